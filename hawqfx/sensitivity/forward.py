"""One forward pass whose loss can be differentiated by the tensors of all sites, and checks of its gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hawqfx.errors import LossError
from hawqfx.frontend.data import Batch
from hawqfx.ir.program import Program
from hawqfx.ir.quantizers import activation_at, weight_at
from hawqfx.maths import curvature
from hawqfx.maths.formats import Format
from hawqfx.sensitivity.double_backward import Operators, for_forms


@dataclass(frozen=True)
class Forward:
    """A forward pass with its autograd graph.

    Args:
        output: the output of the model.
        tensors: key of a site -> its tensors: the weight, or the activations of its nodes in the order of the graph.
        names: key of a site -> what users call it.
        forms: key of a weight -> the scalar at which its quadratic forms arrive, see Hessian; empty unless asked for.
    """

    output: object
    tensors: Mapping[str, list[Tensor]]
    names: Mapping[str, str]
    forms: Mapping[str, Tensor] = field(default_factory=dict)

    def gradients(self, loss: Tensor, sites: Sequence[str], *, again: bool) -> dict[str, list[Tensor]]:
        """The gradients of a loss of the output, for the tensors of some sites.

        Args:
            loss: a scalar.
            sites: keys of the sites.
            again: whether the gradients will be differentiated once more.
        """
        tensors = [tensor for site in sites for tensor in self.tensors[site]]
        gradients = iter(curvature.gradient(loss, tensors, again=again))
        return {site: [next(gradients) for _ in self.tensors[site]] for site in sites}

    def check_gradient(self, index: int, site: str, gradients: Sequence[Tensor]) -> None:
        """Refuses a gradient that is not finite.  Callers check sites in the order of the graph.

        Args:
            index: number of the batch.
            site: key of the site.
            gradients: of the tensors of the site.

        Raises:
            LossError: names the site.
        """
        if not all(map(curvature.is_finite, gradients)):
            name = self.names[site]
            raise LossError(f"the gradient at {name!r} is not finite on batch {index}: the loss overflows there")

    def mean_square(self, site: str) -> float:
        """The mean square of a site's elements.

        A unit of trace counts this much, because the squared error per element at equal bits is proportional to it.
        """
        tensors = [tensor.detach() for tensor in self.tensors[site]]
        return sum(curvature.dot(x, x) for x in tensors) / sum(x.numel() for x in tensors)


def forward(program: Program, batch: Batch, operators: Operators, *, forms: bool = False) -> Forward:
    """Runs the model so that a loss of its output can be differentiated by the tensors of all sites.

    The derivative by an activation is the derivative by a perturbation that is added to the tensor.

    Args:
        program: the program with its sites.
        batch: the inputs.
        operators: replacements for operators, see hawqfx.sensitivity.double_backward.
        forms: whether all that a Hessian is wanted for are quadratic forms (layer_derivatives.py).
    """
    weights = {site.key: program.tensor(site.key).detach().requires_grad_() for site in program.weights}
    tensors: dict[str, list[Tensor]] = {key: [weight] for key, weight in weights.items()}
    site_of = program.site_of

    def record(node: str, value: Tensor) -> Tensor:
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        tensors.setdefault(site_of[node], []).append(value)
        return value

    scalars: dict[str, Tensor] = {}
    if forms:
        scalars = {key: w.new_zeros((), dtype=torch.float64, requires_grad=True) for key, w in weights.items()}
        operators = for_forms(operators, {weights[key]: scalar for key, scalar in scalars.items()})
    with torch.enable_grad():
        output = program.run(batch.args, batch.kwargs, record, weights, operators=operators)
    return Forward(output, tensors, _names(program), scalars)


def quantized_forward(
    program: Program, batch: Batch, plan: Mapping[str, Format]
) -> tuple[Forward, dict[str, list[Tensor]]]:
    """Runs the model as a plan quantizes it, so that a loss of its output can be differentiated by the tensors of all
    sites; gradients pass straight through the quantizers.

    Args:
        program: the program with its sites, their quantizers and codes.
        batch: the inputs.
        plan: the format of every site.

    Returns:
        The forward pass, whose tensors are the quantized ones, and key of a site -> its tensors before quantization.
    """
    values: dict[str, list[Tensor]] = {site.key: [program.tensor(site.key).detach()] for site in program.weights}
    weights = {
        key: (weight if plan[key].is_float else weight_at(program, key, plan[key])).detach().requires_grad_()
        for key, (weight,) in values.items()
    }
    tensors: dict[str, list[Tensor]] = {key: [weight] for key, weight in weights.items()}
    site_of = program.site_of

    def quantize(node: str, value: Tensor) -> Tensor:
        site = site_of[node]
        width, before = plan[site], value.detach()
        after = before if width.is_float else activation_at(program, site, width, before)
        value = value + (after - before) if value.requires_grad else after.clone().requires_grad_()
        values.setdefault(site, []).append(before)
        tensors.setdefault(site, []).append(value)
        return value

    with torch.enable_grad():
        output = program.run(batch.args, batch.kwargs, quantize, weights)
    return Forward(output, tensors, _names(program)), values


def _names(program: Program) -> dict[str, str]:
    return {site.key: site.name for site in program.sites}
