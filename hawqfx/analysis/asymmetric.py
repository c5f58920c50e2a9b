"""Codes of a layer's weight that are fitted to what the float layer gives, from inputs that are quantized.

A layer of weight W, whose inputs were x and are z in the network as quantized so far, should still give W x.  Of all
real weights V, V z is nearest to that at

    V = W E[x z^T] E[z z^T]^-1 = W + W E[(x - z) z^T] E[z z^T]^-1,

and codes are compensated towards this V by the second moment of z: errors of earlier layers are taken back where the
inputs show them (Li et al., "GPTAQ", ICML 2025, who call it asymmetric calibration; their correction is column by
column, here it is the least squares of all columns).  Where the layer's bias is free to move too, all moments are
about the means, and the bias takes the difference of the means.

With few samples V fits what these have in common by chance.  So W + a (V - W) is taken: of the V of one half of the
samples, the part `a` that leaves the least error on the other half, both ways, between none and all of it.

A row is rounded in the scale that it was calibrated with and in others, and keeps the one whose codes leave the least
error, by the same moment.  From there its codes descend: with uniform 2 bits of ResNet-20, descent takes back a fifth
of the errors of layers and half of the divergence from float on data held out (.032 to .015 nats); from 3 bits on it
moves less than a code in a hundred, and changes little.  Scales chosen after descent in each bring no more.  Scales of
blocks are chosen by hawqfx/maths/block_scales.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hawqfx.analysis.input_moments import Part, Rows, groups_of, halves
from hawqfx.ir.sites import Layer
from hawqfx.maths import affine, rounding
from hawqfx.maths.block_scales import chosen_scales

# Rows of a half that the moments of a group are taken over, for each column and at least; and where groups are many.
# Four times as many leave the same within what the choice of rows moves, and take half as long again.
ROWS_PER_COLUMN, FEWEST_ROWS, FEWEST_OF_MANY = 16, 4096, 1024
ELEMENTS = 1 << 22  # of vectors that are multiplied at once, and of codes that are rounded at once, in all scales


@dataclass(frozen=True, eq=False)
class PairMoments:
    """Moments of the inputs of a layer, z in the quantized network and x in the float one.

    Args:
        second: (groups, K, K) float64, E[z z^T].
        cross: (groups, K, K), E[(x - z) z^T].
        mean: (groups, K), E[z].
        gap: (groups, K), E[x - z].
    """

    second: Tensor
    cross: Tensor
    mean: Tensor
    gap: Tensor

    @property
    def about_means(self) -> "PairMoments":
        """The same of inputs less their means."""
        second = self.second - self.mean[:, :, None] * self.mean[:, None]
        cross = self.cross - self.gap[:, :, None] * self.mean[:, None]
        return PairMoments(second, cross, self.mean, self.gap)

    def mixed(self, other: "PairMoments", part: float) -> "PairMoments":
        """The mean of both, of which `other` is such a part."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return PairMoments(*(torch.lerp(own, others, part) for own, others in pairs))


def pair_moments(
    node: fx.Node, layer: Layer, weight: Tensor, inputs: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int]
) -> list[tuple[float, PairMoments]]:
    """The moments of both halves of the samples, or of one half if there is a single sample, and their shares.

    Args:
        node: of the layer.
        layer: the layer.
        weight: its weight.
        inputs: of each batch, in the float network and in the quantized one.
        sizes: samples of each batch.
    """
    part = Part(slice(0, weight[0].numel()), 1)
    found: dict[int, tuple[float, PairMoments]] = {}
    for index, ((exact, quantized), size) in enumerate(zip(inputs, sizes, strict=True)):
        pieces = zip(halves(exact, size, index), halves(quantized, size, index), strict=True)
        for (half, x, samples), (_, z, _) in pieces:
            share = samples / sum(sizes)
            moments = _moments(x, z, node, layer, weight, share, part)
            if half in found:
                total, before = found[half]
                found[half] = (total + share, before.mixed(moments, share / (total + share)))
            else:
                found[half] = (share, moments)
    return list(found.values())


def _moments(
    x: Tensor, z: Tensor, node: fx.Node, layer: Layer, weight: Tensor, share: float, part: Part
) -> PairMoments:
    fewest = FEWEST_ROWS if groups_of(node, layer) == 1 else FEWEST_OF_MANY
    read = Rows(z, node, layer, weight, share, fewest, ROWS_PER_COLUMN)
    wanted = Rows(x, node, layer, weight, share, fewest, ROWS_PER_COLUMN, read.exponent)
    found, given, unit = read.vectors(part), wanted.vectors(part), 2.0**read.exponent
    groups, count, columns = found.shape
    products, sums = (found.new_zeros(groups, 2 * columns, *more, dtype=torch.float64) for more in ((columns,), ()))
    # so many rows at once that their differences take little memory
    at_once = max(1, ELEMENTS // (groups * columns))
    for vectors, exact in zip(found.split(at_once, 1), given.split(at_once, 1), strict=True):
        both = torch.cat([vectors, exact - vectors], 2)
        products += both.transpose(1, 2) @ vectors
        # as a product, which is ten times faster than a sum along the rows
        sums += (torch.ones_like(both[:, :1, :1]).expand(-1, 1, both.shape[1]) @ both)[:, 0]
    second, cross = (products * (unit**2 / count)).chunk(2, 1)
    return PairMoments(second, cross, *(sums * (unit / count)).chunk(2, 1))


@dataclass(frozen=True, eq=False)
class Recoded:
    """New codes of a weight.

    Args:
        codes: int8, in the weight's shape.
        scale: float32, in the shape of the one that there was.
        weight: the values of the codes, in float32.
        shift: (C,) float64, of the bias; None: none.
        part: of the way to the weight that fits the quantized inputs, `a` above.
    """

    codes: Tensor
    scale: Tensor
    weight: Tensor
    shift: Tensor | None
    part: float


def recoded(
    weight: Tensor,
    scale: Tensor,
    ends: tuple[int | Tensor, int | Tensor],
    known: Sequence[tuple[float, PairMoments]],
    groups: int,
    damping: float,
    *,
    bias: bool,
    scales: Sequence[float],
    block: int = 0,
) -> Recoded:
    """Codes that are fitted to the float layer from quantized inputs.

    Args:
        weight: (C, ...), in float.
        scale: of the codes, (C,), or (C, B) for blocks of each row.
        ends: the lowest and the highest code, () or (C,).
        known: shares and moments of one half of the samples, or of both.
        groups: of the layer's channels.
        damping: of the moment of all samples, see hawqfx.maths.rounding.Compensation.
        bias: whether the layer's bias moves with the codes.
        scales: that are tried of every row or block, in units of the one that it has; a single one leaves them.
        block: columns of a block, of a layer of one group; 0 for scales per row.
    """
    columns = weight[0].numel()
    rows = weight.detach().reshape(groups, -1, columns).double()
    steps = scale.double().reshape(*rows.shape[:2], -1)
    moments = [(share, each.about_means if bias else each) for share, each in known]
    whole = moments[0][1]
    for share, each in moments[1:]:
        whole = whole.mixed(each, share)
    compensation = rounding.Compensation(whole.second, damping)
    part = _part(rows, [each for _, each in moments], damping) if len(moments) > 1 else 0.0
    aim = rows + part * compensation.solved(rows @ whole.cross) if part else rows
    moment = compensation.damped(whole.second)
    if block and len(scales) > 1:
        whole_ends = int(ends[0]), int(ends[1])
        scale = chosen_scales(compensation, moment, aim[0], steps[0], whole_ends, block, scales, settled=True).float()
    if block:
        steps, scales = affine.along_channels(scale.double(), aim[0])[None], (1.0,)
    low, high = (torch.as_tensor(end).to(aim).expand(len(weight)).reshape(*rows.shape[:2], 1) for end in ends)
    codes, chosen = _best_codes(compensation, aim, steps, (low, high), scales)
    codes = _descended(codes, aim, chosen, (low, high), moment)
    values, shift = codes * chosen, None
    if bias:
        shift = (rows @ (whole.mean + whole.gap)[..., None] - values @ whole.mean[..., None]).reshape(-1)
    return Recoded(
        codes.to(torch.int8).reshape(weight.shape),
        scale if block else chosen.float().reshape(scale.shape),
        values.float().reshape(weight.shape),
        shift,
        part,
    )


def _part(rows: Tensor, known: Sequence[PairMoments], damping: float) -> float:
    """The part of the way to the weight that fits one half which leaves the least error on the other, both ways.

    With the step d of the one half, the other loses E ||W (x - z) - a d z||^2, which is least at
    tr(W E[(x - z) z^T] d^T) / tr(d E[z z^T] d^T).
    """
    gained = spent = 0.0
    for own, other in (known, reversed(known)):
        # half of the samples need twice the damping
        step = rounding.Compensation(own.second, 2 * damping).solved(rows @ own.cross)
        gained += float(((rows @ other.cross) * step).sum())
        spent += float(((step @ other.second) * step).sum())
    return min(1.0, max(0.0, gained / spent)) if spent > 0 else 0.0


def _best_codes(
    compensation: rounding.Compensation,
    aim: Tensor,
    steps: Tensor,
    ends: tuple[Tensor, Tensor],
    scales: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The codes (groups, R, K) of every row, and their scales, in the one of several scales that leaves the least.

    Args:
        compensation: of the moment.
        aim: (groups, R, K), what is rounded.
        steps: (groups, R, 1) or (groups, R, K), the scales.
        ends: (groups, R, 1), the lowest and the highest codes.
        scales: times `steps`.
    """
    groups, count, columns = aim.shape
    at_once = max(1, ELEMENTS // (groups * len(scales) * columns))
    codes, chosen = torch.empty_like(aim), torch.empty_like(steps)
    for start in range(0, count, at_once):
        some = slice(start, start + at_once)
        # float32, as quantizers have them, so that codes are those of a plan that is followed
        tried = torch.stack([(steps[:, some] * times).float().double() for times in scales], 1)
        rows = aim[:, None, some].expand(-1, len(scales), -1, -1).flatten(1, 2)
        low, high = (end[:, None, some].expand(-1, len(scales), -1, -1).flatten(1, 2) for end in ends)
        found, cost = compensation.round(rows, tried.flatten(1, 2), low, high)
        # of scales that are alike the first
        best = cost.reshape(groups, len(scales), -1).argmin(1)[:, None, :, None]
        codes[:, some] = found.reshape(groups, len(scales), -1, columns).take_along_dim(best, 1)[:, 0]
        chosen[:, some] = tried.take_along_dim(best, 1)[:, 0]
    return codes, chosen


def _descended(codes: Tensor, aim: Tensor, steps: Tensor, ends: tuple[Tensor, Tensor], moment: Tensor) -> Tensor:
    """Codes (groups, R, K) after descent, some rows at once; the arguments are those of `rounding.descended`."""
    at_once = max(1, ELEMENTS // (len(codes) * codes.shape[-1]))
    found = []
    parts = (each.split(at_once, 1) for each in (codes, aim, steps, *ends))
    for some, wanted, scale, low, high in zip(*parts, strict=True):
        found.append(rounding.descended(some, wanted, scale, low, high, moment))
    return torch.cat(found, 1)
