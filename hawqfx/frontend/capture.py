"""Captures a model as a Program, by torch.export.

torch.export gives a graph with a single vocabulary of operators, and without call_module and call_method nodes.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from hawqfx.errors import CaptureError
from hawqfx.frontend.data import Batch
from hawqfx.ir.operators import BATCH_NORM, DECOMPOSED_BATCH_NORM, operands, training_argument
from hawqfx.ir.program import Program

Model = nn.Module | torch.export.ExportedProgram


def capture(model: Model, example: Batch) -> Program:
    """The program of an eval-mode model, with a dynamic batch dimension.

    Args:
        model: an nn.Module, an fx.GraphModule or an ExportedProgram.  The model is not changed; the program shares its
            tensors.  An ExportedProgram keeps the batch dimension that it was exported with.
        example: inputs of the model; dimension 0 of every tensor is the batch.

    Returns:
        A program with a graph, and without sites and facts.

    Raises:
        CaptureError: if the model is in train mode, if torch.export refuses the model (the message contains that of
            torch.export), or if a parameter or buffer is not finite.
    """
    if isinstance(model, torch.export.ExportedProgram):
        exported = model
    else:
        _refuse_training(model)
        exported = export(model, example)
    for node in exported.graph.nodes:
        if training_argument(node):
            raise CaptureError(f"{node.name} was captured in train mode: call model.eval() before torch.export")
    if any(_writes_in_place(node) for node in exported.graph.nodes):
        exported = exported.run_decompositions({})
    graph = exported.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    _recompose_batchnorm(graph.graph)
    for name, tensor in (*graph.named_parameters(), *graph.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CaptureError(f"{name} holds NaN or infinity: the checkpoint is damaged, or training diverged")
    _merge_get_attr_nodes(graph)
    return Program(graph)


def export(model: nn.Module, example: Batch) -> torch.export.ExportedProgram:
    """torch.export with a dynamic batch.

    Args:
        model: the module, in eval mode.
        example: inputs of the module; dimension 0 of every tensor is the batch, and becomes dynamic.

    Returns:
        The exported program.

    Raises:
        CaptureError: if torch.export refuses the model.
    """
    example = _with_two_samples(example)
    try:
        return torch.export.export(
            model, example.args, dict(example.kwargs), dynamic_shapes=_dynamic_batch(model, example)
        )
    except Exception as error:  # torch.export raises whatever the model's own code raises
        inputs = [f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in example.tensors]
        raise CaptureError(
            f"torch.export refused {type(model).__name__} on inputs {', '.join(inputs)}:\n{error}\n"
            "If the inputs have the wrong shape or order, mend the data. If control flow depends on tensor values, "
            "rewrite it with torch.where or torch.cond, or export the model yourself and give the ExportedProgram."
        ) from error


def _with_two_samples(example: Batch) -> Batch:
    """The example, with a single sample repeated: torch.export takes a dimension of size 1 for a constant."""
    if example.size > 1:
        return example

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf

    return Batch(pytree.tree_map(twice, example.args), pytree.tree_map(twice, dict(example.kwargs)))


def _dynamic_batch(model: nn.Module, example: Batch) -> Any:
    """The `dynamic_shapes` of torch.export: dimension 0 of every input tensor is dynamic."""

    def dynamic(leaf: Any) -> Any:
        return {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) else None

    forward = model.forward
    bound = inspect.signature(forward).bind(*example.args, **example.kwargs)
    return pytree.tree_map(dynamic, dict(bound.arguments))


def _refuse_training(model: nn.Module) -> None:
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training and not isinstance(model, fx.GraphModule):
        raise CaptureError(
            f"the model is in train mode ({', '.join(training[:3])}{', ...' if len(training) > 3 else ''}): "
            "call model.eval() first, since batch-norm and dropout behave differently in training"
        )


def _writes_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _recompose_batchnorm(graph: fx.Graph) -> None:
    """Turn every decomposed batch-norm back into a batch_norm node, the form that passes recognise.

    run_decompositions splits batch-norm with frozen statistics into a node with three outputs and a getitem node.
    """
    for node in graph.find_nodes(op="call_function", target=DECOMPOSED_BATCH_NORM):
        *arguments, momentum, epsilon = operands(node)
        (item,) = node.users  # the other two items are statistics of training
        with graph.inserting_after(node):
            whole = graph.call_function(BATCH_NORM, (*arguments, False, momentum, epsilon, False))
        whole.meta = dict(item.meta)
        item.replace_all_uses_with(whole)
        graph.erase_node(item)
        graph.erase_node(node)


def _merge_get_attr_nodes(graph: fx.GraphModule) -> None:
    """Make all uses of a tensor read the same get_attr node, so that passes see which weights are shared."""
    first: dict[int, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        owner, _, name = str(node.target).rpartition(".")
        tensor = getattr(graph.get_submodule(owner), name)
        kept = first.setdefault(id(tensor), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.graph.erase_node(node)
    graph.recompile()
