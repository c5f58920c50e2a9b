"""What passes promise, and what the law of the graph forbids."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hawqfx.errors import PassError
from hawqfx.export.legalize.pipeline import legalization
from hawqfx.export.weigh_file import WeighFile
from hawqfx.frontend.capture import capture
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Fact, Sensitivity
from hawqfx.ir.graph import copy_graph
from hawqfx.ir.program import Program
from hawqfx.latency.profile_latency import ProfileLatency
from hawqfx.pass_manager.base import Analysis, Kind, Observer, Pass, Rewrite
from hawqfx.pass_manager.manager import run
from hawqfx.pass_manager.verify import verify
from hawqfx.passes.fold_batchnorm import FoldBatchnorm
from hawqfx.passes.lowering import Lowering
from hawqfx.pipeline import every_pass
from tests.nets import Plain, build, images
from tests.tools import after, captured, context

ROOT = Path(__file__).parents[2]

EVERY_PASS = {step.name: step for step in every_pass()}
# beside the room that they belong to
ELSEWHERE = {
    step.name for step in (*legalization(), WeighFile(), ProfileLatency())
}  # beside the room that they belong to


@pytest.mark.parametrize("step", EVERY_PASS.values(), ids=EVERY_PASS)
def test_every_pass_is_a_frozen_dataclass_named_as_its_file(step: Pass) -> None:
    assert is_dataclass(step)
    assert type(step).__dataclass_params__.frozen
    if step.name not in ELSEWHERE:
        assert type(step).__module__ == f"hawqfx.passes.{step.name}"
        assert (ROOT / "passes" / f"{step.name}.py").exists()
    assert isinstance(step, Analysis) != isinstance(step, Rewrite)
    assert hash(step) == hash(replace(step))  # its fields are its options, and immutable
    assert all(field.init for field in fields(step))


def test_the_recipe_gives_what_it_needs_and_uses_every_pass_file() -> None:
    files = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert EVERY_PASS.keys() - ELSEWHERE == files


class Liar(Analysis):
    """Promises what it does not give."""

    gives: ClassVar[tuple[Kind, ...]] = (Sensitivity,)

    def learn(self, program: Program, context: Context) -> Mapping[str, Fact]:
        return {}


class Meddler(Analysis):
    """An analysis that changes the graph."""

    def learn(self, program: Program, context: Context) -> Program:
        return replace(program, graph=copy_graph(program.graph))


@dataclass(frozen=True)
class Spoiler(Rewrite):
    """A rewrite that changes the function by a tenth of a percent."""

    tolerance: ClassVar[float] = 1e-4

    def rewrite(self, program: Program) -> Program:
        graph = copy_graph(program.graph)
        (output,) = graph.graph.find_nodes(op="output")
        result = output.args[0][0]
        with graph.graph.inserting_before(output):
            output.args = ((graph.graph.call_function(torch.ops.aten.mul.Scalar, (result, 1.001)),),)
        graph.recompile()
        return replace(program, graph=graph)


def test_the_runner_holds_passes_to_their_promises() -> None:
    program = after("find_sites", Plain)
    with pytest.raises(PassError, match=r"liar promised Sensitivity and gave none for conv1\.weight"):
        run([Liar()], program, context())
    with pytest.raises(PassError, match="meddler is an analysis and changed the graph"):
        run([Meddler()], program, context())
    with pytest.raises(PassError, match=r"spoiler changed output 0 by 1.0e-03, over its tolerance 1e-04") as caught:
        run([Spoiler()], program, context())
    assert (
        "in pass spoiler, after ['fold_constants', 'fold_batchnorm', 'float_reference', 'decompose', 'equalize', "
        "'normalize_tables', 'insert_copies', 'smoothing', 'smooth_inputs', 'find_sites']" in caught.value.__notes__[0]
    )


class OnlyRounding(nn.Module):
    """An instance-norm of pixels that are all the same: its output is zero, and what sums in float32 leave of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.InstanceNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)).expand(-1, -1, 1, 3))


def test_an_output_that_is_rounding_alone_is_no_broken_promise() -> None:
    program = capture(build(OnlyRounding), context().batches[0])
    outputs = [each.run(*((images()[0][0],), {})) for each in (program, run([FoldBatchnorm()], program, context()))]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4 * outputs[0].abs().max()
    with pytest.raises(PassError, match="spoiler changed output 0"):
        run([Spoiler()], capture(build(Plain), context().batches[0]), context())


def test_the_order_is_checked_before_anything_runs() -> None:
    seen: list[str] = []

    class Watch(Observer):
        def before(self, number: int, step: Pass, program: Program) -> None:
            seen.append(step.name)

    with pytest.raises(
        PassError,
        match="lowering needs ChosenFormat, Quantizers, RoundedWeights, which no pass up to the program given",
    ):
        run([Lowering()], captured(Plain), context(), [Watch()])
    assert seen == []


def test_history_tells_what_ran() -> None:
    assert [step.name for step in after("calibration", Plain).history] == [
        "fold_constants",
        "fold_batchnorm",
        "float_reference",
        "decompose",
        "equalize",
        "normalize_tables",
        "insert_copies",
        "smoothing",
        "smooth_inputs",
        "find_sites",
        "histograms",
        "calibration",
    ]


def test_the_law_of_the_graph() -> None:
    program = after("find_sites", Plain)

    def broken(change: Any) -> Program:
        graph = copy_graph(program.graph)
        change(graph.graph)
        return replace(program, graph=graph)

    def call_a_module(graph: torch.fx.Graph) -> None:
        with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
            graph.call_method("relu", (graph.find_nodes(op="placeholder")[0],))

    def call_a_lambda(graph: torch.fx.Graph) -> None:
        with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
            graph.call_function(print, ())

    with pytest.raises(PassError, match="only functions may be called"):
        verify(broken(call_a_module))
    with pytest.raises(PassError, match="which is no operator"):
        verify(broken(call_a_lambda))
    with pytest.raises(PassError, match="two sites have the same key"):
        verify(replace(program, sites=(*program.sites, program.sites[0])))
    with pytest.raises(PassError, match="not in the graph"):
        verify(replace(program, sites=(replace(program.activations[0], nodes=("missing",)),)))


def test_a_rewrite_is_checked_on_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the check does not grow with the batches."""
    sizes: list[int] = []
    whole = Program.run

    def watched(program: Program, args: tuple[Any, ...], *rest: Any) -> Any:
        sizes.append(len(args[0]))
        return whole(program, args, *rest)

    monkeypatch.setattr(Program, "run", watched)
    after_capture = captured(Plain)
    run([FoldBatchnorm()], after_capture, context([torch.randn(100, *images()[0][0].shape[1:])]))
    assert sizes == [8, 8]
