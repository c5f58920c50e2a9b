"""The comparison with other tools, with a tool that changes nothing in the place of theirs."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import peers
import pytest
import torch
from others.exchange import Job
from subjects import Subject, outputs
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hawqfx.frontend.losses import cross_entropy

SAME = 1e-6  # logits of order one in float32, by other kernels


class Padded(nn.Conv2d):
    """A convolution of one's own class, as EfficientNet-Lite has them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, self.padding, (1, 1), self.groups)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (Padded(2, 4, 3, stride=2), nn.ReLU(), Padded(4, 4, 3, groups=2, bias=False), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(4 * 3 * 3, 3)).eval()


def subject() -> Subject:
    model, inputs = network(), list(torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(1)).split(4))

    def distance(output: Tensor, wanted: Tensor) -> Tensor:
        return (output.double() - wanted.double()).square().sum(1)

    return Subject(
        "small", model, inputs, cross_entropy, "mean", lambda other: float(outputs(other, inputs).mean()), 8, inputs,
        distance, classes=True,
    )  # fmt: skip


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], peers.Tool]:
    """Makes a tool of the body of its `quantize`."""

    def made(body: str) -> peers.Tool:
        head = "import torch\nfrom others import exchange\n\n\ndef quantize(job):\n"
        tail = '\n\nif __name__ == "__main__":\n    exchange.serve(quantize)\n'
        (tmp_path / "stand_in.py").write_text(head + textwrap.indent(body, "    ") + tail)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return peers.Tool("stand_in", (), lambda bits, plan: {})

    return made


def test_a_network_of_torchs_own_modules_answers_the_same() -> None:
    model, x = network(), torch.randn(4, 2, 8, 8)
    plain = peers.plain(model)
    torch.testing.assert_close(plain(x), model(x), atol=SAME, rtol=0)
    assert [type(each) for each in plain.modules() if list(each.parameters(recurse=False))] == [
        nn.Conv2d, nn.Conv2d, nn.Linear,
    ]  # fmt: skip
    assert sum(each.numel() for each in plain.parameters()) == sum(each.numel() for each in model.parameters())


class Functions(nn.Module):
    """What traced networks hold beside layers: functions, methods, slices, numbers, and a parameter of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.gain = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.conv(x)), inplace=True)
        return (
            torch.cat([x[:, 1:, ::2], F.pad(x, (0, 1))[:, 1:, ::2, :-1]], dim=1).mean([2, 3])
            @ self.gain.repeat(2)[1:-1]
        )


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 8, 8)
    for model in (Functions().eval(), network()):
        job = Job(peers.plain(model), x, ["conv.weight"], 2.5, {"bits": {"conv.weight": 3}}, tmp_path / "model.onnx")
        job.ask()
        read = Job.asked(job.file)
        assert torch.equal(read.model(x), job.model(x))
        assert list(read.model.state_dict()) == list(job.model.state_dict())
        assert not any(module.training for module in read.model.modules())
        assert (read.weights, read.bytes, read.options, read.file) == (job.weights, job.bytes, job.options, job.file)


def test_a_job_of_modules_of_ones_own_is_refused(tmp_path: Path) -> None:
    class Leaf(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return True

    model = network()
    traced = fx.GraphModule(model, Leaf().trace(model))
    with pytest.raises(TypeError, match="Padded is no module"):
        Job(traced, torch.zeros(1, 2, 8, 8), [], 0, {}, tmp_path / "model.onnx").ask()


def test_bytes_are_bits_times_elements() -> None:
    assert peers.packed_bytes({"one": (4, 100), "other": (2.5, 16)}) == 50 + 5


def test_a_tool_that_changes_nothing_is_judged_as_the_float_network(tool: Callable[[str], peers.Tool]) -> None:
    unchanged = tool(
        "network, example = torch.nn.Sequential(job.model), (job.inputs[:2],)\n"
        'axes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}\n'
        "torch.onnx.export(network, example, str(job.file), dynamo=False, **axes)\n"
        "return {name: (32, job.model.get_parameter(name).numel()) for name in job.weights}"
    )
    found = peers.examine(subject(), 32, {"unchanged": unchanged}, minutes=5)
    row = found["tools"]["unchanged"]
    assert row["bytes"] == found["bytes"] == 4 * (4 * 2 * 9 + 4 * 2 * 9 + 3 * 36)
    assert row["score"] == pytest.approx(found["float"], abs=SAME)
    assert row["agreement"] == 1
    assert row["divergence"] < SAME
    assert row["MiB"] > 0


def test_the_table_has_the_message_of_a_tool_that_fails(
    tool: Callable[[str], peers.Tool], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"broken": tool('raise ValueError("no such layer")')}
    found = peers.examine(subject(), 4, broken, minutes=5, earlier={"other": {"failed": "no memory"}})
    assert found["tools"] == {
        "other": {"failed": "no memory"}, "broken": {"failed": "RuntimeError: ValueError: no such layer"},
    }  # fmt: skip
    peers.show({"small": found})
    assert "no such layer" in capsys.readouterr().out


def test_a_tool_that_takes_too_long_is_stopped(tool: Callable[[str], peers.Tool], tmp_path: Path) -> None:
    slow = tool("import time\ntime.sleep(60)")
    job = Job(peers.plain(network()), torch.zeros(1, 2, 8, 8), [], 0, {}, tmp_path / "model.onnx")
    row = peers.result(slow, job, subject(), minutes=0.01)
    assert row == {"failed": "RuntimeError: not done after 0.01 minutes"}
