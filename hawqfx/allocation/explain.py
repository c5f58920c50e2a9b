"""The reasons for a plan: the part of every site, the price of every limit, and why a budget cannot be met."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hawqfx.allocation.constraints import Resource
from hawqfx.allocation.search_space import Formats
from hawqfx.allocation.solver.problem import Choice, Infeasible
from hawqfx.allocation.task import AllocationTask, Effort
from hawqfx.errors import InfeasibleBudget
from hawqfx.ir.facts import Account, ChosenFormat, LimitUse, Move, Reason
from hawqfx.ir.program import KEPT_IN_FLOAT, Program
from hawqfx.maths.formats import Format

_Totals = Mapping[str, Sequence[float]]


def explained(task: AllocationTask, chosen: Formats, answer: Choice | None) -> Program:
    """The program with these formats, the reason for each, and the account of all.

    Args:
        task: whose space holds the formats.
        chosen: site -> format.
        answer: the solver's answer; None for a plan that was found elsewhere, of which nothing is proven.
    """
    picks = task.space.picks(chosen)
    totals = {name: resource.totals(picks) for name, resource in task.resources.items()}
    totals["loss"] = task.loss.totals(picks)
    facts = {
        key: ChosenFormat(width, task.losses[key][width], _reason(task, key, chosen, picks, totals))
        for key, width in chosen.items()
    }
    limits = {name: _use(task, resource, picks, answer) for name, resource in task.resources.items()}
    proven = (-math.inf, False) if answer is None else (answer.bound, answer.optimal)
    return task.program.learn(facts).learn_about_network(Account(limits, totals["loss"][0], *proven))


def refusal(task: AllocationTask, obstacle: Infeasible, effort: Effort) -> InfeasibleBudget:
    """The error for a budget that cannot be met: the limit, the least that it could be, and the rules in the way."""
    name = next(name for name, resource in task.resources.items() if resource.part(obstacle.name) is not None)
    resource = task.resources[name]
    text = f"{task.budget.written(name)} cannot be met: the least is {_least(resource, obstacle)}"
    reasons = "" if obstacle.alone else ", within the other limits"
    reasons += _fixes_in_the_way(task, obstacle, name, effort)
    if name in ("size", "weight_bits"):
        reasons += _floats_in_the_way(task.program, name)
    if task.order != "exact":
        reasons += f"; the rule {task.order} allows no other"
    return InfeasibleBudget(text, name, _amount(resource, obstacle), reasons)


def of_float(amount: float, reference: float) -> str:
    """An amount of a limit as a part of the float32 network's, rounded up: one that is named as a budget is kept."""
    return f"{math.ceil(1e4 * amount / reference) / 100}% of float32"


def _floats_in_the_way(program: Program, limit: str) -> str:
    """The weights that stay in float and count in a limit, and what a user can do about them."""
    floats, text = program.float_weights(), ""
    kept = [name for name, reason in floats.items() if reason == KEPT_IN_FLOAT]
    others = [name for name in floats if name not in kept]
    if limit == "size" and kept:
        text += f"; keep_float leaves {_named(kept)} in float"
    if others:
        text += f"; {_named(others)} stay in float ({floats[others[0]]})"
        text += ": name them in keep_float= to leave them out of the average" if limit == "weight_bits" else ""
    return text


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fixes_in_the_way(task: AllocationTask, obstacle: Infeasible, name: str, effort: Effort) -> str:
    """The entries of `fix` without which the limit could be met, or be less."""
    text = ""
    for pattern, bits in task.rules.fix:
        rest = tuple(pair for pair in task.rules.fix if pair != (pattern, bits))
        rules = replace(task.rules, fix=rest)
        freed = AllocationTask.of(task.program, task.budget, rules, task.order, task.interactions)
        answer = freed.solve(replace(effort, start=()))
        if not isinstance(answer, Infeasible):
            text += f"; fix {pattern!r}: {bits} stands in the way, without it the budget can be met"
        elif answer.name == obstacle.name and answer.least < obstacle.least:
            # a size is weighed for the rules that were given alone
            least = ("about " if name == "size" else "") + _least(freed.resources[name], answer)
            text += f"; fix {pattern!r}: {bits} stands in the way, without it the least is {least}"
    return text


def _amount(resource: Resource, obstacle: Infeasible) -> float:
    number = resource.part(obstacle.name)
    assert number is not None
    return (resource.parts[number][0] + obstacle.least) * resource.unit_size


def _least(resource: Resource, obstacle: Infeasible) -> str:
    number, least = resource.part(obstacle.name), _amount(resource, obstacle)
    assert number is not None
    at = f" at {resource.where[number]}" if resource.where else ""
    return f"{resource.written(least)}{at}, {of_float(least, resource.reference)}"


def _use(task: AllocationTask, resource: Resource, picks: Sequence[int], answer: Choice | None) -> LimitUse:
    prices = {} if answer is None else answer.prices
    price = sum(value for row, value in prices.items() if resource.part(row) is not None) / resource.unit_size
    bound = task.budget.limits[resource.name].of(resource.reference)
    return LimitUse(resource.unit, resource.amount(picks), bound, resource.reference, price, shape=resource.shape)


def _reason(task: AllocationTask, key: str, chosen: Formats, picks: Sequence[int], totals: _Totals) -> Reason:
    widths = task.space.formats[key]
    at, item, loss = list(widths).index(chosen[key]), task.space.item[key], totals["loss"][0]
    return Reason(
        task.losses[key][chosen[key]] / loss if loss else math.nan,
        {name: resource.share(item, picks, totals[name]) for name, resource in task.resources.items()},
        _move(task, key, widths[at + 1], chosen, picks, totals) if at + 1 < len(widths) else None,
        _move(task, key, widths[at - 1], chosen, picks, totals) if at else None,
    )


def _move(
    task: AllocationTask, key: str, width: Format, chosen: Formats, picks: Sequence[int], totals: _Totals
) -> Move:
    moved, items = task.space.moved(key, width, chosen, picks)
    amounts = {n: resource.change(items, picks, moved, totals[n]) for n, resource in task.resources.items()}
    return Move(width, task.loss.change(items, picks, moved, totals["loss"]), amounts)
