"""Codes of weights in the formats of their quantizers, rounded to the nearest or compensated.

Compensation fits the codes to the calibration samples, and the fewer these are beside the columns of a weight, the
better they are fitted at the cost of all others: of 64 pictures, the last layer of EfficientNet-Lite0 (1,280 columns)
is left an error 300 times too small.  So the samples are parted in two halves.  Codes that are fitted to one half are
judged by the other, both ways: that chooses the damping, and it is the error that the facts tell.  The codes themselves
are fitted to all samples.

A weight of K columns has moments of K x K, and a factor that takes K^3 steps.  Where that is too much, the columns are
parted into blocks, and an error moves to columns of its own block alone: each block is rounded as if it were a weight,
and the errors of the blocks are added up, without what they do together.  Weights are taken in turns over the data
where the moments of all do not fit into memory at once, which changes no result.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hawqfx.analysis.input_moments import InputMoments, groups_of, input_moments, parts_of
from hawqfx.analysis.mixed_rows import mixed_rows
from hawqfx.analysis.table_moments import table_moments, tables
from hawqfx.frontend.context import Context
from hawqfx.frontend.memory import free_memory
from hawqfx.ir.facts import Compensated, Quantizers, QuantParams, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import ends_of, nearest_codes, numbers_of, one_bit, scale_of
from hawqfx.maths import affine, rounding
from hawqfx.maths.block_scales import chosen_scales
from hawqfx.maths.formats import Format

DAMPINGS = (rounding.DAMPING, 0.1, rounding.STRONGEST_DAMPING)  # tried for each block

MOST_COLUMNS, FEWEST_COLUMNS = 8192, 64  # of a block; steps grow with the cube of the former, and memory halves it
ELEMENTS = 1 << 22  # of all codes that are rounded at once; about six tensors of float64 have as many
# Rows of each group that a damping and the optimism are judged by: all of a head over fifty thousand words tell no more
# than these, and to round them for every half and damping would be three quarters of the work.
JUDGED = 4096


@dataclass(frozen=True)
class _Size:
    """The size of a weight, (groups, ..., columns)."""

    groups: int
    columns: int

    def held(self, width: int) -> int:
        """Bytes of the moments of both halves, in blocks of so many columns."""
        return 2 * 8 * self.groups * self.columns * width

    def work(self, width: int) -> int:
        """Bytes of what is made of the moments that are worked on at once, at the peak: eight tensors of their size."""
        return 8 * 8 * self.groups * width**2 * max(part.blocks for part in parts_of(self.groups, self.columns, width))

    def width_within(self, memory: int) -> int:
        """The most columns of a block that fit into so many bytes."""
        widths = [self.columns] if self.columns <= MOST_COLUMNS else []
        width = MOST_COLUMNS
        while width >= FEWEST_COLUMNS:
            widths += [width] if width < self.columns else []
            width //= 2
        fitting = (width for width in widths if self.held(width) + self.work(width) <= memory)
        return next(fitting, widths[-1])


def _compensated(
    weight: Tensor, widths: Quantizers, moments: Sequence[InputMoments], *, scales: bool, settled: bool
) -> tuple[Quantizers, RoundedWeights]:
    """The codes in all formats, some blocks of columns after others, and the quantizers in the end, whose blocks have
    other scales if `scales` are chosen."""
    by_format = dict(widths.by_format)
    codes = {width: torch.empty(weight.shape, dtype=torch.int8, device=weight.device) for width in widths.by_format}
    fitted, held_out, errors = (dict.fromkeys(codes, 0.0) for _ in range(3))
    damping, asked = 0.0, []
    for own in moments:
        halves, chosen = _best_damped(weight, own)
        # twice the samples need half the damping
        needed = (chosen / len(own.halves)).clamp_min(rounding.DAMPING)
        asked.append(float(needed[0]))
        whole = rounding.Compensation(own.whole, needed)
        damping = max(damping, float(whole.damping.max()))
        # static quantizers, which have a scale per row, are rounded together, and then the others
        for static in (True, False):
            quantizers = [quantizer for width, quantizer in widths.by_format.items() if width.is_static is static]
            if not quantizers:
                continue
            stack = _Stack(weight, quantizers, own)
            if scales and not static and len(moments) == 1:
                stack.choose_scales(whole, settled=settled)
                by_format |= {each.format: each for each in stack.quantizers}
            final, left = stack.rounded(whole, own.whole)
            judges = stack.some
            some = left if judges is stack else judges.rounded(whole, own.whole)[1]
            others = judges.held_out(halves) if halves else some
            for number, quantizer in enumerate(quantizers):
                stack.put(final[:, number], codes[quantizer.format])
                errors[quantizer.format] += float(left[:, number].sum())
                fitted[quantizer.format] += float(some[:, number].sum())
                held_out[quantizer.format] += float(others[:, number].sum())
    # an optimism below one is by chance alone
    optimism = {width: max(1.0, held_out[width] / fitted[width]) if fitted[width] > 0 else 1.0 for width in codes}
    errors = {width: errors[width] * optimism[width] for width in codes}
    blocks = sum(own.part.blocks for own in moments)
    how = Compensated(moments[0].part.width, blocks, damping, asked[0])
    return Quantizers(by_format), RoundedWeights(codes, errors, optimism, compensation=how)


def _best_damped(weight: Tensor, moments: InputMoments) -> tuple[list[rounding.Compensation], Tensor]:
    """What is fitted to each half of the samples, with the damping of each block, (groups * blocks,), by which such
    codes leave the least error on the other half; nothing, and the least damping, where there is a single sample.

    Judged at 4 bits whatever the formats are, so that a plan which names a single one gives the same codes.
    """
    damping = torch.full_like(moments.energy, DAMPINGS[0])
    if len(moments.halves) < 2:
        return [], damping
    low, high = affine.signed_range(4)
    scale = tuple(affine.channel_scales(weight, 4).tolist())
    stack = _Stack(weight, [QuantParams(4, scale, 0, low, high, per_channel=True)], moments).some

    def judged(value: float) -> tuple[list[rounding.Compensation], Tensor]:
        """Both halves with a damping, and the errors of each block of columns, of all groups together."""
        fitted = [rounding.Compensation(half, value) for half in moments.halves]
        return fitted, stack.held_out(fitted).reshape(-1, moments.part.blocks).sum(0)

    best, least = judged(DAMPINGS[0])
    for value in DAMPINGS[1:]:
        others, errors = judged(value)
        better = (errors < least).repeat(len(damping) // len(errors))
        for own, other in zip(best, others, strict=True):
            own.take(other, better)
        damping[better], least = value, torch.minimum(least, errors)
    return best, damping


class _Stack:
    """The rows of some blocks of columns, once per quantizer: all quantizers are rounded together.

    Args:
        weight: (C, ...).
        quantizers: q of them.
        moments: of the inputs of the blocks.
    """

    def __init__(self, weight: Tensor, quantizers: Sequence[QuantParams], moments: InputMoments) -> None:
        part, self.moments = moments.part, moments
        self.groups = len(moments.energy) // part.blocks
        whole = weight.detach().reshape(self.groups, -1, weight[0].numel())
        self.rows = part.of(whole[:, :, part.columns]).double()
        self.quantizers = list(quantizers)
        self.scales = [
            scale_of(quantizer).to(weight.device).double().reshape(*whole.shape[:2], -1) for quantizer in quantizers
        ]
        # of the codes: the lowest, the highest, and where they have one bit
        self.ends = [
            tuple(
                each.to(weight.device).expand(len(weight)).reshape(*whole.shape[:2], 1)
                for each in (*ends_of(quantizer), one_bit(quantizer))
            )
            for quantizer in quantizers
        ]

    def choose_scales(self, compensation: rounding.Compensation, *, settled: bool) -> None:
        """Give the quantizers, all of them in blocks, the scales that leave the least by the moment of a compensation;
        see hawqfx/maths/block_scales.py."""
        moment, rows = compensation.damped(self.moments.whole), self.rows[0]
        for number, quantizer in enumerate(self.quantizers):
            scale = chosen_scales(
                compensation, moment, rows, self.scales[number][0], (quantizer.low, quantizer.high), quantizer.block,
                rounding.SCALES, settled=settled,
            )  # fmt: skip
            self.scales[number] = scale[None]
            self.quantizers[number] = replace(quantizer, scale=numbers_of(scale.float()))

    @property
    def some(self) -> "_Stack":
        """The stack of JUDGED rows of each group, evenly spread; itself where there are no more."""
        count = self.rows.shape[1]
        if count <= JUDGED:
            return self
        rows, found = rounding.spread(count, JUDGED, self.rows.device), copy.copy(self)
        found.rows, found.scales = self.rows[:, rows], [scale[:, rows] for scale in self.scales]
        found.ends = [tuple(each[:, rows] for each in ends) for ends in self.ends]
        return found

    def _scales_of(self, some: slice) -> list[Tensor]:
        """The scales of some rows in each quantizer, (groups * blocks, R, 1) or (groups * blocks, R, K): those of all
        rows of a large table, one per element, would be many times its size."""
        part, found = self.moments.part, []
        for quantizer, scale in zip(self.quantizers, self.scales, strict=True):
            if quantizer.block:
                each = scale[:, some].repeat_interleave(quantizer.block, 2)
                found.append(part.of(each[:, :, part.columns]))
            else:
                found.append(scale[:, some].repeat_interleave(part.blocks, 0))
        return found

    def _ends_of(self, some: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The lowest and the highest codes of some rows in all quantizers, and where they have one bit,
        (groups * blocks, q * R, 1) each."""
        times = len(self.rows) // self.groups
        low, high, signs = (
            torch.cat([each[:, some].repeat_interleave(times, 0) for each in every], 1)
            for every in zip(*self.ends, strict=True)
        )
        return low.double(), high.double(), signs

    def put(self, codes: Tensor, whole: Tensor) -> None:
        """Write the codes (groups * blocks, R, K) of one quantizer into those of the weight, (C, ...)."""
        _, rows, width = codes.shape
        columns = codes.reshape(self.groups, -1, rows, width).transpose(1, 2).reshape(self.groups, rows, -1)
        whole.view(self.groups, rows, -1)[:, :, self.moments.part.columns] = columns

    def rounded(self, compensation: rounding.Compensation, judge: Tensor) -> tuple[Tensor, Tensor]:
        """Compensated by one moment and judged by another (groups * blocks, K, K), some rows at a time.

        Returns:
            Codes (groups * blocks, q, R, K), int8, and their errors by the judge, (groups * blocks, q).
        """
        (blocks, rows, columns), count = self.rows.shape, len(self.scales)
        at_once = max(1, ELEMENTS // (blocks * count * columns))
        codes, errors = [], judge.new_zeros(blocks, count)
        for start in range(0, rows, at_once):
            some = slice(start, start + at_once)
            scales = self._scales_of(some)
            codes.append(self._codes(compensation, some, scales))
            for number, scale in enumerate(scales):
                difference = codes[-1][:, number] * scale - self.rows[:, some]
                errors[:, number] += self.moments.energy * rounding.weighted_error(difference, judge)
        return torch.cat(codes, 2), errors

    def _codes(self, compensation: rounding.Compensation, some: slice, scales: list[Tensor]) -> Tensor:
        """Codes (groups * blocks, q, R, K) of some rows, with their scales."""
        rows = self.rows[:, some]
        count, size = len(scales), rows.shape[1]
        low, high, signs = self._ends_of(some)
        whole, steps = rows.repeat(1, count, 1), torch.cat(scales, 1)
        if signs.any():  # -1 and 1 are 2 c - 1, with c of 0 and 1 for a row that lies a step higher
            low, high = low.masked_fill(signs, 0), high.masked_fill(signs, 1)
            moved, doubled = whole + signs * steps, torch.where(signs, 2 * steps, steps)
            codes = compensation.round(moved, doubled, low, high)[0]
            codes = torch.where(signs, 2 * codes - 1, codes)
        else:
            codes = compensation.round(whole, steps, low, high)[0]
        return codes.to(torch.int8).reshape(len(rows), count, size, -1)

    def held_out(self, fitted: Sequence[rounding.Compensation]) -> Tensor:
        """The errors (groups * blocks, q) that codes fitted to one half of the samples leave on the other, the mean of
        both ways."""
        judges = reversed(self.moments.halves)
        return torch.stack([self.rounded(own, judge)[1] for own, judge in zip(fitted, judges, strict=True)]).mean(0)


def _scale_of_rows(quantizer: QuantParams, weight: Tensor) -> Tensor:
    """The scale in a shape that broadcasts over the weight: one per row, or one per element of a matrix."""
    return affine.along_channels(scale_of(quantizer).to(weight.device), weight)


def nearest(weight: Tensor, widths: Quantizers) -> RoundedWeights:
    """The nearest codes in all formats, and their squared errors ||Q(W) - W||^2."""
    codes: dict[Format, Tensor] = {}
    errors: dict[Format, float] = {}
    for width, quantizer in widths.by_format.items():
        scale = _scale_of_rows(quantizer, weight)
        code = nearest_codes(weight / scale, quantizer)
        codes[width] = code.to(torch.int8)
        errors[width] = float((code * scale - weight).square().sum(dtype=torch.float64))
    return RoundedWeights(codes, errors, dict.fromkeys(codes, 1.0))


def _sizes(program: Program, looked_up: Set[str]) -> dict[str, _Size]:
    """The sizes of the weights that layers multiply by, and of tables."""
    nodes = {node.name: node for node in program.graph.graph.nodes}
    groups = dict.fromkeys(sorted(looked_up), 1)
    groups |= {layer.weight: groups_of(nodes[layer.node], layer) for layer in program.layers}
    return {key: _Size(count, program.tensor(key)[0].numel()) for key, count in groups.items()}


def _width_before(program: Program, key: str) -> int | None:
    """The blocks that a weight was compensated in before, if it was: other codes of it are made in the same."""
    if not program.facts.has(key, RoundedWeights):
        return None
    before = program.facts.get(key, RoundedWeights).compensation
    return None if before is None else before.width


def _in_turns(sizes: Mapping[str, _Size], widths: Mapping[str, int], memory: int) -> Iterator[list[str]]:
    """The weights in parts whose moments fit into memory together."""
    part: list[str] = []
    held = most = 0
    for key, size in sizes.items():
        own, work = size.held(widths[key]), size.work(widths[key])
        if part and held + own + max(most, work) > memory:
            yield part
            part, held, most = [], 0, 0
        part.append(key)
        held, most = held + own, max(most, work)
    if part:
        yield part


def compensated(program: Program, context: Context, block: int | None = None) -> dict[str, RoundedWeights]:
    """The codes of `compensated_anew`, in the scales that the quantizers have."""
    return compensated_anew(program, context, block, scales=False)[1]


@torch.no_grad()
def compensated_anew(
    program: Program, context: Context, block: int | None = None, *, scales: bool
) -> tuple[dict[str, Quantizers], dict[str, RoundedWeights]]:
    """The compensated codes of every weight in the formats that the fact Quantizers has, by the samples of the context,
    and these quantizers; where no targets can be drawn, the nearest codes of a table that no layer multiplies by.

    Args:
        program: the float network with its quantizers.
        context: the samples.
        block: the most columns of a weight that are compensated together.  None: the blocks that a weight was rounded
            in before, or as free memory allows.
        scales: whether scales of blocks, and bits of the rows of tables, are chosen by the samples.
    """
    memory = free_memory(context.device) // 2
    looked_up = tables(program)
    by_slopes = looked_up if context.knows_distribution else set()
    sizes = _sizes(program, by_slopes)
    widths = {key: block or _width_before(program, key) or size.width_within(memory) for key, size in sizes.items()}
    known = {site.key: program.facts.get(site.key, Quantizers) for site in program.weights}
    facts: dict[str, RoundedWeights] = {}
    for keys in _in_turns(sizes, widths, memory):
        some = [key for key in keys if key in by_slopes]
        moments = input_moments(program, context, {key: widths[key] for key in keys if key not in some})
        of_tables = table_moments(program, context, {key: widths[key] for key in some}) if some else {}
        moments |= {key: each.parts for key, each in of_tables.items()}
        for key in keys:
            optimism: Mapping[Format, float] = {}
            costs = of_tables[key].rows if key in of_tables else None
            if costs is not None and scales:
                known[key], optimism = mixed_rows(program.tensor(key).detach(), known[key], costs)
            # those of other weights settle once formats are chosen
            known[key], facts[key] = _compensated(
                program.tensor(key), known[key], moments.pop(key), scales=scales, settled=key in looked_up
            )
            own = facts[key].optimism
            facts[key] = replace(
                facts[key], optimism={**own, **{each: own[each] * optimism[each] for each in optimism}}
            )
    nearest_ones = {key: nearest(program.tensor(key), each) for key, each in known.items() if key not in facts}
    return known, facts | nearest_ones
