"""A decoder block of GPT-2 by every scheme: static, dynamic, weight-only, float, and what the allocation chooses.

    python benchmarks/schemes.py [--quick] [--check]

One block in the configuration of GPT-2 small (768 wide, 12 heads; the extra `bench`) with a head for 2,000 words and
random weights: it computes the next word's logits of 1 token, as in a step of decoding, and of 128, as of a prompt.
A row: the file's milliseconds in onnxruntime, one sample, one thread, all files of a length side by side in one run;
bytes of the file; bytes of the weights in memory, as a budget on weight_memory counts them; the divergence (KL, nats)
of its words from those of the float network on 16 sequences that nothing was calibrated on.  Then plans that the
allocation makes under budgets on latency and on the memory of weights, with how many layers have which scheme.
"""

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import Claims, arguments, console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import hawqfx
from hawqfx import Compiled
from hawqfx.allocation.budget import Budget
from hawqfx.errors import InfeasibleBudget
from hawqfx.ir.facts import Account
from hawqfx.maths.formats import Scheme
from hawqfx.passes.allocation import Allocation
from hawqfx.runtime import ort

os.environ.setdefault("HF_HUB_OFFLINE", "1")
WORDS, LENGTHS = 2000, (1, 128)
SCHEMES: tuple[Scheme, ...] = ("static", "dynamic", "weight-only")
CLOSE = 1.1  # of a latency, between timings of one network in two runs


class NextWord(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(n_layer=layers, vocab_size=WORDS, use_cache=False, tie_word_embeddings=False)
        self.model = GPT2LMHeadModel(config)

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=words).logits
        return logits[:, -1]


def divergence(float_logits: Tensor, path: Path, words: Tensor) -> float:
    session = ort.session(path)
    logits = torch.from_numpy(ort.run(session, [words.numpy()])[0])
    return float(F.kl_div(logits.log_softmax(1), float_logits.log_softmax(1), log_target=True, reduction="batchmean"))


def memory(compiled: Compiled) -> float:
    planned = compiled.planned
    allocation = Allocation(Budget.parse("weight_memory=100%"))
    explained = compiled.session.planner.explain(allocation, planned.formats())
    return explained.about(Account).limits["weight_memory"].amount


def examined(length: int, quick: bool, folder: Path) -> dict[str, Any]:
    random = torch.Generator().manual_seed(length)
    model = NextWord(1).eval()
    data = [torch.randint(0, WORDS, (4, length), generator=random) for _ in range(2 if quick else 4)]
    held = torch.randint(0, WORDS, (16, length), generator=random)
    with torch.no_grad():
        logits = model(held)
    made: dict[str, Compiled] = {}
    measured = hawqfx.compile(model, "weight_bits=8", data, schemes=SCHEMES, weight_bits=(4, 6, 8))
    for scheme in SCHEMES:
        made[scheme] = measured.at("weight_bits=8", schemes=(scheme,), against_uniform=False)
    paths: dict[str, Path] = {}
    for name, compiled in made.items():
        paths[name] = folder / f"{name}.onnx"
        compiled.export(paths[name])
    paths["float"] = folder / "float.onnx"
    measured.export_float(paths["float"])
    sample = [data[0][:1].numpy()]
    first = ort.latency(paths, sample, rounds=30 if quick else 200)
    fastest = min(first[name].median for name in SCHEMES)
    refused = {}
    for budget in (f"latency={1e3 * CLOSE * fastest:.4g}ms", "latency=90%", "weight_memory=18%", "weight_memory=25%"):
        try:
            made[budget] = measured.at(budget)
        except InfeasibleBudget as error:
            refused[budget] = str(error)
            continue
        paths[budget] = folder / f"{len(made)}.onnx"
        made[budget].export(paths[budget])
    times = ort.latency(paths, sample, rounds=30 if quick else 200)
    rows = {}
    for name, path in paths.items():
        row: dict[str, Any] = {
            "milliseconds": 1e3 * times[name].median, "bytes": path.stat().st_size,
            "divergence": divergence(logits, path, held),
        }  # fmt: skip
        if name in made:
            row |= {"weight memory": memory(made[name]), "layers": Counter(made[name].planned.schemes().values())}
        rows[name] = row
    return {"rows": rows, "refused": refused}


def main() -> None:
    args = arguments(__doc__)
    results, claims = {}, Claims()
    for length in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            results[str(length)] = examined(length, args.quick, Path(folder))
        found = results[str(length)]
        table = Table(
            "scheme or budget", "ms", "file", "weights in memory", "divergence", "layers", title=f"{length} tokens"
        )
        for name, row in found["rows"].items():
            layers = ", ".join(f"{count} {scheme}" for scheme, count in row.get("layers", {}).items())
            table.add_row(
                name, f"{row['milliseconds']:.3f}", f"{row['bytes']:,}", f"{row.get('weight memory', 0):,.0f}",
                f"{row['divergence']:.2e}", layers,
            )  # fmt: skip
        console.print(table)
        for budget, why in found["refused"].items():
            console.print(f"{budget}: {why}")
    one, many = (results[str(length)]["rows"] for length in LENGTHS)
    claims.add(
        "one token: weight-only is the fastest scheme",
        one["weight-only"]["milliseconds"] <= min(one[scheme]["milliseconds"] for scheme in SCHEMES),
        ", ".join(f"{scheme} {one[scheme]['milliseconds']:.3f} ms" for scheme in (*SCHEMES, "float")),
    )
    claims.add(
        "128 tokens: a scheme of integer kernels is the fastest",
        many["weight-only"]["milliseconds"] > min(many[scheme]["milliseconds"] for scheme in SCHEMES),
        ", ".join(f"{scheme} {many[scheme]['milliseconds']:.3f} ms" for scheme in (*SCHEMES, "float")),
    )
    for length in LENGTHS:
        found = results[str(length)]
        claims.add(
            f"{length} tokens: no budget is refused",
            not found["refused"],
            ", ".join(f"{budget}: {why}" for budget, why in found["refused"].items()) or "none",
        )
    claims.finish("schemes", args, {"lengths": results, "seed": 0})


if __name__ == "__main__":
    main()
