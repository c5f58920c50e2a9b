"""translations: operators whose ONNX is hawqfx's own, and those that are decomposed first, against torch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import onnx_ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hawqfx.errors import ExportError
from hawqfx.export import translations
from hawqfx.export.opsets import OPSET
from hawqfx.runtime import ort

SUMS = 1e-5  # of a few hundred products in another order

Function = Callable[[Tensor], Tensor]


class Computing(nn.Module):
    """A network that is one function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# name -> function and input
OWN: dict[str, tuple[Function, Tensor]] = {
    "same padding, even kernel": (
        partial(F.conv1d, weight=normal(6, 2, 4), padding="same", dilation=3, groups=2),
        normal(3, 4, 11),
    ),
    "same padding of an image": (
        partial(F.conv2d, weight=normal(6, 4, 2, 5), bias=normal(6), padding="same", dilation=(3, 2)),
        normal(3, 4, 9, 8),
    ),
    "valid padding, strides": (
        partial(F.conv2d, weight=normal(6, 4, 3, 2), padding="valid", stride=(2, 3)),
        normal(3, 4, 9, 8),
    ),
    "convolution of a volume": (partial(F.conv3d, weight=normal(5, 2, 2, 3, 4)), normal(2, 2, 5, 6, 7)),
    "strides and pads of a volume": (
        partial(
            F.conv3d, weight=normal(4, 1, 2, 3, 4), stride=(1, 2, 3), padding=(2, 1, 0), dilation=(2, 1, 1), groups=2
        ),
        normal(2, 2, 5, 6, 7),
    ),
    "same padding of a volume": (
        partial(F.conv3d, weight=normal(5, 2, 2, 3, 4), bias=normal(5), padding="same"),
        normal(2, 2, 5, 6, 7),
    ),
    "squeeze of two dimensions": (lambda x: x.squeeze((1, -1)), normal(3, 1, 5, 1)),
    "adaptive average of a volume": (partial(F.adaptive_avg_pool3d, output_size=(2, 3, 4)), normal(2, 3, 5, 6, 4)),
    "GELU": (F.gelu, 3 * normal(4, 50)),
    "GELU by a tangent": (partial(F.gelu, approximate="tanh"), 3 * normal(4, 50)),
    "RMS norm": (partial(F.rms_norm, normalized_shape=(7,)), 1e-4 * normal(3, 5, 7)),
    "RMS norm of two dimensions": (
        partial(F.rms_norm, normalized_shape=(5, 7), weight=normal(5, 7), eps=0.1),
        normal(3, 5, 7),
    ),
}
DECOMPOSED: dict[str, tuple[Function, Tensor]] = {
    "moved dimension": (lambda x: x.movedim(1, -1), normal(3, 4, 5)),
    "transposed convolution": (
        partial(F.conv_transpose2d, weight=normal(4, 3, 3, 2), stride=2, groups=2),
        normal(2, 4, 5, 6),
    ),
    "adaptive average": (partial(F.adaptive_avg_pool2d, output_size=(2, 3)), normal(2, 4, 5, 7)),
}


def translated(function: Function, x: Tensor, path: Path) -> Tensor:
    """The answer of the file of a function."""
    exported = torch.export.export(Computing(function), (x,))
    onnx_ir.save(translations.translate(exported, OPSET["portable"]), path)
    (found,) = ort.run(ort.session(path), [x.numpy()])
    return torch.from_numpy(found)


@pytest.mark.parametrize("name", OWN)
def test_operators_that_are_translated_as_they_are(tmp_path: Path, name: str) -> None:
    function, x = OWN[name]
    with mock.patch.object(torch.export.ExportedProgram, "run_decompositions", side_effect=AssertionError):
        torch.testing.assert_close(translated(function, x, tmp_path / "m.onnx"), function(x), rtol=SUMS, atol=SUMS)


@pytest.mark.parametrize("name", DECOMPOSED)
def test_operators_that_torch_knows_by_their_parts(tmp_path: Path, name: str) -> None:
    function, x = DECOMPOSED[name]
    torch.testing.assert_close(translated(function, x, tmp_path / "m.onnx"), function(x), rtol=SUMS, atol=SUMS)


@pytest.mark.parametrize(
    ("function", "kernel"),
    [
        (F.gelu, "Gelu"),
        (partial(F.gelu, approximate="tanh"), "FastGelu"),
        (partial(F.rms_norm, normalized_shape=(50,), weight=normal(50)), "SimplifiedLayerNormalization"),
    ],
)
def test_onnxruntime_has_one_kernel_for_them(function: Function, kernel: str, tmp_path: Path) -> None:
    """Each of several operators passes over the tensor once: GELU takes six to ten times as long by them."""
    translated(function, normal(4, 50), tmp_path / "m.onnx")
    ort.session(tmp_path / "m.onnx", save=tmp_path / "fused.onnx")
    assert [node.op_type for node in onnx_ir.load(tmp_path / "fused.onnx").graph] == [kernel]


def test_an_operator_without_a_translation_is_named() -> None:
    exported = torch.export.export(Computing(torch.linalg.eigvalsh), (torch.eye(3),))
    with pytest.raises(ExportError, match="eigh"):
        translations.translate(exported, OPSET["portable"])
