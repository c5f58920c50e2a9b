"""Budgets on a drop, the frontier, uniform bits as a rival, plans measured again, formats that are allowed."""

import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import hawqfx
from hawqfx import Budget, Compiled, zoo
from hawqfx.errors import DataError, HawqfxError, InfeasibleBudget
from hawqfx.frontend.data import gather
from hawqfx.ir.facts import Account, LossIncrease
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.hawq_v2 import HawqV2
from hawqfx.session.frontier import rounded_up
from hawqfx.session.planner import Candidate, Planner, Scoring
from hawqfx.session.session import Session
from tests.nets import Plain, Residual, build, images
from tests.tools import quick

Batch = tuple[Tensor, Tensor]


def accuracy(output: Tensor, target: Tensor) -> float:
    return float((output.argmax(1) == target).double().mean())


def digits() -> list[Batch]:
    """Labelled images of Fashion-MNIST: 128 to calibrate on, and others to score on."""
    return [(images[:128], labels[:128]) for images, labels in zoo.calibration()]


@pytest.fixture(scope="module")
def trained() -> Compiled:
    """A trained ResNet-20, cheaply measured, of whose metric half of the data is held out."""
    data = digits()
    return hawqfx.compile(
        zoo.resnet20(), "bops=100%", data[:1], metric=accuracy, holdout=data[1:2], sensitivity="mse", rounding="nearest"
    )


def score(compiled: Compiled | None, batch: Batch) -> float:
    model = zoo.resnet20() if compiled is None else compiled.model
    with torch.no_grad():
        return accuracy(model(batch[0]), batch[1])


def test_a_drop_gives_the_smallest_network_that_keeps_the_metric(trained: Compiled) -> None:
    calibrating, held = digits()[:2]
    loose, tight = trained.at("drop=50%"), trained.at("drop=2%")
    for compiled, kept in ((loose, 0.5), (tight, 0.98)):
        assert score(compiled, calibrating) >= kept * score(None, calibrating)
        assert score(compiled, held) >= kept * score(None, held)
    assert loose.weight_bytes < tight.weight_bytes < trained.planned.float_bytes()
    # the next size down, of 64 from the least to the most, would not keep it on the calibration data
    least, *_, most = tight.session.planner.range_of(tight.session.allocation, "size", 64)
    found = Budget.parse(tight.budget.partition(", met by ")[2]).size
    assert found is not None
    size = found.amount / (most / least) ** (1 / 63)
    planned = run([Allocation(Budget.parse(f"size={size:.0f}"))], tight.session.measured, tight.session.context)
    assert score(tight.session.lowered(planned, ""), calibrating) < 0.98 * score(None, calibrating)


def test_each_budget_of_a_drop_is_evaluated_once(trained: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = Planner.lower

    def counted(self: Any, planned: Any, budget: str) -> Candidate:
        made.append(budget)
        return original(self, planned, budget)

    monkeypatch.setattr(Planner, "lower", counted)
    trained.at("drop=5%, bops=20%")
    # bisection of 64 steps, perhaps again of those above, and the result once more under the eyes of the observers
    assert len(made) == len(set(made)) + 1 <= 13


def test_a_drop_holds_out_a_quarter_of_the_data() -> None:
    data = [(images, torch.zeros(16, dtype=torch.long)) for images, _ in images()]
    compiled = quick(Plain, "drop=50%", data=data, metric=lambda output, target: 1.0)
    assert compiled.session.scoring is not None
    assert compiled.session.context.samples == 24
    assert sum(batch.size for batch in compiled.session.scoring.holdout) == 8


def test_a_drop_that_the_held_out_data_refuses(trained: Compiled) -> None:
    """A metric that no quantized network keeps on the data held out."""
    session = trained.session
    held = session.scoring.holdout if session.scoring else ()
    with torch.no_grad():
        exact = [zoo.resnet20()(batch.args[0]) for batch in held]

    def spiteful(output: Tensor, target: Tensor) -> float:
        seen = any(torch.equal(target, batch.target) for batch in held)
        return 1.0 if not seen or any(torch.allclose(output, each, atol=1e-3) for each in exact) else 0.25

    refused = replace(session, scoring=Scoring(spiteful, held))
    with pytest.raises(InfeasibleBudget, match=r"drop=1% cannot be met .* must be 0\.99, and the largest .* has 0\.25"):
        refused.at("drop=1%", weight_bits=(2, 8), activation_bits=(8,))


def test_a_drop_needs_a_metric_and_data() -> None:
    with pytest.raises(HawqfxError, match="a budget on drop needs metric="):
        quick(Plain, "drop=1%")
    with pytest.raises(HawqfxError, match="a budget on drop needs metric="):
        quick(Plain).at("drop=1%")
    with pytest.raises(DataError, match="too little to hold some out"):
        quick(Plain, "drop=1%", metric=accuracy, data=[(torch.randn(1, 1, 8, 8), torch.tensor([0]))])
    with pytest.raises(HawqfxError, match="the metric is nan"):
        quick(Plain, "drop=1%", metric=lambda output, target: float("nan"))


def test_the_frontier_is_a_curve_of_plans() -> None:
    compiled = quick(Residual, "size=1MB")  # whose session has weighed the file
    frontier = compiled.session.frontier(12, evaluate=3)
    losses = [point.account.loss for point in frontier.points]
    assert losses == sorted(losses, reverse=True)
    assert len(frontier.points) == 12
    assert [point.measured for point in frontier.points].count(True) == 3
    assert frontier.points[0].measured
    assert frontier.points[-1].measured
    for point in frontier.points:
        assert re.fullmatch(r"size=[\d.]{1,5}k?B", point.budget)  # as people write it
        alone = run([Allocation(Budget.parse(point.budget))], compiled.session.measured, compiled.session.context)
        assert alone.about(Account).loss == pytest.approx(point.account.loss, rel=1e-12)
    assert "predicted only" in str([column._cells for column in frontier.table().columns])


@pytest.mark.parametrize(
    ("amount", "written"),
    [(2.82842712475, 2.829), (2.0, 2.0), (8.000000000000002, 8.0), (71234.2, 71240), (123, 123), (0.03123456, 0.03124)],
)
def test_amounts_along_a_frontier_have_four_digits(amount: float, written: float) -> None:
    assert rounded_up(amount) == written


def test_pareto_measures_once() -> None:
    frontier = hawqfx.pareto(
        build(Plain), images(), points=5, limit="bops", evaluate=1, sensitivity=HawqV2(4, tolerance=0)
    )
    amounts = [point.account.limits["bops"].amount for point in frontier.points]
    assert amounts == sorted(amounts)
    assert amounts[0] < amounts[-1]
    with pytest.raises(HawqfxError, match="a frontier goes along size, weight_bits, bops or activation_memory"):
        quick(Plain).session.frontier(limit="speed")


def test_uniform_bits_that_lose_less_are_returned_with_a_warning(
    trained: Compiled, caplog: pytest.LogCaptureFixture
) -> None:
    """Sensitivities turned upside down make the plan bad: uniform bits within the same size are better."""
    session = upside_down(trained.session)
    with caplog.at_level(logging.WARNING):
        found = session.at("weight_bits=4")
    assert {found.plan.bits[site.key] for site in found.planned.weights} == {4}
    assert "uniform bits (weights 4, activations 8) keep the budget weight_bits=4 too and lose less" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fixed = session.at("weight_bits=4", fix={"classifier.weight": 8})
    assert fixed.plan.bits["classifier.weight"] == 8


def upside_down(session: Session) -> Session:
    """The session with sensitivities that make its plans bad."""
    increases = {
        site.key: LossIncrease({width: 1.0 * width.bits for width in known}, dict.fromkeys(known, 0.0))
        for site in session.measured.weights
        for known in [session.measured.facts.get(site.key, LossIncrease).by_format]
    }
    return replace(session, measured=session.measured.learn(increases))


def test_a_bad_plan_is_refined_on_data_that_it_was_not_measured_on(trained: Compiled) -> None:
    session = upside_down(trained.session)
    first = session.at("weight_bits=4", against_uniform=False, refine=0)
    found = session.at("weight_bits=4", against_uniform=False, refine=3)
    assert first.refinements == ()
    assert found.refinements[0].taken
    for step in found.refinements:
        assert step.taken == (step.gain.mean < 0 and step.gain.is_significant)
    rounds = sum(step.taken for step in found.refinements)
    moved = {key: abs(found.plan.bits[key] - bits) for key, bits in first.plan.bits.items()}
    assert 0 < max(moved.values()) <= rounds
    assert found.plan.account is not None
    assert found.plan.account.limits["weight_bits"].amount <= 4
    # and the gain is one on images that had no part in it
    planner = replace(session.planner, context=replace(session.context, batches=gather(digits()[2:3])))
    before, after = planner.losses(first.program, found.program)
    gain = after.minus(before)
    assert gain.mean < 0
    assert gain.is_significant
    assert "measured again at the plan" in found.summary()


def test_a_plan_that_gains_nothing_stays(trained: Compiled) -> None:
    found = trained.at("weight_bits=7.9", refine=3)
    assert not any(step.taken for step in found.refinements)
    assert found.plan.bits == trained.at("weight_bits=7.9", refine=0).plan.bits


def test_the_rules_hold_for_plans_that_are_refined(trained: Compiled) -> None:
    session = upside_down(trained.session)
    found = session.at("weight_bits=4", refine=2, weight_bits=(2, 4, 8), fix={"stem.0.weight": 8})
    weights = {site.key for site in found.planned.weights}
    assert {found.plan.bits[key] for key in weights} <= {2, 4, 8}
    assert found.plan.bits["stem.0.weight"] == 8


def test_no_expansion_no_refinement(trained: Compiled) -> None:
    """A loss whose targets cannot be drawn, a single sample, and the paper's own rule leave the plan as it is."""
    session = upside_down(trained.session)
    own = replace(session.context, loss=lambda output, target: output.square().mean())
    single = replace(session.context, batches=(session.context.batches[0].first(1),))
    for surroundings in (own, single):
        assert replace(session, context=surroundings).at("weight_bits=4", refine=2).refinements == ()
    with pytest.raises(HawqfxError, match="refine=-1: a plan is refined zero times or more"):
        quick(Plain, refine=-1)


@pytest.mark.parametrize("bits", [(32,), (9,), (1, 4), ()])
def test_widths_are_2_to_8_or_float_beside_them(bits: tuple[int, ...]) -> None:
    with pytest.raises(HawqfxError, match="bit widths must be from 2 to 8, with 32 for float beside them"):
        quick(Plain, weight_bits=bits)


def test_float_is_chosen_where_it_may_be_and_the_budget_has_room() -> None:
    compiled = quick(Plain, "size=10kB", weight_bits=(2, 4, 8, 32))
    assert all(compiled.plan.bits[site.key] == 32 for site in compiled.planned.weights)
    assert compiled.weight_bytes == compiled.planned.float_bytes()
    tight = compiled.at("size=3kB")
    assert tight.weight_bytes <= 0.45 * tight.planned.float_bytes()


def test_formats_that_were_not_calibrated_are_refused() -> None:
    compiled = quick(Plain, weight_bits=(4, 8))
    with pytest.raises(HawqfxError, match=r"'conv1\.weight' was not calibrated at 3 bits: give such bits to compile"):
        compiled.uniform(3)
    with pytest.raises(HawqfxError, match="'input x' was not calibrated at 4 bits"):
        quick(Plain, activation_bits=(8,)).uniform(8, 4)
    with pytest.raises(HawqfxError, match=r"uniform\(9, 8\): there is no format of 9 bits"):
        compiled.uniform(9)
    with pytest.raises(HawqfxError, match=r"schemes=\('weight-only',\) were not calibrated: give schemes= to compile"):
        compiled.at("weight_bits=5", schemes=("weight-only",))
    with pytest.raises(HawqfxError, match="must be some of static, dynamic, weight-only"):
        compiled.at("weight_bits=5", schemes=("foo",))  # type: ignore[arg-type]
