"""Files for processors whose sums saturate, and files that are larger than protobuf takes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hawqfx
from hawqfx.errors import ExportError, HawqfxError
from hawqfx.export import write
from hawqfx.ir.facts import Quantizers, RoundedWeights
from hawqfx.maths.formats import Format
from hawqfx.runtime import ort
from tests.nets import Plain, build, images
from tests.tools import quick


def saturated(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """What vpmaddubsw makes of pairs of products of uint8 and int8."""
    return np.clip(one.astype(np.int64) + other.astype(np.int64), -(1 << 15), (1 << 15) - 1)


@pytest.mark.parametrize(("bits", "exact"), [(7, True), (8, False)])
def test_pairs_of_products_fit_into_sixteen_bits_up_to_seven(bits: int, exact: bool) -> None:
    """Over the extremes of every code: sums are linear in both."""
    weights = np.arange(-(1 << (bits - 1)), 1 << (bits - 1))
    products = np.multiply.outer(np.array([0, 255]), weights).reshape(-1)
    one, other = np.meshgrid(products, products)
    assert np.array_equal(saturated(one, other), one + other) == exact


class Summing(nn.Module):
    """A linear layer of which all weights are about as large as the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)
        self.head.weight.data = torch.linspace(0.45, 0.5, 192).reshape(3, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x.flatten(1)))


@pytest.mark.parametrize(("target", "bits", "exact"), [("x86-avx2", 7, True), ("any", 8, False)])
def test_a_layer_on_a_processor_that_saturates(target: str, bits: int, exact: bool, tmp_path: Path) -> None:
    """The sums that vpmaddubsw makes of the codes in the file, against exact integers, and onnxruntime's answer here
    against the exact ones."""
    data = [(x.abs(), y) for x, y in images()]
    compiled = hawqfx.compile(build(Summing), "weight_bits=8", data, sensitivity="mse", target=target)
    compiled = compiled.at("weight_bits=8", fix={"head.weight": bits})
    assert compiled.plan.bits["head.weight"] == bits
    path = tmp_path / "m.onnx"
    compiled.export(path)
    metadata = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert metadata["hawqfx_target"] == target
    layer, program = compiled.planned.layers[0], compiled.planned
    weight = program.facts.get("head.weight", RoundedWeights).codes[Format(bits)].numpy()
    quantizer = program.facts.get(layer.input, Quantizers).by_format[Format(8)]
    x = torch.full((1, 1, 8, 8), 10.0)
    codes = (torch.relu(x.flatten(1)) / quantizer.scale[0]).round().clamp(0, 255).numpy().astype(np.int64)
    products = codes[:, None] * weight.astype(np.int64)
    exactly = products.sum(-1)
    pairs = saturated(products[..., 0::2], products[..., 1::2]).sum(-1)
    assert np.array_equal(pairs, exactly) == exact
    if exact:
        scale = quantizer.scale[0] * np.array(
            program.facts.get("head.weight", Quantizers).by_format[Format(bits)].scale
        )
        expected = exactly * scale + build(Summing).head.bias.detach().numpy()  # type: ignore[union-attr, operator]
        theirs = ort.run(ort.session(path), [x.numpy()])[0]
        assert np.abs(theirs - expected).max() <= 1e-3 * np.abs(expected).max()  # the bias has steps of the scale


def test_a_target_refuses_what_would_saturate() -> None:
    with pytest.raises(HawqfxError, match="target='arm': must be one of any, x86-avx2"):
        quick(Plain, target="arm")
    with pytest.raises(HawqfxError, match="takes weights of at most 7 bits"):
        quick(Plain, target="x86-avx2", weight_bits=(8,))
    plan = quick(Plain, "weight_bits=8").plan
    with pytest.raises(HawqfxError, match="takes weights of at most 7 bits"):
        hawqfx.compile(build(Plain), None, images(), plan=plan, target="x86-avx2")


def test_large_files_keep_their_tensors_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = quick(Summing, "weight_bits=8", fix={"head.weight": 8})
    compiled.export(tmp_path / "one.onnx")
    monkeypatch.setattr(write, "LARGEST_FILE", 100)
    compiled.export(tmp_path / "two.onnx")
    (tensors,) = tmp_path.glob("two.onnx.*.data")
    assert {path.name for path in tmp_path.iterdir()} == {"one.onnx", "two.onnx", tensors.name}
    assert (tmp_path / "two.onnx").stat().st_size < (tmp_path / "one.onnx").stat().st_size
    x = [images()[0][0].numpy()]
    one, two = (ort.run(ort.session(tmp_path / f"{name}.onnx"), x)[0] for name in ("one", "two"))
    assert np.array_equal(one, two)
    with pytest.raises(ExportError, match="does not exist"):
        compiled.export(tmp_path / "no" / "two.onnx")


def test_a_large_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of its files: a process that dies between them leaves the older graph with its own tensors."""
    monkeypatch.setattr(write, "LARGEST_FILE", 100)
    older, newer = (quick(Summing, f"weight_bits={bits}", fix={"head.weight": bits}) for bits in (8, 4))
    path, x = tmp_path / "two.onnx", [images()[0][0].numpy()]
    older.export(path)
    before, (tensors,) = ort.run(ort.session(path), x)[0], tmp_path.glob("*.data")
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        if target == path:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            newer.export(path)
    assert np.array_equal(ort.run(ort.session(path), x)[0], before)
    newer.export(path)
    (others,) = tmp_path.glob("*.data")
    assert others != tensors
    assert not np.array_equal(ort.run(ort.session(path), x)[0], before)
    newer.export(path)
    assert {each.name for each in tmp_path.iterdir()} == {path.name, others.name}
