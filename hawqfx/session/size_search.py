"""A plan whose exported file keeps a limit on size.

The allocation counts the file's text as it is where all sites are static and activations have their widest formats; the
file of another plan takes a little more or less.  Such a plan is exported and weighed, and where its file is too large,
the limit is held to less by what it has too much.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from hawqfx.allocation.budget import Budget, Limit
from hawqfx.errors import InfeasibleBudget
from hawqfx.ir.facts import Account, FileText
from hawqfx.ir.program import Program
from hawqfx.session.planner import Candidate, Planner

TRIES = 6  # plans that are exported


def within_size(planner: Planner, budget: Budget, find: Callable[[Budget], Candidate], target: str) -> Candidate:
    """The network under a budget whose file was weighed, and keeps the limit on size.

    Args:
        planner: whose program knows its FileText.
        budget: with a limit on size, or on drop, for which the size is searched.
        find: the network under a budget, by the file text that is predicted.
        target: the processors that the file is made for.

    Raises:
        InfeasibleBudget: if no plan that was tried keeps the limit.
    """
    most = math.inf if budget.size is None else budget.size.of(planner.measured.about(FileText).float_bytes)
    held, size, refused = budget, 0, None
    for _ in range(TRIES):
        try:
            candidate = find(held)
        except InfeasibleBudget as error:
            if held is budget or error.limit != "size":
                raise
            refused = error
            break
        size = _file_bytes(planner, candidate, target)
        if size <= most:
            text = candidate.budget.replace(str(held), str(budget))
            return replace(candidate, planned=_with_measurement(candidate.planned, most, size), budget=text)
        # by how much the file must shrink, below what was predicted for it
        held = replace(budget, size=Limit(candidate.planned.about(Account).limits["size"].amount - (size - most)))
    raise InfeasibleBudget(
        f"{budget.written('size')} cannot be met: the smallest file that was made has {size} bytes", "size", size
    ) from refused


def _file_bytes(planner: Planner, candidate: Candidate, target: str) -> int:
    """The bytes of a candidate's file, counted where the text is known, and else weighed."""
    planned, text = candidate.planned, candidate.planned.about(FileText)
    if text.holds_for(planned.formats(), {site.key for site in planned.weights}):
        return text.bytes + planned.weight_bytes()
    from hawqfx.export.weigh_file import exported_bytes  # loads onnx

    return exported_bytes(candidate.program, planner.context, target)


def _with_measurement(planned: Program, bound: float, size: int) -> Program:
    """The plan whose account holds the user's bound, if there is one, and the bytes of the file."""
    account = planned.about(Account)
    use = account.limits["size"]
    use = replace(use, bound=bound if math.isfinite(bound) else max(use.bound, size), measured=size)
    return planned.learn_about_network(replace(account, limits={**account.limits, "size": use}))
