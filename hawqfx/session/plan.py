"""A plan: the quantizer chosen for every site, and why, to and from JSON."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hawqfx.atomic_write import whole_file
from hawqfx.errors import PlanError
from hawqfx.ir.facts import Account, ChosenFormat, Fact, LimitUse, Move, Quantizers, QuantParams, Reason
from hawqfx.ir.program import Program
from hawqfx.maths.formats import bits_of, described, scheme, width_of
from hawqfx.maths.pricing import FLOAT_BITS

FORMAT = 3


@dataclass(frozen=True)
class Plan:
    """Site key -> quantizer (None: float) and chosen bits with their reason; the budget that they were chosen for, and
    what they take of it."""

    budget: str
    quantizers: Mapping[str, QuantParams | None]
    chosen: Mapping[str, ChosenFormat]
    account: Account | None = None

    @staticmethod
    def of(program: Program, budget: str) -> "Plan":
        chosen = {site.key: program.facts.get(site.key, ChosenFormat) for site in program.sites}
        quantizers = {
            key: program.facts.get(key, Quantizers).by_bits[bits.bits] if bits.bits != FLOAT_BITS else None
            for key, bits in chosen.items()
        }
        return Plan(budget, quantizers, chosen, program.account)

    @property
    def bits(self) -> dict[str, int]:
        return {key: bits_of(bits.bits) for key, bits in self.chosen.items()}

    @property
    def schemes(self) -> dict[str, str]:
        """How the tensors of each site are quantized: hawqfx.maths.formats."""
        return {key: scheme(bits.bits) for key, bits in self.chosen.items()}

    def explain(self, site: str | None = None) -> str:
        """Why a site has its bits, or every site whose name the pattern matches; without one, what the plan takes of
        its limits.  Raises PlanError if there is no such site."""
        if site is None:
            return _whole(self)
        keys = [key for key in self.chosen if key == site or fnmatch(key, site)]
        if not keys:
            raise PlanError(f"the plan has no site {site!r}; it has {', '.join(list(self.chosen)[:8])}, ...")
        return "\n".join(_explained(key, self.chosen[key], self.account) for key in keys)

    @property
    def digest(self) -> str:
        """A name for the content: equal plans have equal digests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        sites = {}
        for key, bits in self.chosen.items():
            quantizer = self.quantizers[key]
            sites[key] = {
                **_width_entry(bits.bits),
                "loss_increase": bits.increase,
                "quantizer": None if quantizer is None else asdict(quantizer),
                "why": _why_entry(bits.why),
            }
        account = None if self.account is None else asdict(self.account)
        content = {"hawqfx_plan": FORMAT, "budget": self.budget, "account": account, "sites": sites}
        return json.dumps(_finite(content), indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Raises PlanError if the text is no plan."""
        try:
            data = json.loads(text)
            if data["hawqfx_plan"] != FORMAT:
                raise PlanError(
                    f"the plan has format {data['hawqfx_plan']}, this version reads {FORMAT}: compile again"
                )
            sites = {key: dict(entry) for key, entry in data["sites"].items()}
            quantizers = {key: _quantizer(entry) for key, entry in sites.items()}
            chosen = {
                key: ChosenFormat(
                    width_of(int(entry["bits"]), entry["scheme"]), _number(entry["loss_increase"]), _why(entry["why"])
                )
                for key, entry in sites.items()
            }
            return Plan(str(data["budget"]), quantizers, chosen, _account(data["account"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"this is no plan, or it is damaged ({type(error).__name__}: {error})") from error

    @staticmethod
    def read(source: "Plan | str | Path") -> "Plan":
        """A plan, or the path of one."""
        if isinstance(source, Plan):
            return source
        try:
            return Plan.from_json(Path(source).read_text())
        except OSError as error:
            raise PlanError(f"the plan {source} cannot be read: {error}") from error

    def write(self, path: str | Path) -> None:
        """Write the JSON, whole or not at all.  Raises ExportError."""
        with whole_file(Path(path)) as temporary:
            temporary.write_text(self.to_json())

    def facts_for(self, program: Program) -> Program:
        """`program` with this plan's quantizers and bits.  Raises PlanError if its sites are others."""
        have, want = {site.key for site in program.sites}, set(self.quantizers)
        if have != want:
            odd = sorted(have ^ want)
            raise PlanError(f"the plan is for another model: {', '.join(odd[:5])} in only one of them")
        for site in program.weights:
            quantizer = self.quantizers[site.key]
            if quantizer is not None and len(quantizer.scale) != site.shape[0] * quantizer.blocks:
                raise PlanError(f"the plan is for another model: {site.key} has {site.shape[0]} channels here")
        quantizers: dict[str, Fact] = {
            key: Quantizers({} if q is None else {q.width: q}) for key, q in self.quantizers.items()
        }
        return replace(program.learn(quantizers).learn(dict(self.chosen)), account=self.account)


def _whole(plan: Plan) -> str:
    if plan.account is None:
        return f"{plan.budget}: these bits were given, not chosen"
    account = plan.account
    proof = "proven to be the least"
    if not account.optimal:
        proof = "the least is not known" if math.isinf(account.bound) else f"no plan has less than {account.bound:.4g}"
    lines = [f"predicted loss increase {account.loss:.4g} within {plan.budget}, {proof}"]
    for name, use in account.limits.items():
        binds = "does not bind"
        if use.price:
            binds = f"binds: one {_one(use)} more would save {use.price * _scale(use):.3g}"
        measured = "" if use.measured is None else f", measured {_written(use.measured, use)}"
        lines.append(f"  {name}: {_written(use.amount, use)}{measured} of {_written(use.bound, use)}; {binds}")
    return "\n".join(lines)


def _explained(key: str, bits: ChosenFormat, account: Account | None) -> str:
    lines = [f"{key}: {described(bits.bits)}, predicted loss increase {bits.increase:.4g}"]
    why = bits.why
    if why is None or account is None:
        return lines[0]
    shares = [f"{share:.1%} of {name}" for name, share in why.shares.items()]
    lines.append("  takes " + ", ".join([f"{why.loss_share:.1%} of the predicted loss", *shares]))
    for word, move in (("wider", why.wider), ("narrower", why.narrower)):
        if move is None:
            lines.append(f"  has no {word} width to take")
            continue
        costs = [f"{_written(amount, account.limits[name], sign=True)} {name}" for name, amount in move.amounts.items()]
        lines.append(f"  {described(move.bits)} instead: " + ", ".join([f"{move.loss:+.3g} loss", *costs]))
    return "\n".join(lines)


def _scale(use: LimitUse) -> float:
    """The size of the step that a shadow price is told for: what a reader would add to a limit."""
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


def _finite(value: Any) -> Any:
    """What JSON has no number for becomes null."""
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
    found = dict(entry["quantizer"])
    quantizer = QuantParams(**found | {"scale": tuple(map(float, found["scale"]))})
    if quantizer.bits != entry["bits"]:
        raise ValueError(f"bits are {entry['bits']}, the quantizer has {quantizer.bits}")
    if not all(scale > 0 for scale in quantizer.scale):
        raise ValueError("a scale is not above zero")
    return quantizer


def _width(entry: Mapping[str, Any]) -> int:
    return width_of(int(entry["bits"]), entry["scheme"])


def _width_entry(width: int) -> dict[str, object]:
    return {"bits": bits_of(width), "scheme": scheme(width)}


def _why_entry(why: Reason | None) -> dict[str, Any] | None:
    if why is None:
        return None
    found = asdict(why)
    for word, move in (("wider", why.wider), ("narrower", why.narrower)):
        if move is not None:
            found[word] |= _width_entry(move.bits)
    return found


def _why(entry: Mapping[str, Any] | None) -> Reason | None:
    if entry is None:
        return None
    found = (entry[word] for word in ("wider", "narrower"))
    moves = (None if move is None else Move(_width(move), move["loss"], move["amounts"]) for move in found)
    return Reason(_number(entry["loss_share"]), dict(entry["shares"]), *moves)


def _account(entry: Mapping[str, Any] | None) -> Account | None:
    if entry is None:
        return None
    limits = {name: LimitUse(**use) for name, use in entry["limits"].items()}
    return Account(limits, _number(entry["loss"]), _number(entry["bound"], -math.inf), bool(entry["optimal"]))
