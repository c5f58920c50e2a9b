"""Second factors of products of activations have signed codes in the file, and it computes the same numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import Tensor, nn
from torch.nn import functional as F

import hawqfx
from hawqfx.runtime import ort, parity
from tests.nets import images
from tests.tools import quick

PRODUCTS = ("QLinearMatMul", "MatMulIntegerToFloat")  # onnxruntime's integer kernels of two activations


class Heads(nn.Module):
    """Attention of two heads with projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(8, out) for out in (8, 8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(-1, 8, 8)
        q, k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


class Gram(nn.Module):
    """A product of a tensor with itself, which has a quantizer for each place: a first factor, and a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 4), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.flatten(1).reshape(-1, 8, 8))
        return self.head((x @ x.transpose(1, 2)).flatten(1))


class ReadElsewhere(nn.Module):
    """A second factor that a layer reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(-1, 8, 8)
        second = self.second(x)
        return self.head((self.first(x) @ second + second).mean(1))


class Kept(nn.Module):
    """A second factor that is an output as well, as the keys of a cache are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1).reshape(-1, 8, 8)
        second = self.second(x)
        return (self.first(x) @ second).mean(1), second


def exported(make: Callable[[], nn.Module], folder: Path, **options: Any) -> tuple[hawqfx.Compiled, Path]:
    compiled = quick(make, "weight_bits=6", **options)
    path = folder / f"{options.get('target', 'any')}.onnx"
    compiled.export(path)
    return compiled, path


def kinds(path: Path) -> list[str]:
    """The types of the codes of all activations, in the order of the file."""
    graph = onnx.load(path).graph
    constants = {each.name: each for each in graph.initializer} | {
        node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"
    }
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    return [onnx.TensorProto.DataType.Name(constants[node.input[2]].data_type) for node in quantizers]


def kernels(path: Path, folder: Path) -> list[str]:
    saved = folder / "optimized.onnx"
    ort.session(path, save=saved)
    return [node.op_type for node in onnx.load(saved).graph.node if node.op_type in PRODUCTS]


@pytest.mark.parametrize(("make", "signed"), [(Heads, 2), (Kept, 1), (Gram, 1), (ReadElsewhere, 0)])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_signed_where_only_products_read_them_second(
    make: Callable[[], nn.Module], signed: int, bits: int, tmp_path: Path
) -> None:
    """The same answers bit for bit as of unsigned codes, by as many integer kernels, and the codes of the graph."""
    options: dict[str, Any] = {"activation_bits": (bits,), "weight_bits": (6,)}
    if make is Kept:
        options |= {"data": [x for x, _ in images()], "loss": lambda output, _: output[0].square().mean()}
    compiled, here = exported(make, tmp_path, **options)
    _, there = exported(make, tmp_path, target="x86-avx2", **options)
    assert sorted(kinds(here)).count("INT8") == signed
    assert set(kinds(there)) == {"UINT8"}
    assert len(kernels(here, tmp_path)) == len(kernels(there, tmp_path)) == (2 if make is Heads else 1)
    batch = compiled.session.context.batches[0]
    inputs = [tensor.numpy() for tensor in batch.tensors]
    for one, other in zip(*(ort.run(ort.session(path), inputs) for path in (here, there)), strict=True):
        assert np.array_equal(one, other)
    sites = parity.sites(compiled.program, here, batch)
    assert len(sites) == len(kinds(here))
    assert sum(site.flips for site in sites) <= sum(site.codes for site in sites) // 1000  # ties


def test_the_graph_that_is_trained_further_keeps_its_codes(tmp_path: Path) -> None:
    """Codes are signed in a copy of the graph, which export makes."""
    compiled = quick(Heads, "weight_bits=6")
    before = str(compiled.program.graph.graph)
    compiled.export(tmp_path / "m.onnx")
    assert str(compiled.program.graph.graph) == before
    assert kinds(tmp_path / "m.onnx").count("INT8") == 2
