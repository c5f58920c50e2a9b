"""Short cuts for tests: a program up to a given pass, and a quick compile."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import hawqfx
from hawqfx import pipeline
from hawqfx.frontend.capture import capture
from hawqfx.frontend.context import Context
from hawqfx.frontend.criteria import Loss
from hawqfx.frontend.data import Batch, gather
from hawqfx.frontend.losses import cross_entropy
from hawqfx.ir.program import Program
from hawqfx.pass_manager.base import Pass
from hawqfx.pass_manager.manager import run
from hawqfx.passes.hawq_v2 import HawqV2
from hawqfx.runtime import parity
from tests.nets import build, images


def context(data: Sequence[Any] | None = None, loss: Loss = cross_entropy, seed: int = 0) -> Context:
    return Context(gather(images() if data is None else data), loss, seed)


def captured(make: Callable[[], nn.Module]) -> Program:
    return capture(build(make), context().batches[0])


def measuring(probes: int = 4) -> list[Pass]:
    """All passes before a budget is known, with few probes."""
    recipe = pipeline.recipe(metric=HawqV2(probes, tolerance=0))
    return [*recipe.prepare, *recipe.measure]


def after(name: str, make: Callable[[], nn.Module], probes: int = 4) -> Program:
    """The program of a network after the pass of this name."""
    steps = measuring(probes)
    last = [step.name for step in steps].index(name)
    return run(steps[: last + 1], captured(make), context())


def quick(make: Callable[[], nn.Module], budget: str | None = "weight_bits=4", **options: Any) -> hawqfx.Compiled:
    """Compile a tiny network with few probes."""
    few = HawqV2(4, tolerance=0)
    return hawqfx.compile(build(make), budget, options.pop("data", images()), sensitivity=few, **options)


def tensor_at(program: Program, batch: Batch, node: str) -> Tensor:
    """The value that a node has on a batch."""
    seen: list[Tensor] = []

    def look(_: str, value: Tensor) -> Tensor:
        seen.append(value.detach())
        return value

    program.run(batch.args, batch.kwargs, look, at=[node])
    return seen[0]


def damaged(path: Path, how: str) -> None:
    """Damage a file: truncated, flipped (a bit of its last quarter), emptied, or a folder in its place."""
    content = bytearray(path.read_bytes())
    if how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "flipped":
        content[-len(content) // 4] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: {"truncated": len(content) * 2 // 3, "emptied": 0}[how]])


def assert_file_has_the_codes(compiled: hawqfx.Compiled, folder: Path) -> None:
    """The exported file computes with the codes of the lowered graph."""
    path = folder / "model.onnx"
    compiled.export(path)
    found = parity.compare(compiled.program, path, compiled.session.context.batches[0])
    assert found.codes > 0
    assert found.flips == 0
    assert found.worst < 1e-6  # float32 sums in another order
