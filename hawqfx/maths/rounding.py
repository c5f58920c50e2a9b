"""Rounding of a weight to integer codes with compensation by the inputs of its layer.

A layer computes y = W x for input patches x with second moment A = E[x x^T].  Rounding W to Q changes its output by

    E ||(Q - W) x||^2 = tr((Q - W) A (Q - W)^T),

which is ||Q - W||^2 only if A is the identity.  Compensated rounding goes through the columns, from the input with the
most energy to the input with the least.  It rounds a column, and moves the error to the columns that are not rounded
yet, by the inverse of A: optimal brain surgery in Cholesky form (Hassibi, Stork 1992; Frantar et al., "GPTQ", ICLR
2023, section 3).

`weighted_error` is the error at the output, on the scale of a plain sum of squares:

    tr((Q - W) A (Q - W)^T) * K / tr(A),     K columns,

equal to ||Q - W||^2 when A is a multiple of the identity, and in expectation for a rounding error that is independent
of A.  It is the right error for a metric that measures only the trace of the Hessian, if the Hessian is a Kronecker
product A x G (Martens, Grosse 2015).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

DAMPING = 0.01  # fraction of the mean of A's diagonal, as in GPTQ: keeps A invertible on few samples
MOST_ROWS = 32768  # patches of a batch, evenly spread: enough for an A of a few thousand columns


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The vectors that a convolution multiplies its weight by.

    Args:
        x: (N, C, spatial...).
        kernel: sizes of the kernel.
        stride: of each dimension.
        padding: of each dimension, or "same" or "valid".
        dilation: of each dimension.
        groups: groups of channels.

    Returns:
        (groups, rows, C/groups * kernel); the rows are the positions of all samples, or of some samples if there are
        more than MOST_ROWS.
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
    columns = channels // groups * torch.Size(kernel).numel()
    positions = x.shape[1 : 2 + dims].numel()
    if positions > MOST_ROWS and n > 1:  # thin out samples first: cheap, and patches of one image are alike
        x = x[:, :: -(-positions // MOST_ROWS)]
    return x.reshape(groups, -1, columns)


def second_moment(rows: Tensor) -> Tensor:
    """The mean of x x^T over rows, of which about MOST_ROWS are taken if there are more.

    Args:
        rows: (groups, rows, K).

    Returns:
        (groups, K, K) in float64.
    """
    stride = -(-rows.shape[1] // MOST_ROWS)
    stride += stride > 1 and stride % 2 == 0  # an even step through images of even width would skip whole columns
    rows = rows[:, ::stride]
    return (rows.transpose(1, 2) @ rows).double() / rows.shape[1]


def compensated(weight: Tensor, moment: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Compensated rounding of a weight; all tensors are float64.

    Scales and ranges of codes are per row, so that the rows of several formats can be rounded together.

    Args:
        weight: (groups, R, K).
        moment: (groups, K, K), the second moment of the inputs.
        scale: (groups, R, 1), or (groups, R, K) for a scale per element.
        low: (groups, R, 1), the lowest codes.
        high: (groups, R, 1), the highest codes.

    Returns:
        Integer codes (groups, R, K).
    """
    columns = weight.shape[-1]
    diagonal = moment.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.mean(1)
    damping = torch.where(damping > 0, damping, 1.0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    moment = moment + torch.diag_embed(damping[:, None].expand_as(diagonal))
    moment = moment.gather(1, order[:, :, None].expand_as(moment)).gather(2, order[:, None, :].expand_as(moment))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = weight.gather(2, order[:, None, :].expand_as(weight))
    if scale.shape[-1] > 1:
        scale = scale.gather(2, order[:, None, :].expand_as(scale))
    codes = torch.empty_like(left)
    for k in range(columns):
        column = left[:, :, k : k + 1]
        step = scale[:, :, k : k + 1] if scale.shape[-1] > 1 else scale
        code = (column / step).round().clamp(low, high)
        codes[:, :, k : k + 1] = code
        error = (column - code * step) / upper[:, k : k + 1, k : k + 1]
        left[:, :, k + 1 :] -= error * upper[:, k : k + 1, k + 1 :]
    return codes.gather(2, order.argsort(1)[:, None, :].expand_as(codes))


def weighted_error(difference: Tensor, moment: Tensor) -> float:
    """tr(D A D^T) K / tr(A), summed over groups; ||D||^2 for groups whose A is zero.

    Args:
        difference: D, (groups, R, K).
        moment: A, (groups, K, K).
    """
    trace = moment.diagonal(dim1=1, dim2=2).sum(1)
    weighted = ((difference @ moment) * difference).sum((1, 2)) * difference.shape[-1] / trace
    plain = difference.square().sum((1, 2))
    return float(torch.where(trace > 0, weighted, plain).sum())
