"""The bits of each row of a table, of which the rows together have so many on average.

A row of a table is read where its word occurs, and words differ by thousands in how often they do.  An error of a row
costs its squares times what a squared error of that row costs, so that rows which cost much gain more by a bit than
the others lose by one: the least sum is met where the last bit of every row was worth the same (the reverse
water-filling of rate-distortion theory, Cover and Thomas, "Elements of information theory", section 10.3.3, in whole
bits).

Samples tell what rows cost of the words that are in them, and others will come.  So a row's cost is in part its own,
and in part the mean of its neighbours and of all rows: tokenizers number words about as they are frequent.  Halves of
the samples tell how much, and how wide the neighbourhood is: with the costs of one half those widths are chosen that
cost the least by those of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

OWN = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)  # how much of a row's cost is its own, tried in this order
NEIGHBOURS = (0, 4097, 1025, 257)  # rows whose mean has a part too; 0: none but all
OF_ALL = 0.1  # of that part, what is the mean of all rows: nothing is certain never to come


@dataclass(frozen=True, eq=False)
class RowWidths:
    """The bits of rows.

    Args:
        bits: (V,) int64.
        own: how much of the costs that they were chosen by is each row's own.
        neighbours: the rows whose mean has a part in them; 0: all.
        optimism: what other samples lose, by halves, over what those lose that the bits are chosen by; at least 1.
    """

    bits: Tensor
    own: float
    neighbours: int
    optimism: float


def row_widths(errors: Tensor, costs: Tensor, bits: int, widths: Sequence[int]) -> RowWidths:
    """The widths of rows that cost the least on samples that they are not chosen by, `bits` on average.

    Args:
        errors: (W, V), the squared error of every row in each of the widths.
        costs: (2, V), what a squared error of each row costs, over each half of the samples; (1, V) for a single one.
        bits: on average.
        widths: W of them, one after another, from the fewest bits to the most; `bits` is one of them.
    """
    if len(costs) < 2:
        return RowWidths(torch.full_like(costs[0], bits, dtype=torch.int64), 0.0, 0, 1.0)
    near = [count for count in NEIGHBOURS if count < costs.shape[1]]
    tried = [(own, count, _judged(errors, costs, own, count, bits, widths)) for count in near for own in OWN]
    own, count, lost = min(tried, key=lambda each: each[2])
    chosen = least_sum(errors, shrunk(costs.mean(0), own, count), bits, widths)
    # over what all samples tell of the widths that all chose: those of a half are chosen by fewer words
    known = float((errors.gather(0, chosen[None] - widths[0])[0] * costs.sum(0)).sum())
    return RowWidths(chosen, own, count, max(1.0, lost / known) if known > 0 else 1.0)


def _judged(errors: Tensor, costs: Tensor, own: float, neighbours: int, bits: int, widths: Sequence[int]) -> float:
    """What widths that are chosen by one half of the samples cost the other, both ways."""
    lost = 0.0
    for mine, others in ((costs[0], costs[1]), (costs[1], costs[0])):
        chosen = least_sum(errors, shrunk(mine, own, neighbours), bits, widths) - widths[0]
        left = errors.gather(0, chosen[None])[0]
        lost += float((left * others).sum())
    return lost


def shrunk(costs: Tensor, own: float, neighbours: int = 0) -> Tensor:
    """Costs (V,), of which so much is each row's own, and the rest the mean of so many neighbours, an odd number, and
    of all rows."""
    mean = costs.mean().expand_as(costs)
    if neighbours:
        near = F.avg_pool1d(costs[None], neighbours, 1, neighbours // 2, count_include_pad=False)[0]
        mean = torch.lerp(near, mean, OF_ALL)
    return torch.lerp(mean, costs, own)


def least_sum(errors: Tensor, costs: Tensor, bits: int, widths: Sequence[int]) -> Tensor:
    """The widths (V,) of rows with the least sum of costs times errors, `bits` on average.

    Args:
        errors: (W, V), as for `row_widths`.
        costs: (V,).
        bits: on average.
        widths: as for `row_widths`.
    """
    gains = ((errors[:-1] - errors[1:]) * costs).cummin(0).values  # no bit is taken before the one below it
    # of equal gains those of fewer bits first, so that rows alike have widths alike
    order = gains.flatten().argsort(descending=True, stable=True)[: errors.shape[1] * (bits - widths[0])]
    taken = torch.zeros_like(gains, dtype=torch.int64).flatten().index_fill_(0, order, 1)
    return widths[0] + taken.reshape(gains.shape).sum(0)
