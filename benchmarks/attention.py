"""What hawqfx's files gain by the kernels that onnxruntime takes for attention, GELU and RMS norms.

    python benchmarks/attention.py [--quick] [--check]

* Attention of 6 heads of 64, with projections of its own, for more and more words: float, in 8 bits with keys and
  values in signed codes, and in unsigned ones (target="x86-avx2"); both with weights of 7 bits.  The answers of both
  are the same, bit for bit.
* GELU, GELU by a tangent and RMS norm of 1,500 x 1,536, as hawqfx writes torch's operators, and by their parts, as
  torch.onnx does.

Files in onnxruntime, side by side, one sample in one thread.  --quick: 128 words alone.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import Claims, arguments, console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import hawqfx
from hawqfx.runtime import ort

HEADS, WIDTH = 6, 384
WORDS = (64, 128, 256, 512, 1500)
MANY = 256  # words from which signed codes are claimed to be faster; fewer than 96 are written unsigned
ROUNDS = 15
SIGNED, UNSIGNED = "signed", "unsigned"
SCALES = torch.linspace(0.5, 2, 1536)  # the weight of the norm


class Attention(nn.Module):
    """Attention and a sum over words."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Computed(nn.Module):
    """A network that is one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def gelu_by_parts(x: Tensor) -> Tensor:
    return x * (0.5 * (torch.erf(x / math.sqrt(2)) + 1))


def tangent_by_parts(x: Tensor) -> Tensor:
    return x * (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def norm_by_parts(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * SCALES


FUNCTIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "GELU": (F.gelu, gelu_by_parts),
    "GELU by a tangent": (lambda x: F.gelu(x, approximate="tanh"), tangent_by_parts),
    "RMS norm": (lambda x: F.rms_norm(x, SCALES.shape, SCALES, 1e-6), norm_by_parts),
}


def milliseconds(files: Mapping[str, Path], x: Tensor) -> dict[str, float]:
    found = ort.latency(dict(files), [x.numpy()], rounds=ROUNDS)
    return {name: 1e3 * each.median for name, each in found.items()}


def attention(words: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(4, words, WIDTH)
    files = {name: folder / f"{name}.onnx" for name in ("float", SIGNED, UNSIGNED)}
    for name, target in ((SIGNED, "any"), (UNSIGNED, "x86-avx2")):
        compiled = hawqfx.compile(
            model, "weight_bits=7", [x], sensitivity="mse", rounding="nearest", weight_bits=(7,), target=target,
            loss=lambda output, target: output.square().mean(),
        )  # fmt: skip
        compiled.export(files[name])
    compiled.export_float(files["float"])
    one, other = (ort.run(ort.session(files[name]), [x.numpy()])[0] for name in (SIGNED, UNSIGNED))
    return {"milliseconds": milliseconds(files, x[:1]), "same": bool((one == other).all())}


def function(name: str, folder: Path) -> dict[str, float]:
    x = torch.randn(1500, 1536, generator=torch.Generator().manual_seed(0))
    files = {}
    for how, given in zip(("hawqfx", "by parts"), FUNCTIONS[name], strict=True):
        files[how] = folder / f"{how}.onnx"
        exported = hawqfx.compile(
            nn.Sequential(Computed(given), nn.Linear(1536, 1)).eval(), "weight_bits=8", [x[:8]], sensitivity="mse",
            rounding="nearest", loss=lambda output, target: output.square().mean(),
        )  # fmt: skip
        exported.export_float(files[how])
    return milliseconds(files, x)


def main() -> None:
    args = arguments(__doc__)
    claims, found, functions = Claims(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for words in (128,) if args.quick else WORDS:
            found[words] = attention(words, Path(folder))
        for name in FUNCTIONS:
            functions[name] = function(name, Path(folder))
    table = Table("words", "float, ms", "unsigned", "signed", "signed to unsigned")
    for words, row in found.items():
        times = row["milliseconds"]
        ratio = times[SIGNED] / times[UNSIGNED]
        table.add_row(str(words), *(f"{times[name]:.2f}" for name in ("float", UNSIGNED, SIGNED)), f"{ratio:.2f}")
        claims.add(f"{words} words: the same answers, bit for bit", row["same"], str(row["same"]))
        if words >= MANY:
            claims.add(f"{words} words: signed codes are faster", ratio < 1, f"{ratio:.2f}")
    console.print(table)
    table = Table("", "hawqfx, ms", "by parts")
    for name, times in functions.items():
        table.add_row(name, f"{times['hawqfx']:.2f}", f"{times['by parts']:.2f}")
        ratio = times["by parts"] / times["hawqfx"]
        claims.add(
            f"{name}: faster than by parts", ratio > 1, f"{ratio:.1f} times, with a layer of one output after each"
        )
    console.print(table)
    claims.finish("attention", args, {"attention": found, "functions": functions})


if __name__ == "__main__":
    main()
