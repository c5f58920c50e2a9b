"""export: packed weights bit for bit, integer kernels, size, whole files, and parity with the lowered graph."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import hawqfx
from hawqfx.errors import ExportError, UsageError
from hawqfx.export.inspection import packed_weights
from hawqfx.ir.facts import ChosenFormat, Quantizers, RoundedWeights
from hawqfx.ir.operators import elementwise
from hawqfx.maths.formats import Format
from hawqfx.runtime import ort, parity
from tests.nets import (
    IMAGES,
    CeilPool,
    KeywordInputs,
    LargeBias,
    Plain,
    Recurrent,
    Residual,
    TinyRange,
    UnreadAttention,
    VolumeWithoutBias,
    build,
    images,
)
from tests.tools import quick

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
PACKINGS = ("portable", "native")
FLOAT_KERNELS = {"Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "ConvInteger"}


class OneLinear(nn.Module):
    """A layer with a weight of a given shape, to look at through the identity matrix."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (7, 3), (16, 8)])
def test_unpacked_weights_are_bit_exact(tmp_path: Path, packing: Any, bits: int, inputs: int, outputs: int) -> None:
    """The weight that onnxruntime sees, divided by its scale, is the integer code that the rounding chose."""
    data = [torch.randn(32, inputs, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    compiled = quick(lambda: OneLinear(inputs, outputs), "weight_bits=8", data=data).uniform(bits)
    path = tmp_path / "model.onnx"
    compiled.export(path, packing)
    model = onnx.load(path)
    call = next(node for node in model.graph.node if node.domain == "hawqfx")
    model.graph.output.append(onnx.helper.make_tensor_value_info(call.output[0], onnx.TensorProto.FLOAT, None))
    session = ort.session(model.SerializeToString(), optimize=False)
    weight = np.asarray(ort.run(session, [data[0].numpy()])[-1])
    codes = compiled.planned.facts.get("layer.weight", RoundedWeights).codes[Format(bits)].numpy()
    quantizer = compiled.plan.quantizers["layer.weight"]
    assert quantizer is not None
    scale = np.array(quantizer.scale, np.float32)[:, None]
    assert np.array_equal(weight, codes.astype(np.float32) * scale)  # the very product that DequantizeLinear makes
    assert np.abs(codes).max() > 0


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_tensors_are_rounded_up_by_less_than_a_byte_each(tmp_path: Path, packing: Any) -> None:
    for bits in WIDTHS:
        compiled = quick(Plain, "weight_bits=8").uniform(bits)
        compiled.export(tmp_path / "model.onnx", packing)
        model = onnx.load(tmp_path / "model.onnx")
        stored = packed_weights(tmp_path / "model.onnx")
        for site in compiled.planned.weights:
            parts = [t for t in model.graph.initializer if t.name in stored[site.key].tensors]
            exact = site.numel * bits / 8
            assert exact <= sum(len(part.raw_data) for part in parts) < exact + len(parts), (site.key, bits)
            if packing == "portable":
                assert len(parts) == 1


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", [name for name in IMAGES if name not in ("attention", "shared_weight_two_norms")])
def test_lowered_layers_run_on_integer_kernels_and_agree(tmp_path: Path, name: str, packing: Any) -> None:
    compiled = quick(IMAGES[name], "weight_bits=5")
    path = tmp_path / "model.onnx"
    compiled.export(path, packing)
    found = parity.kernels(path)
    assert not FLOAT_KERNELS & set(found), found
    layers = sum(layer.operator.startswith("conv") for layer in compiled.planned.layers)
    assert found.get("QLinearConv", 0) == layers
    result = parity.compare(compiled.program, path, compiled.session.context.batches[0])
    assert result.codes > 0
    assert result.flips <= 1e-3 * result.codes
    assert result.worst <= 1e-4
    last = compiled.plan.quantizers[compiled.planned.layers[-1].input]
    assert last is not None
    assert result.mean_difference < last.scale[0]


def test_mixed_activation_widths_reach_integer_kernels(tmp_path: Path) -> None:
    compiled = quick(Residual, "weight_bits=6").at("weight_bits=6, bops=2.2%", against_uniform=False)
    assert len({bits for key, bits in compiled.plan.bits.items() if not key.endswith("weight")}) > 1
    compiled.export(tmp_path / "model.onnx")
    found = parity.kernels(tmp_path / "model.onnx")
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (2, 1, 1)
    assert found["Clip"] >= 1


@pytest.mark.parametrize("make", [Recurrent])
def test_what_stays_in_float_still_computes_the_same(tmp_path: Path, make: type[nn.Module]) -> None:
    compiled = quick(make, "weight_bits=5", keep_float=["lstm*"])
    assert compiled.planned.left_float
    compiled.export(tmp_path / "model.onnx")
    x = compiled.session.context.batches[0].tensors[0]
    theirs = torch.from_numpy(np.asarray(ort.run(ort.session(tmp_path / "model.onnx", optimize=False), [x.numpy()])[0]))
    # float32 in another order, and a code flipped by it here and there
    assert (compiled.model(x) - theirs).abs().mean() < 1e-3 * theirs.abs().max()


def test_named_inputs_dict_outputs_and_dynamic_batch(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    data = [
        {"second": torch.randn(8, 6, generator=random), "first": torch.randn(8, 5, generator=random)} for _ in range(2)
    ]
    compiled = quick(KeywordInputs, "weight_bits=7", data=data)
    compiled.export(tmp_path / "model.onnx")
    session = ort.session(tmp_path / "model.onnx", optimize=False)
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "first": ["batch", 5],
        "second": ["batch", 6],
    }
    one = {name: value[:3].numpy() for name, value in data[0].items()}
    theirs = session.run(None, one)[0]
    ours = compiled.model(**{name: value[:3] for name, value in data[0].items()})["logits"].detach().numpy()
    assert np.abs(theirs - ours).max() <= 1e-5 * np.abs(ours).max()


def test_the_promise_covers_all_that_belongs_to_weights(tmp_path: Path) -> None:
    """Payload of weights, scales and biases in the file = promised bytes, to the byte, in portable packing."""
    compiled = quick(Residual, "weight_bits=5")
    compiled.export(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    names = {name for node in model.graph.node if node.domain == "hawqfx" for name in node.input}
    biases = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT32]
    held = sum(len(t.raw_data) for t in model.graph.initializer if t.name in names) + sum(
        len(t.raw_data) for t in biases
    )
    assert held == compiled.weight_bytes


def test_the_same_functions_for_all_widths_and_no_traces_of_the_exporter(tmp_path: Path) -> None:
    compiled = quick(Plain, "weight_bits=8").at("bops=100%", fix={"conv1*": 3, "conv2*": 4, "head*": 8})
    compiled.export(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert {function.name for function in model.functions} == {"Weight", "Weight8"}
    called = [node for node in model.graph.node if node.domain == "hawqfx"]
    assert [node.op_type for node in called] == ["Weight", "Weight", "Weight8"]
    assert [node.name for node in called] == ["conv1.weight", "conv2.weight", "head.weight"]
    assert all(len(name) <= 2 for node in model.graph.node for name in node.output if name != "output")
    assert not model.graph.value_info
    assert not model.graph.metadata_props
    assert {entry.key for entry in model.metadata_props} == {
        "hawqfx_version",
        "hawqfx_plan",
        "hawqfx_packing",
        "hawqfx_target",
        "hawqfx_runtime",
        "hawqfx_schemes",
    }


def test_the_same_inputs_and_seed_give_the_same_plan_and_bytes(tmp_path: Path) -> None:
    contents = []
    for run in range(2):
        compiled = quick(Residual, "weight_bits=5, bops=2.5%")
        compiled.export(tmp_path / f"{run}.onnx")
        contents.append((compiled.plan.to_json(), (tmp_path / f"{run}.onnx").read_bytes()))
    assert contents[0] == contents[1]


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    compiled = quick(Plain, "weight_bits=6")
    with pytest.raises(ExportError, match="does not exist"):
        compiled.export(tmp_path / "missing" / "model.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        compiled.export(tmp_path)
    with pytest.raises(UsageError, match="must be one of portable, native"):
        compiled.export(tmp_path / "model.onnx", "zip")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, path = quick(Plain, "weight_bits=6"), tmp_path / "model.onnx"
    path.write_bytes(b"what was there before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hawqfx.export.write.ir.save", full)
    with pytest.raises(ExportError, match="No space left on device"):
        compiled.export(path)
    assert path.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_batch_of_one_is_captured_and_exported_with_a_dynamic_batch(tmp_path: Path) -> None:
    data = [(x[:1], y[:1]) for x, y in images(count=4)]
    compiled = quick(Plain, "weight_bits=6", data=data)
    compiled.export(tmp_path / "model.onnx")
    session = ort.session(tmp_path / "model.onnx")
    assert np.asarray(ort.run(session, [images()[0][0].numpy()])[0]).shape == (16, 3)


def test_float_export_is_the_float_network(tmp_path: Path) -> None:
    compiled, x = quick(Plain, "weight_bits=6"), images()[0][0]
    compiled.export_float(tmp_path / "float.onnx")
    theirs = np.asarray(ort.run(ort.session(tmp_path / "float.onnx"), [x.numpy()])[0])
    # float32 sums of at most 54 terms in another order, with batch-norm folded
    assert np.abs(theirs - build(Plain)(x).detach().numpy()).max() < 1e-5


class Strided(nn.Module):
    """A first layer with a stride, maybe behind zeros, as networks for images have it."""

    def __init__(self, kernel: Any, stride: Any, padding: Any, around: tuple[int, ...] = (), **more: Any) -> None:
        super().__init__()
        self.around = around
        self.first, self.second = nn.Conv2d(3, 9, kernel, stride, padding, **more), nn.Conv2d(9, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(F.pad(x, self.around) if self.around else x))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "around", "parted"),
    [
        (7, 2, 3, (), True),  # ResNet
        (3, 2, 1, (), True),  # MobileNet
        (3, 2, 0, (0, 1, 0, 1), True),  # "same" padding as TensorFlow has it
        (4, 4, 0, (0, 0, 0, 3), True),  # ConvNeXt
        (7, 4, 3, (), True),  # SegFormer; a kernel that the stride does not divide
        ((3, 5), 2, (1, 2), (1, 2, 3, 0), True),
        (3, 2, 1, (1, 0), True),  # zeros along one axis
        (3, 1, 1, (), False),
        (8, 8, 0, (), False),  # its pixels lie side by side as it is
        (3, (1, 2), 1, (), False),
        (4, 4, 0, (), False),  # rows that nothing reads would have to be cut off
    ],
)
def test_a_strided_layer_of_an_image_reads_blocks_of_pixels(
    tmp_path: Path, kernel: Any, stride: Any, padding: Any, around: tuple[int, ...], parted: bool, packing: Any
) -> None:
    """The file computes the very sums of the graph, and holds the kernel as the network has it."""
    data = [torch.randn(4, 3, 29, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    compiled = quick(lambda: Strided(kernel, stride, padding, around), "weight_bits=5", data=data)
    path = tmp_path / "model.onnx"
    compiled.export(path, packing)
    kernels = parity.kernels(path)
    assert ("SpaceToDepth" in kernels) == parted
    assert kernels["QLinearConv"] == 2
    assert {*kernels}.isdisjoint({"Conv", "DequantizeLinear"})
    same = parity.compare(compiled.program, path, compiled.session.context.batches[0])
    assert same.codes > 0
    assert same.flips <= 1  # a tie, where sums in another order cross it
    # float32 sums of 8 products in the head; everything before it is integers
    assert same.worst < 1e-6
    graph = onnx.load(path).graph
    floats = {"x"} | {node.output[0] for node in graph.node if node.op_type == "Pad" and node.input[0] == "x"}
    # onnxruntime 1.24 has the operator for floats alone
    assert all(node.input[0] in floats for node in graph.node if node.op_type == "SpaceToDepth")
    (stored,) = packed_weights(path)["first.weight"].tensors[:1]
    first = next(t for t in graph.initializer if t.name == stored)
    bits = compiled.plan.bits["first.weight"]
    assert len(first.raw_data) <= -(-compiled.program.tensor("first.weight").numel() * bits // 8)


@pytest.mark.parametrize("more", [{"dilation": 2}, {"groups": 3}, {"around": (-1, -1, -1, -1)}])  # cut off, then zeros
def test_other_strided_layers_stay_as_they_are(tmp_path: Path, more: Any) -> None:
    data = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    compiled = quick(lambda: Strided(3, 2, 1, **more), "weight_bits=5", data=data)
    compiled.export(tmp_path / "model.onnx")
    assert "SpaceToDepth" not in parity.kernels(tmp_path / "model.onnx")
    assert parity.compare(compiled.program, tmp_path / "model.onnx", compiled.session.context.batches[0]).flips == 0


class Answer(NamedTuple):
    logits: Tensor
    hidden: tuple[Tensor, Tensor]


class Own:
    """A structure that torch has been told of, and that no numbers make."""

    def __init__(self, one: Tensor, other: Tensor) -> None:
        assert not isinstance(one, int)
        self.parts = one, other


pytree.register_pytree_node(
    Own, lambda own: (list(own.parts), None), lambda parts, _: Own(*parts), serialized_type_name="tests.Own"
)

ANSWERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str]]] = {
    "a tensor": (lambda x, y: y, ["output"]),
    "a tuple": (lambda x, y: (x, y), ["output_0", "output_1"]),
    "a list in a tuple": (lambda x, y: (y, [x, x + 1]), ["output_0", "output_1_0", "output_1_1"]),
    "a dict": (lambda x, y: {"logits": y, "features": x}, ["logits", "features"]),
    "a named tuple": (lambda x, y: Answer(y, (x, x + 1)), ["logits", "hidden_0", "hidden_1"]),
    "nothing beside": (lambda x, y: {"loss": None, "logits": y}, ["logits"]),
    "of its own type": (lambda x, y: Own(x, y), ["output_0", "output_1"]),
    "a tensor twice": (lambda x, y: {"first": y, "again": y}, ["first", "again"]),
    "paths that read alike": (lambda x, y: {"a": {"b": x}, "a_b": y}, ["a_b", "a_b_output"]),
    "the name of an input": (lambda x, y: {"x": y}, ["x_output"]),
    "the name of a value inside": (lambda x, y: {"relu": y, "conv2d": x}, ["relu", "conv2d"]),
}


class Answering(nn.Module):
    """Returns its tensors in some structure."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.conv(x))
        return self.answer(x, self.head(x.mean((2, 3))))


@pytest.mark.parametrize("name", ANSWERS)
def test_outputs_are_named_as_in_the_model(tmp_path: Path, name: str) -> None:
    answer, names = ANSWERS[name]
    data = [x for x, _ in images()]

    def loss(output: Any, target: Any) -> Tensor:
        return sum(leaf.square().mean() for leaf in pytree.tree_leaves(output) if leaf is not None)

    compiled = hawqfx.compile(build(lambda: Answering(answer)), "weight_bits=8", data, sensitivity="mse", loss=loss)
    compiled.export(tmp_path / "model.onnx")
    session = ort.session(tmp_path / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert [value.name for value in session.get_outputs()] == names
    wanted = [leaf for leaf in pytree.tree_leaves(compiled.model(data[0])) if leaf is not None]
    for ours, theirs in zip(wanted, ort.run_exactly(tmp_path / "model.onnx", [data[0].numpy()]), strict=True):
        assert np.abs(ours.detach().numpy() - theirs).max() < 0.05  # a step of the largest is 0.02


def test_an_input_that_is_returned_keeps_its_name(tmp_path: Path) -> None:
    class Echo(Answering):
        def forward(self, x: Tensor) -> Any:
            return {"given": x, "logits": super().forward(x)}

    data = [x for x, _ in images()]
    loss = lambda output, target: output["logits"].square().mean()  # noqa: E731
    model = build(lambda: Echo(lambda x, y: y))
    hawqfx.compile(model, "weight_bits=8", data, sensitivity="mse", loss=loss).export(tmp_path / "model.onnx")
    session = ort.session(tmp_path / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert [value.name for value in session.get_outputs()] == ["given", "logits"]
    assert np.array_equal(ort.run(session, [data[0].numpy()])[0], data[0].numpy())


def test_every_code_of_every_width_survives_packing(tmp_path: Path) -> None:
    """All 2^b codes through the file, not only those that rounding happens to choose."""
    for bits, packing in itertools.product(WIDTHS, PACKINGS):
        compiled = quick(lambda: OneLinear(16, 16), "weight_bits=8", data=[torch.randn(32, 16)]).uniform(bits)
        span = torch.arange(256).reshape(16, 16) % 2**bits - 2 ** (bits - 1)
        compiled.program.tensor("layer.weight").data.copy_(
            span * compiled.program.tensor("layer.weight_scale")[:, None]
        )
        compiled.export(tmp_path / "model.onnx", packing)  # type: ignore[arg-type]
        model = onnx.load(tmp_path / "model.onnx")
        call = next(node for node in model.graph.node if node.domain == "hawqfx")
        model.graph.output.append(onnx.helper.make_tensor_value_info(call.output[0], onnx.TensorProto.FLOAT, None))
        session = ort.session(model.SerializeToString(), optimize=False)
        weight = np.asarray(ort.run(session, [np.zeros((1, 16), np.float32)])[-1])
        scale = compiled.program.tensor("layer.weight_scale").numpy()[:, None]
        assert np.array_equal(np.round(weight / scale).astype(int), span.numpy()), (bits, packing)


def test_bits_of_the_plan_are_those_of_the_file(tmp_path: Path) -> None:
    compiled = quick(Residual, "weight_bits=5")
    compiled.export(tmp_path / "model.onnx")
    called = {key: weight.bits for key, weight in packed_weights(tmp_path / "model.onnx").items()}
    facts = compiled.planned.facts
    chosen = {site.key: facts.get(site.key, ChosenFormat).format.bits for site in compiled.planned.weights}
    assert called == chosen


def test_what_nobody_reads_is_not_in_the_file(tmp_path: Path) -> None:
    compiled = quick(UnreadAttention, "weight_bits=5")
    assert not [key for key in compiled.plan.bits if key.startswith("mods")]
    compiled.export(tmp_path / "m.onnx")
    assert not [each.name for each in onnx.load(tmp_path / "m.onnx").graph.initializer if each.name.startswith("mods")]


@pytest.mark.parametrize("make", [TinyRange, LargeBias])
def test_biases_far_above_the_products_fit_into_int32(
    make: type[nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They saturated in silence: a bias of -0.74 behind a tensor of range 1e-9 became -0.03, and another sign in the
    file.  Now the output is right by the steps of 8 bits, in the graph and in the file (which export compares)."""
    compiled = quick(make, "weight_bits=8")
    assert re.search(r"biases of \d+ channels are so far above the products .*: \d of [\w.]+", caplog.text)
    x = images()[0][0]
    wanted, found = build(make)(x)[:, 0], compiled.model(x)[:, 0]
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()
    formats, facts = compiled.planned.formats(), compiled.planned.facts
    for layer in compiled.planned.layers:
        scales = [facts.get(key, Quantizers).by_format[formats[key]].scale for key in (layer.input, layer.weight)]
        unit = scales[0][0] * torch.tensor(scales[1]).double()
        assert layer.bias is not None
        assert (compiled.planned.tensor(layer.bias).abs() / unit).max() < 2**31 - 1
    compiled.export(tmp_path / "m.onnx")
    assert "outputs within" in compiled.checks["m.onnx"]


def test_average_pools_with_windows_beyond_the_tensor(tmp_path: Path) -> None:
    """onnxruntime's integer kernel divides such windows by their whole size where it counts padding; an EfficientNet of
    transformers, whose last pool is of this kind, was off by 121 codes.  Those without padding count none, the others
    stay in float."""
    compiled = quick(CeilPool, "weight_bits=8")
    compiled.export(tmp_path / "m.onnx")
    (x, _), *_ = images()
    (found,) = ort.run(ort.session(tmp_path / "m.onnx"), [x.numpy()])
    wanted = compiled.model(x).detach()
    # a tie may flip a code of one of the 16 images
    assert float((torch.from_numpy(found) - wanted).abs().mean()) < 1e-2 * float(wanted.abs().mean())
    pools = [node for node in compiled.planned.graph.graph.nodes if "avg_pool2d" in str(node.target)]
    integer = [bool(elementwise(node)) for node in pools]
    assert integer == [True, False, True]


def test_convolutions_of_volumes_without_a_bias_stay_in_float(tmp_path: Path) -> None:
    """torch.onnx adds zeros of a shape that onnxruntime refuses."""
    compiled = quick(VolumeWithoutBias, "weight_bits=8", keep_float=["first.*", "second.*"])
    compiled.export(tmp_path / "m.onnx")
    assert "outputs within" in compiled.checks["m.onnx"]
