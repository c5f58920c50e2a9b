"""What torch.export makes of models, brought to one form; and what is refused, by a sentence."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn import functional as F
from torch.nn.utils import prune

import hawqfx
from hawqfx.errors import CaptureError, DataError
from hawqfx.frontend.capture import capture
from hawqfx.frontend.data import Batch
from hawqfx.frontend.single_precision import in_single_precision
from hawqfx.runtime import ort

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


class Rotary(nn.Module):
    """Sub-graphs without gradients and with autocast off, one inside the other, as in rotary embeddings; and autocast
    around a layer."""

    def __init__(self, autocast: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.frequencies = nn.Linear(8, 8), nn.Linear(8, 3), nn.Buffer(torch.rand(8))
        self.autocast = autocast

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wave = torch.cos(x * self.frequencies)
            with torch.autocast("cpu", enabled=False):
                shifted = torch.sin(x.float() * self.frequencies)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            x = self.a(x * wave + shifted)
        return self.b(torch.relu(x.float()))


def seeded(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def compiled(model: nn.Module, data: Any, **options: Any) -> hawqfx.Compiled:
    """With 7 bits, whose sums saturate on no processor."""
    return hawqfx.compile(model, "weight_bits=7", data, sensitivity="mse", rounding="nearest", **options)


def test_wrapped_sub_graphs_are_written_into_the_graph() -> None:
    model = seeded(Rotary)
    program = capture(model, Batch((X,), {}))
    assert not any(isinstance(node.target, HigherOrderOperator) for node in program.graph.graph.nodes)
    assert torch.equal(program.run((X,), {}), model(X))
    assert [site.key for site in compiled(model, [X]).planned.weights] == ["a.weight", "b.weight"]


def test_a_layer_under_autocast_is_a_layer_in_float32() -> None:
    model = seeded(lambda: Rotary(autocast=True))
    program = in_single_precision(capture(model, Batch((X,), {})))
    exact = seeded(Rotary)(X)
    assert torch.equal(program.run((X,), {}), exact)
    assert not torch.equal(model(X), exact)  # which rounds to 8 bits of mantissa
    assert [site.key for site in compiled(model, [X]).planned.weights] == ["a.weight", "b.weight"]


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.head(x), lambda x: self.head(-x), (x,))


class Holding(nn.Module):
    """Control flow inside of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Conditional(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.randn_like(x))


class Routed(nn.Module):
    """Experts that compute the tokens that they were chosen for: sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        chosen, total = self.gate(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == number)
            total = total.index_add(0, rows, expert(x[rows]))
        return total


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Noisy, r"randn_like: aten.randn_like.default draws random numbers in every run.* make them an input"),
        (Conditional, r"cond is a cond, whose sub-graphs are run as the values of tensors ask for"),
        (Holding, r"inner cond is a cond, whose sub-graphs are run"),
        (Routed, r"where: aten.where.default makes a tensor whose size depends on the values .* mixture of experts"),
    ],
)
def test_what_no_graph_of_kernels_can_do_is_refused(make: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        compiled(seeded(make), [X])


class GroupedQueries(nn.Module):
    """Key and value heads that several query heads share, and a write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        def heads(tensor: Tensor, count: int) -> Tensor:
            return tensor.view(-1, 4, count, 2).transpose(1, 2)

        def shared(tensor: Tensor) -> Tensor:
            return tensor[:, :, None].expand(-1, 2, 2, 4, 2).reshape(-1, 4, 4, 2)

        q, k, v = heads(self.q(x), 4), shared(heads(self.k(x), 2)), shared(heads(self.v(x), 2))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(-1, 4, 8)
        x = x.clone()
        x[:, 0] = 0.0
        return self.head(x).mean(1)


def test_a_write_in_place_beside_grouped_queries() -> None:
    model, x = seeded(GroupedQueries), torch.randn(8, 4, 8, generator=torch.Generator().manual_seed(1))
    made = compiled(model, [x])
    # a step of 7 bits is 1/128 of a tensor's range
    assert (made.model(x) - model(x)).abs().max() < 0.03 * model(x).abs().max()


class Cache:
    """A class that torch knows nothing of, as the caches of transformers."""


@dataclass
class Generated:
    logits: Tensor
    past: Cache | None


torch.export.register_dataclass(Generated, serialized_type_name="tests.Generated")


class Caching(nn.Module):
    def __init__(self, structure: str) -> None:
        super().__init__()
        self.head, self.structure = nn.Linear(8, 3), structure

    def forward(self, x: Tensor) -> Any:
        logits = self.head(x)
        made: dict[str, Any] = {"tuple": (logits, Cache()), "dict": {"logits": logits, "past": Cache()}}
        return made.get(self.structure, Generated(logits, Cache()))


@pytest.mark.parametrize("structure", ["tuple", "dict", "dataclass"])
def test_objects_are_left_out_of_the_outputs(tmp_path: Path, structure: str) -> None:
    model = seeded(lambda: Caching(structure))
    made = compiled(model, [X])
    name = "1" if structure == "tuple" else "past"
    assert f"left out of the outputs: {name} (Cache)" in made.summary()
    assert not model._forward_hooks
    made.export(tmp_path / "model.onnx")
    assert len(ort.session(tmp_path / "model.onnx").get_outputs()) == 1


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, scale: float, x: Tensor) -> Tensor:
        return self.head(x) * scale


def test_a_number_among_the_inputs_is_part_of_the_network(tmp_path: Path) -> None:
    model: Any = seeded(Scaled)
    labels = torch.zeros(8, dtype=torch.long)
    made = compiled(model, [((2.0, X), labels)] * 2)
    made.export(tmp_path / "model.onnx")
    (output,) = ort.run(ort.session(tmp_path / "model.onnx"), [X.numpy()])
    assert np.abs(output - made.model(2.0, X).detach().numpy()).max() < 1e-5
    with pytest.raises(DataError, match=r"batch 1 has \[3.0\] among its inputs, and batch 0 \[2.0\]"):
        compiled(model, [((2.0, X), labels), ((3.0, X), labels)])


def test_the_mask_of_a_pruned_layer_is_part_of_its_weight() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    plain = compiled(model, [X])
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index]
    made = compiled(model, [X], keep_float=["2.*"])
    assert made.planned.constants().keys() == {"0.weight_orig", "0.bias", "2.weight", "2.bias"}
    weight = made.program.tensor("0.weight_orig")
    assert torch.equal(made.planned.tensor("0.weight_orig"), model[0].weight)  # type: ignore[index]
    assert int((weight == 0).sum()) >= 64  # half of 128, in codes too
    assert made.planned.float_bytes() == plain.planned.float_bytes()


def test_an_output_of_an_unknown_class_is_refused_by_its_name() -> None:
    class Whole(Caching):
        def forward(self, x: Tensor) -> Any:
            return Cache()

    with pytest.raises(CaptureError, match=r"tests.frontend.test_capture.Cache.* in output, which is not a known type"):
        compiled(seeded(lambda: Whole("tuple")), [X])


def test_torch_prints_nothing_and_its_advice_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[: int(x.sum())].mean(0, keepdim=True) if x.sum() > 3 else x

    with pytest.raises(CaptureError, match="Could not guard on data-dependent expression") as caught:
        compiled(Sized().eval(), [X])
    assert "TORCH" not in str(caught.value)
    assert "draft_export" not in str(caught.value)
    assert "def forward" not in capsys.readouterr().err


class _WritesAll(nn.Module):
    """Writes over whole tensors: of the same shape, of one row for all, and of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
        first.copy_(self.one(x))
        second[...] = self.two(x.mean(0, keepdim=True))
        third[...] = (x > 0).long()
        return first + second * third


def test_what_is_written_over_a_whole_tensor_has_a_derivative() -> None:
    torch.manual_seed(0)
    model, x = _WritesAll().eval(), torch.randn(3, 4)
    program = capture(model, Batch((x,), {}))
    assert torch.equal(program.run((x,), {}), model(x))
    program.run((x,), {}).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_capture_that_is_dropped_leaves_no_shapes_behind() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def alive() -> int:
        gc.collect()
        return sum(type(each) is ShapeEnv for each in gc.get_objects())

    def once() -> None:
        capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), Batch((X,), {}))

    for _ in range(4):  # the first ones leave what torch makes once, and the last what is asked of its sizes
        once()
    before = alive()
    for _ in range(8):
        once()
    assert alive() <= before + 2  # caches of torch hold the last ones; torch.export alone leaves one each
