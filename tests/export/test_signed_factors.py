"""Second factors of products of activations have signed codes in the file, and it computes the same numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import hawqfx
from hawqfx.runtime import ort, parity
from tests.nets import Heads
from tests.tools import quick

# onnxruntime's integer kernels of two activations -> the input that is the second one's zero-point
PRODUCTS = {"QLinearMatMul": 5, "MatMulIntegerToFloat": 5}


class Few(Heads):
    """Of so few words that a product gains less than the codes of its second factor cost to convert."""

    def __init__(self) -> None:
        super().__init__(64)


class Vector(Heads):
    """Keys that a vector is multiplied by, too."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(-1, 8, 8).repeat(1, 16, 1)
        keys = self.k(x).transpose(1, 2)
        return self.head(self.q(x) @ keys @ self.v(x)).mean(1) + torch.matmul(self.vector, keys)[:, :3]


class Permuted(nn.Module):
    """A second factor behind a permutation of all dimensions; `again`: it is the first factor of another product."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.again = nn.Linear(8, 8), nn.Linear(8, 8), again

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(-1, 1, 8, 8)
        second = self.second(x).permute(0, 1, -1, -2)
        first = self.first(x).repeat(1, 2, 16, 1) * torch.linspace(-1, 1, 128)[:, None]
        products = (first @ second).mean((1, 2))
        return products + (second @ first[:, :1, :8]).mean((1, 2)) if self.again else products


class Again(Permuted):
    def __init__(self) -> None:
        super().__init__(again=True)


def exported(make: Callable[[], nn.Module], folder: Path, **options: Any) -> tuple[hawqfx.Compiled, Path]:
    compiled = quick(make, "weight_bits=6", **options)
    path = folder / f"{options.get('target', 'any')}.onnx"
    compiled.export(path)
    return compiled, path


def kinds(path: Path) -> list[str]:
    """The types of the codes of all activations, in the order of the file."""
    graph = onnx.load(path).graph
    return [types(graph)[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]


def types(graph: onnx.GraphProto) -> dict[str, str]:
    """Name of a constant -> the type of its elements."""
    return {each.name: onnx.TensorProto.DataType.Name(each.data_type) for each in graph.initializer}


def kernels(path: Path, folder: Path) -> list[str]:
    """The types of the second factors of all products by integer kernels, as onnxruntime runs the file."""
    saved = folder / "optimized.onnx"
    ort.session(path, save=saved)
    graph = onnx.load(saved).graph
    return [types(graph)[node.input[PRODUCTS[node.op_type]]] for node in graph.node if node.op_type in PRODUCTS]


@pytest.mark.parametrize(("make", "signed"), [(Heads, 2), (Permuted, 1), (Few, 0), (Again, 0), (Vector, 0)])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_signed_where_only_products_read_them_second(
    make: Callable[[], nn.Module], signed: int, bits: int, tmp_path: Path
) -> None:
    """The same answers bit for bit as of unsigned codes, by as many integer kernels, and the codes of the graph; those
    of 4 bits go through a Clip."""
    options: dict[str, Any] = {"activation_bits": (bits,), "weight_bits": (6,)}
    compiled, here = exported(make, tmp_path, **options)
    _, there = exported(make, tmp_path, target="x86-avx2", **options)
    assert kinds(here).count("INT8") == signed
    assert set(kinds(there)) == {"UINT8"}
    found, unsigned = (kernels(path, tmp_path) for path in (here, there))
    assert len(found) == len(unsigned) == (1 if make is Permuted else 2)
    assert found.count("INT8") == signed
    assert "INT8" not in unsigned
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
