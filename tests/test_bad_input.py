"""Bad input gets a clear error that says what to do, and nothing is lost."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hawqfx
from hawqfx.errors import (
    BudgetError,
    CaptureError,
    DataError,
    HawqfxError,
    InfeasibleBudget,
    LossError,
    NothingToQuantize,
    PlanError,
)
from hawqfx.passes.hawq_v2 import HawqV2
from tests.nets import Mlp, Plain, SharedLayer, build, images
from tests.tools import quick

NAN = float("nan")


def spoiled(value: float) -> list[tuple[Tensor, Tensor]]:
    data = images()
    data[1][0][3, 0, 2, 2] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is empty"),
        (iter([]), "data is empty"),
        (7, "data must be an iterable of batches"),
        (["text"], "batch 0 is a str"),
        ([(1, 2, 3)], "batch 0 is a tuple"),
        ([torch.zeros(0, 1, 8, 8)], "batch 0 is empty"),
        (
            [*images(), (torch.zeros(4, 1, 9, 9), torch.zeros(4).long())],
            r"batch 2 has inputs of shape \[\(4, 1, 9, 9\)\]",
        ),
        (images()[0], r"given as \[\(inputs, targets\)\]"),
        ([(torch.zeros(4, 1, 8, 8), torch.zeros(5).long())], "batch 0 has 4 inputs and targets of shape"),
        (spoiled(NAN), "batch 1 holds NaN or infinity"),
        (spoiled(float("inf")), "batch 1 holds NaN or infinity"),
        ([(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))], "labels go from 0 to 3, but the model has 3 classes"),
        ([(torch.zeros(4, 1, 8, 8), torch.tensor([0, -1, 2, 1]))], "labels go from -1 to 2"),
        (
            [(torch.zeros(4, 1, 8, 8), torch.zeros(4))],
            r"no default loss fits output \(N, 3\) and targets \(N\): labels are integers",
        ),
        ([(torch.zeros(4, 1, 8, 8), torch.full((4,), NAN))], "targets of batch 0 hold NaN"),
    ],
)
def test_data(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        quick(Plain, data=data)


def test_a_batch_of_the_wrong_shape_for_the_model() -> None:
    with pytest.raises(CaptureError, match=r"torch.export refused Plain on inputs float32\[4, 3, 8, 8\]"):
        quick(Plain, data=[torch.zeros(4, 3, 8, 8)])


def test_a_model_in_train_mode() -> None:
    with pytest.raises(CaptureError, match=r"train mode \(Plain, conv1, norm1, \.\.\.\): call model.eval\(\)"):
        hawqfx.compile(build(Plain).train(), "weight_bits=5", images())


def test_one_module_in_train_mode() -> None:
    model: Any = build(Plain)
    model.norm2.train()
    with pytest.raises(CaptureError, match="norm2"):
        hawqfx.compile(model, "weight_bits=5", images())


def test_an_exported_program_in_train_mode() -> None:
    x = images()[0][0]
    exported = torch.export.export(build(Plain).train(), (x,))
    with pytest.raises(CaptureError, match=r"^norm1 was captured in train mode"):
        hawqfx.compile(exported, "weight_bits=5", images())


class Branching(nn.Module):
    """Control flow that depends on values, which torch.export refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) if x.sum() > 0 else x.flatten(1)[:, :3]


def test_a_model_that_export_refuses() -> None:
    with pytest.raises(CaptureError, match=r"(?s)torch.export refused Branching.*data-dependent.*torch.where"):
        quick(Branching)


def test_nan_in_a_weight_names_it() -> None:
    model: Any = build(Plain)
    model.conv2.weight.data[0, 0, 0, 0] = NAN
    with pytest.raises(CaptureError, match=r"conv2\.weight holds NaN"):
        hawqfx.compile(model, "weight_bits=5", images())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, target: output, r"must be a scalar, the mean over the batch; it returned \(16, 3\)"),
        (lambda output, target: 1.0, "it returned float"),
        (lambda output, target: output.sum() * NAN, "loss of batch 0 is nan"),
        (lambda output, target: output.sum() / 0, "loss of batch 0 is -?inf"),
    ],
)
def test_loss(loss: Any, message: str) -> None:
    with pytest.raises(LossError, match=message):
        quick(Mlp, loss=loss)


def test_an_output_that_the_default_loss_cannot_read() -> None:
    class Nested(Plain):
        def forward(self, x: Tensor) -> Any:
            return [super().forward(x)], x.argmax(1)

    with pytest.raises(LossError, match=r"need a tensor of floats; the model returned tuple without .*: give loss="):
        quick(Nested)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "size",
        "size=",
        "size=12.5",
        "volume=3%",
        "size=12%,size=13%",
        "size=-3%",
        "size=1e",
        "size=0%",
        "weight_bits=4MB",
        "size=0.125",
    ],
)
def test_a_budget_that_does_not_parse(text: str) -> None:
    if text == "size=12.5":  # bytes: parses, and cannot be met
        with pytest.raises(InfeasibleBudget):
            quick(Plain, text)
        return
    with pytest.raises(BudgetError) as caught:
        quick(Plain, text)
    assert text.split(",")[0].split("=")[0].strip() in str(caught.value)


def test_a_budget_that_cannot_be_met_names_the_least() -> None:
    with pytest.raises(
        InfeasibleBudget, match=r"size=5% cannot be met: the least is \d+ bytes, [\d.]+% of float32"
    ) as caught:
        quick(Plain, "size=5%")
    refused = caught.value.__cause__  # by prediction; then the least was weighed
    assert refused is not None
    assert "in pass allocation" in "".join(refused.__notes__)


def test_neither_budget_nor_plan() -> None:
    with pytest.raises(HawqfxError, match="give a budget"):
        hawqfx.compile(build(Plain), None, images())


def test_widths_that_do_not_exist() -> None:
    with pytest.raises(HawqfxError, match="from 2 to 8"):
        quick(Plain, weight_bits=(1, 8))


def test_one_probe_has_no_standard_error() -> None:
    with pytest.raises(HawqfxError, match="at least two"):
        HawqV2(probes=1)


def test_nothing_to_quantize() -> None:
    with pytest.raises(NothingToQuantize, match="no convolution or linear layer"):
        quick(nn.Flatten)


def test_everything_kept_in_float() -> None:
    with pytest.raises(NothingToQuantize, match="kept in float by the user"):
        quick(Plain, keep_float=["*"])


def test_a_plan_for_another_model() -> None:
    plan = quick(Plain, "weight_bits=6").plan
    with pytest.raises(PlanError, match="for another model"):
        hawqfx.compile(build(Mlp), None, images(), plan=plan)


def test_a_layer_used_twice_is_right() -> None:
    """Close to the float network at 8 bits, as a network without sharing is."""
    compiled, x = quick(SharedLayer, "weight_bits=6").uniform(8), images()[0][0]
    reference = build(SharedLayer)(x)
    assert (compiled.model(x) - reference).abs().max() < 0.05 * reference.abs().max()


def test_the_users_model_is_left_as_it_was() -> None:
    model = build(Plain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = hawqfx.compile(model, "weight_bits=6", images(), sensitivity=HawqV2(2))
    compiled.model(images()[0][0]).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_device_that_is_not_there_or_not_the_models() -> None:
    with pytest.raises(HawqfxError, match="device='nonsense' cannot be used"):
        hawqfx.compile(build(Plain), "weight_bits=5", images(), device="nonsense")
    with pytest.raises(HawqfxError, match=r"the model is on meta and device='cpu': move it with model\.to\('cpu'\)"):
        hawqfx.compile(build(Plain).to("meta"), "weight_bits=5", images())


def test_less_than_one_sample_at_a_time() -> None:
    with pytest.raises(HawqfxError, match="batch=0"):
        hawqfx.compile(build(Plain), "weight_bits=5", images(), batch=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "neares"}, r"rounding='neares': must be 'learned', 'sequential', 'compensated' or 'nearest'"),
        ({"threads": 0}, "threads=0: onnxruntime needs at least one"),
        ({"keep_float": "head.*"}, r"keep_float='head\.\*': give a list of patterns"),
        ({"keep_float": ["nothing*"]}, r"keep_float 'nothing\*': no weight has such a name"),
        ({"loss": "mse"}, "loss='mse': must be a function"),
        ({"metric": "accuracy"}, "metric='accuracy': must be a function"),
        ({"loss": lambda output, target: output.square().mean(), "interactions": True}, "interactions draws targets"),
    ],
)
def test_options_that_are_wrong_are_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HawqfxError, match=message):
        quick(Plain, **options)


def test_targets_are_given_for_all_batches_or_for_none() -> None:
    x, y = torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    for data in ([(x, y), x], [x, (x, y)]):
        with pytest.raises(DataError, match="batch 1 and batch 0: one has targets and the other none"):
            quick(Plain, data=data)
    with pytest.raises(DataError, match=r"targets in the shape of the output, \(N, 3\), not \(N\)"):
        quick(Plain, data=[(x, torch.zeros(4, 3)), (x, torch.zeros(4))])


def forbidden(*_: object) -> None:
    raise AssertionError("calibrated before the arguments were checked")


class OnceDifferentiable(torch.autograd.Function):
    """A squared error whose backward pass has no derivative, as that of many kernels of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 * x / x.numel()


def squared(output: Tensor) -> Tensor:
    return OnceDifferentiable.apply(output)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.15}, r"budget=0\.15: give text, such as 'size=12\.5%'"),
        ({"budget": ["size=3%"]}, r"budget=\['size=3%'\]: give text"),
        ({"model": Plain}, r"the model is type .*: call it, and give what it returns"),
        ({"model": None}, "the model is NoneType None; an nn.Module in eval mode"),
        (
            {"budget": "drop=1%", "metric": lambda output: 1.0},
            r"metric= raised TypeError: .* with an output of float32",
        ),
        ({"budget": "drop=1%", "metric": lambda output, target: output.nope}, "metric= raised AttributeError"),
        ({"budget": "drop=1%", "metric": lambda output, target: output.argmax(1) == target}, "metric= raised"),
        ({"budget": "drop=1%", "metric": lambda output, target: float("nan")}, "the metric is nan"),
        ({"holdout": images()}, "holdout= is data that metric= is validated on"),
        (
            {"metric": lambda output, target: 1.0, "holdout": [(torch.zeros(4, 1, 9, 9), torch.zeros(4).long())]},
            r"holdout has inputs of type and shape \[\('torch.float32', \(1, 9, 9\)\)\] per sample",
        ),
        ({"metric": lambda output, target: 1.0, "holdout": []}, "holdout is empty"),
        ({"loss": lambda output: output.mean()}, r"loss= raised TypeError: .* a target of int64 \(N\)"),
        ({"loss": lambda output, target: output.detach().square().mean()}, "does not depend on the model's output"),
        (
            {"loss": lambda output, target: squared(output)},
            r"the loss has no second derivatives.*once_differentiable.*sensitivity=\"measured\"",
        ),
        ({"fix": {"foo*": 8}}, r"fix 'foo\*': no site has such a name"),
        ({"fix": {"head*": 9}}, r"fix 'head\*': bits are from 2 to 8, or 32 for float, not 9"),
        ({"fix": {"head*": "8"}}, "not '8'"),
        ({"fix": ["head*"]}, "fix=.*: give a dict from patterns of names to bits"),
        ({"fix": {"head*": 8}, "weight_bits": (2, 4), "activation_bits": (4,)}, "8 bits are in neither weight_bits="),
        ({"weight_bits": 8}, r"weight_bits=8: give several bit widths, such as \(4, 8\)"),
        ({"activation_bits": (4.5,)}, "from 2 to 8"),
        ({"threads": "2"}, "threads='2': give a whole number"),
        ({"batch": 1.5}, r"batch=1\.5: give a whole number"),
        ({"samples": 0}, "samples=0: at least one sample"),
        ({"seed": "a"}, "seed='a': give a whole number"),
        ({"keep_float": [3]}, r"keep_float=\[3\]: give a list of patterns of names"),
        ({"sensitivity": HawqV2}, "sensitivity=<class .*: must be one of gauss-newton"),
        ({"rule": "foo"}, "rule='foo': must be"),
        ({"observers": [1]}, r"observers=\[1\]: give instances"),
    ],
)
def test_slips_are_said_before_anything_is_calibrated(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hawqfx.passes.histograms.Histograms.learn", forbidden)
    model, budget = options.pop("model", build(Plain)), options.pop("budget", "weight_bits=5")
    with pytest.raises(HawqfxError, match=message):
        hawqfx.compile(model, budget, images(), **options)


def test_a_loss_of_first_derivatives_is_enough_where_no_more_are_taken() -> None:
    compiled = hawqfx.compile(
        build(Mlp), "weight_bits=5", images(), loss=lambda output, target: squared(output), sensitivity="measured"
    )
    assert compiled.predicted_loss >= 0


def test_a_budget_beside_a_plan_is_refused() -> None:
    plan = quick(Plain, "weight_bits=4").plan
    with pytest.raises(HawqfxError, match="budget='weight_bits=8' beside plan=: a plan has its budget already"):
        hawqfx.compile(build(Plain), "weight_bits=8", images(), plan=plan)


def test_what_has_no_effect_beside_a_plan_is_said(caplog: pytest.LogCaptureFixture) -> None:
    plan = quick(Plain, "weight_bits=4").plan
    hawqfx.compile(build(Plain), None, images(), plan=plan, weight_bits=[2, 3, 4, 5, 6, 7, 8], fix=None)
    assert "no effect" not in caplog.text
    hawqfx.compile(build(Plain), None, images(), plan=plan, sensitivity="mse", fix={"conv1.weight": 8})
    assert "plan= has its formats: sensitivity=, fix= have no effect" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": "foo"}, "limit='foo': a frontier goes along size, weight_bits, bops or activation_memory"),
        ({"limit": "drop"}, "limit='drop': a frontier goes along"),
        ({"points": 1}, "points=1: a frontier has at least two"),
        ({"evaluate": -1}, "evaluate=-1"),
        ({"budgets": []}, "budgets is empty"),
        ({"budgets": "size=30%"}, "budgets='size=30%': give a list of budgets"),
        ({"budgets": ["drop=1%"], "metric": lambda output, target: 1.0}, "a budget on drop is searched for"),
        ({"budgets": ["size=x"]}, "size='x'"),
    ],
)
def test_a_frontier_that_cannot_be(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawqfx.passes.histograms.Histograms.learn", forbidden)
    with pytest.raises(HawqfxError, match=message):
        hawqfx.pareto(build(Plain), images(), **options)


def test_a_network_that_follows_a_plan_has_no_other_budgets() -> None:
    followed = hawqfx.compile(build(Plain), None, images(), plan=quick(Plain).plan)
    for ask in (
        lambda: followed.at("weight_bits=5"),
        lambda: followed.at("size=50%"),
        lambda: followed.uniform(8),
        lambda: followed.session.frontier(4, "weight_bits"),
    ):
        with pytest.raises(HawqfxError, match=r"follows a plan, and no other formats were calibrated or measured"):
            ask()


def test_rules_of_another_budget_are_checked() -> None:
    compiled = quick(Plain)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"foo": 8}, "foo: the rules are weight_bits"),
        ({"weight_bits": (9,)}, "from 2 to 8"),
        ({"fix": {"foo": 8}}, "no site has such a name"),
        ({"rule": "foo"}, "rule='foo'"),
    ]
    for rules, message in wrong:
        with pytest.raises(HawqfxError, match=message):
            compiled.at("weight_bits=5", **rules)
    with pytest.raises(BudgetError, match=r"budget=0\.15"):
        compiled.at(0.15)  # type: ignore[arg-type]


def test_samples_that_a_metric_holds_out_are_said(caplog: pytest.LogCaptureFixture) -> None:
    compiled = quick(Plain, "weight_bits=5", metric=lambda output, target: 1.0)
    assert "metric= holds out 8 samples, the last quarter of the data" in caplog.text
    assert "calibrated on 24 samples; 8 more held out for the metric" in compiled.summary()


def test_the_summary_says_what_was_compared() -> None:
    """A loss that fails on a single sample is compared batch by batch; float that was asked for is no choice."""

    def several(output: Tensor, target: Tensor) -> Tensor:
        if len(output) < 2:
            raise ValueError("one sample")
        return output.square().mean()

    compiled = quick(Plain, "weight_bits=5, bops=4%", loss=several)
    assert compiled.rival is not None
    assert compiled.rival.unit == "batch"
    assert "paired by batch, since the loss is no mean over samples or fails on single ones" in " ".join(
        compiled.summary().split()
    )
    floating = quick(Plain, weight_bits=(4, 8, 32), activation_bits=(8, 32)).uniform(32)
    assert "in float: head.weight: given, not chosen" in floating.summary()


def test_compile_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        assert quick(Plain).plan == quick(Plain).plan
    with torch.inference_mode(), pytest.raises(HawqfxError, match=r"outside of torch\.inference_mode"):
        quick(Plain)
