"""The problem as a mixed-integer program: columns that are 0 or 1, and linear rows.

A column stands for an option of an item that has a choice, or for a pair of options of two such items whose pair has
terms.  Rows of sums tie the columns of a pair to those of its two items: y_km is the column of options k and m,

    sum_k x_ik = 1   for each item i,     sum_m y_km = x_ik   for each k,     sum_k y_km = x_jm   for each m.

In every sum of terms the least amount of each item and of each pair goes into a constant, so that all columns have
amounts of zero or more.
"""

from collections.abc import Iterable, Sequence
from math import inf
from typing import NamedTuple

from hawqfx.allocation.solver.problem import LinearConstraint, Nogood, Pair, Problem, Table, Terms

Amounts = list[tuple[int, float]]  # a column and its amount, in the unit of the terms
NO_COLUMNS = ((0, 0.0),)  # a row needs a column: solvers then say themselves that no choice keeps the row


class Row(NamedTuple):
    """A linear row: low <= sum of amounts of columns <= high.

    Args:
        columns: numbers of columns.
        amounts: by entry of `columns`.
        low: the least sum, or minus infinity.
        high: the largest sum.
    """

    columns: list[int]
    amounts: list[float]
    low: float
    high: float


class Core(NamedTuple):
    """The result of solving a program for a core, some of the options of a problem.

    Args:
        picks: the option of every item in the best choice so far; None if no choice is known.
        loss: the total loss of that choice, or infinity.
        bound: no choice in the core has a smaller total loss; infinity if the core has no choice.
        settled: whether loss and bound are as near as the caller asked, or the core has no choice.
    """

    picks: tuple[int, ...] | None
    loss: float
    bound: float
    settled: bool


class MixedIntegerProgram:
    """A problem with some of its options, as rows and columns.

    Args:
        problem: the problem.
        kept: the options kept of each item, at least one.

    Attributes:
        free: items that have more than one option.
        columns: (item, option) -> column, for free items.
        column_count: the number of all columns, those of pairs included.
        rows: all rows.
        choice_rows: free item -> number of the row by which it has one option.
        pair_columns: pair -> (option, option) -> column.
        link_rows: pair -> numbers of the rows that tie it to its first item and to its second, by option.
        limit_rows: number of the row of each limit; None if every choice keeps it.
        nogood_rows: number of the row of each nogood; None if every choice keeps it.
        losses: loss of each column, zero or more.
        constant: the total loss is this and the losses of the columns that are 1.
    """

    def __init__(self, problem: Problem, kept: Sequence[Sequence[int]]) -> None:
        self.problem, self.kept = problem, kept
        self.free = [i for i, options in enumerate(kept) if len(options) > 1]
        self.columns: dict[tuple[int, int], int] = {}
        for i in self.free:
            for k in kept[i]:
                self.columns[i, k] = len(self.columns)
        self.column_count = len(self.columns)
        self.rows: list[Row] = []
        self.choice_rows = {i: self._add_row((self.columns[i, k], 1.0) for k in kept[i]) for i in self.free}
        self.pair_columns: dict[Pair, dict[tuple[int, int], int]] = {}
        self.link_rows: dict[Pair, tuple[dict[int, int], dict[int, int]]] = {}
        self.limit_rows = [self._add_limit(limit) for limit in problem.limits]
        self.nogood_rows = [self._add_nogood(nogood) for nogood in problem.nogoods]
        self.constant, amounts = self._reduce(problem.objective)
        self.losses = [0.0] * self.column_count
        for column, loss in amounts:
            self.losses[column] += loss

    def values(self, picks: Sequence[int]) -> dict[int, bool]:
        """The columns at a choice.

        Args:
            picks: the option of every item.

        Returns:
            Column -> whether it is 1.
        """
        known = {column: picks[i] == k for (i, k), column in self.columns.items()}
        for (i, j), both in self.pair_columns.items():
            known |= {column: (picks[i], picks[j]) == options for options, column in both.items()}
        return known

    def picks(self, values: Sequence[float]) -> tuple[int, ...]:
        """The choice that takes the option of the largest column of each item.

        Args:
            values: from 0 to 1, by column.

        Returns:
            The option of every item.
        """
        return tuple(
            max(options, key=lambda k, i=i: values[self.columns[i, k]]) if i in self.choice_rows else options[0]  # type: ignore[misc]
            for i, options in enumerate(self.kept)
        )

    def _add_row(self, amounts: Iterable[tuple[int, float]], low: float = 1.0, high: float = 1.0) -> int:
        """The number of a new row."""
        columns, values = zip(*amounts, strict=True)
        self.rows.append(Row(list(columns), list(values), low, high))
        return len(self.rows) - 1

    def _add_limit(self, limit: LinearConstraint) -> int | None:
        """The number of the row of a limit; None if every choice keeps it."""
        constant, amounts = self._reduce(limit.terms)
        slack = limit.bound - constant
        if sum(amount for _, amount in amounts) <= slack:
            return None
        return self._add_row(amounts or NO_COLUMNS, -inf, slack)

    def _add_nogood(self, nogood: Nogood) -> int | None:
        """The number of the row by which an item takes an option outside of its set; None if every choice does so."""
        inside = {i: [k for k in self.kept[i] if k in options] for i, options in nogood.items()}
        if any(not options for options in inside.values()):
            return None
        amounts = [(self.columns[i, k], 1.0) for i, options in inside.items() if i in self.choice_rows for k in options]
        return self._add_row(amounts or NO_COLUMNS, -inf, sum(i in self.choice_rows for i in nogood) - 1)

    def _reduce(self, terms: Terms) -> tuple[float, Amounts]:
        """Terms as a constant, and amounts of zero or more that columns have."""
        constant: float = 0
        amounts: Amounts = []
        for i, costs in terms.single.items():
            least = min(costs[k] for k in self.kept[i])
            constant += least
            if i in self.choice_rows:
                amounts += ((self.columns[i, k], costs[k] - least) for k in self.kept[i] if costs[k] != least)
        for (i, j), table in terms.pairs.items():
            least = min(table[k][m] for k in self.kept[i] for m in self.kept[j])
            constant += least
            amounts += self._pair_amounts((i, j), table, least)
        return constant, amounts

    def _pair_amounts(self, pair: Pair, table: Table, least: float) -> Amounts:
        """Amounts beyond the least of a pair: of its own columns if both items are free, else of those of the one."""
        i, j = pair
        if i in self.choice_rows and j in self.choice_rows:
            both = self._columns_of_pair(pair)
            return [(column, table[k][m] - least) for (k, m), column in both.items() if table[k][m] != least]
        if i in self.choice_rows:
            (m,) = self.kept[j]
            return [(self.columns[i, k], table[k][m] - least) for k in self.kept[i]]
        if j in self.choice_rows:
            (k,) = self.kept[i]
            return [(self.columns[j, m], table[k][m] - least) for m in self.kept[j]]
        return []

    def _columns_of_pair(self, pair: Pair) -> dict[tuple[int, int], int]:
        """The columns of a pair of free items, made with their rows at the first call."""
        if pair not in self.pair_columns:
            options = [(k, m) for k in self.kept[pair[0]] for m in self.kept[pair[1]]]
            self.pair_columns[pair] = {km: self.column_count + number for number, km in enumerate(options)}
            self.column_count += len(options)
            self.link_rows[pair] = (self._add_links(pair, 0), self._add_links(pair, 1))
        return self.pair_columns[pair]

    def _add_links(self, pair: Pair, side: int) -> dict[int, int]:
        """Rows that tie the columns of a pair to those of its first item (side 0) or second (side 1), by option."""
        item, numbers = pair[side], {}
        for option in self.kept[item]:
            own = [(column, 1.0) for options, column in self.pair_columns[pair].items() if options[side] == option]
            numbers[option] = self._add_row([*own, (self.columns[item, option], -1.0)], 0, 0)
        return numbers
