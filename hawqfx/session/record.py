"""What is known of a network's calibration, for its summary; a saved file keeps it, where the data are gone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hawqfx.ir.facts import Compensated, Fact, FileText, RoundedWeights, Sensitivity
from hawqfx.ir.program import Program
from hawqfx.maths.formats import known_format
from hawqfx.maths.paired import Difference
from hawqfx.session.plan_json import number
from hawqfx.session.planner import Refinement, Rival


@dataclass(frozen=True)
class Calibrated:
    """The data that a network was calibrated on, and the losses there.

    Args:
        samples: their number.
        held: number of samples that the metric is validated on.
        losses: the mean loss, of the float network and of the compiled one.
        loss_reason: the name of the loss and why it is taken.
    """

    samples: int
    held: int
    losses: tuple[float, float]
    loss_reason: str


@dataclass(frozen=True)
class Trials:
    """What was tried beside a plan.

    Args:
        rival: uniform bits within the same limits.
        scores: the metric of the float network and of the compiled one, by the name of the data.
        refinements: the plans that were tried after the first one.
    """

    rival: Rival | None
    scores: Mapping[str, tuple[float, float]]
    refinements: tuple[Refinement, ...]

    def to_tree(self) -> dict[str, Any]:
        """As dicts, lists, texts and numbers."""
        return {
            "rival": None if self.rival is None else asdict(self.rival),
            "scores": dict(self.scores),
            "refinements": [asdict(each) for each in self.refinements],
        }

    @staticmethod
    def from_tree(tree: Mapping[str, Any]) -> "Trials":
        """What `to_tree` gave.

        Raises:
            Exception: a KeyError, TypeError or ValueError, if the tree is another.
        """
        rival = tree["rival"]
        return Trials(
            None if rival is None else Rival(**{**rival, "behind": _difference(rival["behind"])}),
            {name: (float(one), float(other)) for name, (one, other) in tree["scores"].items()},
            tuple(Refinement(**{**each, "gain": _difference(each["gain"])}) for each in tree["refinements"]),
        )


def _difference(entry: Sequence[float | None]) -> Difference:
    mean, stderr = entry
    return Difference(number(mean), number(stderr, math.inf))


def known_facts(planned: Program) -> dict[str, Any]:
    """What the tables show of the sites and of the file's size, as JSON holds it."""
    sensitivities = {
        site.key: asdict(planned.facts.get(site.key, Sensitivity))
        for site in planned.sites
        if planned.facts.has(site.key, Sensitivity)
    }
    text = planned.about(FileText) if planned.knows(FileText) else None
    rounded = {site.key: planned.facts.get(site.key, RoundedWeights).compensation for site in planned.weights}
    compensations = {key: asdict(each) for key, each in rounded.items() if each is not None}
    file = None
    if text is not None:
        file = asdict(text) | {
            "formats": {key: [width.bits, width.scheme, width.block] for key, width in text.formats.items()}
        }
    return {"sensitivities": sensitivities, "compensations": compensations, "file": file}


def with_facts(planned: Program, facts: Mapping[str, Any]) -> Program:
    """The program with what `known_facts` gave."""
    learned: dict[str, Fact] = {key: Sensitivity(**entry) for key, entry in facts["sensitivities"].items()}
    rounded: dict[str, Fact] = {
        key: replace(planned.facts.get(key, RoundedWeights), compensation=Compensated(**entry))
        for key, entry in facts["compensations"].items()
    }
    known, text = planned.learn(learned).learn(rounded), facts["file"]
    if text is None:
        return known
    formats = {key: known_format(*width) for key, width in text["formats"].items()}
    return known.learn_about_network(FileText(text["bytes"], formats, text["float_bytes"]))
