"""What a pass is, and who may watch it run.

A pass is a frozen dataclass; its fields are its options.  An Analysis learns facts and leaves the graph alone; a
Rewrite returns a new graph and keeps the function within a tolerance that it states.  Each declares the fact classes
that it needs and gives; the runner checks the whole list before anything runs and holds each pass to its promise.
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
    """A field of a pass that is an option, with a sentence that `hawqfx passes` prints."""
    return field(default=default, metadata={"doc": doc})


def options_of(step: "Pass") -> list[Field[Any]]:
    """The options of a pass, in order; `metadata["doc"]` says what each does."""
    return list(fields(step))  # type: ignore[arg-type]


class Pass(ABC):  # noqa: B024 (its two kinds have the abstract methods)
    """One step of the compiler, named on the command line as its class, in snake case."""

    needs: ClassVar[tuple[Kind, ...]] = ()
    gives: ClassVar[tuple[Kind, ...]] = ()

    @property
    @final
    def name(self) -> str:
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()


class Analysis(Pass):
    @abstractmethod
    def learn(self, program: Program, context: Context) -> Mapping[str, Fact] | Program:
        """Facts by site key; or, for an analysis that finds sites, a program with the same graph and more sites."""


class Rewrite(Pass):
    tolerance: ClassVar[float]
    """The largest change of the output that the pass may cause, relative to its largest magnitude, on one batch.
    Infinity for a pass that changes the function by design."""

    @abstractmethod
    def rewrite(self, program: Program) -> Program:
        """A program with a new graph; the old one stays as it is."""


class Observer:
    """Looks at the program between passes, and never touches it."""

    def before(self, number: int, step: Pass, program: Program) -> None:
        return None

    def after(self, number: int, step: Pass, program: Program, seconds: float) -> None:
        return None
