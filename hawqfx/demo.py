"""The demo: compiles ResNet-20 for Fashion-MNIST, and compares float, uniform and mixed precision in onnxruntime."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hawqfx import zoo
from hawqfx.compiler import compile
from hawqfx.pass_manager.observers import TimePasses
from hawqfx.runtime import ort
from hawqfx.session.session import Compiled

ROUNDS = 100


@dataclass(frozen=True)
class Entry:
    """A model in the comparison.

    Args:
        name: for the table.
        path: of the ONNX file.
        promised: bytes of the weights, by the plan.
    """

    name: str
    path: Path
    promised: int


def demo(budget: str, folder: Path, console: Console) -> Compiled:
    """Compile ResNet-20, export four files, run them all, and print the table of sites and the comparison.

    Beside the network under the budget are uniform 8 bits, and the widest uniform bits that take no more.

    Args:
        budget: as for hawqfx.compile.
        folder: of the files; it is made if it does not exist.
        console: prints the tables.

    Returns:
        The compiled network.

    Raises:
        HawqfxError: if the network cannot be compiled, or if a file cannot be written.
    """
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    timing = TimePasses()
    compiled = compile(zoo.resnet20(), budget, zoo.calibration(), observers=[timing], console=console)
    console.print(compiled.table())
    console.print(timing.table())
    entries = [_export_float(compiled, folder)]
    bits, uniform = _widest_uniform(compiled)
    for name, model in {
        "uniform 8 bits": compiled.uniform(8),
        f"uniform {bits} bits": uniform,
        f"hawqfx {budget}": compiled,
    }.items():
        path = folder / (name.replace(" ", "_").replace("%", "").replace("=", "_") + ".onnx")
        model.export(path)
        entries.append(Entry(name, path, model.weight_bytes))
    accuracy = {entry.name: _accuracy(entry.path) for entry in entries}
    console.print(_comparison(entries, accuracy))
    exact, _, even, mixed = accuracy.values()
    console.print(
        f"Of no more bytes, one width for all weights is {bits} bits and costs {100 * (exact - even):.1f} points of "
        f"float32's {exact:.2%}; mixed widths cost {100 * (exact - mixed):.1f}."
    )
    console.print(f"files are in {folder.resolve()}; {time.perf_counter() - start:.0f} s in all")
    return compiled


def _widest_uniform(compiled: Compiled) -> tuple[int, Compiled]:
    """The widest uniform bits whose weights take no more bytes than those of a network; 2 bits, if none do."""
    for bits in range(8, 2, -1):
        uniform = compiled.uniform(bits)
        if uniform.weight_bytes <= compiled.weight_bytes:
            return bits, uniform
    return 2, compiled.uniform(2)


def _export_float(compiled: Compiled, folder: Path) -> Entry:
    path = folder / "float32.onnx"
    compiled.export_float(path)
    return Entry("float32", path, compiled.planned.float_bytes())


def _accuracy(path: Path) -> float:
    """The top-1 accuracy of a file on the test images, from 0 to 1."""
    model = ort.session(path)
    scores = [
        float((np.asarray(ort.run(model, [images.numpy()])[0]).argmax(1) == labels.numpy()).sum())
        for images, labels in zoo.evaluation()
    ]
    return sum(scores) / sum(len(labels) for _, labels in zoo.evaluation())


def _comparison(entries: list[Entry], accuracy: Mapping[str, float]) -> Table:
    """Size, accuracy and latency of the models, a row for every model; the first model is the reference for sizes."""
    images = zoo.evaluation(64)[0][0]
    single, batch = (
        ort.latency({entry.name: entry.path for entry in entries}, [images[:size].numpy()], rounds=ROUNDS)
        for size in (1, len(images))
    )
    table = Table(
        "model", "weight bytes", "file bytes", "of float32", "top-1", "1 image, ms", "64 images, ms",
        title="2,000 test images; onnxruntime, one thread, median of 100 runs in turns",
    )  # fmt: skip
    reference = entries[0].path.stat().st_size
    for entry in entries:
        size = entry.path.stat().st_size
        table.add_row(
            entry.name,
            f"{entry.promised:,}",
            f"{size:,}",
            f"{size / reference:.1%}",
            f"{accuracy[entry.name]:.2%}",
            f"{1e3 * single[entry.name].median:.3f}",
            f"{1e3 * batch[entry.name].median:.2f}",
        )
    return table
