"""A plan's JSON, with null for numbers that JSON has not (NaN, infinity).

    {hawqfx_plan, budget, account, pins, exponents, sites}

Format 3 had no pins, format 4 no names of activations, format 5 no shape of a latency, format 6 no bits of rows, and
format 7 no exponents of inputs.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from hawqfx.errors import PlanError
from hawqfx.ir.facts import Account, ChosenFormat, LimitUse, Move, QuantParams, Reason
from hawqfx.maths import affine
from hawqfx.maths.formats import FLOAT_BITS, Format, known_format
from hawqfx.passes.smoothing import HALVINGS
from hawqfx.session.pins import Pins

FORMAT = 8
READ = (3, 4, 5, 6, 7, 8)
ROWS = frozenset(range(1, 9))  # bits that a row may have
EXPONENTS = frozenset(range(1, HALVINGS + 1))  # that an input may have
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, IndexError)  # what it raises

Exponents = Mapping[str, Mapping[int, int]]


class Content(NamedTuple):
    """The fields of a Plan, in their order; see there."""

    budget: str
    quantizers: Mapping[str, QuantParams | None]
    chosen: Mapping[str, ChosenFormat]
    account: Account | None
    pins: Pins | None
    names: Mapping[str, str]
    exponents: Exponents


def dumps(content: Content) -> str:
    """The content of a plan as JSON text."""
    return json.dumps(to_tree(content), indent=1, allow_nan=False)


def to_tree(content: Content) -> dict[str, Any]:
    """The content of a plan as dicts, lists, texts and finite numbers."""
    sites = {}
    for key, choice in content.chosen.items():
        quantizer = content.quantizers[key]
        sites[key] = {
            **({"name": content.names[key]} if key in content.names else {}),
            **_format_entry(choice.format),
            "loss_increase": choice.increase,
            "quantizer": None if quantizer is None else _quantizer_entry(quantizer),
            "why": _reason_entry(choice.reason),
        }
    tree = {
        "hawqfx_plan": FORMAT,
        "budget": content.budget,
        "account": None if content.account is None else asdict(content.account),
        "pins": None if content.pins is None else asdict(content.pins),
        "exponents": content.exponents,
        "sites": sites,
    }
    return finite(tree)


def loads(text: str) -> Content:
    """The content of a plan in the text of `dumps`.

    Raises:
        PlanError: if the text is no plan.
    """
    try:
        return from_tree(json.loads(text))
    except DAMAGE as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"this is no plan, or it is damaged ({type(error).__name__}: {error})") from error


def from_tree(data: Any) -> Content:
    """The content of a plan in the tree of `to_tree`.

    Raises:
        PlanError: if the format is not known.
        Exception: one of DAMAGE, if the tree is no plan.
    """
    if data["hawqfx_plan"] not in READ:
        raise PlanError(f"the plan has format {data['hawqfx_plan']}, this version reads {FORMAT}: compile again")
    pins = None if data["hawqfx_plan"] == 3 or data["pins"] is None else Pins(**data["pins"])
    sites = {key: dict(entry) for key, entry in data["sites"].items()}
    quantizers = {key: _quantizer(entry) for key, entry in sites.items()}
    chosen = {
        key: ChosenFormat(_format(entry), number(entry["loss_increase"]), _reason(entry["why"]))
        for key, entry in sites.items()
    }
    names = {key: str(entry["name"]) for key, entry in sites.items() if "name" in entry}
    account, exponents = _account(data["account"]), _exponents(data)
    return Content(str(data["budget"]), quantizers, chosen, account, pins, names, exponents)


def finite(value: Any) -> Any:
    """The value with null for every number that JSON has not."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None, otherwise: float = math.nan) -> float:
    """The number that stands in JSON, or what null stands for."""
    return otherwise if value is None else float(value)


def _exponents(data: Mapping[str, Any]) -> Exponents:
    """Those of a plan; in JSON, channels are texts."""
    known = data.get("exponents", {})
    if not all(powers and EXPONENTS.issuperset(powers.values()) for powers in known.values()):
        raise ValueError(f"an exponent of an input is not within 1 to {HALVINGS}")
    found = {
        str(node): {int(channel): int(power) for channel, power in powers.items()} for node, powers in known.items()
    }
    if min((channel for powers in found.values() for channel in powers), default=0) < 0:
        raise ValueError("a channel of an input is below zero")
    return found


def _quantizer_entry(quantizer: QuantParams) -> dict[str, Any]:
    """Without rows where they all have the bits of the format, as older versions read it."""
    return {name: value for name, value in asdict(quantizer).items() if name != "rows" or value}


def _quantizer(entry: Mapping[str, Any]) -> QuantParams | None:
    if entry["bits"] == FLOAT_BITS:
        return None
    known = dict(entry["quantizer"])
    rows = tuple(map(int, known.get("rows", ())))
    quantizer = QuantParams(**known | {"scale": tuple(map(float, known["scale"])), "rows": rows})
    if quantizer.bits != entry["bits"]:
        raise ValueError(f"bits are {entry['bits']}, the quantizer has {quantizer.bits}")
    in_blocks = quantizer.scheme == "weight-only"
    signed = in_blocks or (quantizer.per_channel and quantizer.bits < 8)
    if not all(0 < (abs(scale) if signed else scale) < math.inf for scale in quantizer.scale):
        raise ValueError("a scale is zero, not finite, or below zero where it has no sign")
    if in_blocks and not all(struct.pack("<f", scale)[:2] == bytes(2) for scale in quantizer.scale):
        raise ValueError("the scale of a block is no bfloat16 number")
    static = quantizer.format == Format(quantizer.bits) and quantizer.per_channel
    if rows and not (static and len(rows) == len(quantizer.scale) and set(rows) <= ROWS):
        raise ValueError("the bits of rows are not of the format")
    widest = max(rows, default=quantizer.bits)
    low, high = (affine.signed_range if quantizer.per_channel else affine.unsigned_range)(widest)
    zeros = (0,) if quantizer.per_channel else range(low, high + 1)
    if (quantizer.low, quantizer.high) != (low, high) or quantizer.zero_point not in zeros:
        raise ValueError("codes or the zero-point are out of the range of the bits")
    if quantizer.format != _format(entry) or (quantizer.scheme == "dynamic") == bool(quantizer.scale):
        raise ValueError("the quantizer is not of the format")
    return quantizer


def _format(entry: Mapping[str, Any]) -> Format:
    return known_format(int(entry["bits"]), entry["scheme"], int(entry.get("block", 0)))


def _format_entry(width: Format) -> dict[str, object]:
    return {"bits": width.bits, "scheme": width.scheme, "block": width.block}


def _reason_entry(reason: Reason | None) -> dict[str, Any] | None:
    if reason is None:
        return None
    moves = {"wider": _move_entry(reason.wider), "narrower": _move_entry(reason.narrower)}
    return {"loss_share": reason.loss_share, "shares": dict(reason.shares), **moves}


def _move_entry(move: Move | None) -> dict[str, Any] | None:
    if move is None:
        return None
    return _format_entry(move.format) | {"loss": move.loss, "amounts": dict(move.amounts)}


def _reason(entry: Mapping[str, Any] | None) -> Reason | None:
    if entry is None:
        return None
    known = (entry[word] for word in ("wider", "narrower"))
    moves = (None if move is None else Move(_format(move), move["loss"], move["amounts"]) for move in known)
    return Reason(number(entry["loss_share"]), dict(entry["shares"]), *moves)


def _account(entry: Mapping[str, Any] | None) -> Account | None:
    if entry is None:
        return None
    limits = {name: LimitUse(**use) for name, use in entry["limits"].items()}
    return Account(limits, number(entry["loss"]), number(entry["bound"], -math.inf), bool(entry["optimal"]))
