"""From a saved file and its model to the same compiled network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hawqfx import arguments, pipeline
from hawqfx.allocation.budget import Budget
from hawqfx.errors import PlanError
from hawqfx.frontend.capture import Model, capture
from hawqfx.frontend.context import Context
from hawqfx.frontend.decoders import as_captured
from hawqfx.frontend.losses import cross_entropy
from hawqfx.frontend.single_precision import in_single_precision
from hawqfx.ir.facts import ChosenFormat, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import nearest_codes
from hawqfx.ir.sites import WeightSite
from hawqfx.pass_manager.base import Analysis, Kind, option
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.smoothing import Smoothing
from hawqfx.session import saved
from hawqfx.session.compiled import Compiled
from hawqfx.session.pins import of_graph, of_network
from hawqfx.session.plan import FollowPlan
from hawqfx.session.planner import Planner
from hawqfx.session.record import with_facts
from hawqfx.session.session import Session


@dataclass(frozen=True)
class StoredCodes(Analysis):
    """The codes of a saved file, in place of rounding."""

    codes: Mapping[str, Tensor] = option(doc="codes/KEY and bias/KEY, as hawqfx.session.pins.stored_codes has them")
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, Quantizers, ChosenFormat)
    gives: ClassVar[tuple[Kind, ...]] = (RoundedWeights,)

    def learn(self, program: Program, context: Context) -> Mapping[str, RoundedWeights]:
        """Raises PlanError if a weight has no codes, or codes of another shape or beyond the range of its bits."""
        formats = program.formats()
        quantized = [site for site in program.weights if not formats[site.key].is_float]
        facts = {site.key: RoundedWeights({}, {}, {}) for site in program.weights}
        for site in quantized:
            width, codes = formats[site.key], self.codes.get(f"codes/{site.key}")
            quantizer = program.facts.get(site.key, Quantizers).by_format[width]
            if codes is None or codes.shape != program.tensor(site.key).shape:
                raise PlanError(f"the file is for another model: it has no codes for {site.key} of this shape")
            if codes.is_floating_point() or not torch.equal(nearest_codes(codes.float(), quantizer), codes.float()):
                raise PlanError(
                    f"the codes of {site.key} are beyond {quantizer.low} to {quantizer.high} or a row's bits"
                )
            bias = self.codes.get(f"bias/{site.key}")
            facts[site.key] = RoundedWeights({width: codes}, {}, {}, {} if bias is None else {width: bias})
        return facts


def load(path: str | Path, model: Model, dynamic_shapes: Any = None) -> Compiled:
    """The network of a file that Compiled.save() wrote: the same plan, codes, summary and ONNX files.

    It has no sensitivities, so that other budgets need compile().  The codes are those of the file, whatever the data;
    compile(model, None, data, plan=path, reround=True) takes the bits of the file for other weights.

    Args:
        path: of the file.
        model: the model that was compiled, with the same weights.  It is not changed.
        dynamic_shapes: as they were given to compile().

    Raises:
        PlanError: if the file cannot be read, is damaged, or was made for another model or other weights.
        CaptureError: if the model cannot be captured.
    """
    arguments.model(model)
    content = saved.read(Path(path))
    context = Context((content.example,), cross_entropy, loss_reason=content.calibrated.loss_reason)
    smoothing = Smoothing(given=content.plan.exponents)
    recipe = pipeline.recipe(keep_float=content.keep_float, smoothing=smoothing)
    model, dynamic_shapes = as_captured(model, content.example, dynamic_shapes)
    captured = in_single_precision(capture(model, content.example, dynamic_shapes))
    rewritten = run(recipe.rewrite, captured, context)
    follow = [FollowPlan(content.plan, rounds=False), StoredCodes(content.codes), *recipe.costs]
    planned = with_facts(run(follow, rewritten, context), content.facts)
    lowered = Planner(planned, context).lower(planned, content.plan.budget).program
    if (content.graph, content.network) != (of_graph(planned), of_network(lowered)):
        raise PlanError(
            f"{path} was saved for another graph of this model, with other dynamic_shapes=, or by another version of "
            "hawqfx or torch: give the same, or compile again"
        )
    session = Session(planned, context, (), Allocation(Budget()), target=content.target, keep_float=content.keep_float)
    trials = content.trials
    return Compiled(
        session, planned, lowered, content.plan.budget, trials.rival, trials.scores, trials.refinements,
        content.calibrated, content.plan.pins,
    )  # fmt: skip
