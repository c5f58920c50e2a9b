"""A plan whose exported file keeps a limit on size.

The allocation counts the file's text as it is where all sites are static and activations have their widest formats; the
file of another plan takes a little more or less.  Such a plan is exported and weighed, and where its file is too large,
the limit is held to less by what it has too much.  Where that is refused, the plan that is predicted to be the least is
weighed too: what a refusal names is the size of its file, which is a budget that can be met.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from hawqfx.allocation.budget import Budget, Limit
from hawqfx.allocation.explain import of_float
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
        InfeasibleBudget: if no plan that was tried keeps the limit; its least is the size of a file that was weighed.
    """
    reference = planner.measured.about(FileText).float_bytes
    most = math.inf if budget.size is None else budget.size.of(reference)
    held, size, refused = budget, 0, InfeasibleBudget("")
    for tried in range(TRIES + 1):
        try:
            candidate = find(held)
        except InfeasibleBudget as error:
            if refused.limit:  # the least breaks another limit: what was predicted stands
                raise refused from error
            if error.limit != "size":
                raise
            refused, held = error, replace(budget, size=Limit(error.least))
            continue
        size = _file_bytes(planner, candidate, target)
        if size <= most:
            text = candidate.budget.replace(str(held), str(budget))
            return replace(candidate, planned=_with_measurement(candidate.planned, most, size), budget=text)
        if refused.limit:  # this was the least
            break
        # by how much the file must shrink, below what was predicted for it; in the end as far as it can
        less = candidate.planned.about(Account).limits["size"].amount - (size - most)
        held = replace(budget, size=Limit(less if tried + 2 < TRIES else 1))
    text = f"{budget.written('size')} cannot be met: the least is {size} bytes, {of_float(size, reference)}"
    raise InfeasibleBudget(text, "size", size, refused.reasons) from refused


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
