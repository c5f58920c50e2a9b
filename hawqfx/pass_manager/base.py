"""The definition of a pass, and observers that watch passes run.

A pass is a frozen dataclass; its fields are its options.  An Analysis learns facts and leaves the graph alone; a
Rewrite returns a new graph and keeps the function within a tolerance that it states.  A pass declares the classes of
facts that it needs and gives.  The pass manager checks the whole list before the first pass runs, and checks after
every pass that it has kept its promise.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, ClassVar, final

from hawqfx.frontend.context import Context
from hawqfx.ir.facts import Fact
from hawqfx.ir.program import Program
from hawqfx.ir.sites import Site

Kind = type[Fact] | type[Site]


def option(default: Any = MISSING, doc: str = "") -> Any:
    """A field of a pass that is an option.

    Args:
        default: the value of the option, if the user gives none.
        doc: a sentence that `hawqfx passes` prints.

    Returns:
        A dataclass field, with the sentence in `metadata["doc"]`.
    """
    return field(default=default, metadata={"doc": doc})


def options_of(step: "Pass") -> list[Field[Any]]:
    """The options of a pass, in order, with their descriptions in `metadata["doc"]`."""
    return list(fields(step))  # type: ignore[arg-type]


class Pass(ABC):  # noqa: B024 (its two kinds have the abstract methods)
    """A step of the compiler.

    Attributes:
        needs: classes of facts and sites that must be known before the pass runs.
        gives: classes of facts and sites that the pass adds: a fact for every site, or a fact about the network.
    """

    needs: ClassVar[tuple[Kind, ...]] = ()
    gives: ClassVar[tuple[Kind, ...]] = ()

    @property
    @final
    def name(self) -> str:
        """The name on the command line: that of the class, in snake case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()


class Analysis(Pass):
    """A pass that learns facts and leaves the graph alone."""

    @abstractmethod
    def learn(self, program: Program, context: Context) -> Mapping[str, Fact] | Program:
        """Learn facts about a program.

        Args:
            program: with the facts that the pass needs.
            context: batches, loss, device and seed.

        Returns:
            Facts by site key.  An analysis that finds sites, or learns about the whole network, returns a program with
            the same graph instead.
        """


class Rewrite(Pass):
    """A pass that returns a new graph.

    Attributes:
        tolerance: the largest change of an output on a few samples that the pass may cause, relative to the largest
            magnitude in that output; infinity for a pass that changes the function by design.
    """

    tolerance: ClassVar[float]

    @abstractmethod
    def rewrite(self, program: Program) -> Program:
        """A program with a new graph; the old one stays as it is."""


class Observer:
    """Looks at the program between passes, and never changes it."""

    def before(self, number: int, step: Pass, program: Program) -> None:
        """Called before a pass runs.

        Args:
            number: position of the pass in the program's history, from 1.
            step: the pass.
            program: the input of the pass.
        """
        return None

    def after(self, number: int, step: Pass, program: Program, seconds: float) -> None:
        """Called after a pass has kept its promise.

        Args:
            number: position of the pass in the program's history, from 1.
            step: the pass.
            program: the output of the pass.
            seconds: of the pass.
        """
        return None
