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
    with pytest.raises(CaptureError, match="captured in train mode"):
        hawqfx.compile(exported, "weight_bits=5", images())


class Branching(nn.Module):
    """Control flow that depends on values, which torch.export refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) if x.sum() > 0 else x.flatten(1)[:, :3]


def test_a_model_that_export_refuses() -> None:
    with pytest.raises(CaptureError, match=r"(?s)torch.export refused Branching.*rewrite it with torch.where"):
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
    assert "in pass allocation" in "".join(caught.value.__notes__)


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
        ({"rounding": "neares"}, r"rounding='neares': must be 'learned', 'compensated' or 'nearest'"),
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
