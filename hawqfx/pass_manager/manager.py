"""Runs passes in order, and checks after every pass that it has kept its promise."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.errors import HawqfxError, PassError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import NETWORK, NETWORK_FACTS, ActivationHistogram, RoundedWeights
from hawqfx.ir.program import Program, Step
from hawqfx.ir.sites import ActivationSite, Site, WeightSite
from hawqfx.ir.sources import dropped_sources
from hawqfx.pass_manager.base import Analysis, Kind, Observer, Pass, Rewrite
from hawqfx.pass_manager.verify import verify

_CHECKED = 8  # samples that tell whether a rewrite keeps the function: each has the values of all channels and pixels
# What inputs are moved by to see how much of an output is rounding, such as all of what an instance-norm makes of equal
# pixels; and how many such changes a rewrite may make, whose sums are in another order at every node.
_LAST_PLACE, _NOISES = 1 + 2.0**-22, 4.0
# facts that one kind of site alone has
_SITES_OF: Mapping[Kind, type[Site]] = {RoundedWeights: WeightSite, ActivationHistogram: ActivationSite}


def run(passes: Sequence[Pass], program: Program, context: Context, observers: Sequence[Observer] = ()) -> Program:
    """Run passes.

    Args:
        passes: in the order in which they run.
        program: the input of the first pass.
        context: batches, loss, device and seed; the function of a Rewrite is checked on the first samples.
        observers: watch the program between passes.

    Returns:
        The output of the last pass.

    Raises:
        PassError: before the first pass runs, if a pass needs facts that no pass before it gives; after a pass, if it
            has broken its promise.
        HawqfxError: from a pass; the error gains a note that names the pass.
    """
    _check_order(passes, program)
    with dropped_sources() as kept:
        program = _run(passes, program, context, observers)
        kept.append(program.graph)
    return program


def _run(passes: Sequence[Pass], program: Program, context: Context, observers: Sequence[Observer]) -> Program:
    for number, step in enumerate(passes, len(program.history) + 1):
        for observer in observers:
            observer.before(number, step, program)
        start = time.perf_counter()
        try:
            done = _apply(step, program, context)
            seconds = time.perf_counter() - start
            _check_promise(step, program, done, context)
        except HawqfxError as error:
            error.add_note(f"in pass {step.name}, after {[past.name for past in program.history] or 'capture'}")
            raise
        program = replace(done, history=(*program.history, Step(step.name, seconds)))
        for observer in observers:
            observer.after(number, step, program, seconds)
    return program


def _apply(step: Pass, program: Program, context: Context) -> Program:
    if isinstance(step, Analysis):
        learned = step.learn(program, context)
        return learned if isinstance(learned, Program) else program.learn(learned)
    assert isinstance(step, Rewrite), f"{step.name} is neither an Analysis nor a Rewrite"
    return step.rewrite(program)


def _check_order(passes: Sequence[Pass], program: Program) -> None:
    """Raise PassError if a pass needs facts that neither the program has nor an earlier pass gives."""
    known: set[Kind] = {type(site) for site in program.sites} | {kind for _, kind in program.facts}
    before = "the program given"
    for step in passes:
        missing = [kind.__name__ for kind in step.needs if kind not in known]
        if missing:
            raise PassError(f"{step.name} needs {', '.join(missing)}, which no pass up to {before} gives")
        known |= set(step.gives)
        before = step.name


def _check_promise(step: Pass, before: Program, after: Program, context: Context) -> None:
    """Raise PassError unless a pass has given its facts, kept the law of the graph, and kept the graph or function."""
    if isinstance(step, Analysis) and (
        after.graph is not before.graph or str(after.graph.graph) != str(before.graph.graph)
    ):
        raise PassError(f"{step.name} is an analysis and changed the graph")
    verify(after)
    for kind in step.gives:
        if kind in (WeightSite, ActivationSite):
            continue
        if kind in NETWORK_FACTS:
            if not after.facts.has(NETWORK, kind):
                raise PassError(f"{step.name} promised {kind.__name__} of the network and gave none")
            continue
        sites = [site for site in after.sites if isinstance(site, _SITES_OF.get(kind, Site))]
        silent = [site.key for site in sites if not after.facts.has(site.key, kind)]  # type: ignore[arg-type]
        if silent:
            raise PassError(f"{step.name} promised {kind.__name__} and gave none for {', '.join(silent[:3])}")
    if isinstance(step, Rewrite) and step.tolerance < float("inf"):
        _check_function(step, before, after, context)


@torch.no_grad()
def _check_function(step: Rewrite, before: Program, after: Program, context: Context) -> None:
    """Raise PassError if an output on the first samples changes by more than the tolerance, and by more than where the
    inputs change in their last place."""
    batch = context.batches[0]
    if before.dynamic_batch:
        batch = batch.first(_CHECKED)
    old, new = (_tensors(program.run(batch.args, batch.kwargs)) for program in (before, after))
    changes = _changes(old, new)
    if all(change <= step.tolerance for change in changes):
        return
    moved = batch.map(lambda tensor: tensor * _LAST_PLACE if tensor.is_floating_point() else tensor)
    noises = _changes(old, _tensors(before.run(moved.args, moved.kwargs)))
    for number, (change, noise) in enumerate(zip(changes, noises, strict=True)):
        if not change <= max(step.tolerance, _NOISES * noise):
            raise PassError(
                f"{step.name} changed output {number} by {change:.1e}, over its tolerance {step.tolerance:.0e}"
            )


def _changes(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[float]:
    """The largest change of each output, relative to its largest value."""
    tiny = torch.finfo(torch.float32).tiny
    return [
        float((one - other).abs().max() / one.abs().max().clamp_min(tiny)) for one, other in zip(old, new, strict=True)
    ]


def _tensors(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor)]
