"""The demo: compiles ResNet-20 for Fashion-MNIST, and compares float, uniform and mixed precision in onnxruntime."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hawqfx import zoo
from hawqfx.allocation.budget import Budget
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
        agreement: the part of the test images on which its answer is float32's.
        single: seconds for one image.
        many: seconds for 64 images.
    """

    model: str
    weight_bytes: int
    file_bytes: int
    accuracy: float
    agreement: float
    single: float
    many: float


def demo(budget: Budget, folder: Path, console: Console) -> list[Row]:
    """Compile ResNet-20, export four files, run them all, and print the table of sites and the comparison.

    Beside the network under the budget are uniform 8 bits, and the widest uniform bits that take no more.

    Args:
        budget: of the network that is compared.
        folder: of the files.
        console: prints the tables.

    Returns:
        What was found of each model, the one under the budget last.

    Raises:
        HawqfxError: if the network cannot be compiled, or if a file cannot be written.
    """
    start = time.perf_counter()
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
    rows = _rows(entries)
    console.print(_table(rows))
    exact, _, even, mixed = rows
    console.print(
        f"Of no more bytes, one width for all weights is {bits} bits, which answers as float32 does on "
        f"{even.agreement:.2%} of the images, with a top-1 of {even.accuracy:.2%} in place of {exact.accuracy:.2%}; "
        f"mixed widths on {mixed.agreement:.2%}, with {mixed.accuracy:.2%}."
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


def _answers(path: Path) -> NDArray[np.int64]:
    """The class that a file gives to each test image."""
    model = ort.session(path)
    return np.concatenate([ort.run(model, [images.numpy()])[0].argmax(1) for images, _ in zoo.evaluation()])


def _rows(entries: list[Entry]) -> list[Row]:
    images = zoo.evaluation(64)[0][0]
    single, many = (
        ort.latency({entry.name: entry.path for entry in entries}, [images[:size].numpy()], rounds=ROUNDS)
        for size in (1, len(images))
    )
    labels = np.concatenate([labels.numpy() for _, labels in zoo.evaluation()])
    answers = [_answers(entry.path) for entry in entries]
    return [
        Row(
            entry.name, entry.promised, entry.path.stat().st_size, float((own == labels).mean()),
            float((own == answers[0]).mean()), single[entry.name].median, many[entry.name].median,
        )
        for entry, own in zip(entries, answers, strict=True)
    ]  # fmt: skip


def _table(rows: list[Row]) -> Table:
    """Size, accuracy and latency of the models, a row for every model; the first model is the reference for sizes."""
    table = Table(
        "model", "weight bytes", "file bytes", "of float32", "top-1", "as float32", "1 image, ms", "64 images, ms",
        title="2,000 test images; onnxruntime, one thread, median of 100 runs in turns",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.model,
            f"{row.weight_bytes:,}",
            f"{row.file_bytes:,}",
            f"{row.file_bytes / rows[0].file_bytes:.1%}",
            f"{row.accuracy:.2%}",
            f"{row.agreement:.2%}",
            f"{1e3 * row.single:.3f}",
            f"{1e3 * row.many:.2f}",
        )
    return table
