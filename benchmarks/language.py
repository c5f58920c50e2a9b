"""A language model in fewer bits: bytes against perplexity, mixed and in one width.

    python benchmarks/language.py [--quick] [--check]

SmolLM2-135M-Instruct (the extra `bench`), compiled with tokens="causal" and weight-only layers in blocks of 128, the
table of words among them, which is the head too, from 16 windows of 256 tokens of news (data.py).  The weights come
from 4 bits in blocks of 32 with zero-points: the reference is "dequantized", not the trained network.  The perplexity
is that of the exported files in onnxruntime on the first 16 windows of 512 tokens of "Emma", 8,176 predictions, which
nothing was calibrated on; one thread.

* One width: all layers and the table of words in so many bits.
* Mixed: at most the bytes of the file of one width.

Seconds and the most memory that the process took are those of compile().  --quick: one window, one width.
"""

import math
import resource
import tempfile
import time
from collections import Counter
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
    return found | {"weights": dict(Counter(str(formats[site.key]) for site in compiled.planned.weights))}


def main() -> None:
    options = arguments(__doc__ or "")
    file = data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    scored = tokens(tokenizer, austen.novel(data.austen(), "emma")[:100_000], SCORED)[: 1 if options.quick else None]
    calibration = tokens(tokenizer, " ".join(data.lee_background()), CALIBRATION)[: 2 if options.quick else None]
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    rows = [{"what": "dequantized", "bytes": size, "perplexity": perplexity(lambda x: model(x).logits, scored)}]

    start = time.perf_counter()
    compiled = hawqfx.compile(
        model, "weight_bits=4", list(calibration.split(2)), tokens="causal", schemes=("weight-only",),
        block_sizes=(128,), sensitivity=GaussNewton(probes=PROBES),
    )  # fmt: skip
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    claims = Claims()
    for bits in WIDTHS[:1] if options.quick else WIDTHS:
        uniform = row(f"{bits} bits", compiled.uniform(bits), scored)
        mixed = row("mixed", compiled.at(f"size={uniform['bytes']}B", against_uniform=False), scored)
        rows += [uniform, mixed]
        claims.add(
            f"mixed loses less than {bits} bits in no more bytes",
            mixed["perplexity"] < uniform["perplexity"] and mixed["bytes"] <= uniform["bytes"],
            f"perplexity {mixed['perplexity']:.2f} and {uniform['perplexity']:.2f}",
        )
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
