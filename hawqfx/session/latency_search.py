"""A plan for a latency that the exported network keeps when it is run.

Where the network is slower than predicted, because the solver likes predictions that are too low, the prediction is
held to less; where no prediction is low enough, the network that is predicted to be the fastest is run.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from hawqfx import pipeline
from hawqfx.allocation.budget import Limit
from hawqfx.errors import InfeasibleBudget
from hawqfx.frontend.context import Context
from hawqfx.frontend.shapes import Shape, at_shape
from hawqfx.ir.facts import Account
from hawqfx.ir.program import Program
from hawqfx.maths.formats import FLOAT
from hawqfx.maths.latency_model import LatencyModel
from hawqfx.pass_manager.base import Pass
from hawqfx.passes.allocation import Allocation
from hawqfx.session.planner import Candidate, Planner

NOISE = 0.02  # of a latency, between one run of a benchmark and the next
TRIES = 6  # plans that are run


def timing(measured: Program, context: Context, limit: Limit, threads: int) -> Sequence[Pass]:
    """The passes after which a network knows its latencies at the shape of a limit: none, if it does already.

    Raises:
        BudgetError: if the network has no such shape.
    """
    _, shape = at_shape(measured, context.batches[0], limit.shape)
    if measured.knows(LatencyModel) and measured.about(LatencyModel).shape == shape:
        return ()
    return pipeline.profiling(threads, limit.shape)


def within_latency(planner: Planner, allocation: Allocation, threads: int) -> Candidate:
    """The plan that keeps the latency of the allocation's budget.

    Args:
        planner: whose program knows its LatencyModel, at the shape of the limit.
        allocation: with a budget on latency.
        threads: of onnxruntime.

    Raises:
        InfeasibleBudget: if no network is fast enough.
    """
    limits, model = allocation.budget, planner.measured.about(LatencyModel)
    limit = limits.latency
    assert limit is not None
    most = limit.of(model.seconds({site.key: FLOAT for site in planner.measured.sites}))
    wanted, predicted, seconds, fastest = most, math.nan, math.inf, False
    for _ in range(TRIES):
        held = replace(allocation, budget=replace(limits, latency=replace(limit, amount=wanted, relative=False)))
        try:
            planned = planner.quiet.plan(held)
        except InfeasibleBudget as error:
            if error.limit != "latency":
                raise
            fastest, wanted = True, error.least * (1 + 1e-9)
            continue
        predicted = model.seconds(planned.formats())
        seconds = _measured(planner, planned, limit.shape, threads)
        if seconds <= (1 - NOISE) * most:
            return planner.lower(_with_measurement(planned, most, seconds), str(limits))
        if fastest:
            break
        wanted *= (1 - NOISE) * most / seconds
    which = "the fastest network" if fastest else "a network"
    raise InfeasibleBudget(
        f"{limits.written('latency')} cannot be met: {which}, predicted to take {1e3 * predicted:.4g} ms, was measured "
        f"at {1e3 * seconds:.4g} ms", "latency", seconds,
    )  # fmt: skip


def _measured(planner: Planner, planned: Program, shape: Shape, threads: int) -> float:
    """Seconds of a run of the exported network at a shape."""
    from hawqfx.latency import profiler

    lowered = replace(planner.quiet, finish=()).lower(planned, "").program  # what a run takes, biases do not change
    example = planner.context.batches[0]
    data, _ = at_shape(planner.measured, example, shape)
    (seconds,) = profiler.whole_networks([lowered], example, data, threads)
    return seconds


def _with_measurement(planned: Program, bound: float, seconds: float) -> Program:
    """The plan whose account holds the user's bound and the measured latency."""
    account = planned.about(Account)
    use = replace(account.limits["latency"], bound=bound, measured=seconds)
    return planned.learn_about_network(replace(account, limits={**account.limits, "latency": use}))
