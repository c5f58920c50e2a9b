"""bench and demo: the commands that run files."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hawqfx.allocation.budget import Budget
from hawqfx.atomic_write import whole_file
from hawqfx.commands import specs
from hawqfx.commands.compiling import Tokens, Weights, folder
from hawqfx.commands.output import Json, as_json, check_out, json_of, offering, show
from hawqfx.ir.names import sizes_of


def bench(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="an ONNX file, as `compile` writes it")],
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="ort-cpu, ort-cuda, ort-tensorrt, torch-cpu or torch-cuda; may be repeated",
            autocompletion=offering("ort-cpu", "ort-cuda", "ort-tensorrt", "torch-cpu", "torch-cuda"),
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="the float model, as for compile, to compare with")] = None,
    weights: Weights = None,
    data: Annotated[str | None, typer.Option(help="the data, as for compile; the first batch is run")] = None,
    plan: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="the plan of the file, as --save writes it, for torch"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="samples in a run")] = 1,
    at: Annotated[
        str | None, typer.Option(help="NAME=SIZE of what varies in the file, such as sequence=1@past=128")
    ] = None,
    tokens: Tokens = None,
    threads: Annotated[int, typer.Option(min=1, help="of onnxruntime or torch")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="runs that are timed")] = 100,
    out: Annotated[Path | None, typer.Option(help="write the figures here, as JSON")] = None,
    json: Json = False,
) -> None:
    """Time a file on backends that are installed here, and compare its answers with the float model's.

    Compared is the first output: the share of its rows with the same largest entry, and the mean |difference| from the
    float model's, in the output's own unit and as a share of the mean |output| of the float model.
    """
    from hawqfx.benchmark import benchmark, check_benchmark
    from hawqfx.runtime.backends import table

    check_out(out)
    backends, shape = backend or ["ort-cpu"], {} if at is None else sizes_of(at, "--at ")
    check_benchmark(file, backends, shape)
    results = benchmark(
        file,
        backends,
        None if model is None else specs.model_of(model, weights),
        None if data is None else specs.made(data),
        plan,
        batch=batch,
        shape=shape,
        threads=threads,
        rounds=rounds,
        tokens=tokens,  # type: ignore[arg-type]
    )
    kept = {name: result if isinstance(result, str) else result.to_json() for name, result in results.items()}
    if json:
        as_json(kept)
    else:
        show(table(results), 140)
    if out is not None:
        with whole_file(out) as temporary, temporary.open("w") as stream:
            stream.write(json_of(kept) + "\n")
    if all(isinstance(result, str) for result in results.values()):  # no backend is here
        raise typer.Exit(1)


def demo(
    budget: str = "size=9.5%",
    out: Annotated[Path, typer.Option(help="folder for the ONNX files")] = Path("demo"),
    json: Json = False,
) -> None:
    """Compile ResNet-20 on Fashion-MNIST and compare it with float32 and uniform bits."""
    from hawqfx.demo import demo as run_demo

    console = Console(quiet=json)
    if not console.is_terminal and not json:
        console = Console(width=120)
    rows = run_demo(Budget.of(budget), folder(out), console)
    if json:
        as_json([asdict(row) for row in rows])
