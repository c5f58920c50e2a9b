"""A plan's JSON: {hawqfx_plan, budget, account, sites}, with null for numbers that JSON has not (NaN, infinity)."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hawqfx.errors import PlanError
from hawqfx.ir.facts import Account, ChosenFormat, LimitUse, Move, QuantParams, Reason
from hawqfx.maths.formats import FLOAT_BITS, Format, known_format

FORMAT = 3

Content = tuple[str, Mapping[str, QuantParams | None], Mapping[str, ChosenFormat], Account | None]


def dumps(
    budget: str,
    quantizers: Mapping[str, QuantParams | None],
    chosen: Mapping[str, ChosenFormat],
    account: Account | None,
) -> str:
    """The content of a plan as JSON text."""
    sites = {}
    for key, choice in chosen.items():
        quantizer = quantizers[key]
        sites[key] = {
            **_format_entry(choice.format),
            "loss_increase": choice.increase,
            "quantizer": None if quantizer is None else asdict(quantizer),
            "why": _reason_entry(choice.reason),
        }
    entry = None if account is None else asdict(account)
    content = {"hawqfx_plan": FORMAT, "budget": budget, "account": entry, "sites": sites}
    return json.dumps(_finite(content), indent=1, allow_nan=False)


def loads(text: str) -> Content:
    """The content of a plan, in the order of the arguments of `dumps`.

    Raises:
        PlanError: if the text is no plan.
    """
    try:
        data = json.loads(text)
        if data["hawqfx_plan"] != FORMAT:
            raise PlanError(f"the plan has format {data['hawqfx_plan']}, this version reads {FORMAT}: compile again")
        sites = {key: dict(entry) for key, entry in data["sites"].items()}
        quantizers = {key: _quantizer(entry) for key, entry in sites.items()}
        chosen = {
            key: ChosenFormat(_format(entry), _number(entry["loss_increase"]), _reason(entry["why"]))
            for key, entry in sites.items()
        }
        return str(data["budget"]), quantizers, chosen, _account(data["account"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"this is no plan, or it is damaged ({type(error).__name__}: {error})") from error


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, otherwise: float = math.nan) -> float:
    return otherwise if value is None else float(value)


def _quantizer(entry: Mapping[str, Any]) -> QuantParams | None:
    if entry["bits"] == FLOAT_BITS:
        return None
    known = dict(entry["quantizer"])
    quantizer = QuantParams(**known | {"scale": tuple(map(float, known["scale"]))})
    if quantizer.bits != entry["bits"]:
        raise ValueError(f"bits are {entry['bits']}, the quantizer has {quantizer.bits}")
    if not all(scale > 0 for scale in quantizer.scale):
        raise ValueError("a scale is not above zero")
    return quantizer


def _format(entry: Mapping[str, Any]) -> Format:
    return known_format(int(entry["bits"]), entry["scheme"])


def _format_entry(width: Format) -> dict[str, object]:
    return {"bits": width.bits, "scheme": width.scheme}


def _reason_entry(reason: Reason | None) -> dict[str, Any] | None:
    if reason is None:
        return None
    moves = {"wider": _move_entry(reason.wider), "narrower": _move_entry(reason.narrower)}
    return {"loss_share": reason.loss_share, "shares": dict(reason.shares), **moves}


def _move_entry(move: Move | None) -> dict[str, Any] | None:
    if move is None:
        return None
    return {"bits": move.format.bits, "loss": move.loss, "amounts": dict(move.amounts), "scheme": move.format.scheme}


def _reason(entry: Mapping[str, Any] | None) -> Reason | None:
    if entry is None:
        return None
    known = (entry[word] for word in ("wider", "narrower"))
    moves = (None if move is None else Move(_format(move), move["loss"], move["amounts"]) for move in known)
    return Reason(_number(entry["loss_share"]), dict(entry["shares"]), *moves)


def _account(entry: Mapping[str, Any] | None) -> Account | None:
    if entry is None:
        return None
    limits = {name: LimitUse(**use) for name, use in entry["limits"].items()}
    return Account(limits, _number(entry["loss"]), _number(entry["bound"], -math.inf), bool(entry["optimal"]))
