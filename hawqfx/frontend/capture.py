"""Captures a model as a Program, by torch.export.

torch.export gives a graph with a single vocabulary of operators, and without call_module and call_method nodes.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import Dim
from torch.utils import _pytree as pytree

from hawqfx.errors import CaptureError, UsageError
from hawqfx.frontend.data import Batch
from hawqfx.frontend.dimensions import name_dimensions, named_keywords, shapes_of, shapes_to_capture, varying_axes
from hawqfx.frontend.experts import dense_experts
from hawqfx.frontend.inlining import inline_wrappers
from hawqfx.frontend.outputs import without_objects
from hawqfx.ir.graph import constants_of, first_input
from hawqfx.ir.names import names_of
from hawqfx.ir.operators import (
    ASSERTIONS,
    BATCH_NORM,
    DECOMPOSED_BATCH_NORM,
    SQUEEZES,
    VIEWS,
    operands,
    training_argument,
)
from hawqfx.ir.program import Program
from hawqfx.ir.sources import dropped_sources

# lines of torch's messages that are of no use to who reads them here
_ADVICE = (
    "The error above occurred", "For more information", "For extended logs", "If you suspect", "For more debugging",
    "For C++ stack", "consider using data-dependent", "Caused by",
)  # fmt: skip

_DROPPING = {"train", "dropout_p"}  # arguments of operators that drop values in training

Model = nn.Module | torch.export.ExportedProgram


def capture(model: Model, example: Batch, dynamic_shapes: Any = None) -> Program:
    """The program of an eval-mode model, with a dynamic batch dimension.

    Args:
        model: an nn.Module, an fx.GraphModule or an ExportedProgram.  The model is not changed; the program shares its
            tensors.  An ExportedProgram keeps the dimensions that it was exported with.
        example: inputs of the model; dimension 0 of every tensor is the batch.
        dynamic_shapes: other dimensions that vary, as torch.export takes them.

    Returns:
        A program with a graph, and without sites and facts.

    Raises:
        CaptureError: if the model is in train mode, if torch.export refuses the model (the message contains that of
            torch.export), if the graph has control flow or sizes that depend on values, or if a parameter or buffer is
            not finite.
        UsageError: if an ExportedProgram is given other dynamic shapes.
    """
    with dropped_sources() as kept:
        program = _capture(model, example, dynamic_shapes)
        kept.append(program.graph)
    return program


def _capture(model: Model, example: Batch, dynamic_shapes: Any) -> Program:
    left_out: list[str] = []
    if isinstance(model, torch.export.ExportedProgram):
        if dynamic_shapes is not None:
            raise UsageError("dynamic_shapes= is for models: an ExportedProgram has those that it was exported with")
        exported = model
    else:
        _refuse_training(model)
        with without_objects(model, left_out), dense_experts(model), named_keywords(model, example):
            exported = export(model, example, dynamic_shapes)
    for node in exported.graph.nodes:
        if training_argument(node):
            name = names_of(exported.graph)[node]
            raise CaptureError(f"{name} was captured in train mode: call model.eval() before torch.export")
    if any(_writes_in_place(node) for node in _all_nodes(exported.graph_module)):
        exported = exported.run_decompositions({})
    graph = exported.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    inline_wrappers(graph)
    _simplify(graph.graph)
    _recompose_batchnorm(graph.graph)
    _refuse_random_numbers(graph.graph)
    _refuse_sizes_by_values(graph.graph)
    _merge_get_attr_nodes(graph)
    for name, tensor in constants_of(graph).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CaptureError(f"{name} holds NaN or infinity: the checkpoint is damaged, or training diverged")
    graph.recompile()
    module = None if isinstance(model, torch.export.ExportedProgram) else model
    names = name_dimensions(graph.graph, module, example, dynamic_shapes)
    notes = [f"left out of the outputs: {', '.join(left_out)}, which no graph returns"] if left_out else []
    return Program(graph, dimensions=names, notes=tuple(notes))


def export(model: nn.Module, example: Batch, dynamic_shapes: Any = None) -> torch.export.ExportedProgram:
    """torch.export with a dynamic batch.

    Args:
        model: the module, in eval mode.
        example: inputs of the module; dimension 0 of every tensor is the batch, and becomes dynamic.
        dynamic_shapes: other dimensions that vary, as torch.export takes them.

    Returns:
        The exported program.

    Raises:
        CaptureError: if torch.export refuses the model.
    """
    example = _with_two_samples(example)
    sizes = (Dim.DYNAMIC, Dim("batch"))  # each its own; all the same, where the model compares them
    return _export(model, example, [shapes_to_capture(model, example, dynamic_shapes, size) for size in sizes])


def _export(model: nn.Module, example: Batch, shapes: Sequence[Any]) -> torch.export.ExportedProgram:
    """torch.export with the first of several `dynamic_shapes` that it takes; see `export`."""
    refused: Exception | None = None
    for given, dynamic in itertools.product(_in_types_of(model, example), shapes):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph as far as it came
                exported = torch.export.export(model, given.args, dict(given.kwargs), dynamic_shapes=dynamic)
            # else torch adds assertions about sizes, which some decompositions cannot evaluate
            exported.example_inputs = None
            _let_go(exported)
            return exported
        except Exception as error:  # torch.export raises whatever the model's own code raises
            refused = refused or error
    inputs = [f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in example.tensors]
    raise CaptureError(
        f"torch.export refused {type(model).__name__} on inputs {', '.join(inputs)}:\n{_without_advice(refused)}\n"
        "If the inputs have the wrong shape or order, mend the data. If control flow depends on tensor values, "
        "rewrite it with torch.where, or export the model yourself and give the ExportedProgram."
    ) from refused


def _let_go(exported: torch.export.ExportedProgram) -> None:
    """Drop what would keep an export's shapes in memory for as long as the process lives, some 0.2 MB each.

    A ShapeEnv lists the fake inputs of its export, and their sizes refer back to it from C++, where Python's garbage
    collector does not look; and the class caches answers by ShapeEnv, some of them without a bound.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # loads SymPy

    for node in exported.graph.find_nodes(op="placeholder"):
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None and mode.shape_env.tracked_fakes:
            mode.shape_env.tracked_fakes.clear()
    for method in vars(ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def _without_advice(error: Exception | None) -> str:
    """The message of an error without what torch tells of its own logs."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(_ADVICE)]
    return "\n".join(lines)


def export_again(graph: fx.GraphModule, example: Batch) -> torch.export.ExportedProgram:
    """torch.export of a captured graph whose inputs vary as they did when it was captured.

    Raises:
        CaptureError: if torch.export refuses the graph.
    """
    if 0 in varying_axes(first_input(graph.graph)):
        example = _with_two_samples(example)
    return _export(graph, example, [shapes_of(graph, example)])


def _with_two_samples(example: Batch) -> Batch:
    """The example, with a single sample repeated: torch.export takes a dimension of size 1 for a constant."""
    if example.size > 1:
        return example

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf

    return Batch(pytree.tree_map(twice, example.args), pytree.tree_map(twice, dict(example.kwargs)))


def _in_types_of(model: nn.Module, example: Batch) -> list[Batch]:
    """The example with its floats in each floating-point type of a model's parameters: a model of one type asks for
    inputs of that type, and one of several types for those of one of them."""
    kinds = dict.fromkeys(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())

    def cast(kind: torch.dtype) -> Batch:
        return example.map(lambda tensor: tensor.to(kind) if tensor.is_floating_point() else tensor)

    return [cast(kind) for kind in kinds] or [example]


def _all_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a graph and of its sub-graphs."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from part.graph.nodes


def _refuse_training(model: nn.Module) -> None:
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training and not isinstance(model, fx.GraphModule):
        raise CaptureError(
            f"the model is in train mode ({', '.join(training[:3])}{', ...' if len(training) > 3 else ''}): "
            "call model.eval() first, since batch-norm and dropout behave differently in training"
        )


def _writes_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _simplify(graph: fx.Graph) -> None:
    """Take out assertions, copies, and squeezes of nothing; write views as reshapes, which need no particular strides.

    The assertions speak of types, devices and layouts that hold for the model as it is; those about sizes are kept by
    torch.export itself, when the graph is exported again.
    """
    for node in list(graph.nodes):
        if node.target in ASSERTIONS:
            graph.erase_node(node)
        elif node.target in VIEWS:
            node.target = torch.ops.aten.reshape.default
        elif node.target in SQUEEZES:
            _squeeze_by_axes(node)
        elif node.target is torch.ops.aten.copy.default:
            _copy_as_value(node)


def _copy_as_value(node: fx.Node) -> None:
    """Write what is copied over a whole tensor as the value that it is, in the tensor's type and shape: torch.export
    leaves `aten.copy` of a write in place, which torch cannot differentiate."""
    over, source = operands(node)[:2]
    value, given = node.meta["val"], source.meta["val"]
    steps: list[tuple[Any, Any]] = []
    if given.dtype != value.dtype:
        steps.append((torch.ops.aten.to.dtype, value.dtype))
    if [*map(str, given.shape)] != [*map(str, value.shape)]:
        steps.append((torch.ops.aten.expand_as.default, over))
    with node.graph.inserting_before(node):
        for target, other in steps:
            source = node.graph.call_function(target, (source, other))
            source.meta = dict(node.meta)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _squeeze_by_axes(node: fx.Node) -> None:
    """Leave to a squeeze the dimensions whose size is 1: torch passes over others, ONNX refuses them."""
    source, *given = operands(node)
    sizes = source.meta["val"].shape
    wanted = given[0] if given else range(len(sizes))
    axes = [axis % len(sizes) for axis in ([wanted] if isinstance(wanted, int) else wanted)]
    ones = [axis for axis in axes if isinstance(sizes[axis], int) and sizes[axis] == 1]
    if not ones:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
    elif len(ones) < len(axes) or not given:
        node.target, node.args = torch.ops.aten.squeeze.dims, (source, ones)


def _refuse_random_numbers(graph: fx.Graph) -> None:
    """Raises CaptureError if an operator draws random numbers; those that drop values, such as attention and recurrent
    layers, draw none outside of training."""
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
            continue
        if not _DROPPING & {argument.name for argument in node.target._schema.arguments}:
            raise CaptureError(
                f"{names_of(graph)[node]}: {node.target} draws random numbers in every run, so that no two runs can be "
                "compared: make them an input of the model, or a buffer"
            )


def _refuse_sizes_by_values(graph: fx.Graph) -> None:
    """Raises CaptureError if the size of a tensor depends on the values of another, as that of nonzero does."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # takes SymPy in, as long as torch itself

    for node in graph.nodes:
        sizes = [size for value in pytree.tree_leaves(node.meta.get("val")) for size in getattr(value, "shape", ())]
        if any(free_unbacked_symbols(size) for size in sizes if isinstance(size, torch.SymInt)):
            raise CaptureError(
                f"{names_of(graph)[node]}: {node.target} makes a tensor whose size depends on the values of its "
                "input: a graph of integer kernels has sizes that follow from those of the inputs. In a mixture of "
                "experts, let each expert compute all tokens, and weigh what they say by the router, with zeros for "
                "the others"
            )


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
