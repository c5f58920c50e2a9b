"""The numbers that a metric measures on a network, their estimates, and the work that samples them on one batch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hawqfx.maths.formats import Format


class Quantity(NamedTuple):
    """A number that a metric measures at a site.

    Args:
        site: key of the site.
        format: the format that the number is about; None for a number that does not depend on the format.
    """

    site: str
    format: Format | None = None

    def __str__(self) -> str:
        return self.site if self.format is None else f"{self.format}: {self.site}"

    @property
    def known_format(self) -> Format:
        """The format, for metrics whose quantities all have one."""
        assert self.format is not None, f"the quantity {self} has no format"
        return self.format


class Estimate(NamedTuple):
    """The estimate of a quantity.

    Args:
        mean: the mean over the data.
        stderr: its standard error over the probes.
        probes: the smallest number of probes on a batch.
    """

    mean: float
    stderr: float
    probes: int


class Measurement(ABC):
    """The work of a metric on one batch."""

    @abstractmethod
    def sample(self, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        """An independent, unbiased sample of every wanted quantity, for the batch as a whole.

        Args:
            probe: number of the sample on this batch, from 0; it seeds the sample.
            wanted: the quantities to sample.
        """

    def worth(self, quantity: Quantity) -> float:
        """The weight of a unit of this quantity beside the quantities of other sites with the same kind and format."""
        return 1.0
