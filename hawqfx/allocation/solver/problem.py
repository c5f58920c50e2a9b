"""The integer program, and the answers to it.

    minimise  sum_i loss_i[x_i] + sum_(i,j) loss_ij[x_i][x_j]   over an option x_i for every item i, subject to
    sum_i cost_i[x_i] + sum_(i,j) cost_ij[x_i][x_j]  <=  bound   for each limit, and
    x_i outside of set_i for at least one item i                 for each nogood.

This is a multiple-choice knapsack with any number of limits and pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite

Table = Sequence[Sequence[float]]  # amounts by option of the first item of a pair and option of the second
Pair = tuple[int, int]  # numbers of two items
Nogood = Mapping[int, frozenset[int]]  # item -> options; not all of these items may have an option of their set


@dataclass(frozen=True)
class Terms:
    """A sum of amounts, each of which depends on the option of an item or on the options of two.

    Args:
        single: item -> amount of each option.
        pairs: pair of items -> amount of each pair of options.
    """

    single: Mapping[int, Sequence[float]]
    pairs: Mapping[Pair, Table]

    def total(self, picks: Sequence[int]) -> float:
        """The sum at a choice.

        Args:
            picks: the option of every item.

        Returns:
            The sum, in the unit of the amounts.
        """
        single = sum(costs[picks[i]] for i, costs in self.single.items())
        return single + sum(table[picks[i]][picks[j]] for (i, j), table in self.pairs.items())

    def most(self) -> float:
        """The sum of the largest amount of each item and pair, which no choice exceeds."""
        pairs = (max(map(max, table)) for table in self.pairs.values())
        return sum(map(max, self.single.values())) + sum(pairs)


@dataclass(frozen=True)
class LinearConstraint:
    """A limit: a sum that must not exceed a bound.

    Args:
        name: tells limits apart.
        bound: the largest sum allowed, in the unit of the terms.
        terms: the sum; its amounts are integers.
        amount: the same for all sums whose largest is limited; empty for a sum by itself.
    """

    name: str
    bound: int
    terms: Terms
    amount: str = ""


@dataclass(frozen=True)
class Problem:
    """The losses to minimise, and the rules that a choice must keep.

    Args:
        losses: loss of each option of each item, of either sign.
        limits: upper bounds on sums.
        nogoods: sets of options that exclude each other.
        interactions: further losses by pair of items and pair of options, of either sign.

    Raises:
        ValueError: if a loss is not finite.
    """

    losses: Sequence[Sequence[float]]
    limits: Sequence[LinearConstraint] = ()
    nogoods: Sequence[Nogood] = ()
    interactions: Mapping[Pair, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, options in enumerate(self.losses):
            if not all(map(isfinite, options)):
                raise ValueError(f"the losses of item {i} are not finite: {list(options)}")
        for pair, table in self.interactions.items():
            if not all(map(isfinite, (value for row in table for value in row))):
                raise ValueError(f"the losses of the pair {pair} are not finite")

    @cached_property
    def objective(self) -> Terms:
        """The total loss, as a sum."""
        return Terms(dict(enumerate(self.losses)), self.interactions)

    def keeps(self, picks: Sequence[int]) -> bool:
        """Whether a choice keeps every limit and every nogood.

        Args:
            picks: the option of every item.

        Returns:
            True if it does.
        """
        return all(limit.terms.total(picks) <= limit.bound for limit in self.limits) and not any(
            all(picks[i] in options for i, options in nogood.items()) for nogood in self.nogoods
        )


@dataclass(frozen=True)
class Choice:
    """The best choice that the solver knows, and the proof of how good it is.

    Args:
        picks: the option of every item.
        loss: the total loss of these options.
        bound: no choice has a smaller total loss; proven.
        optimal: whether `loss` is within the allowed gap of `bound`.
        prices: limit -> decrease of the least loss per further unit of its bound, in the linear relaxation.
    """

    picks: tuple[int, ...]
    loss: float
    bound: float
    optimal: bool
    prices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Infeasible:
    """A limit that no choice keeps; of several sums whose largest is limited, the one that must be exceeded most.

    Args:
        name: of the limit.
        least: the least sum of the limit.
        alone: True if the other limits are left out for that; False if the limits before it are kept.
    """

    name: str
    least: int
    alone: bool
