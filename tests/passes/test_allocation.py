"""allocation: equal to brute force under every limit, Omega as the paper has it, the reason for every bit, refusals
that name the least."""

import itertools
import math
import random
import re
from collections.abc import Mapping

import pytest

from hawqfx.allocation.budget import Budget
from hawqfx.allocation.task import increases
from hawqfx.analysis.liveness import live
from hawqfx.errors import HawqfxError, InfeasibleBudget, PassError
from hawqfx.ir.facts import (
    Account,
    ByteCost,
    ChosenFormat,
    Fact,
    FileText,
    LossIncrease,
    QuantizationError,
    Sensitivity,
)
from hawqfx.ir.program import Program
from hawqfx.ir.sites import Site, WeightSite
from hawqfx.maths.formats import FLOAT, Format
from hawqfx.maths.latency_model import ConversionTimes, KernelTimes, LatencyModel
from hawqfx.maths.packing import packed_bytes
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from tests.nets import Plain, Residual, SharedLayer
from tests.tools import after, context

WIDTHS = tuple(map(Format, range(2, 9)))
WIDTHS_OF_WEIGHTS = (Format(2), Format(4), Format(8))
WIDTHS_OF_ACTIVATIONS = (Format(4), Format(8))
MEASURED: dict[type, Program] = {}


def measured(make: type) -> Program:
    if make not in MEASURED:
        program = after("hawq_v2", make)
        MEASURED[make] = program.learn_about_network(FileText(0, {}, program.float_bytes()))
    return MEASURED[make]


def latency_model(program: Program, draw: random.Random) -> LatencyModel:
    """Invented seconds of every kernel and conversion, in whole nanoseconds."""

    def seconds(most: float) -> float:
        return round(draw.uniform(0, most) * 1e9) * 1e-9

    makers = {site.nodes[0]: site.key for site in program.activations}
    timed = []
    for layer in program.layers:
        made = next((key for node, key in makers.items() if layer.node == node), None)
        sites = tuple(dict.fromkeys((layer.input, layer.weight, *((made,) if made else ()))))
        timed.append(KernelTimes(layer.node, sites, layer.weight, seconds(1e-3), seconds(4e-3), seconds(5e-3)))
    converted = []
    for site in program.activations:
        maker = next((timed.node for timed in timed if timed.node in site.nodes), None)
        readers: list[str | None] = [layer.node for layer in program.layers if layer.input == site.key]
        readers += [None] * (draw.random() < 0.3)
        converted.append(ConversionTimes(site.key, maker, tuple(readers), *(seconds(1e-3) for _ in range(3))))
    return LatencyModel(seconds(1e-3), tuple(timed), tuple(converted), "invented")


def narrowed(program: Program, seed: int) -> Program:
    """The program with random sensitivities, invented latencies and few widths, so that all plans can be enumerated."""
    draw = random.Random(seed)
    facts: dict[str, Fact] = {}
    for site in program.sites:
        kept = (2, 4, 8) if isinstance(site, WeightSite) else (4, 8)
        known = program.facts.get(site.key, QuantizationError).squared_error
        errors = {Format(bits): known[Format(bits)] for bits in kept}
        facts[site.key] = Sensitivity(draw.lognormvariate(0, 2), 0.0, 8).times(errors)
    text = FileText(draw.randrange(2000), {}, program.float_bytes())
    return program.learn(facts).learn_about_network(latency_model(program, draw)).learn_about_network(text)


def totals(program: Program, formats: Mapping[str, Format]) -> dict[str, float]:
    """What a plan takes of every limit, counted in the plainest way."""
    bits = {key: width.bits for key, width in formats.items()}
    weights = sum(site.numel for site in program.weights)
    return {
        "size": program.about(FileText).bytes
        + program.fixed_bytes()
        + sum(program.facts.get(s.key, ByteCost).bytes[formats[s.key]] for s in program.weights),
        "weight_bits": sum(bits[site.key] * site.numel for site in program.weights) / weights,
        "bops": sum(layer.macs * bits[layer.weight] * bits[layer.input] for layer in program.layers),
        "activation_memory": max(
            step.fixed
            + sum(packed_bytes(count, bits[key]) for key, counts in step.elements.items() for count in counts)
            for step in live(program)
        ),
        "latency": program.about(LatencyModel).seconds(formats) if program.knows(LatencyModel) else math.nan,
    }


def brute_force(program: Program, bounds: dict[str, float], floats: bool = False) -> float:
    options = [[*program.facts.get(site.key, LossIncrease).by_format, *[FLOAT] * floats] for site in program.sites]
    losses = {site.key: increases(program, site) for site in program.sites}
    best = math.inf
    for widths in itertools.product(*options):
        bits = {site.key: width for site, width in zip(program.sites, widths, strict=True)}
        loss = sum(losses[key][width] for key, width in bits.items())
        if loss < best and all(totals(program, bits)[name] <= bound * (1 + 1e-12) for name, bound in bounds.items()):
            best = loss
    return best


def bounded(program: Program, limits: tuple[str, ...], seed: int) -> tuple[dict[str, float], str]:
    """Bounds between the least and the most that the widths can take, and their text."""
    facts = {site.key: program.facts.get(site.key, LossIncrease).by_format for site in program.sites}
    narrow, wide = (totals(program, {key: pick(by_format) for key, by_format in facts.items()}) for pick in (min, max))
    draw = random.Random(seed)
    bounds = {name: narrow[name] + (wide[name] - narrow[name]) * draw.uniform(0.1, 0.8) for name in limits}
    if "latency" in limits and program.knows(LatencyModel):
        ends = [program.about(LatencyModel).seconds(dict.fromkeys(facts, width)) for width in (Format(8), FLOAT)]
        bounds["latency"] = round(min(ends) + abs(ends[1] - ends[0]) * draw.uniform(0.3, 0.9), 9)
    units = {"latency": "s"}
    return bounds, ", ".join(f"{name}={bound:.9f}{units.get(name, '')}" for name, bound in bounds.items())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [Plain, Residual, SharedLayer])
@pytest.mark.parametrize(
    "limits", [("size",), ("weight_bits",), ("bops",), ("activation_memory",), ("size", "bops", "activation_memory")]
)
def test_equals_brute_force(make: type, limits: tuple[str, ...], seed: int) -> None:
    """Plain, Residual and SharedLayer have 7 or 8 sites: 3^3 x 2^5 plans."""
    program = narrowed(measured(make), seed)
    bounds, text = bounded(program, limits, seed)
    planned = run([Allocation(Budget.parse(text))], program, context())
    # the text has 9 decimals, and every total is a multiple of more than that
    assert all(totals(program, planned.formats())[name] <= bound + 1e-6 for name, bound in bounds.items())
    found = sum(planned.facts.get(site.key, ChosenFormat).increase for site in planned.sites)
    # sums of 8 floats in another order
    assert found == pytest.approx(brute_force(program, bounds), rel=1e-12)
    account = planned.about(Account)
    assert account.optimal
    for name, use in account.limits.items():
        assert use.amount == pytest.approx(totals(program, planned.formats())[name], rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limits", [("latency",), ("latency", "size")])
def test_a_latency_with_boundaries_equals_brute_force(limits: tuple[str, ...], seed: int) -> None:
    """Plain, with float as a choice: (4 x 4 x 4) x (3 x 3 x 3 x 3) plans."""
    program = narrowed(measured(Plain), seed)
    bounds, text = bounded(program, limits, seed)
    allocation = Allocation(Budget.parse(text), weight_bits=(2, 4, 8, 32), activation_bits=(4, 8, 32))
    best = brute_force(program, bounds, floats=True)
    if math.isinf(best):
        with pytest.raises(InfeasibleBudget, match=r"latency=.* cannot be met"):
            run([allocation], program, context())
        return
    planned = run([allocation], program, context())
    assert all(totals(program, planned.formats())[name] <= bound * (1 + 1e-12) for name, bound in bounds.items())
    assert sum(planned.facts.get(site.key, ChosenFormat).increase for site in planned.sites) == pytest.approx(
        best, rel=1e-12
    )
    assert planned.about(Account).limits["latency"].amount == pytest.approx(
        totals(program, planned.formats())["latency"]
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_papers_rule_is_the_best_monotone_setting(seed: int) -> None:
    """Against the enumeration of all settings whose bits fall with the trace, of weights and of activations."""
    program = narrowed(measured(Residual), seed)
    draw = random.Random(seed)
    facts: dict[str, Fact] = {site.key: Sensitivity(draw.lognormvariate(0, 2), 0.0, 8) for site in program.sites}
    program = program.learn(facts)
    bounds, text = bounded(program, ("size",), seed)
    losses = {site.key: increases(program, site) for site in program.sites}
    groups: list[list[Site]] = [
        sorted(sites, key=lambda site: -program.facts.get(site.key, Sensitivity).curvature)
        for sites in (program.weights, program.activations)
    ]
    best = math.inf
    for widths in itertools.product(*([WIDTHS_OF_WEIGHTS] * len(groups[0]) + [WIDTHS_OF_ACTIVATIONS] * len(groups[1]))):
        bits = {site.key: width for site, width in zip([*groups[0], *groups[1]], widths, strict=True)}
        falling = all(bits[one.key] >= bits[other.key] for group in groups for one, other in itertools.pairwise(group))
        if falling and totals(program, bits)["size"] <= bounds["size"]:
            best = min(best, sum(losses[key][width] for key, width in bits.items()))
    planned = run([Allocation(Budget.parse(text), rule="hawq-v2")], program, context())
    assert sum(planned.facts.get(site.key, ChosenFormat).increase for site in planned.sites) == pytest.approx(
        best, rel=1e-12
    )
    exact = run([Allocation(Budget.parse(text))], program, context())
    assert exact.about(Account).loss <= best


def test_every_move_is_what_it_would_do() -> None:
    program = narrowed(measured(Residual), 1)
    bounds, text = bounded(program, ("size", "bops", "activation_memory"), 1)
    planned = run([Allocation(Budget.parse(text))], program, context())
    bits, losses = planned.formats(), {site.key: increases(program, site) for site in program.sites}
    before = totals(program, bits)
    moves = 0
    for site in planned.sites:
        why = planned.facts.get(site.key, ChosenFormat).reason
        assert why is not None
        widths = sorted(
            losses[site.key], key=losses[site.key].__getitem__, reverse=True
        )  # the one that loses most first
        at = widths.index(bits[site.key])
        assert why.narrower is None if at == 0 else why.narrower is not None and why.narrower.format == widths[at - 1]
        for move in filter(None, (why.wider, why.narrower)):
            after = totals(program, {**bits, site.key: move.format})
            assert move.loss == pytest.approx(losses[site.key][move.format] - losses[site.key][bits[site.key]])
            assert move.amounts == pytest.approx({name: after[name] - before[name] for name in bounds})
            # one that loses less must break a limit, else the plan is not the best
            assert move.loss >= 0 or any(after[name] > bound for name, bound in bounds.items())
            moves += 1
    assert moves >= len(planned.sites)
    whys = {site.key: planned.facts.get(site.key, ChosenFormat).reason for site in planned.sites}
    assert sum(why.loss_share for why in whys.values() if why) == pytest.approx(1)
    weights = [whys[site.key] for site in planned.weights]
    assert sum(why.shares["size"] for why in weights if why) == pytest.approx(
        1 - (program.about(FileText).bytes + program.fixed_bytes()) / before["size"]
    )


def test_fixed_widths_are_kept_and_named_where_they_stand_in_the_way() -> None:
    program = measured(Plain)
    planned = run([Allocation(Budget.parse("size=40%"), fix=(("conv1*", 7), ("head.*", 32)))], program, context())
    assert (planned.formats()["conv1.weight"], planned.formats()["head.weight"]) == (Format(7), FLOAT)
    least = run([Allocation(Budget.parse("size=100%"), fix=(("*.weight", 2),))], program, context()).about(Account)
    tight = f"size={least.limits['size'].amount + 1:.0f}"
    run([Allocation(Budget.parse(tight))], program, context())
    with pytest.raises(InfeasibleBudget, match=r"fix 'conv2\*': 8 stands in the way, without it the budget can be met"):
        run([Allocation(Budget.parse(tight), fix=(("conv2*", 8),))], program, context())
    # without one of the entries the other is still there, so that the least alone falls
    with pytest.raises(InfeasibleBudget) as refused:
        run([Allocation(Budget.parse(tight), fix=(("conv1*", 8), ("conv2*", 8)))], program, context())
    freed = r"fix '(conv\d)\*': 8 stands in the way, without it the least is about (\d+) bytes"
    found = re.findall(freed, str(refused.value))
    assert [name for name, _ in found] == ["conv1", "conv2"]
    assert all(float(amount) < refused.value.least for _, amount in found)


def test_a_plan_is_admitted_if_it_keeps_every_limit_and_every_rule() -> None:
    program = measured(Plain)
    allocation = Allocation(Budget.parse("weight_bits=5"), fix=(("conv1*", 7),))
    planned = run([allocation], program, context())
    chosen = planned.formats()
    task = allocation.task(program, chosen)
    assert task.admits(chosen)
    assert not task.admits({**chosen, "conv1.weight": Format(6)})
    widest = {key: max(formats) for key, formats in allocation.rules.formats(program).items()}
    assert not task.admits(widest)


@pytest.mark.parametrize(
    ("fix", "message"),
    [
        ((("nothing*", 4),), "fix 'nothing\\*': no site has such a name"),
        ((("conv1*", 4), ("*.weight", 5)), "is to have 4 bits by 'conv1\\*' and 5 by '\\*.weight'"),
        ((("conv1*", 9),), "may take 9 bits, and was measured at 2, 3, 4, 5, 6, 7, 8, 32"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(fix: tuple[tuple[str, int], ...], message: str) -> None:
    with pytest.raises(HawqfxError, match=message):
        run([Allocation(Budget.parse("size=50%"), fix=fix)], measured(Plain), context())


def test_omega_is_the_mean_trace_times_the_sum_of_squares() -> None:
    program = measured(Plain)
    site = program.weights[0]
    program = program.learn({site.key: Sensitivity(3.0, 0.1, 8).times({Format(2): 0.5, Format(4): 0.125})})
    assert increases(program, site) == {Format(2): 1.5, Format(4): 0.375, FLOAT: 0.0}


@pytest.mark.parametrize(
    ("mean", "stderr", "used"), [(3.0, 0.1, 3.0), (1.0, 0.6, 2.2), (-0.5, 0.6, 0.7), (-5.0, 1.0, 0.0), (0.0, 0.0, 0.0)]
)
def test_a_trace_that_noise_hides_enters_by_its_upper_bound(mean: float, stderr: float, used: float) -> None:
    assert Sensitivity(mean, stderr, 8).times({Format(4): 2.0}).upper(Format(4)) == pytest.approx(2 * used, rel=1e-12)


def test_a_percentage_is_of_float32() -> None:
    program = measured(Plain)
    planned = run([Allocation(Budget.parse("size=40%"))], program, context())
    assert totals(program, planned.formats())["size"] <= 0.4 * program.float_bytes()
    parameters = 4 * 9 + 4 + 6 * 4 * 9 + 6 + 6 * 3 + 3
    assert program.float_bytes() == 4 * parameters


def test_more_budget_never_predicts_more_loss() -> None:
    losses = []
    for percent in range(26, 60, 3):
        planned = run([Allocation(Budget.parse(f"size={percent}%"))], measured(Residual), context())
        losses.append(sum(planned.facts.get(site.key, ChosenFormat).increase for site in planned.sites))
    assert losses == sorted(losses, reverse=True)


def test_a_site_without_sensitivity_takes_the_most_bits_that_the_limits_allow() -> None:
    """Bits that no limit asks for are free, also where noise hides an increase and where it is negative."""
    program = measured(Plain).learn(
        {"conv2.weight": LossIncrease(dict.fromkeys(WIDTHS, 0.0), dict.fromkeys(WIDTHS, 0.0))}
    )
    assert run([Allocation(Budget.parse("size=90%"))], program, context()).formats()["conv2.weight"] == Format(8)


@pytest.mark.parametrize(
    ("name", "unit"), [("size", "bytes"), ("weight_bits", "bits on average"), ("bops", "bit operations")]
)
def test_an_infeasible_limit_names_the_least_that_can_be_reached(name: str, unit: str) -> None:
    program = measured(Plain)
    with pytest.raises(InfeasibleBudget, match=f"{name}=0.5% cannot be met: the least is .* {unit}") as caught:
        run([Allocation(Budget.parse(f"{name}=0.5%"))], program, context())
    match = re.search(r"the least is ([\d.]+)", str(caught.value))
    assert match is not None
    least = float(match[1])
    assert least == totals(program, {s.key: min(program.facts.get(s.key, ByteCost).bytes) for s in program.sites})[name]
    run([Allocation(Budget.parse(f"{name}={least}"))], program, context())
    with pytest.raises(InfeasibleBudget):
        run([Allocation(Budget.parse(f"{name}={least * 0.999}"))], program, context())


def test_a_sensitivity_that_is_not_finite_never_reaches_the_solver() -> None:
    program = measured(Plain).learn(
        {"conv2.weight": LossIncrease(dict.fromkeys(WIDTHS, math.nan), dict.fromkeys(WIDTHS, 0.0))}
    )
    with pytest.raises(PassError, match=r"sensitivity of 'conv2\.weight' is not finite"):
        run([Allocation(Budget.parse("size=50%"))], program, context())


@pytest.mark.parametrize("mean", [0.0, -1.0, 0.5])
def test_no_site_has_fewer_bits_than_the_limits_demand(mean: float) -> None:
    """Increases that are zero, negative or within two standard errors of zero, at every site; the limit is on weights
    alone, so that activations keep 8 bits, and the weights are as wide as they may be."""
    program = measured(Plain)
    facts = {
        site.key: LossIncrease(dict.fromkeys(known, mean), dict.fromkeys(known, 0.0 if mean == 0 else 1.0))
        for site in program.sites
        for known in [program.facts.get(site.key, LossIncrease).by_format]
    }
    planned = run([Allocation(Budget.parse("weight_bits=5"))], program.learn(facts), context())
    assert {planned.formats()[site.key] for site in planned.activations} == {Format(8)}
    average, weights = planned.about(Account).limits["weight_bits"].amount, sum(s.numel for s in program.weights)
    for site in planned.weights:  # none has room for another bit
        assert planned.formats()[site.key] == Format(8) or average + site.numel / weights > 5


def test_a_bound_falls_with_the_bits() -> None:
    """Noise that is larger at 4 bits than at 2 counts at 2 bits too."""
    increase = LossIncrease(
        {Format(2): 0.1, Format(4): 0.0, Format(8): 0.0}, {Format(2): 0.1, Format(4): 0.5, Format(8): 0.0}
    )
    assert [increase.upper(Format(bits)) for bits in (2, 4, 8)] == [1.0, 1.0, 0.0]
    assert LossIncrease({Format(2): 3.0}, {Format(2): 1.0}).upper(Format(2)) == 3.0
