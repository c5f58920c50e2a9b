"""smoothing and smooth_inputs: the function stays to the bit, outliers are brought below the ceiling that leaves the
least error, and what others read is left alone."""

import json
from collections.abc import Callable
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hawqfx
from hawqfx import pipeline
from hawqfx.errors import PlanError
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import gather
from hawqfx.frontend.losses import squared_error
from hawqfx.ir.facts import InputExponents
from hawqfx.ir.program import Program
from hawqfx.maths import affine
from hawqfx.pass_manager.manager import run
from hawqfx.passes.smooth_inputs import SmoothInputs
from hawqfx.passes.smoothing import Smoothing
from tests.nets import build
from tests.tools import assert_file_has_the_codes, tensor_at

CHANNELS, WIDE, OUTLIER = 16, 128, 5
REACH = 60.0  # of the outlier, where other channels reach about 3


def activations() -> list[Tensor]:
    drawn = torch.randn(6, 4, 7, CHANNELS, generator=torch.Generator().manual_seed(1))
    return list(drawn)


class Normed(nn.Module):
    """A layer-norm with a channel far above the others, and layers that read it; `residual`: their sum does too."""

    def __init__(self, residual: bool = False, wide: int = WIDE) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.up, self.also = nn.Linear(CHANNELS, wide), nn.Linear(CHANNELS, wide)
        self.down = nn.Linear(wide, CHANNELS)
        self.residual = residual
        self.norm.weight.data[OUTLIER] = REACH / 3
        for layer in (self.up, self.also):
            layer.weight.data[:, OUTLIER] *= 0.02

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y = self.down(F.gelu(self.up(x)) * torch.sigmoid(self.also(x)))
        return x + y if self.residual else y


class Squared(nn.Module):
    """An RMS-norm by hand, with its outlier, as language models have it."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.scale, self.shared = nn.Parameter(torch.ones(CHANNELS)), shared
        self.up, self.down = nn.Linear(CHANNELS, WIDE), nn.Linear(WIDE, CHANNELS)
        self.scale.data[OUTLIER] = REACH / 3
        self.up.weight.data[:, OUTLIER] *= 0.02

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.tanh(self.up(self.scale * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)))))
        return y * self.scale if self.shared else y


class Tied(Normed):
    """The weight of a layer is read by another too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(torch.tanh(x), self.up.weight).mean() + (self.also.weight * x.mean()).sum()


class Attended(Normed):
    """A product of activations reads the norm as well."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.gelu(self.up(x))) + (x @ x.transpose(1, 2)).mean()


def around(data: list[Tensor] | None = None) -> Context:
    return Context(gather(activations() if data is None else data), squared_error)


def found(make: Callable[[], nn.Module], **options: Any) -> Program:
    """The program before the sites, without what smoothing changes."""
    from hawqfx.frontend.capture import capture

    surroundings = around()
    recipe = pipeline.recipe(smoothing=Smoothing(given={}), **options)
    steps = [step for step in recipe.rewrite if step.name not in ("smoothing", "smooth_inputs", "find_sites")]
    return run(steps, capture(build(make), surroundings.batches[0]), surroundings)


def exponents(program: Program, **options: Any) -> dict[str, dict[int, int]]:
    learned = run([Smoothing(**options)], program, around()).about(InputExponents).exponents
    return {name: dict(powers) for name, powers in learned.items()}


def smoothed(program: Program) -> Program:
    return run([Smoothing(), SmoothInputs()], program, around())


def outputs(program: Program) -> Tensor:
    return torch.cat([program.run((x,), {}) for x in activations()])


@pytest.mark.parametrize("make", [Normed, lambda: Normed(residual=True), Squared], ids=["alone", "residual", "rms"])
def test_the_function_stays_to_the_bit_and_the_outlier_goes(make: Callable[[], nn.Module]) -> None:
    before = found(make)
    (powers,) = exponents(before).values()
    assert set(powers) == {OUTLIER}
    after = smoothed(before)
    assert torch.equal(outputs(after), outputs(before))  # powers of two
    key = "up.weight"
    factor = after.tensor(key) / before.tensor(key)
    assert torch.equal(factor[:, OUTLIER], torch.full((WIDE,), 2.0 ** powers[OUTLIER]))
    assert torch.equal(factor[:, :OUTLIER], torch.ones(WIDE, OUTLIER))


def _products(program: Program) -> int:
    return sum(node.target is torch.ops.aten.mul.Tensor for node in program.graph.graph.nodes)


def test_a_norm_takes_the_factors_where_nothing_else_reads_it() -> None:
    for make, key in ((Normed, "norm.weight"), (Squared, "scale")):
        before = found(make)
        after = smoothed(before)
        assert _products(after) == _products(before)
        ((power,),) = (powers.values() for powers in exponents(before).values())
        assert torch.equal(after.tensor(key)[OUTLIER], before.tensor(key)[OUTLIER] / 2**power)


@pytest.mark.parametrize(
    ("make", "key"),
    [(lambda: Normed(residual=True), "norm.weight"), (lambda: Squared(shared=True), "scale")],
    ids=["residual", "shared constant"],
)
def test_else_a_product_stands_before_the_layers(make: Callable[[], nn.Module], key: str) -> None:
    before = found(make)
    after = smoothed(before)
    assert _products(after) == _products(before) + 1
    assert torch.equal(after.tensor(key), before.tensor(key))
    assert torch.equal(outputs(after), outputs(before))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Tied, {}),
        (Attended, {}),
        (lambda: Normed(wide=32), {}),  # 64 rows: the factors would take as much as half a bit of each weight
        (Normed, {"keep_float": ("up.weight", "also.weight")}),
    ],
    ids=["tied", "attended", "few rows", "kept in float"],
)
def test_what_others_read_is_left_alone(make: Callable[[], nn.Module], options: Any) -> None:
    program = found(make, **options)
    tensors = exponents(program, **options)
    assert all("gelu" in name or "mul" in name for name in tensors), "the norm's input of the layers is not among them"


def test_the_ceiling_leaves_the_least_error() -> None:
    """Against the error of every ceiling with inputs and weights that are really quantized; what compensation takes off
    the nearest codes' error is a quarter of it by definition here."""
    program = found(lambda: Normed(residual=True))
    ((name, powers),) = exponents(program).items()
    x = torch.cat([tensor_at(program, batch, name) for batch in around().batches]).flatten(0, -2)
    weight = torch.cat([program.tensor("up.weight"), program.tensor("also.weight")]).detach()
    reach = x.abs().amax(0)

    def error(exponent: Tensor) -> float:
        scale = torch.exp2(exponent)
        inputs, weights = x / scale, weight * scale
        low, high = min(0.0, float(inputs.min())), max(0.0, float(inputs.max()))
        step = torch.tensor((high - low) / 255)
        zero = round(-low / float(step))
        of_inputs = affine.fake_quantize(inputs, step, zero, 0, 255) - inputs
        steps = affine.along_channels(affine.channel_scales(weights, 4), weights)
        of_weights = affine.fake_quantize(weights, steps, 0, -8, 7) - weights
        by_inputs = (of_inputs @ weights.T).square().sum()
        by_weights = (inputs.square().sum(0) * of_weights.square().sum(0)).sum()
        return float(by_inputs + by_weights / 4)

    tries = [torch.zeros(CHANNELS)]
    tries += [(reach / (reach.max() / 2**halvings)).clamp_min(1).log2().ceil() for halvings in range(1, 9)]
    errors = [error(each) for each in tries]
    taken = torch.zeros(CHANNELS)
    taken[list(powers)] = torch.tensor([float(power) for power in powers.values()])
    # The error of inputs is a twelfth of a squared step where values are spread over many steps, and that of 168 rows
    # differs from its mean by some percent.
    assert error(taken) <= 1.05 * min(errors)
    assert error(taken) < errors[0] / 2


def test_a_gain_that_is_too_small_changes_nothing() -> None:
    assert exponents(found(Normed), gain=1e6) == {}


def compiled(budget: str | None = "weight_bits=4", **options: Any) -> hawqfx.Compiled:
    model = options.pop("model", None) or build(lambda: Normed(residual=True))
    return hawqfx.compile(model, budget, activations(), sensitivity="mse", **options)


def test_the_network_is_nearer_to_float_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(lambda: Normed(residual=True))
    held_out = torch.randn(64, 7, CHANNELS, generator=torch.Generator().manual_seed(2))
    wanted = model(held_out).detach()

    def error(network: hawqfx.Compiled) -> float:
        return float((network.model(held_out).detach() - wanted).square().mean())

    with_it = compiled("weight_bits=8", model=model)
    assert with_it.planned.about(InputExponents).exponents
    monkeypatch.setattr("hawqfx.options._smoothing", lambda *_: Smoothing(given={}))
    without = compiled("weight_bits=8", model=model)
    assert error(with_it) < error(without) / 2


def test_files_plans_and_saved_networks_have_it(tmp_path: Any) -> None:
    first = compiled()
    assert first.plan.exponents
    assert "norm output" in first.plan.names.values()  # as without
    assert_file_has_the_codes(first, tmp_path)
    first.plan.write(tmp_path / "plan.json")
    assert hawqfx.Plan.read(tmp_path / "plan.json") == first.plan
    followed = compiled(None, plan=tmp_path / "plan.json")
    assert followed.plan == first.plan
    first.save(tmp_path / "net.hawqfx")
    again = hawqfx.load(tmp_path / "net.hawqfx", build(lambda: Normed(residual=True)))
    assert again.plan == first.plan
    assert torch.equal(again.model(activations()[0]), first.model(activations()[0]))


def test_other_data_take_the_exponents_of_the_plan() -> None:
    first = compiled()
    calm = [batch * 0.01 for batch in activations()]
    model = build(lambda: Normed(residual=True))
    again = hawqfx.compile(model, None, calm, plan=first.plan, reround=True)
    assert again.plan.exponents == first.plan.exponents
    assert again.plan.bits == first.plan.bits


def test_plans_of_before_are_followed_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("hawqfx.options._smoothing", lambda *_: Smoothing(given={}))
        before = compiled()
    tree = before.plan.to_tree()
    del tree["exponents"]
    old = hawqfx.Plan.from_json(json.dumps(tree | {"hawqfx_plan": 7}))
    assert old.exponents == {}
    assert compiled(None, plan=old).plan.bits == before.plan.bits


def test_lengths_that_vary_stay_so(tmp_path: Any) -> None:
    model, sizes = build(lambda: Normed(residual=True)), {"x": {1: torch.export.Dim("sequence")}}
    data = [*activations()[:3], *(batch[:, :5] for batch in activations()[3:])]
    found = hawqfx.compile(model, "weight_bits=4", data, sensitivity="mse", dynamic_shapes=sizes)
    assert found.plan.exponents
    path = tmp_path / "model.onnx"
    found.export(path)
    x = torch.randn(2, 11, CHANNELS, generator=torch.Generator().manual_seed(3))
    (output,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    torch.testing.assert_close(
        torch.tensor(output), found.model(x).detach(), rtol=0, atol=0.05
    )  # a code or two at ties


def test_weights_alone_in_fewer_bits_have_no_need_of_it() -> None:
    assert compiled("weight_memory=60%", schemes=["weight-only"]).plan.exponents == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nobody": {"1": 2}}, "another model"),
        ({"alias_default": {"1000": 2}}, "another model"),
        ({"alias_default": {"1": 0}}, "not within 1 to 8"),
        ({"alias_default": {"1": 9}}, "not within 1 to 8"),
        ({"alias_default": {"1": 1.5}}, "not within 1 to 8"),
        ({"alias_default": {"1": None}}, "not within 1 to 8"),
        ({"alias_default": {"-1": 1}}, "below zero"),
        ({"alias_default": {}}, "not within 1 to 8"),
    ],
)
def test_damaged_exponents_are_refused(wrong: Any, message: str) -> None:
    tree = compiled().plan.to_tree()
    assert set(tree["exponents"]) == {"alias_default"}
    with pytest.raises(PlanError, match=message):
        compiled(None, plan=hawqfx.Plan.from_json(json.dumps(tree | {"exponents": wrong})))
