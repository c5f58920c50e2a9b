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
from hawqfx.session.compiled import Compiled

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


@dataclass(frozen=True)
class Row:
    """What is found of a model.

    Args:
        model: its name.
        weight_bytes: by the plan.
        file_bytes: of the ONNX file.
        accuracy: top-1 on the test images, from 0 to 1.
        single: seconds for one image.
        many: seconds for 64 images.
    """

    model: str
    weight_bytes: int
    file_bytes: int
    accuracy: float
    single: float
    many: float


def demo(budget: str, folder: Path, console: Console) -> list[Row]:
    """Compile ResNet-20, export four files, run them all, and print the table of sites and the comparison.

    Beside the network under the budget are uniform 8 bits, and the widest uniform bits that take no more.

    Args:
        budget: as for hawqfx.compile.
        folder: of the files; it is made if it does not exist.
        console: prints the tables.

    Returns:
        What was found of each model, the one under the budget last.

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
    rows = _rows(entries, accuracy)
    console.print(_table(rows))
    exact, _, even, mixed = accuracy.values()
    console.print(
        f"Of no more bytes, one width for all weights is {bits} bits and costs {100 * (exact - even):.1f} points of "
        f"float32's {exact:.2%}; mixed widths cost {100 * (exact - mixed):.1f}."
    )
    console.print(f"files are in {folder.resolve()}; {time.perf_counter() - start:.0f} s in all")
    return rows


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


def _rows(entries: list[Entry], accuracy: Mapping[str, float]) -> list[Row]:
    images = zoo.evaluation(64)[0][0]
    single, many = (
        ort.latency({entry.name: entry.path for entry in entries}, [images[:size].numpy()], rounds=ROUNDS)
        for size in (1, len(images))
    )
    return [
        Row(
            entry.name, entry.promised, entry.path.stat().st_size, accuracy[entry.name], single[entry.name].median,
            many[entry.name].median,
        )
        for entry in entries
    ]  # fmt: skip


def _table(rows: list[Row]) -> Table:
    """Size, accuracy and latency of the models, a row for every model; the first model is the reference for sizes."""
    table = Table(
        "model", "weight bytes", "file bytes", "of float32", "top-1", "1 image, ms", "64 images, ms",
        title="2,000 test images; onnxruntime, one thread, median of 100 runs in turns",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.model,
            f"{row.weight_bytes:,}",
            f"{row.file_bytes:,}",
            f"{row.file_bytes / rows[0].file_bytes:.1%}",
            f"{row.accuracy:.2%}",
            f"{1e3 * row.single:.3f}",
            f"{1e3 * row.many:.2f}",
        )
    return table
