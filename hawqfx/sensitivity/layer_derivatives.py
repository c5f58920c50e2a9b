"""Layers whose second derivatives cost as little as they can: convolutions and linear layers.

A layer y = x * w is linear in its input and in its weight.  A Hessian-vector product by reverse over reverse mode runs
six such products for it: for a vector v of the weight, the tangent a of the input, the gradient g of the output, and b,
what the second pass finds for the output,

    a * w + x * v  upwards,    b *' w + g *' v  back to the input,    (g, a)_w + (b, x)_w  to the weight,

where *' leads back to the input and (.,.)_w to the weight; a gradient is three of them (with x * w and (g, x)_w).  A
quadratic form does not need the two that lead to the weight, for they are bilinear:

    <v, (g, a)_w> = <g *' v, a>    and    <v, (b, x)_w> = <b, x * v>,

whose factors g *' v and x * v are there already.  So v^T (H v)_w takes four products in place of six: 1.33 gradients in
place of 2.  What is added up is a scalar for each weight, at which the second pass arrives in place of the weight.

Torch can differentiate convolutions twice, too, but it computes the second derivative by the weight as a convolution
with a kernel as large as the image.  Here all are those of ordinary training.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hawqfx.maths.curvature import dot

# weight -> a scalar of value zero, whose product in a second backward pass is the quadratic form of the weight's vector
Forms = Mapping[Tensor, Tensor]


class _Products(ABC):
    """The three products of a layer that is linear in its input and in its weight."""

    @abstractmethod
    def outputs(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x * w, in the shape of the layer's output, and the bias."""

    @abstractmethod
    def back(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """g *' w, in the shape of x, of which only the shape counts."""

    @abstractmethod
    def by_weight(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """(g, x)_w, in the shape of the weight, of which only the shape counts."""

    @abstractmethod
    def by_bias(self, gradient: Tensor) -> Tensor:
        """(channels,): the sums of the gradient."""


@dataclass(frozen=True)
class _Linear(_Products):
    """x (..., in), w (out, in) -> (..., out)."""

    def outputs(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def back(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return gradient @ weight

    def by_weight(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    def by_bias(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1, gradient.shape[-1]).sum(0)


@dataclass(frozen=True)
class _Convolution(_Products):
    """A convolution over one to three dimensions, with torch's shapes."""

    stride: Any
    padding: Any
    dilation: Any
    groups: int

    def outputs(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.aten.convolution(x, weight, bias, *self._options(x))

    def back(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(gradient, x, weight, [True, False, False])[0]

    def by_weight(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(gradient, x, weight, [False, True, False])[1]

    def by_bias(self, gradient: Tensor) -> Tensor:
        return gradient.sum((0, *range(2, gradient.ndim)))

    def _backward(self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(gradient, x, weight, None, *self._options(x), wanted)

    def _options(self, x: Tensor) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, False, [0] * (x.ndim - 2), self.groups


class _Kept:
    """x * v of one call, from the second pass through its gradients until that through its output."""

    product: Tensor | None = None


class _Layer(torch.autograd.Function):
    """A layer whose backward pass is _Gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, form: Tensor | None, products: _Products) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products, ctx.form, ctx.kept = products, form, _Kept()
        return products.outputs(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        by_bias = ctx.products.by_bias(gradient) if ctx.needs_input_grad[2] else None
        if ctx.form is None or torch.is_grad_enabled():  # the first pass, or a product with the whole Hessian
            arguments = gradient, x, weight, ctx.form, ctx.products, ctx.kept
            by_x, by_weight, by_form = _Gradients.apply(*arguments)  # type: ignore[no-untyped-call]
            return by_x, by_weight, by_bias, by_form, None
        by_x = ctx.products.back(gradient, x, weight) if ctx.needs_input_grad[0] else None
        product, ctx.kept.product = ctx.kept.product, None
        by_form = None if product is None else ctx.form.new_tensor(dot(gradient, product))
        return by_x, None, by_bias, by_form, None


class _Gradients(torch.autograd.Function):
    """The backward pass of a layer: (g, x, w) -> g *' w, (g, x)_w and a zero for the form."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, form: Tensor | None, products: _Products, kept: _Kept
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, x, weight)
        ctx.products, ctx.form, ctx.kept = products, form, kept
        by_x = products.back(gradient, x, weight) if ctx.needs_input_grad[1] else None
        by_form = None if form is None else torch.zeros_like(form)
        return by_x, products.by_weight(gradient, x, weight), by_form

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, v: Tensor | None, by_form: Tensor | None) -> Any:
        gradient, x, weight = ctx.saved_tensors
        products = ctx.products
        by_gradient = by_x = by_weight = found = None
        if v is not None:
            by_x = products.back(gradient, x, v) if ctx.needs_input_grad[1] else None
            by_gradient = products.outputs(x, v)
        ctx.kept.product = None if ctx.form is None else by_gradient
        if a is not None:
            moved = products.outputs(a, weight)
            by_gradient = moved if by_gradient is None else moved.add_(by_gradient)
            if ctx.form is None:
                by_weight = products.by_weight(gradient, a, weight)
            elif by_x is not None:
                found = ctx.form.new_tensor(dot(by_x, a))
        return by_gradient, by_x, by_weight, found, None, None


@dataclass(frozen=True)
class LayerOperator:
    """Stands in for an operator of a layer, with the same arguments.

    Args:
        products: of the operator's arguments after the bias.
        forms: the weights of which quadratic forms are asked for, and not products.
    """

    products: Callable[..., _Products]
    forms: Forms = field(default_factory=lambda: MappingProxyType({}))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any, **named: Any) -> Tensor:
        if weight.ndim == 1:  # a product by a vector, as nn.functional.linear takes it, too
            return F.linear(x, weight, bias)
        form = self.forms.get(weight)
        return _Layer.apply(x, weight, bias, form, self.products(*options, **named))  # type: ignore[no-untyped-call]

    def asked(self, forms: Forms) -> "LayerOperator":
        """The same for quadratic forms of some weights."""
        return replace(self, forms=forms)


def _convolution(dimensions: int) -> LayerOperator:
    """The stand-in of torch's convolution over so many dimensions."""
    ones, zeros = [1] * dimensions, [0] * dimensions

    def products(stride: Any = ones, padding: Any = zeros, dilation: Any = ones, groups: int = 1) -> _Products:
        return _Convolution(stride, padding, dilation, groups)

    return LayerOperator(products)


LAYERS: Mapping[Any, LayerOperator] = {
    torch.ops.aten.conv1d.default: _convolution(1),
    torch.ops.aten.conv2d.default: _convolution(2),
    torch.ops.aten.conv3d.default: _convolution(3),
    torch.ops.aten.linear.default: LayerOperator(_Linear),
}
