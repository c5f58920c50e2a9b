"""Rules beside a budget that at() takes by name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from hawqfx import arguments
from hawqfx.allocation.rules import Order, known_schemes
from hawqfx.errors import UsageError
from hawqfx.maths.formats import Scheme
from hawqfx.passes.allocation import Allocation


class RuleOptions(TypedDict, total=False):
    """Rules that a choice of formats keeps to besides the budget; see compile()."""

    weight_bits: Sequence[int]
    activation_bits: Sequence[int]
    schemes: Sequence[Scheme]
    fix: Mapping[str, int]
    rule: Order


def ruled(allocation: Allocation, rules: RuleOptions) -> Allocation:
    """The allocation with these rules in place of its own.

    Raises:
        UsageError: if a rule is unknown, or has a value that it cannot have.
    """
    unknown = rules.keys() - RuleOptions.__annotations__
    if unknown:
        raise UsageError(f"{', '.join(sorted(unknown))}: the rules are {', '.join(RuleOptions.__annotations__)}")
    changes: dict[str, Any] = dict(rules)
    for name in ("weight_bits", "activation_bits"):
        if name in changes:
            changes[name] = arguments.bits(name, changes[name])
    if "schemes" in rules:
        changes["schemes"] = known_schemes(rules["schemes"])
    if "fix" in rules:
        changes["fix"] = arguments.fixed(rules["fix"])
    return replace(allocation, **changes)
