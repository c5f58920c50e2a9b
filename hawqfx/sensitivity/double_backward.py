"""Replacements for operators while second derivatives are measured.

Torch has no list of the operators that it cannot differentiate twice.  So every operator of the graph is tried once, on
a sample of the data; if its backward pass has no derivative, torch's decomposition into simpler operators is tried
instead.  Layers have stand-ins of our own, for speed (layer_derivatives.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.utils import _pytree as pytree

from hawqfx.errors import DerivativeError
from hawqfx.frontend.data import Batch
from hawqfx.ir.names import names_of
from hawqfx.ir.program import Program
from hawqfx.sensitivity.layer_derivatives import LAYERS, Forms, LayerOperator

# operator -> the function that replaces it
Operators = Mapping[Any, Callable[..., Any]]


def twice_differentiable(program: Program, batch: Batch) -> Operators:
    """Replacements that compute the same and can be differentiated twice.

    Args:
        program: the program whose operators are tried.
        batch: a batch to try them on; two samples are enough where the program takes any batch size.

    Returns:
        Operator -> replacement, for the operators of the program that need one, and for all layers.

    Raises:
        DerivativeError: if an operator has no second derivative and no replacement; it names a value of each.
    """
    trial = _Trial(program.graph, {site.key for site in program.weights})
    few = batch.first(2) if program.dynamic_batch else batch
    with torch.no_grad():
        trial.run(*program.flat_inputs(few.args, few.kwargs), enable_io_processing=False)
    if trial.failures:
        names = names_of(program.graph.graph)
        named = "; ".join(f"{target} ({names[node]}): {why}" for target, (node, why) in trial.failures.items())
        raise DerivativeError(
            f"a Hessian needs second derivatives, which torch does not have for {named}. "
            'sensitivity="fisher" needs first derivatives only and works on this network.'
        )
    return {**LAYERS, **trial.replacements}


def for_forms(operators: Operators, forms: Forms) -> Operators:
    """The same replacements, of which those of layers compute quadratic forms of some weights instead of products."""
    return {
        target: function.asked(forms) if isinstance(function, LayerOperator) else function
        for target, function in operators.items()
    }


class _Trial(fx.Interpreter):
    """Runs the graph, and differentiates every operator twice on its own when it is called for the first time.

    Args:
        graph: the graph.
        weights: names of the constants that are differentiated; the other constants are fixed.

    Attributes:
        replacements: operator -> its decomposition, where only that can be differentiated twice.
        failures: operator -> a node that calls it, and torch's message, where neither can.
    """

    def __init__(self, graph: fx.GraphModule, weights: set[str]) -> None:
        super().__init__(graph)
        self.weights = weights
        self.replacements: dict[Any, Callable[..., Any]] = {}
        self.failures: dict[Any, tuple[fx.Node, str]] = {}
        self.tried: set[Any] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target not in self.tried:
            self.tried.add(n.target)
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
            self.replacements[node.target] = simpler
        else:
            self.failures[node.target] = node, why


def _failure(function: Callable[..., Any], args: Any, kwargs: Any, fixed: set[int]) -> str | None:
    """Torch's message if it cannot differentiate a function twice; None if it can.

    Args:
        function: the operator or its decomposition.
        args: its positional arguments.
        kwargs: its keyword arguments.
        fixed: ids of the tensors in the arguments that are not differentiated.
    """
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
    """A copy of a floating-point tensor that is differentiated; any other value as it is."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().clone().requires_grad_()
    return leaf


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
