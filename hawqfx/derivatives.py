"""Operators that cannot be differentiated twice, and what stands in for them while second derivatives are measured.

Nothing is listed: every operator of the graph is tried once, on a sample of the data, and where its own backward pass
has no derivative, torch's decomposition of it into simpler operators is tried in its place.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.utils import _pytree as pytree

from hawqfx.errors import DerivativeError
from hawqfx.program import Program
from hawqfx.study import Batch

Operators = Mapping[Any, Callable[..., Any]]


def stand_ins(program: Program, batch: Batch) -> Operators:
    """Operator -> a function that computes the same and can be differentiated twice, for those that need one.

    Raises DerivativeError that names the operators, and a node of each, for which there is none.
    """
    trial = _Trial(program.graph, {site.key for site in program.weights})
    few = batch.first(2)
    with torch.no_grad():
        trial.run(*program.flat_inputs(few.args, few.kwargs), enable_io_processing=False)
    if trial.refused:
        named = "; ".join(f"{target} (node {node}): {why}" for target, (node, why) in trial.refused.items())
        raise DerivativeError(
            f"a Hessian needs second derivatives, which torch does not have for {named}. "
            'sensitivity="fisher" needs first derivatives only and works on this network.'
        )
    return trial.found


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
