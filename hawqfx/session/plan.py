"""A plan: the quantizer chosen for every site, and the reason."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hawqfx.atomic_write import whole_file
from hawqfx.errors import PlanError, UsageError
from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Account, ChosenFormat, InputExponents, Quantizers, QuantParams
from hawqfx.ir.names import matches, some_of
from hawqfx.ir.program import Program
from hawqfx.ir.sites import ActivationSite, WeightSite
from hawqfx.maths.formats import Format
from hawqfx.pass_manager.base import Analysis, Kind, option
from hawqfx.passes.calibration import Calibration
from hawqfx.session import plan_json, plan_text
from hawqfx.session.pins import Pins, of_data, of_weights

REROUND = "to take its bits alone, calibrated and rounded anew, give reround=True to compile()"

SHOWN = 20  # sites in a notebook's table


@dataclass(frozen=True)
class Plan:
    """The chosen formats of a network.

    Args:
        budget: the text of the budget that the formats were chosen for.
        quantizers: site -> its quantizer; None: float.
        chosen: site -> its format, the increase predicted for it, and the reason.
        account: the amounts that the plan takes of its limits; None where the formats were given and not chosen.
        pins: what it was made with; None where that is not known, as in plans of older versions.
        names: activation -> what users call it (hawqfx.ir.names); none in plans of older versions.
        exponents: of the channels of linear layers' inputs (hawqfx.ir.facts.InputExponents); none in plans of older
            versions.
    """

    budget: str
    quantizers: Mapping[str, QuantParams | None]
    chosen: Mapping[str, ChosenFormat]
    account: Account | None = None
    pins: Pins | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    exponents: plan_json.Exponents = field(default_factory=dict)

    @staticmethod
    def of(program: Program, budget: str, pins: Pins | None = None) -> "Plan":
        """The plan that a program knows."""
        chosen = {site.key: program.facts.get(site.key, ChosenFormat) for site in program.sites}
        quantizers = {
            key: None if choice.format.is_float else program.facts.get(key, Quantizers).by_format[choice.format]
            for key, choice in chosen.items()
        }
        account = program.about(Account) if program.knows(Account) else None
        names = {site.key: site.name for site in program.activations}
        exponents = program.about(InputExponents).exponents if program.knows(InputExponents) else {}
        return Plan(budget, quantizers, chosen, account, pins, names, exponents)

    @property
    def bits(self) -> dict[str, int]:
        """Bits of every site; 32 is float."""
        return {key: choice.format.bits for key, choice in self.chosen.items()}

    @property
    def schemes(self) -> dict[str, str]:
        """The scheme by which the tensors of each site are quantized: see hawqfx.maths.formats."""
        return {key: choice.format.scheme for key, choice in self.chosen.items()}

    @property
    def formats(self) -> dict[str, Format]:
        """The format of every site."""
        return {key: choice.format for key, choice in self.chosen.items()}

    def calibration(self) -> Calibration:
        """The pass that calibrates every site in the formats that the plan has."""
        signed, unsigned = (
            {q.format for q in self.quantizers.values() if q is not None and q.per_channel is weight}
            for weight in (True, False)
        )
        schemes = {width.scheme for width in signed | unsigned} - {"float"}
        blocks = tuple(sorted({width.block for width in signed} - {0}))
        return Calibration(_bits(signed), _bits(unsigned), tuple(sorted(schemes)), blocks)

    def name(self, key: str) -> str:
        """What users call a site."""
        return self.names.get(key, key)

    def matching(self, site: str) -> list[str]:
        """The keys of the site of this name, or of those whose name matches the pattern.

        Raises:
            UsageError: if there is none.
        """
        keys = [key for key in self.chosen if matches(site, key, self.name(key))]
        if not keys:
            raise UsageError(f"the plan has no site {site!r}; it has {some_of(map(self.name, self.chosen))}")
        return keys

    def explain(self, site: str | None = None) -> str:
        """The reason for the bits of a site, or of every site whose name matches the pattern; without one, the amounts
        that the plan takes of its limits.

        Raises:
            UsageError: if there is no such site.
        """
        if site is None:
            return plan_text.whole(self.budget, self.account)
        found = ((self.name(key), self.chosen[key]) for key in self.matching(site))
        return "\n".join(plan_text.explained(name, choice, self.account) for name, choice in found)

    def _repr_html_(self) -> str:
        """A short table for notebooks: the first sites, and how many there are."""
        rows = [
            (self.name(key), str(choice.format), f"{choice.increase:.2g}")
            for key, choice in list(self.chosen.items())[:SHOWN]
        ]
        if len(self.chosen) > SHOWN:
            rows.append((f"and {len(self.chosen) - SHOWN} more", "", ""))
        return plan_text.html_table((f"site ({self.budget})", "format", "predicted loss increase"), rows)

    @property
    def digest(self) -> str:
        """A name for the content: equal plans have equal digests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"<Plan {self.budget}: {len(self.chosen)} sites, {self.digest}>"

    @property
    def _content(self) -> plan_json.Content:
        return plan_json.Content(
            self.budget, self.quantizers, self.chosen, self.account, self.pins, self.names, self.exponents
        )

    def to_tree(self) -> dict[str, Any]:
        """The plan as dicts, lists, texts and finite numbers; see hawqfx.session.plan_json."""
        return plan_json.to_tree(self._content)

    def to_json(self) -> str:
        """The plan as JSON text; see hawqfx.session.plan_json."""
        return plan_json.dumps(self._content)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The plan in a JSON text.

        Raises:
            PlanError: if the text is no plan.
        """
        return Plan(*plan_json.loads(text))

    @staticmethod
    def read(source: "Plan | str | Path") -> "Plan":
        """A plan, or the plan at a path.

        Raises:
            PlanError: if it cannot be read, or is no plan.
        """
        if isinstance(source, Plan):
            return source
        try:
            return Plan.from_json(Path(source).read_text())
        except OSError as error:
            raise PlanError(f"the plan {source} cannot be read: {error}") from error
        except UnicodeDecodeError as error:
            raise PlanError(
                f"the plan {source} cannot be read: it is neither JSON nor a file of Compiled.save()"
            ) from error

    def write(self, path: str | Path) -> None:
        """Write the JSON, whole or not at all.

        Raises:
            ExportError: if the file cannot be written.
        """
        with whole_file(Path(path)) as temporary:
            temporary.write_text(self.to_json())


def _bits(formats: Collection[Format]) -> tuple[int, ...]:
    return tuple(sorted({width.bits for width in formats if width.is_static or width.is_blockwise}))


@dataclass(frozen=True)
class FollowPlan(Analysis):
    """The quantizers and formats of a plan, in place of calibration and allocation."""

    plan: Plan = option(doc="the plan to follow")
    rounds: bool = option(True, "whether the codes are made anew, which takes the data that the plan was made with")
    needs: ClassVar[tuple[Kind, ...]] = (WeightSite, ActivationSite)
    gives: ClassVar[tuple[Kind, ...]] = (Quantizers, ChosenFormat)

    def learn(self, program: Program, context: Context) -> Program:
        """Raises PlanError if the program has other sites or weights than the plan, or the context other data."""
        check_sites(self.plan, program)
        if self.plan.pins is None:
            raise PlanError(f"the plan does not say which weights and data it was made with; {REROUND}")
        if self.plan.pins.weights != of_weights(program):
            raise PlanError(f"the plan was made for other weights of this network; {REROUND}")
        if self.rounds and self.plan.pins.data != of_data(context.batches):
            raise PlanError(
                "the plan was made with other data, on which weights would be rounded otherwise: give the same data, "
                f"or take hawqfx.load() and the file of Compiled.save(), which holds the codes; {REROUND}"
            )
        quantizers = {key: Quantizers({} if q is None else {q.format: q}) for key, q in self.plan.quantizers.items()}
        known = program.learn(quantizers).learn(self.plan.chosen)
        return known if self.plan.account is None else known.learn_about_network(self.plan.account)


def check_sites(plan: Plan, program: Program) -> None:
    """Raises PlanError if the program has other sites than the plan, or sites of other shapes."""
    have, want = {site.key for site in program.sites}, set(plan.quantizers)
    if have != want:
        odd = sorted(have ^ want)
        raise PlanError(f"the plan is for another model: {', '.join(odd[:5])} in only one of them")
    for site in program.weights:
        quantizer = plan.quantizers[site.key]
        if quantizer is not None and len(quantizer.scale) != site.shape[0] * quantizer.blocks:
            raise PlanError(f"the plan is for another model: {site.key} has {site.shape[0]} channels here")


def check_codes(plan: Plan, followed: Plan) -> None:
    """Raises PlanError if the network of a plan that was followed has other codes than the plan's own."""
    if plan.pins is not None and followed.pins is not None and plan.pins.codes != followed.pins.codes:
        raise PlanError(
            "the plan's codes were learned, or rounded in another way: give the same rounding=, or take hawqfx.load() "
            f"and the file of Compiled.save(), which holds the codes; {REROUND}"
        )
