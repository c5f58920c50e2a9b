"""allocation: equal to brute force under every limit, Omega as the paper has it, refusals that name the least."""

import itertools
import math
import random
import re

import pytest

from hawqfx.budget import Budget
from hawqfx.errors import InfeasibleBudget, PassError
from hawqfx.facts import Bits, Cost, Fact, LossIncrease, Perturbation, Sensitivity
from hawqfx.passes.allocation import Allocation, increases
from hawqfx.program import Program, WeightSite
from hawqfx.runner import run
from tests.nets import Plain, Residual, SharedLayer
from tests.tools import after, study

WIDTHS = range(2, 9)
MEASURED: dict[type, Program] = {}


def measured(make: type) -> Program:
    if make not in MEASURED:
        MEASURED[make] = after("hawq_v2", make)
    return MEASURED[make]


def narrowed(program: Program, seed: int) -> Program:
    """The program with random sensitivities and three widths per site, so that all plans can be enumerated."""
    draw = random.Random(seed)
    facts: dict[str, Fact] = {}
    costs: dict[str, Fact] = {}
    for site in program.sites:
        kept = (2, 4, 8) if isinstance(site, WeightSite) else (4, 8)
        errors = {b: program.facts.get(site.key, Perturbation).squared_error[b] for b in kept}
        facts[site.key] = Sensitivity(draw.lognormvariate(0, 2), 0.0, 8).times(errors)
        costs[site.key] = Cost({b: program.facts.get(site.key, Cost).bytes[b] for b in kept})
    return program.learn(facts).learn(costs)


def totals(program: Program, bits: dict[str, int]) -> dict[str, float]:
    """Size, average width and BOPs of a plan, counted in the plainest way."""
    weights = sum(site.numel for site in program.weights)
    return {
        "size": program.fixed_bytes() + sum(program.facts.get(s.key, Cost).bytes[bits[s.key]] for s in program.weights),
        "weight_bits": sum(bits[site.key] * site.numel for site in program.weights) / weights,
        "bops": sum(layer.macs * bits[layer.weight] * bits[layer.input] for layer in program.layers),
    }


def brute_force(program: Program, bounds: dict[str, float]) -> float:
    options = [sorted(program.facts.get(site.key, LossIncrease).by_bits) for site in program.sites]
    losses = {site.key: increases(program, site) for site in program.sites}
    best = math.inf
    for widths in itertools.product(*options):
        bits = {site.key: width for site, width in zip(program.sites, widths, strict=True)}
        if all(totals(program, bits)[name] <= bound for name, bound in bounds.items()):
            best = min(best, sum(losses[key][width] for key, width in bits.items()))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [Plain, Residual, SharedLayer])
@pytest.mark.parametrize("limits", [("size",), ("weight_bits",), ("bops",), ("size", "bops")])
def test_equals_brute_force(make: type, limits: tuple[str, ...], seed: int) -> None:
    """Plain, Residual and SharedLayer have 7 or 8 sites: 3^3 x 2^5 plans."""
    program = narrowed(measured(make), seed)
    narrow, wide = ({s.key: pick(program.facts.get(s.key, Cost).bytes) for s in program.sites} for pick in (min, max))
    bounds = {
        name: low + (totals(program, wide)[name] - low) * random.Random(seed).uniform(0.1, 0.8)
        for name, low in totals(program, narrow).items()
        if name in limits
    }
    text = ", ".join(f"{name}={bound:.6f}" for name, bound in bounds.items())
    planned = run([Allocation(Budget.parse(text))], program, study())
    assert all(totals(program, planned.bits())[name] <= bound + 1e-6 for name, bound in bounds.items())
    found = sum(planned.facts.get(site.key, Bits).increase for site in planned.sites)
    # losses become integers of 2^-40 of the largest: 8 sites' rounding is below 1e-11 of it
    assert found == pytest.approx(brute_force(program, bounds), rel=1e-9)


def test_omega_is_the_mean_trace_times_the_sum_of_squares() -> None:
    program = measured(Plain)
    site = program.weights[0]
    program = program.learn({site.key: Sensitivity(3.0, 0.1, 8).times({2: 0.5, 4: 0.125})})
    assert increases(program, site) == {2: 1.5, 4: 0.375}


@pytest.mark.parametrize(
    ("mean", "stderr", "used"), [(3.0, 0.1, 3.0), (1.0, 0.6, 2.2), (-0.5, 0.6, 0.7), (-5.0, 1.0, 0.0), (0.0, 0.0, 0.0)]
)
def test_a_trace_that_noise_hides_enters_by_its_upper_bound(mean: float, stderr: float, used: float) -> None:
    assert Sensitivity(mean, stderr, 8).times({4: 2.0}).upper(4) == pytest.approx(2 * used, rel=1e-12)


def test_a_percentage_is_of_float32() -> None:
    program = measured(Plain)
    planned = run([Allocation(Budget.parse("size=40%"))], program, study())
    assert totals(program, planned.bits())["size"] <= 0.4 * program.float_bytes()
    parameters = 4 * 9 + 4 + 6 * 4 * 9 + 6 + 6 * 3 + 3
    assert program.float_bytes() == 4 * parameters


def test_more_budget_never_predicts_more_loss() -> None:
    losses = []
    for percent in range(26, 60, 3):
        planned = run([Allocation(Budget.parse(f"size={percent}%"))], measured(Residual), study())
        losses.append(sum(planned.facts.get(site.key, Bits).increase for site in planned.sites))
    assert losses == sorted(losses, reverse=True)


def test_a_site_without_sensitivity_takes_the_fewest_bits() -> None:
    program = measured(Plain).learn(
        {"conv2.weight": LossIncrease(dict.fromkeys(WIDTHS, 0.0), dict.fromkeys(WIDTHS, 0.0))}
    )
    assert run([Allocation(Budget.parse("size=90%"))], program, study()).bits()["conv2.weight"] == 2


@pytest.mark.parametrize(
    ("name", "unit"), [("size", "bytes"), ("weight_bits", "bits on average"), ("bops", "bit operations")]
)
def test_an_infeasible_limit_names_the_least_that_can_be_reached(name: str, unit: str) -> None:
    program = measured(Plain)
    with pytest.raises(InfeasibleBudget, match=f"{name}=0.5% cannot be met: the least is .* {unit}") as caught:
        run([Allocation(Budget.parse(f"{name}=0.5%"))], program, study())
    match = re.search(r"the least is ([\d.]+)", str(caught.value))
    assert match is not None
    least = float(match[1])
    assert least == totals(program, {s.key: min(program.facts.get(s.key, Cost).bytes) for s in program.sites})[name]
    run([Allocation(Budget.parse(f"{name}={least}"))], program, study())
    with pytest.raises(InfeasibleBudget):
        run([Allocation(Budget.parse(f"{name}={least * 0.999}"))], program, study())


def test_a_sensitivity_that_is_not_finite_never_reaches_the_solver() -> None:
    program = measured(Plain).learn(
        {"conv2.weight": LossIncrease(dict.fromkeys(WIDTHS, math.nan), dict.fromkeys(WIDTHS, 0.0))}
    )
    with pytest.raises(PassError, match=r"sensitivity of 'conv2\.weight' is not finite"):
        run([Allocation(Budget.parse("size=50%"))], program, study())
