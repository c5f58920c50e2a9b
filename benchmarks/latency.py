"""Latency beside float onnxruntime and beside onnxruntime's own tool, in one run.

    python benchmarks/latency.py [--quick] [--check] [--only NETWORK ...]

ResNet-18 at 224 pixels and the stack of six 3x3 convolutions with 128 channels at 28x28 (random weights), and
EfficientNet-Lite0, YOLOX-Nano and MiniLM (subjects.py; the extra `bench`).  One sample; one thread, and all.

* mixed: hawqfx at 4 bits per weight on average (chosen by squared error: the kernels do not depend on which metric
  chose), in the portable packing;
* float: the same network, as hawqfx exports it;
* static int8 and INT4: what onnxruntime's tool makes of that float file on the same calibration data (theirs.py).

Files take turns, each with a session of its own; medians.  --quick: the stack of convolutions alone.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Claims, console, environment, parser
from layouts import resnet18
from rich.table import Table
from theirs import their_files
from torch import nn

import hawqfx
from hawqfx.runtime import ort

THREADS = (1, 0)  # 0: as many as onnxruntime chooses
ROUNDS = 60
CALIBRATION = 16  # samples
ORDINARY = ("efficientnet-lite0", "yolox-nano", "minilm")
FASTER, NOT_SLOWER = 3.0, 1.05


def random_images(model: nn.Module, *shape: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    return {"model": model.eval(), "data": [torch.randn(8, *shape, generator=random) for _ in range(2)]}


def stack() -> dict[str, Any]:
    torch.manual_seed(0)
    layers = [module for _ in range(6) for module in (nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())]
    return random_images(nn.Sequential(*layers), 128, 28, 28)


def residual() -> dict[str, Any]:
    torch.manual_seed(0)
    return random_images(resnet18(), 3, 224, 224)


def subject(name: str) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        from subjects import SUBJECTS

        found = SUBJECTS[name]()
        return {"model": found.model, "data": found.calibration, "loss": found.loss, "draw": found.draw}

    return make


NETWORKS: dict[str, Callable[[], dict[str, Any]]] = {
    "convolution stack": stack, "ResNet-18": residual, **{name: subject(name) for name in ORDINARY},
}  # fmt: skip


def examine(name: str, folder: Path) -> dict[str, Any]:
    network = NETWORKS[name]()
    compiled = hawqfx.compile(
        network.pop("model"), "weight_bits=4", network.pop("data"), samples=CALIBRATION, sensitivity="mse",
        rounding="nearest", **network,
    )  # fmt: skip
    files: dict[str, str | Path] = {"float": folder / "float.onnx", "mixed": folder / "mixed.onnx"}
    compiled.export_float(files["float"])
    compiled.export(files["mixed"])
    theirs = their_files(Path(files["float"]), compiled.session.context.batches, folder)
    files |= {key: path for key, path in theirs.items() if isinstance(path, Path)}
    sample = [tensor.numpy() for tensor in compiled.session.context.batches[0].first(1).tensors]
    found: dict[str, Any] = {
        "bytes": {key: Path(path).stat().st_size for key, path in files.items()},
        "refused": {key: text for key, text in theirs.items() if isinstance(text, str)},
        "milliseconds": {},
    }
    for threads in THREADS:
        times = ort.latency(files, sample, threads=threads, rounds=ROUNDS)
        word = f"{threads} thread" if threads else "all threads"
        found["milliseconds"][word] = {key: 1e3 * latency.median for key, latency in times.items()}
    return found


def claim(name: str, found: dict[str, Any], claims: Claims) -> None:
    one, size = found["milliseconds"]["1 thread"], found["bytes"]
    if name not in ORDINARY:
        ratio = one["float"] / one["mixed"]
        claims.add(f"{name}: {FASTER} times faster than float at one thread", ratio >= FASTER, f"{ratio:.2f}")
    if "static int8" in one:
        ratio = one["mixed"] / one["static int8"]
        claims.add(
            f"{name}: not slower than {NOT_SLOWER} times onnxruntime's static int8", ratio <= NOT_SLOWER, f"{ratio:.3f}"
        )
    if "static INT4" in one:
        claims.add(
            f"{name}: faster than onnxruntime's INT4 file, at equal or smaller bytes",
            one["mixed"] < one["static INT4"] and size["mixed"] <= size["static INT4"],
            f"{one['static INT4'] / one['mixed']:.2f} times, {size['mixed']:,} against {size['static INT4']:,} bytes",
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    args = options.parse_args()
    warnings.simplefilter("ignore")
    results, claims = {}, Claims()
    for name in ["convolution stack"] if args.quick else args.only:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = examine(name, Path(folder))
        for word, times in results[name]["milliseconds"].items():
            table = Table("file", "ms", "of float", "bytes", title=f"{name}, {word}")
            for key, milliseconds in times.items():
                ratio = milliseconds / times["float"]
                table.add_row(key, f"{milliseconds:.3f}", f"{ratio:.2f}", f"{results[name]['bytes'][key]:,}")
            for key, text in results[name]["refused"].items():
                table.add_row(key, text)
            console.print(table)
        claim(name, results[name], claims)
    console.print(f"VNNI: {environment()['vnni']}")
    claims.finish("latency", args, {"networks": results, "calibration": CALIBRATION, "seed": 0})


if __name__ == "__main__":
    main()
