"""What stands in for operators while second derivatives are measured.

Which operators cannot be differentiated twice is listed nowhere: every operator of the graph is tried once, on a sample
of the data, and where its own backward pass has no derivative, torch's decomposition of it into simpler operators is
tried in its place.  Convolutions can be, but torch computes the second derivative by the weight as a convolution with
a kernel as large as the image; here it is one of the kernels that ordinary training uses, which takes a fifth off a
Hessian-vector product of ResNet-50.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.utils import _pytree as pytree

from hawqfx.errors import DerivativeError
from hawqfx.frontend.context import Batch
from hawqfx.ir.program import Program

Operators = Mapping[Any, Callable[..., Any]]


def twice_differentiable(program: Program, batch: Batch) -> Operators:
    """Operator -> a function that computes the same and can be differentiated twice, for those that need one.

    Raises DerivativeError that names the operators, and a node of each, for which there is none.
    """
    trial = _Trial(program.graph, {site.key for site in program.weights})
    few = batch.first(2) if program.dynamic_batch else batch
    with torch.no_grad():
        trial.run(*program.flat_inputs(few.args, few.kwargs), enable_io_processing=False)
    if trial.refused:
        named = "; ".join(f"{target} (node {node}): {why}" for target, (node, why) in trial.refused.items())
        raise DerivativeError(
            f"a Hessian needs second derivatives, which torch does not have for {named}. "
            'sensitivity="fisher" needs first derivatives only and works on this network.'
        )
    return {**_CONVOLUTIONS, **trial.found}


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return _convolve(x, weight, bias, options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        by_x, by_weight = _ConvolutionBackward.apply(gradient, x, weight, ctx.options)  # type: ignore[no-untyped-call]
        by_bias = gradient.sum((0, *range(2, gradient.ndim))) if ctx.needs_input_grad[2] else None
        return by_x, by_weight, by_bias, None, None, None, None


class _ConvolutionBackward(torch.autograd.Function):
    """(g, x, w) -> the gradients by x and by w, which are linear in g and in w, and in g and in x."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, options: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, x, weight)
        ctx.options = options
        return _convolve_back(gradient, x, weight, options, [True, True, False])[:2]

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dw: Tensor | None) -> Any:
        gradient, x, weight = ctx.saved_tensors
        by_gradient = by_x = by_weight = None
        if dx is not None:
            by_gradient = _convolve(dx, weight, None, ctx.options)
            by_weight = _convolve_back(gradient, dx, weight, ctx.options, [False, True, False])[1]
        if dw is not None:
            other = _convolve(x, dw, None, ctx.options)
            by_gradient = other if by_gradient is None else by_gradient.add_(other)
            by_x = _convolve_back(gradient, x, dw, ctx.options, [True, False, False])[0]
        return by_gradient, by_x, by_weight, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, options: Any) -> Tensor:
    stride, padding, dilation, groups = options
    no_output_padding = [0] * (x.ndim - 2)
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, no_output_padding, groups)


def _convolve_back(gradient: Tensor, x: Tensor, weight: Tensor, options: Any, wanted: list[bool]) -> Any:
    stride, padding, dilation, groups = options
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0] * (x.ndim - 2), groups, wanted
    )


def _convolution(dimensions: int) -> Callable[..., Tensor]:
    ones, zeros = [1] * dimensions, [0] * dimensions

    def convolution(
        x: Tensor, weight: Tensor, bias: Any = None, stride: Any = ones, padding: Any = zeros, dilation: Any = ones,
        groups: int = 1,
    ) -> Tensor:  # fmt: skip
        return _Convolution.apply(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-untyped-call]

    return convolution


_CONVOLUTIONS: Operators = {
    torch.ops.aten.conv1d.default: _convolution(1),
    torch.ops.aten.conv2d.default: _convolution(2),
    torch.ops.aten.conv3d.default: _convolution(3),
}


class _Trial(fx.Interpreter):
    """Runs the graph and differentiates every operator twice on its own, the first time that it is called."""

    def __init__(self, graph: fx.GraphModule, weights: set[str]) -> None:
        super().__init__(graph)
        self.weights = weights
        self.found: dict[Any, Callable[..., Any]] = {}
        self.refused: dict[Any, tuple[str, str]] = {}
        self.seen: set[Any] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target not in self.seen:
            self.seen.add(n.target)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self._try(n, args, kwargs)
        return super().run_node(n)

    def _try(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        assert callable(node.target)
        sources = [source for source in node.all_input_nodes if source.op == "get_attr"]
        fixed = {id(self.env[source]) for source in sources if source.target not in self.weights}
        why = _failure(node.target, args, kwargs, fixed)
        if why is None:
            return
        simpler = decomposition_table.get(node.target)  # type: ignore[call-overload]
        if simpler is not None and _failure(simpler, args, kwargs, fixed) is None:
            self.found[node.target] = simpler
        else:
            self.refused[node.target] = node.name, why


def _failure(function: Callable[..., Any], args: Any, kwargs: Any, fixed: set[int]) -> str | None:
    """torch's message when it cannot differentiate `function` twice at these arguments, but for those `fixed`."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    with torch.enable_grad():
        leaves = [leaf if id(leaf) in fixed else _variable(leaf) for leaf in leaves]
        variables = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not variables:
            return None
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        outputs = [x for x in pytree.tree_leaves(function(*args, **kwargs)) if _differentiable(x)]
        if not outputs:
            return None
        try:
            cotangents = [torch.ones_like(x, requires_grad=True) for x in outputs]
            gradients = torch.autograd.grad(outputs, variables, cotangents, create_graph=True, allow_unused=True)
            once = [x for x in gradients if _differentiable(x)]
            if once:
                torch.autograd.grad(once, [*variables, *cotangents], [x.detach() for x in once], allow_unused=True)
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return None


def _variable(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().clone().requires_grad_()
    return leaf


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
