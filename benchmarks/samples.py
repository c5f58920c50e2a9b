"""What calibration samples are worth: few, more, and several views of the same pictures.

    python benchmarks/samples.py [--quick] [--check] [--only SUBJECT ...]

Trained networks (subjects.py; the extra `bench`), compiled with so many of their calibration samples, or with views of
all: each picture as it is, mirrored, and two crops of 60 to 100% of its sides at random places (seed 0), half of them
mirrored.  Of plans with so many bits per weight on average and 8 bits for activations: the mean divergence of the
lowered graph from the float network on data held out (divergence.py), its standard error, and agreement with the float
network's argmax where there is a score of labelled data.  Results are written after each network.
--quick: ResNet-20 with 16 and 64 images.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from common import Claims, console, each_network, parser
from rich.table import Table
from subjects import SUBJECTS, Subject, divergences
from torch import Tensor
from torch.nn import functional as F

import hawqfx

VIEWS = "views"
# numbers of samples, and budgets
CASES: dict[str, tuple[tuple[int | str, ...], tuple[str, ...]]] = {
    "resnet20": ((16, 64, 256, 512), ("weight_bits=3", "weight_bits=2.5")),
    "efficientnet-lite0": ((16, 64, VIEWS), ("weight_bits=4", "weight_bits=3")),
}
SMALLEST = 0.6  # of a picture's sides, in a crop
BATCH = 32


def views(pictures: Tensor) -> Tensor:
    """Four views of each picture, (4 n, C, H, W)."""
    random = torch.Generator().manual_seed(0)
    crops = [_crop(picture, random) for _ in range(2) for picture in pictures]
    return torch.cat([pictures, pictures.flip(-1), torch.stack(crops)])


def _crop(picture: Tensor, random: torch.Generator) -> Tensor:
    """A random part of a picture (C, H, W), in its size."""
    share, down, right, mirrored = torch.rand(4, generator=random).tolist()
    height, width = (int(side * (SMALLEST + (1 - SMALLEST) * share)) for side in picture.shape[1:])
    top, left = int(down * (picture.shape[1] - height + 1)), int(right * (picture.shape[2] - width + 1))
    part = picture[None, :, top : top + height, left : left + width]
    sized = F.interpolate(part, size=picture.shape[1:], mode="bilinear", antialias=True)[0]
    return sized.flip(-1) if mirrored < 0.5 else sized


def pictures_of(subject: Subject) -> Tensor:
    """The inputs that calibrate, (n, C, H, W)."""
    return torch.cat([batch if isinstance(batch, Tensor) else batch[0] for batch in subject.calibration])


def examine(name: str, kinds: Sequence[int | str], budgets: Sequence[str]) -> dict[str, Any]:
    """Every number of samples under every budget."""
    subject = SUBJECTS[name]()
    pictures, rows = pictures_of(subject), []
    for kind in kinds:
        inputs = views(pictures) if isinstance(kind, str) else pictures[:kind]
        start = time.process_time()
        compiled = hawqfx.compile(
            subject.model, budgets[0], list(inputs.split(BATCH)), loss=subject.loss, draw=subject.draw
        )
        seconds = time.process_time() - start
        for budget in budgets:
            network = compiled.at(budget, against_uniform=False)
            found = divergences(subject, network.model)
            rows.append(
                {
                    "samples": kind, "inputs": len(inputs), "budget": budget, "seconds": seconds,
                    "divergence": float(found.mean()), "error": float(found.std() / len(found) ** 0.5),
                    "score": subject.score(network.model), "more": subject.more(network.model),
                }
            )  # fmt: skip
            console.print(f"{name}: {rows[-1]}")
    return {"held out": len(subject.held_out_float), "n": subject.samples, "metric": subject.metric, "rows": rows}


def show(results: dict[str, Any]) -> None:
    table = Table("network", "samples", "budget", "divergence", "score", "other metrics", "CPU seconds of compile()")
    for name, found in results.items():
        title = f"{name}, {found['metric']}, n={found['n']}, held out {found['held out']}"
        for row in found["rows"]:
            samples = f"{row['inputs']} {row['samples'] if isinstance(row['samples'], str) else ''}"
            more = ", ".join(f"{key} {value:.4f}" for key, value in row["more"].items())
            table.add_row(
                title, samples, row["budget"], f"{row['divergence']:.4g} +- {row['error']:.2g}",
                f"{row['score']:.4f}", more, f"{row['seconds']:.0f}",
            )  # fmt: skip
            title = ""
    console.print(table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    args = options.parse_args()
    if args.quick:
        results = {"resnet20": examine("resnet20", (16, 64), ("weight_bits=3",))}
    else:
        results = each_network("samples", args.only, lambda name: examine(name, *CASES[name]))
    show(results)
    claims = Claims()
    for name, found in results.items():
        for budget in dict.fromkeys(row["budget"] for row in found["rows"]):
            rows = [row for row in found["rows"] if row["budget"] == budget]
            fewest, most = rows[0], rows[-1]
            claims.add(
                f"{name}, {budget}: {most['inputs']} inputs leave less than {fewest['inputs']}",
                most["divergence"] < fewest["divergence"], f"{most['divergence']:.4g}, {fewest['divergence']:.4g}",
            )  # fmt: skip
    claims.finish("samples", args, {"networks": results})


if __name__ == "__main__":
    main()
