"""Rounding of a weight to integer codes with compensation by the inputs of its layer.

A layer computes y = W x for input patches x with second moment A = E[x x^T].  Rounding W to Q changes its output by

    E ||(Q - W) x||^2 = tr((Q - W) A (Q - W)^T),

which is ||Q - W||^2 only if A is the identity.  Compensated rounding goes through the columns, from the input with the
most energy to the input with the least.  It rounds a column, and moves the error to the columns that are not rounded
yet, by the inverse of A: optimal brain surgery in Cholesky form (Hassibi, Stork 1992; Frantar et al., "GPTQ", ICLR
2023, section 3).  A column cannot take back what later ones leave, so descent may go over the codes again: each takes
the value that is best beside all others as they are (Behdin et al., "QuantEase", 2023).

`weighted_error` is the error at the output, on the scale of a plain sum of squares:

    tr((Q - W) A (Q - W)^T) * K / tr(A),     K columns,

equal to ||Q - W||^2 when A is a multiple of the identity, and in expectation for a rounding error that is independent
of A.  It is the right error for a metric that measures only the trace of the Hessian, if the Hessian is a Kronecker
product A x G (Martens, Grosse 2015).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DAMPING = 0.01  # as in GPTQ: enough to keep A invertible, nearly always
STRONGEST_DAMPING = 0.5  # that is tried; more than it is as good as rounding to the nearest
STRONGER = 10.0  # times the damping where A is still not positive definite
SOLVED = 256  # columns of a triangular matrix that are inverted at once
SWEEPS = 2  # over all columns, in which codes descend; more lower the errors of layers by little, and no loss
# Times the calibrated scale, that codes are tried in.  It is at most 1 / 0.7 below it: half a step of the bias's
# headroom, see Calibration.
SCALES = (1.0, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2)
COLUMNS = 64  # rounded before their errors move on to later columns, in one product of matrices (GPTQ, section 3.3)

# Rows that a second moment is taken over: so many for each column, and at least so many.  Patches overlap and those of
# an image are alike, so that they count for fewer than they are.
ROWS_PER_COLUMN, FEWEST_ROWS = 64, 16384
_GOLDEN = (5**0.5 - 1) / 2


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    columns: slice = slice(None),
    most: int | None = None,
) -> Tensor:
    """The vectors that a convolution multiplies its weight by, or some columns of them.

    Args:
        x: (N, C, spatial...).
        kernel: sizes of the kernel.
        stride: of each dimension.
        padding: of each dimension, or "same" or "valid".
        dilation: of each dimension.
        groups: groups of channels.
        columns: of the C/groups * kernel that there are.
        most: the most rows; None: all.

    Returns:
        (groups, rows, columns); the rows are the positions of all samples, or those of `spread`.
    """
    extent = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if padding == "same":
        pads = [(total // 2, total - total // 2) for total in extent]
    elif padding == "valid":
        pads = [(0, 0)] * len(kernel)
    else:
        pads = [(int(pad), int(pad)) for pad in padding]
    x = F.pad(x, [pad for pair in reversed(pads) for pad in pair])
    n, channels, dims = x.shape[0], x.shape[1], len(kernel)
    for axis in range(dims):
        x = x.unfold(2 + axis, extent[axis] + 1, stride[axis])[..., :: dilation[axis]]
    # (N, C, out..., kernel...) -> (groups, N, out..., C/groups, kernel...)
    x = x.reshape(n, groups, channels // groups, *x.shape[2:])
    order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    x = x.permute(order)
    # so far a view of the input; only rows that are taken, and channels that have some of the columns, are written out
    area = torch.Size(kernel).numel()
    start, stop, _ = columns.indices(channels // groups * area)
    first, last = start // area, -(-stop // area)
    x = x.narrow(2 + dims, first, last - first)
    places = x.shape[1 : 2 + dims]
    if most is not None and places.numel() > most:
        at: list[Any] = [slice(None), *torch.unravel_index(spread(places.numel(), most, x.device), places)]
        x = x[tuple(at)]
    return x.reshape(groups, -1, (last - first) * area)[:, :, start - first * area : stop - first * area]


def spread(count: int, most: int, device: torch.device | None = None) -> Tensor:
    """`most` of the numbers 0 to count - 1, or all if there are no more, ascending.

    They are the multiples of the golden ratio, modulo one, times the count: as evenly spread as can be, and without a
    period, so that they skip no column of pixels as an even step would.
    """
    if count <= most:
        return torch.arange(count, device=device)
    multiples = torch.arange(most, dtype=torch.float64, device=device) * _GOLDEN
    return (multiples.frac() * count).long().sort().values


def second_moment(rows: Tensor) -> Tensor:
    """The mean of x x^T over rows.

    Args:
        rows: (groups, rows, K).

    Returns:
        (groups, K, K) in float64.
    """
    return (rows.transpose(1, 2) @ rows).double() / rows.shape[1]


class Compensation:
    """Where the error of each column goes: what compensated rounding needs of a second moment.

    Args:
        moment: (groups, K, K) in float64, the second moment of the inputs.
        damping: fraction of the mean of the moment's diagonal that is added to the diagonal.  It keeps the moment
            invertible, and few samples from being fitted at the cost of others.  Where the moment is still not positive
            definite, as rounding of its own may leave it, the fraction grows by STRONGER until it is.  One for all
            groups, or (groups,).

    Attributes:
        damping: (groups,), the fractions in the end.
        added: (groups,), what is added to the diagonal.
    """

    def __init__(self, moment: Tensor, damping: float | Tensor = DAMPING) -> None:
        if not torch.isfinite(moment).all():
            raise ValueError("the second moment is not finite")
        diagonal = moment.diagonal(dim1=1, dim2=2)
        self.order = diagonal.argsort(dim=1, descending=True, stable=True)
        self.damping = torch.zeros_like(diagonal[:, 0]) + damping
        unit = diagonal.mean(1)
        unit = torch.where(self.damping * unit > 0, unit, 1 / self.damping)  # of inputs that are never on
        moment = self._sorted(self._sorted(moment).transpose(1, 2)).transpose(1, 2).contiguous()
        moment.diagonal(dim1=1, dim2=2).add_((unit * self.damping)[:, None])
        self.upper, failed = _upper(moment)
        while failed.any():
            more = torch.where(failed, self.damping * (STRONGER - 1), 0.0)
            self.damping += more
            moment.diagonal(dim1=1, dim2=2).add_((unit * more)[:, None])
            self.upper[failed], failed[failed.clone()] = _upper(moment[failed])
        self.added = unit * self.damping

    @property
    def costs(self) -> Tensor:
        """What a squared error of each column costs, whatever later columns take back, (groups, K)."""
        return self.unsorted(self.upper.diagonal(dim1=1, dim2=2)[:, None] ** -2)[:, 0]

    def take(self, other: "Compensation", groups: Tensor) -> None:
        """Take some groups, (groups,) bool, from what is made of the same moment with another damping."""
        for name in ("upper", "damping", "added"):
            getattr(self, name)[groups] = getattr(other, name)[groups]

    def damped(self, moment: Tensor) -> Tensor:
        """A copy of the moment, (groups, K, K), with what the damping adds to its diagonal."""
        found = moment.clone()
        found.diagonal(dim1=1, dim2=2).add_(self.added[:, None])
        return found

    def _sorted(self, x: Tensor) -> Tensor:
        """The columns of (groups, R, K), from the input with the most energy to the input with the least."""
        return x.gather(2, self.order[:, None, :].expand_as(x))

    def unsorted(self, rows: Tensor) -> Tensor:
        """Columns (groups, R, K) in the order of energy, back in their own."""
        return rows.gather(2, self.order.argsort(1)[:, None, :].expand_as(rows))

    def solved(self, rows: Tensor) -> Tensor:
        """Rows (groups, R, K) times the inverse of the damped moment."""
        return self.unsorted(self._sorted(rows) @ self.upper.transpose(1, 2) @ self.upper)

    def round(self, weight: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Compensated rounding of a weight; all tensors are float64.

        Scales and ranges of codes are per row, so that the rows of several formats can be rounded together.

        Args:
            weight: (groups, R, K).
            scale: (groups, R, 1), or (groups, R, K) for a scale per element.
            low: (groups, R, 1), the lowest codes.
            high: (groups, R, 1), the highest codes.

        Returns:
            Integer codes (groups, R, K), and what they leave of each row's error by the damped moment, (groups, R).
        """
        # by columns: what is done to one column is done to a vector
        left = self._sorted(weight).transpose(1, 2).contiguous()
        steps = self._sorted(scale).transpose(1, 2).contiguous() if scale.shape[-1] > 1 else scale.transpose(1, 2)
        low, high = low.transpose(1, 2), high.transpose(1, 2)
        codes, cost = torch.empty_like(left), torch.zeros_like(left[:, 0])
        for start in range(0, left.shape[1], COLUMNS):
            block, rest = slice(start, start + COLUMNS), slice(start + COLUMNS, None)
            some = steps[:, block] if steps.shape[1] > 1 else steps
            codes[:, block], errors = self._round_block(left[:, block], some, low, high, start)
            left[:, rest] -= self.upper[:, block, rest].transpose(1, 2) @ errors
            cost += errors.square().sum(1)  # what no later column can take back (Hassibi, Stork 1992, equation 5)
        return self.unsorted(codes.transpose(1, 2)), cost

    def _round_block(self, left: Tensor, steps: Tensor, low: Tensor, high: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The codes of the columns from `start`, and their errors by which later columns are corrected.

        Args:
            left: (groups, columns, R), what earlier columns left to these; it is changed.
            steps: their scales, likewise, or (groups, 1, R).
            low: (groups, 1, R).
            high: (groups, 1, R).
            start: number of the first column.
        """
        codes, errors = torch.empty_like(left), torch.empty_like(left)
        stop = start + left.shape[1]
        upper = self.upper[:, start:stop, start:stop]
        for k in range(left.shape[1]):
            column, step = left[:, k : k + 1], steps[:, min(k, steps.shape[1] - 1)][:, None]
            code = torch.clamp((column / step).round_(), low, high)
            codes[:, k : k + 1] = code
            error = (column - code * step) / upper[:, k : k + 1, k : k + 1]
            errors[:, k : k + 1] = error
            left[:, k + 1 :].addcmul_(upper[:, k, k + 1 :, None], error, value=-1)
        return codes, errors


def descended(
    codes: Tensor, weight: Tensor, scale: Tensor, low: Tensor, high: Tensor, moment: Tensor, sweeps: int = SWEEPS
) -> Tensor:
    """Codes from which the error of no row is lowered by another value of a single code, or after so many sweeps.

    Of a code q with the others as they are, the error tr((s q - W) A (s q - W)^T) is a parabola, whose least is

        s q - ((s q - W) A)_k / A_kk,

    and the code takes the nearest value that there is: no step raises the error.  All tensors are float64.

    Args:
        codes: (groups, R, K), where to begin.
        weight: (groups, R, K).
        scale: (groups, R, 1), or (groups, R, K) for a scale per element.
        low: (groups, R, 1), the lowest codes.
        high: (groups, R, 1), the highest codes.
        moment: A, (groups, K, K); its diagonal is positive.
        sweeps: the most passes over all columns.
    """
    # by columns, as in `Compensation.round`
    steps, low, high = (each.transpose(1, 2).contiguous() for each in (scale, low, high))
    codes = codes.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    values = codes * steps
    slope = moment @ (values - weight.transpose(1, 2))
    curvature = moment.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, codes.shape[1], COLUMNS):
            block = slice(start, start + COLUMNS)
            moved = values[:, block].clone()
            for k in range(start, start + moved.shape[1]):
                one, step = slice(k, k + 1), steps[:, min(k, steps.shape[1] - 1)][:, None]
                least = values[:, one] - slope[:, one] / curvature[:, one, None]
                codes[:, one] = torch.clamp((least / step).round_(), low, high)
                change = codes[:, one] * step - values[:, one]
                values[:, one] += change
                slope[:, block].addcmul_(moment[:, block, one], change)
            moved = values[:, block] - moved
            for rest in (slice(0, start), slice(start + moved.shape[1], None)):
                slope[:, rest] += moment[:, rest, block] @ moved
        if torch.equal(codes, before):
            break
    return codes.transpose(1, 2)


def _upper(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factors of the inverses, (groups, K, K), and the groups that have none, (groups,).

    Factored from the last column to the first, a moment is R R^T with R upper triangular, and its inverse is
    (R^-1)^T R^-1: no inverse of a full matrix is made, which takes half of the steps and keeps more digits.
    """
    factor, failed = torch.linalg.cholesky_ex(moment.flip(1, 2))
    upper = _inverse(factor).flip(1, 2)
    return upper, (failed != 0) | ~torch.isfinite(upper.diagonal(dim1=1, dim2=2)).all(1)


def _inverse(lower: Tensor) -> Tensor:
    """The inverses of lower triangular matrices (groups, K, K), by halves: a solver alone makes no use of the zeros of
    the identity."""
    size = lower.shape[-1]
    if size <= SOLVED:
        return torch.linalg.solve_triangular(lower, torch.eye(size).to(lower).expand_as(lower), upper=False)
    first, last = slice(size // 2), slice(size // 2, None)
    one, two, inverse = lower[:, first, first], lower[:, last, last], torch.zeros_like(lower)
    inverse[:, first, first], inverse[:, last, last] = _inverse(one), _inverse(two)
    across = torch.linalg.solve_triangular(one, lower[:, last, first], upper=False, left=False)
    inverse[:, last, first] = -torch.linalg.solve_triangular(two, across, upper=False)
    return inverse


def weighted_error(difference: Tensor, moment: Tensor) -> Tensor:
    """tr(D A D^T) K / tr(A) of every group, (groups,); ||D||^2 for groups whose A is zero.

    Args:
        difference: D, (groups, R, K).
        moment: A, (groups, K, K).
    """
    trace = moment.diagonal(dim1=1, dim2=2).sum(1)
    weighted = ((difference @ moment) * difference).sum((1, 2)) * difference.shape[-1] / trace
    plain = difference.square().sum((1, 2))
    return torch.where(trace > 0, weighted, plain)
