"""A language model in fewer bits: bytes against perplexity, mixed and in one width.

    python benchmarks/language.py [--quick] [--check] [--only ROW ...]

SmolLM2-135M-Instruct (the extra `bench`), compiled with tokens="causal", the table of words, which is the head too,
among its weights, from 16 windows of 256 tokens of news (data.py).  The weights come from 4 bits in blocks of 32 with
zero-points: the reference is "dequantized", not the trained network.  The perplexity is that of the exported files in
onnxruntime on the first 16 windows of 512 tokens of "Emma", 8,176 predictions, which nothing was calibrated on; one
thread.

* One width: all layers and the table of words in so many bits; weight-only in blocks of 32 and of 128 (rows of 576
  inputs are filled up to 640), and with a scale for each channel, activations at 8 bits with ranges that are taken in
  each run.  4 bits in blocks of 32 are the reference's own.
* Mixed: the plan, weight-only in blocks of 32, 2, 3, 4 or 8 bits, in at most the bytes of a file of one width (3 bits
  in blocks of 32 are 3.5 bits a weight with their scales), and along a curve of sizes.

Seconds and the most memory that the process took are those of compile() for the mixed ones.  --quick: one window, one
width.
"""

import math
import resource
import tempfile
import time
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import austen
import data
import numpy as np
import torch
from common import Claims, console, each_network, parser
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import hawqfx
from hawqfx import Compiled
from hawqfx.frontend.decoders import MASK, TOKENS
from hawqfx.passes.gauss_newton import GaussNewton
from hawqfx.runtime import ort

PAST = "past_key_values."
CALIBRATION, SCORED = (16, 256), (16, 512)  # windows, and tokens of each
WIDTHS = (4, 3)
BLOCK, LONGER = 32, 128  # inputs that share a scale, of the mixed ones
PROBES = 32  # backward passes, a quarter of the default: each has as many draws as tokens


def blocks_of(inputs: int) -> str:
    return f"in blocks of {inputs}"


REFERENCE, CHANNELS = "dequantized", "per channel"
SCALES: dict[str, dict[str, Any]] = {
    **{blocks_of(each): {"schemes": ("weight-only",), "block_sizes": (each,)} for each in (BLOCK, LONGER)},
    CHANNELS: {"schemes": ("dynamic",)},
}
CURVE = ("90MB", "68MB", "50MB")  # of files, between and beside those of one width
ROWS = [REFERENCE, *(f"{bits} bits {scales}" for scales in SCALES for bits in WIDTHS), *CURVE]


def tokens(tokenizer: Any, text: str, windows: tuple[int, int]) -> Tensor:
    """The first windows of a text, (windows, tokens)."""
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[: math.prod(windows)].reshape(windows)


@torch.no_grad()
def perplexity(logits_of: Any, windows: Tensor) -> float:
    """exp of the mean negative log likelihood of all tokens but the first of each window."""
    lost = [F.cross_entropy(logits_of(window[None])[0, :-1], window[1:], reduction="sum") for window in windows]
    return math.exp(float(sum(lost)) / (windows.shape[0] * (windows.shape[1] - 1)))


def of_file(path: Path, windows: Tensor) -> float:
    session = ort.session(path, threads=1)
    past = {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith(PAST)
    }

    def logits(window: Tensor) -> Tensor:
        feed = {TOKENS: window.numpy(), MASK: np.ones_like(window.numpy()), **past}
        return torch.from_numpy(session.run(["logits"], feed)[0])

    return perplexity(logits, windows)


class Study:
    """The reference, its data, and what is compiled from it.

    Args:
        quick: with little data.
    """

    def __init__(self, *, quick: bool) -> None:
        file = data.smollm2()
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        self.model: Any = model.eval()
        text = austen.novel(data.austen(), "emma")[:100_000]
        self.scored = tokens(tokenizer, text, SCORED)[: 1 if quick else None]
        self.batches = list(tokens(tokenizer, " ".join(data.lee_background()), CALIBRATION).split(2))
        self.batches = self.batches[: 1 if quick else None]
        self._even: dict[str, Compiled] = {}

    def row(self, name: str) -> dict[str, Any]:
        if name == REFERENCE:
            size = 4 * self.model.num_parameters()
            lost = perplexity(lambda x: self.model(x).logits, self.scored)
            return {"bytes": size, "perplexity": lost}
        if name in CURVE:
            return {"mixed": self._scored(self.mixed.at(f"size={name}", against_uniform=False))}
        bits, scales = int(name.split()[0]), name.split(maxsplit=2)[2]
        uniform = self._scored(self.even(scales).uniform(bits))
        if scales == CHANNELS:
            return {"uniform": uniform}
        mixed = self.mixed.at(f"size={uniform['bytes']}B", against_uniform=False)
        return {"uniform": uniform, "mixed": self._scored(mixed), **self.cost}

    @cached_property
    def mixed(self) -> Compiled:
        start = time.perf_counter()
        compiled = hawqfx.compile(
            self.model, "weight_bits=4", self.batches, tokens="causal", schemes=("weight-only",), block_sizes=(BLOCK,),
            sensitivity=GaussNewton(probes=PROBES),
        )  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.cost = {"seconds": time.perf_counter() - start, "peak": peak}
        return compiled

    def even(self, scales: str) -> Compiled:
        """Compiled for uniform bits, which need no metric that looks at data; the last alone is kept, since each is as
        large as the model."""
        if scales == blocks_of(BLOCK):
            return self.mixed
        if scales not in self._even:
            self._even.clear()
            self._even[scales] = hawqfx.compile(
                self.model, f"weight_bits={max(WIDTHS)}", self.batches, tokens="causal", sensitivity="mse",
                weight_bits=WIDTHS, activation_bits=(8,), **SCALES[scales],
            )  # fmt: skip
        return self._even[scales]

    def _scored(self, compiled: Compiled) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            compiled.export(path)
            found: dict[str, Any] = {"bytes": path.stat().st_size, "perplexity": of_file(path, self.scored)}
        formats = compiled.plan.formats
        found |= {"weights": dict(Counter(str(formats[site.key]) for site in compiled.planned.weights))}
        console.print(found)
        return found


def show(results: dict[str, Any], claims: Claims) -> None:
    table = Table("", "", "MB", "perplexity", "weights", title="SmolLM2-135M-Instruct")
    for name, found in results.items():
        for kind, row in {"": found}.items() if name == REFERENCE else found.items():
            if isinstance(row, dict) and "perplexity" in row:
                formats = ", ".join(f"{count} of {form}" for form, count in row.get("weights", {}).items())
                table.add_row(name, kind, f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.2f}", formats)
        if "mixed" in found and "uniform" in found:
            mixed, uniform = found["mixed"], found["uniform"]
            claims.add(
                f"mixed loses less than {name} in no more bytes",
                mixed["perplexity"] < uniform["perplexity"] and mixed["bytes"] <= uniform["bytes"],
                f"perplexity {mixed['perplexity']:.2f} and {uniform['perplexity']:.2f}",
            )
            seconds, peak = found["seconds"], found["peak"]
            told = f"{peak / 1e9:.1f} GB, {seconds / 60:.1f} minutes"
            claims.add(f"{name}: compiled within 6 GB and 20 minutes", seconds < 1200 and peak < 6e9, told)
    console.print(table)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    args = options.parse_args()
    study = Study(quick=args.quick)
    some = ROWS[:2]
    results = {name: study.row(name) for name in some} if args.quick else each_network("language", args.only, study.row)
    claims = Claims()
    show(results, claims)
    claims.finish("language", args, {"networks": results})


if __name__ == "__main__":
    main()
