"""A plan in words."""

import html
import math
from collections.abc import Iterable, Sequence

from hawqfx.ir.facts import Account, ChosenFormat, LimitUse
from hawqfx.ir.names import sizes_in_words


def whole(budget: str, account: Account | None) -> str:
    """The amounts that a plan takes of its limits, and the proof."""
    if account is None:
        return f"{budget}: these bits were given, not chosen"
    proof = "proven to be the least"
    if not account.optimal:
        proof = "the least is not known" if math.isinf(account.bound) else f"no plan has less than {account.bound:.4g}"
    lines = [f"predicted loss increase {account.loss:.4g} within {budget}, {proof}"]
    for name, use in account.limits.items():
        binds = "does not bind"
        if use.price:
            binds = f"binds: one {_one(use)} more would save {use.price * _scale(use):.3g}"
        at = f" at {sizes_in_words(use.shape)}" if use.shape else ""
        measured = "" if use.measured is None else f", measured {_written(use.measured, use)}"
        lines.append(f"  {name}: {_written(use.amount, use)}{measured} of {_written(use.bound, use)}{at}; {binds}")
    return "\n".join(lines)


def explained(name: str, choice: ChosenFormat, account: Account | None) -> str:
    """The part of a site in a plan: its shares, and the moves to its next formats."""
    lines = [f"{name}: {choice.format}, predicted loss increase {choice.increase:.4g}"]
    reason = choice.reason
    if reason is None or account is None:
        return lines[0]
    shares = [f"{share:.1%} of {name}" for name, share in reason.shares.items()]
    lines.append("  takes " + ", ".join([f"{reason.loss_share:.1%} of the predicted loss", *shares]))
    for word, move in (("wider", reason.wider), ("narrower", reason.narrower)):
        if move is None:
            lines.append(f"  has no {word} width to take")
            continue
        costs = [f"{_written(amount, account.limits[name], sign=True)} {name}" for name, amount in move.amounts.items()]
        lines.append(f"  {move.format} instead: " + ", ".join([f"{move.loss:+.3g} loss", *costs]))
    return "\n".join(lines)


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in HTML; all texts are escaped."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _scale(use: LimitUse) -> float:
    """The size of the step that a shadow price is told for, such as a reader would add to a limit."""
    return {"bytes": 1000.0, "s": 1e-3, "bit operations": 1e9}.get(use.unit, 1.0)


def _one(use: LimitUse) -> str:
    return {"bytes": "kB", "s": "ms", "bit operations": "10^9 bit operations"}.get(use.unit, "bit on average")


def _written(amount: float, use: LimitUse, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    if use.unit == "s":
        return f"{1e3 * amount:{plus}.4g} ms"
    if use.unit == "bits on average":
        return f"{amount:{plus}.4g} {use.unit}"
    return f"{round(amount):{plus},} {use.unit}"
