"""What a plan was made with: digests that tell whether it is followed on the same weights, data and codes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hawqfx.frontend.data import Batch
from hawqfx.ir.facts import RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.maths.digest import digest


@dataclass(frozen=True)
class Pins:
    """SHA-256 of what a network was made of.

    Args:
        weights: of the float network's parameters and buffers, after batch-norm is folded.
        data: of the inputs that it was calibrated on.
        codes: of the integer codes of its weights, and of biases that were learned with them.
    """

    weights: str
    data: str
    codes: str

    @staticmethod
    def of(planned: Program, batches: Sequence[Batch]) -> "Pins":
        """The digests of a network with chosen formats, and of the batches that it was calibrated on."""
        return Pins(of_weights(planned), of_data(batches), of_codes(planned))


def of_weights(program: Program) -> str:
    """The digest of the parameters and buffers of a float network."""
    return digest("weights", sorted(program.constants().items()))


def of_data(batches: Sequence[Batch]) -> str:
    """The digest of the inputs of batches."""
    return digest("data", ((f"{n}", tensor) for n, batch in enumerate(batches) for tensor in batch.tensors))


def of_codes(planned: Program) -> str:
    """The digest of the codes of all weights in the chosen formats."""
    return digest("codes", [(name, tensor) for name, tensor in sorted(stored_codes(planned).items())])


def stored_codes(planned: Program) -> dict[str, Tensor]:
    """The codes of all weights in the chosen formats, as codes/KEY, and the biases that were learned with them, as
    bias/KEY; KEY is that of the weight's site."""
    found: dict[str, Tensor] = {}
    for site in planned.weights:
        width = planned.formats()[site.key]
        if width.is_float:
            continue
        known = planned.facts.get(site.key, RoundedWeights)
        found[f"codes/{site.key}"] = known.codes[width]
        if width in known.biases:
            found[f"bias/{site.key}"] = known.biases[width]
    return found


def of_graph(program: Program) -> str:
    """The digest of a graph without its tensors, and of the dimensions of its inputs that vary."""
    varying = sorted((name, sorted(axes)) for name, axes in program.dimensions.items())
    return digest(f"{program.graph.graph}\n{varying}")


def of_network(lowered: Program) -> str:
    """The digest of a graph with its tensors."""
    return digest(str(lowered.graph.graph), sorted(lowered.constants().items()))
