"""A language model in fewer bits: bytes against perplexity, mixed and in one width.

    python benchmarks/language.py [--quick] [--check]

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
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import austen
import data
import numpy as np
import torch
from common import Claims, arguments, console
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
CURVE = (90, 68, 50)  # megabytes of files, between and beside those of one width
PROBES = 32  # backward passes, a quarter of the default: each has as many draws as tokens


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


def row(name: str, compiled: Compiled, windows: Tensor) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        compiled.export(path)
        found = {"what": name, "bytes": path.stat().st_size, "perplexity": of_file(path, windows)}
    formats = compiled.plan.formats
    found |= {"weights": dict(Counter(str(formats[site.key]) for site in compiled.planned.weights))}
    console.print(found)
    return found


def even(model: Any, batches: list[Tensor], bits: Sequence[int], **options: Any) -> Iterator[tuple[int, Compiled]]:
    """One width for all weights, which needs no metric that looks at data."""
    compiled = hawqfx.compile(
        model, f"weight_bits={max(bits)}", batches, tokens="causal", sensitivity="mse", weight_bits=bits,
        activation_bits=(8,), **options,
    )  # fmt: skip
    for width in bits:
        yield width, compiled.uniform(width)


def main() -> None:
    options = arguments(__doc__ or "")
    file = data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    scored = tokens(tokenizer, austen.novel(data.austen(), "emma")[:100_000], SCORED)[: 1 if options.quick else None]
    calibration = tokens(tokenizer, " ".join(data.lee_background()), CALIBRATION)[: 2 if options.quick else None]
    batches, widths = list(calibration.split(2)), WIDTHS[:1] if options.quick else WIDTHS
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    rows = [{"what": "dequantized", "bytes": size, "perplexity": perplexity(lambda x: model(x).logits, scored)}]

    start = time.perf_counter()
    compiled = hawqfx.compile(
        model, "weight_bits=4", batches, tokens="causal", schemes=("weight-only",), block_sizes=(BLOCK,),
        sensitivity=GaussNewton(probes=PROBES),
    )  # fmt: skip
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    claims = Claims()
    blocks = {"schemes": ("weight-only",), "block_sizes": (LONGER,)}
    # one after the other, since each is as large as the model
    own = ((BLOCK, bits, compiled.uniform(bits)) for bits in widths)
    longer = ((LONGER, *each) for each in even(model, batches, widths, **blocks))
    for block, bits, network in chain(own, longer):
        name = f"{bits} bits in blocks of {block}"
        uniform = row(name, network, scored)
        mixed = row("mixed", compiled.at(f"size={uniform['bytes']}B", against_uniform=False), scored)
        rows += [uniform, mixed]
        claims.add(
            f"mixed loses less than {name} in no more bytes",
            mixed["perplexity"] < uniform["perplexity"] and mixed["bytes"] <= uniform["bytes"],
            f"perplexity {mixed['perplexity']:.2f} and {uniform['perplexity']:.2f}",
        )
    for megabytes in () if options.quick else CURVE:
        rows.append(row("mixed", compiled.at(f"size={megabytes}MB", against_uniform=False), scored))
    for bits, network in even(model, batches, widths, schemes=("dynamic",)):
        rows.append(row(f"{bits} bits per channel", network, scored))
    claims.add(
        "within 6 GB and 20 minutes", seconds < 1200 and peak < 6e9, f"{peak / 1e9:.1f} GB, {seconds / 60:.1f} minutes"
    )
    table = Table(title="SmolLM2-135M-Instruct")
    for title in ("", "MB", "perplexity", "weights"):
        table.add_column(title)
    for each in rows:
        formats = ", ".join(f"{count} of {name}" for name, count in each.get("weights", {}).items())
        table.add_row(each["what"], f"{each['bytes'] / 1e6:.1f}", f"{each['perplexity']:.2f}", formats)
    console.print(table)
    claims.finish("language", options, {"rows": rows, "seconds": seconds, "peak": peak})


if __name__ == "__main__":
    main()
