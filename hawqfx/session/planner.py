"""Plans of a measured network: choose formats, lower them, and run the lowered network on data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hawqfx.allocation.budget import Budget, Limit
from hawqfx.allocation.explain import explained
from hawqfx.allocation.search_space import Formats
from hawqfx.analysis.finite import refuse_not_finite
from hawqfx.errors import LossError
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import Batch
from hawqfx.frontend.trial import score_of
from hawqfx.ir.facts import Account, ChosenFormat, LossIncrease
from hawqfx.ir.program import Program
from hawqfx.maths.formats import FLOAT_BITS, STATIC_BITS, Format
from hawqfx.maths.paired import Difference, paired_difference
from hawqfx.pass_manager.base import Observer, Pass
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.lowering import Lowering

Score = Callable[[Any, Any], float | torch.Tensor]


@dataclass(frozen=True)
class Scoring:
    """The judge of a budget on `drop`.

    Args:
        score: a function of (output, target), the mean over a batch, higher being better.
        holdout: data held out of calibration, that a drop is validated on.
    """

    score: Score
    holdout: tuple[Batch, ...]


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of a network on the calibration data.

    Args:
        values: (n,) float64, of samples, or of batches where the loss is no mean over samples.
        weights: (n,) float64, samples that each value stands for.
    """

    values: Tensor
    weights: Tensor

    @property
    def mean(self) -> float:
        return float((self.values * self.weights).sum() / self.weights.sum())

    @property
    def unit(self) -> str:
        """What each value is the loss of: "sample", or "batch" where a batch does not part by samples."""
        return "sample" if bool((self.weights == 1).all()) else "batch"

    def minus(self, other: "Losses") -> Difference:
        """The mean of the paired differences, and its standard error."""
        return paired_difference(self.values, other.values, self.weights)


@dataclass(frozen=True)
class Rival:
    """Uniform bits that keep the same limits as a plan.

    Args:
        weights: the formats of weights, in words.
        activations: those of activations.
        loss: the mean loss on the calibration data.
        behind: the loss of the plan less that of uniform bits, pair by pair.
        chosen: whether uniform bits are returned in place of the plan.
        unit: what the pairs are: "sample", or "batch".
    """

    weights: str
    activations: str
    loss: float
    behind: Difference
    chosen: bool
    unit: str = "sample"


@dataclass(frozen=True)
class Refinement:
    """A plan that was tried after another.

    Args:
        changed: number of sites whose format differs.
        gain: the expected loss of the new plan less that of the old one, on samples that were not measured on.
        taken: whether it is a gain beyond two standard errors.
        unit: what is compared: "sample" by sample, or "batch" by batch.
    """

    changed: int
    gain: Difference
    taken: bool
    unit: str = "sample"


@dataclass(frozen=True)
class Candidate:
    """A plan and the network made of it.

    Args:
        planned: the float program with the chosen formats.
        program: the lowered one.
        budget: the text that the plan is for.
        rival: uniform bits within the same limits, if they were tried.
        scores: the metric of the float network and of the lowered one, by the name of the data.
        refinements: the plans that were tried after the first one.
    """

    planned: Program
    program: Program
    budget: str
    rival: Rival | None = None
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    refinements: tuple[Refinement, ...] = ()


@dataclass(frozen=True)
class Planner:
    """Makes plans for a measured network, and lowers them.

    Args:
        measured: the float program with all facts that no budget changes.
        context: the calibration data and the loss.
        observers: of the passes that run.
        scoring: the judge of a budget on `drop`, if there is one.
        finish: the passes between the choice of formats and lowering.
    """

    measured: Program
    context: Context
    observers: Sequence[Observer] = ()
    scoring: Scoring | None = None
    finish: Sequence[Pass] = ()

    @property
    def quiet(self) -> "Planner":
        """A planner for plans that are only tried: nobody observes them."""
        return replace(self, observers=())

    def plan(self, allocation: Allocation) -> Program:
        """The program with the formats that the allocation chooses.

        Raises:
            InfeasibleBudget: if no choice keeps the budget.
        """
        return run([allocation], self.measured, self.context, self.observers)

    def explain(self, allocation: Allocation, chosen: Formats) -> Program:
        """The program with formats that were chosen elsewhere, explained under the limits of an allocation."""
        return explained(allocation.task(self.measured, chosen), chosen, None)

    def given(self, chosen: Formats) -> Program:
        """The program with formats that keep no budget, and the increase predicted for each where it was measured."""
        choices = {key: ChosenFormat(width, self._increase(key, width)) for key, width in chosen.items()}
        # a plan that is followed has an account of its own
        return replace(self.measured, facts=self.measured.facts.without(Account)).learn(choices)

    def lower(self, planned: Program, budget: str) -> Candidate:
        """The lowered network of a plan, which is finished first if it is not.

        Raises:
            LossError: if a value of it is not finite on the first batch, and is in the float network.
        """
        past = {step.name for step in planned.history}
        left = [step for step in self.finish if step.name not in past]
        finished = run(left, planned, self.context, self.observers)
        lowered = run([Lowering()], finished, self.context, self.observers)
        _require_finite(self.measured, lowered, self.context.batches[0])
        return Candidate(finished, lowered, budget)

    @torch.no_grad()
    def losses(self, *programs: Program, expected: bool = False) -> "list[Losses]":
        """The losses of programs on the calibration data, sample by sample and by the same targets.

        Args:
            programs: to be compared.
            expected: whether the targets are the expected ones where these are known, whatever targets the data have.
        """
        values: list[list[Tensor]] = [[] for _ in programs]
        weights: list[Tensor] = []
        for index, batch in enumerate(self.context.batches):
            target = batch.target
            if expected or batch.lacks_targets:
                find = self.context.expected_target if expected else self.context.target_of
                target = find(self.measured.run(batch.args, batch.kwargs), batch, index)
            found = [
                self.context.sample_losses(program.run(batch.args, batch.kwargs), target, index) for program in programs
            ]
            fewest = min(map(len, found))
            for parts, losses in zip(values, found, strict=True):
                parts.append((losses if len(losses) == fewest else losses.mean().reshape(1)).cpu())
            weights.append(torch.full((fewest,), batch.size / fewest, dtype=torch.float64))
        return [Losses(torch.cat(parts), torch.cat(weights)) for parts in values]

    def loss(self, program: Program) -> float:
        """The mean loss of a program over the calibration data."""
        return self.losses(program)[0].mean

    @torch.no_grad()
    def score(self, program: Program, batches: Sequence[Batch]) -> float:
        """The mean score of a program over batches, weighed by their size.

        Raises:
            LossError: if the metric raises, returns no number, or is not finite.
        """
        assert self.scoring is not None
        total = 0.0
        for batch in batches:
            total += batch.size * score_of(self.scoring.score, program.run(batch.args, batch.kwargs), batch)
        score = total / sum(batch.size for batch in batches)
        if not math.isfinite(score):
            raise LossError(f"the metric is {score}: it must be finite, the mean over a batch, higher being better")
        return score

    def range_of(self, allocation: Allocation, limit: str, count: int) -> list[float]:
        """Amounts of a limit from that of the narrowest formats to that of the widest, a constant factor apart; whole
        bytes, where it is in bytes."""
        whole = replace(allocation, budget=Budget(**{limit: Limit(1.0, relative=True)}))
        ends = []
        for pick in (min, max):
            chosen = {key: pick(formats) for key, formats in allocation.rules.formats(self.measured).items()}
            ends.append(self.explain(whole, chosen).about(Account).limits[limit])
        low, high = (use.amount for use in ends)
        amounts = [low * (high / low) ** (step / (count - 1)) for step in range(count)]
        return [float(round(amount)) for amount in amounts] if ends[0].unit == "bytes" else amounts

    def _increase(self, key: str, width: Format) -> float:
        """The increase that is predicted for a site; NaN where nothing was measured."""
        if width.is_float:
            return 0.0
        known: Mapping[Format, float] = {}
        if self.measured.facts.has(key, LossIncrease):
            known = self.measured.facts.get(key, LossIncrease).by_format
        return known.get(width, math.nan)


def for_budget(allocation: Allocation, limits: Budget) -> Allocation:
    """The allocation with a budget; where that limits latency, with float among the formats of every site unless its
    rules say which bits, since a float kernel may be faster than the conversions of an integer one."""
    ruled = replace(allocation, budget=limits)
    if limits.latency is None:
        return ruled
    every = (*STATIC_BITS, FLOAT_BITS)
    weights, activations = (
        every if bits is None else bits for bits in (allocation.weight_bits, allocation.activation_bits)
    )
    return replace(ruled, weight_bits=weights, activation_bits=activations)


@torch.no_grad()
def _require_finite(measured: Program, lowered: Program, batch: Batch) -> None:
    """Raises LossError if a network is not finite on a batch on which the one that was measured is."""
    output = lowered.run(batch.args, batch.kwargs)
    if not all(bool(torch.isfinite(leaf).all()) for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)):
        _, exact = measured.values(batch.args, batch.kwargs)
        _, quantized = lowered.values(batch.args, batch.kwargs)
        refuse_not_finite(measured, exact, quantized)
