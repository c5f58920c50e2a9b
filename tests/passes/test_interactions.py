"""interactions: pairs against a dense Gauss-Newton matrix, one backward per probe, and the allocation with them."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from hawqfx.allocation.budget import Budget
from hawqfx.allocation.task import increases
from hawqfx.errors import HawqfxError
from hawqfx.ir.facts import Account, ErrorProducts, LossIncrease
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import weight_at
from hawqfx.maths.formats import Format
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.interactions import Interactions
from tests.nets import Mlp
from tests.passes.test_metrics import counted_gradients, double_context, double_program

PROBES = 1000
WIDTHS = (Format(2), Format(4), Format(8))


def dense_gram(program: Program, choices: tuple[tuple[str, Format], ...]) -> Tensor:
    """d_i^T J^T S J d_j, S = diag(p) - p p^T, averaged over the samples, from the whole Jacobian."""
    work = double_context()
    total = torch.zeros(len(choices), len(choices), dtype=torch.float64)
    weights = {site.key: program.tensor(site.key).detach() for site in program.weights}
    for batch in work.batches:

        def logits(*tensors: Tensor, batch: object = batch) -> Tensor:
            return program.run(batch.args, {}, tensors=dict(zip(weights, tensors, strict=True)))  # type: ignore[attr-defined]

        jacobians = torch.autograd.functional.jacobian(logits, tuple(weights.values()))
        by_key = dict(zip(weights, jacobians, strict=True))
        moved = []
        for key, width in choices:
            error = weight_at(program, key, width) - weights[key]
            moved.append((by_key[key] * error).flatten(2).sum(2))
        p = logits(*weights.values()).softmax(1)
        for (i, one), (j, other) in itertools.product(enumerate(moved), repeat=2):
            fisher = (one * p * other).sum(1) - (one * p).sum(1) * (other * p).sum(1)
            total[i, j] += fisher.sum() / work.samples
    return total


def test_every_pair_is_that_of_the_dense_fisher_matrix() -> None:
    """Within 5 of the standard errors that the docstring states, for all pairs of 3 weights and 7 widths."""
    program = double_program(Mlp)
    found = run([Interactions(PROBES)], program, double_context()).about(ErrorProducts)
    dense = dense_gram(program, found.choices)
    diagonal = dense.diagonal()
    noise = (diagonal[:, None] * diagonal * 2 / (PROBES * len(double_context().batches))).sqrt()
    assert len(found.choices) == 7 * len(program.weights)
    assert bool(((torch.tensor(found.gram, dtype=torch.float64) - dense).abs() <= 5 * noise).all())


def test_one_ordinary_backward_per_probe_gives_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    program = double_program(Mlp)
    calls = counted_gradients(monkeypatch)
    run([Interactions(3)], program, double_context())
    assert calls == [False] * 3 * len(double_context().batches)


@pytest.mark.parametrize("seed", range(4))
def test_the_allocation_with_interactions_equals_brute_force(seed: int) -> None:
    program = double_program(Mlp)
    draw = torch.Generator().manual_seed(seed)
    choices = tuple((site.key, width) for site in program.weights for width in WIDTHS)
    rows = torch.randn(len(choices), 4, generator=draw, dtype=torch.float64)
    gram = rows @ rows.T
    facts = {
        site.key: LossIncrease(dict(zip(WIDTHS, sorted(noise, reverse=True), strict=True)), dict.fromkeys(WIDTHS, 0.0))
        for site in program.sites
        for noise in [torch.rand(3, generator=draw).mul(4).tolist()]
    }
    products = ErrorProducts(choices, tuple(tuple(row) for row in gram.tolist()))
    program = program.learn(facts).learn_about_network(products)
    number = {choice: row for row, choice in enumerate(choices)}
    losses = {site.key: increases(program, site) for site in program.sites}
    weights = sum(site.numel for site in program.weights)
    best = math.inf
    activations = sum(min(losses[site.key][width] for width in WIDTHS) for site in program.activations)
    for widths in itertools.product(WIDTHS, repeat=len(program.weights)):
        plan = {site.key: width for site, width in zip(program.weights, widths, strict=True)}
        if sum(plan[site.key].bits * site.numel for site in program.weights) > 5 * weights:
            continue
        pairs = sum(
            2 * float(gram[number[one, plan[one]], number[other, plan[other]]])
            for one, other in itertools.combinations(plan, 2)
        )
        best = min(best, activations + pairs + sum(losses[key][width] for key, width in plan.items()))
    planned = run([Allocation(Budget.parse("weight_bits=5"), interactions=99)], program, double_context())
    account = planned.about(Account)
    assert account.loss == pytest.approx(best, rel=1e-9)  # sums in another order
    assert account.optimal


def test_interactions_that_were_not_measured_are_asked_for() -> None:
    program = double_program(Mlp)
    increase = LossIncrease({Format(2): 1.0, Format(8): 0.0}, {Format(2): 0.0, Format(8): 0.0})
    program = program.learn({site.key: increase for site in program.sites})
    allocation = Allocation(Budget.parse("weight_bits=5"), interactions=9)
    with pytest.raises(HawqfxError, match="give interactions=True to compile"):
        allocation.learn(program, double_context())
    with pytest.raises(HawqfxError, match="allocation needs ErrorProducts"):
        run([allocation], program, double_context())
    with pytest.raises(HawqfxError, match="probes=0"):
        Interactions(0)
