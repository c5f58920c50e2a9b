"""A plan: the quantizer chosen for every site, to and from JSON."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hawqfx.errors import PlanError
from hawqfx.facts import Bits, Fact, Quantizers, QuantParams
from hawqfx.files import whole_file
from hawqfx.program import Program

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Site key -> quantizer and predicted loss increase, and the budget that they were chosen for."""

    budget: str
    quantizers: Mapping[str, QuantParams]
    increase: Mapping[str, float]

    @staticmethod
    def of(program: Program, budget: str) -> "Plan":
        chosen = {site.key: program.facts.get(site.key, Bits) for site in program.sites}
        return Plan(
            budget,
            {key: program.facts.get(key, Quantizers).by_bits[bits.bits] for key, bits in chosen.items()},
            {key: bits.increase for key, bits in chosen.items()},
        )

    @property
    def bits(self) -> dict[str, int]:
        return {key: quantizer.bits for key, quantizer in self.quantizers.items()}

    @property
    def digest(self) -> str:
        """A name for the content: equal plans have equal digests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        sites = {key: asdict(q) | {"loss_increase": self.increase[key]} for key, q in self.quantizers.items()}
        return json.dumps({"hawqfx_plan": FORMAT, "budget": self.budget, "sites": sites}, indent=1)

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
            increase = {key: float(entry.pop("loss_increase")) for key, entry in sites.items()}
            quantizers = {key: _quantizer(entry) for key, entry in sites.items()}
            return Plan(str(data["budget"]), quantizers, increase)
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
            if len(self.quantizers[site.key].scale) != site.shape[0]:
                raise PlanError(f"the plan is for another model: {site.key} has {site.shape[0]} channels here")
        quantizers: dict[str, Fact] = {key: Quantizers({q.bits: q}) for key, q in self.quantizers.items()}
        bits: dict[str, Fact] = {key: Bits(q.bits, self.increase[key]) for key, q in self.quantizers.items()}
        return program.learn(quantizers).learn(bits)


def _quantizer(entry: dict[str, Any]) -> QuantParams:
    quantizer = QuantParams(**entry | {"scale": tuple(map(float, entry["scale"]))})
    if not all(scale > 0 for scale in quantizer.scale):
        raise ValueError("a scale is not above zero")
    return quantizer
