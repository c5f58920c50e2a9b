"""The command line: hawqfx compile, pareto, explain, report, bench, demo, passes."""

import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

from hawqfx import pipeline
from hawqfx.atomic_write import check_writable, whole_file
from hawqfx.compiler import compile as compile_model
from hawqfx.compiler import pareto as pareto_of
from hawqfx.errors import HawqfxError, InfeasibleBudget
from hawqfx.export.opsets import Packing
from hawqfx.pass_manager.base import Analysis, Observer, options_of
from hawqfx.pass_manager.observers import Dump, PrintAfter, TimePasses
from hawqfx.pipeline import DEFAULT_METRIC
from hawqfx.sensitivity.distributed import launched
from hawqfx.session.load import load
from hawqfx.session.saved import read_plan

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Mixed-precision integer compiler for PyTorch models."
)


@app.command()
def compile(
    model: Annotated[str, typer.Argument(help="pkg.module:factory, a function that returns an eval-mode model")],
    budget: Annotated[str, typer.Option(help="such as 'size=12.5%' or 'size=1.2MB, bops=2%'")],
    data: Annotated[str, typer.Option(help="pkg.module:loader, a function that returns an iterable of batches")],
    out: Annotated[Path, typer.Option(help="the ONNX file to write")],
    plan: Annotated[Path | None, typer.Option(help="write the plan here, as JSON")] = None,
    save: Annotated[Path | None, typer.Option(help="write plan, codes and ranges here, for bench and load()")] = None,
    packing: Annotated[str, typer.Option(help="portable (onnxruntime >= 1.20) or native (>= 1.24)")] = "portable",
    sensitivity: Annotated[str, typer.Option(help=f"one of {', '.join(pipeline.METRICS)}")] = DEFAULT_METRIC,
    probes: Annotated[int | None, typer.Option(min=2, help="the most probes per batch")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="take so many samples of the data")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="the most samples to measure at once")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder to keep measurements in, and to go on from")] = None,
    device: Annotated[str, typer.Option(help="where to measure, such as cuda")] = "cpu",
    keep_float: Annotated[list[str] | None, typer.Option(help="pattern of weights that stay in float")] = None,
    fix: Annotated[list[str] | None, typer.Option(help="PATTERN=BITS, the width of the sites so named")] = None,
    rule: Annotated[str, typer.Option(help="exact, or hawq-v2 for the paper's own")] = "exact",
    metric: Annotated[str | None, typer.Option(help="pkg.module:function of (output, target), for drop=")] = None,
    holdout: Annotated[str | None, typer.Option(help="pkg.module:loader of data to validate a drop on")] = None,
    target: Annotated[str, typer.Option(help="any, or x86-avx2 for x86 without VNNI")] = "any",
    threads: Annotated[int, typer.Option(min=1, help="of the runs that latency= is for")] = 1,
    check: Annotated[bool, typer.Option(help="run the file first, and refuse it if it differs")] = True,
    seed: int = 0,
    dump: Annotated[Path | None, typer.Option(help="write the graph after every pass into this folder")] = None,
    print_after: Annotated[str | None, typer.Option(help="print the graph after this pass")] = None,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="print seconds per pass")] = False,
) -> None:
    """Compile a trained model to a packed integer ONNX file.

    `torchrun --nproc-per-node=N -m hawqfx compile ...` shares the measuring among N processes.
    """
    timing = TimePasses()
    observers: list[Observer] = [timing]
    if dump is not None:
        observers.append(Dump(_folder(dump)))
    if print_after is not None:
        names = [step.name for step in pipeline.every_pass()]
        if print_after not in names:
            raise HawqfxError(f"--print-after {print_after}: the passes are {', '.join(names)}")
        observers.append(PrintAfter(print_after))
    if packing not in get_args(Packing):
        raise HawqfxError(f"--packing {packing}: must be one of {', '.join(get_args(Packing))}")
    for path in (out, plan, save):
        if path is not None:
            check_writable(path)
    chosen = _metric(sensitivity, probes)
    with launched(torch.device(device)) as rank:
        compiled = compile_model(
            _made(model),
            budget,
            _made(data),
            metric=None if metric is None else _load(metric),
            holdout=None if holdout is None else _made(holdout),
            sensitivity=chosen,
            keep_float=keep_float or (),
            fix=_fixed(fix or ()),
            rule=rule,  # type: ignore[arg-type]
            samples=samples,
            batch=batch,
            cache=cache,
            device=device,
            target=target,
            threads=threads,
            seed=seed,
            observers=observers if rank == 0 else (),
            console=None if rank == 0 else Console(quiet=True),
        )
    if rank != 0:  # the first process writes and speaks for all
        return
    compiled.export(out, packing, check=check)  # type: ignore[arg-type]
    if plan is not None:
        compiled.plan.write(plan)
    if save is not None:
        compiled.save(save)
    print(compiled.summary())
    if time_passes:
        Console().print(timing.table())


@app.command()
def pareto(
    model: Annotated[str, typer.Argument(help="pkg.module:factory, a function that returns an eval-mode model")],
    data: Annotated[str, typer.Option(help="pkg.module:loader, a function that returns an iterable of batches")],
    limit: Annotated[str, typer.Option(help="size, weight_bits, bops or activation_memory")] = "size",
    points: Annotated[int, typer.Option(min=2, help="budgets, a constant factor apart")] = 30,
    evaluate: Annotated[int, typer.Option(min=0, help="how many of them to run on the data")] = 5,
    sensitivity: Annotated[str, typer.Option(help=f"one of {', '.join(pipeline.METRICS)}")] = DEFAULT_METRIC,
    probes: Annotated[int | None, typer.Option(min=2, help="the most probes per batch")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="take so many samples of the data")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder to keep measurements in, and to go on from")] = None,
    seed: int = 0,
) -> None:
    """Print the whole curve of a budget against the predicted loss, from one measurement."""
    frontier = pareto_of(
        _made(model),
        _made(data),
        limit=limit,
        points=points,
        evaluate=evaluate,
        sensitivity=_metric(sensitivity, probes),
        samples=samples,
        cache=cache,
        seed=seed,
    )
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(frontier.table())


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="a plan, as `compile --plan` or `--save` writes it")],
    site: Annotated[str | None, typer.Argument(help="a site, or a pattern of sites; without one, the whole")] = None,
) -> None:
    """Say why a plan has the bits that it has."""
    print(read_plan(plan).explain(site))


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="a compiled network, as `compile --save` writes it")],
    model: Annotated[str, typer.Argument(help="pkg.module:factory of the float model that was compiled")],
    out: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("report.html"),
) -> None:
    """Write a page that shows a compiled network; it needs no network."""
    check_writable(out)
    load(file, _made(model)).report(out)
    print(f"{out}: {out.stat().st_size:,} bytes")


@app.command()
def bench(
    file: Annotated[Path, typer.Argument(help="an ONNX file, as `compile` writes it")],
    backend: Annotated[
        list[str] | None, typer.Option(help="ort-cpu, ort-cuda, ort-tensorrt, torch-cpu or torch-cuda; may be repeated")
    ] = None,
    model: Annotated[str | None, typer.Option(help="pkg.module:factory of the float model, to compare with")] = None,
    data: Annotated[str | None, typer.Option(help="pkg.module:loader; its first batch is run")] = None,
    plan: Annotated[Path | None, typer.Option(help="the plan of the file, as --save writes it, for torch")] = None,
    batch: Annotated[int, typer.Option(min=1, help="samples in a run")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="of onnxruntime or torch")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="runs that are timed")] = 100,
    out: Annotated[Path | None, typer.Option(help="write the figures here, as JSON")] = None,
) -> None:
    """Time a file on backends that are installed here, and compare its answers with the float model's."""
    from hawqfx.benchmark import benchmark
    from hawqfx.runtime.backends import table

    results = benchmark(
        file,
        backend or ["ort-cpu"],
        None if model is None else _made(model),
        None if data is None else _made(data),
        plan,
        batch=batch,
        threads=threads,
        rounds=rounds,
    )
    Console(width=140).print(table(results))
    if out is not None:
        kept = {name: r if isinstance(r, str) else r.to_json() for name, r in results.items()}
        with whole_file(out) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n")


@app.command()
def demo(
    budget: str = "size=9.5%",
    out: Annotated[Path, typer.Option(help="folder for the ONNX files")] = Path("demo"),
) -> None:
    """Compile ResNet-20 on Fashion-MNIST and compare it with float32 and uniform bits."""
    from hawqfx.demo import demo as run_demo

    console = Console()
    run_demo(budget, _folder(out), console if console.is_terminal else Console(width=120))


@app.command()
def passes() -> None:
    """List the passes in the order in which they run, then those that run when asked for, each with its options."""
    table = Table("pass", "kind", "needs", "gives", "options")
    for step in pipeline.every_pass():
        kind = "analysis" if isinstance(step, Analysis) else "rewrite"
        needs, gives = (", ".join(fact.__name__ for fact in facts) for facts in (step.needs, step.gives))
        options = "\n".join(f"{entry.name}: {entry.metadata.get('doc', '')}" for entry in options_of(step))
        table.add_row(step.name, kind, needs, gives, options)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def _metric(name: str, probes: int | None) -> Analysis:
    metric = pipeline.metric(name)
    if probes is None:
        return metric
    if "probes" not in {field.name for field in fields(metric)}:  # type: ignore[arg-type]
        raise HawqfxError(f"--probes: the metric {name} draws none")
    return replace(metric, probes=probes)  # type: ignore[type-var]


def _folder(path: Path) -> Path:
    """The folder, which is made if it does not exist."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HawqfxError(f"the folder {path} cannot be made: {error}") from error
    return path


def _fixed(rules: Sequence[str]) -> dict[str, int]:
    """Pattern -> bits from PATTERN=BITS."""
    fixed = {}
    for rule in rules:
        pattern, _, bits = rule.rpartition("=")
        if not pattern or not bits.isdecimal():
            raise HawqfxError(f"--fix {rule}: write it as PATTERN=BITS, such as 'head.*=8'")
        fixed[pattern] = int(bits)
    return fixed


def _load(spec: str) -> Any:
    """The object that `pkg.module:name` names; modules in the working folder are found."""
    module, _, name = spec.partition(":")
    if not name:
        raise HawqfxError(f"{spec!r}: write it as pkg.module:function")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise HawqfxError(f"{spec!r} cannot be loaded: {error}") from error


def _made(spec: str) -> Any:
    """What the function that `pkg.module:name` names returns."""
    factory = _load(spec)
    if not callable(factory):
        raise HawqfxError(f"{spec!r} is {factory!r:.60}: name a function that returns the model or the data")
    try:
        made = factory()
    except HawqfxError:
        raise
    except Exception as error:  # the user's function may raise anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise HawqfxError(
            f"{spec!r} raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        ) from error
    if made is None:
        raise HawqfxError(f"{spec!r} returned None: return the model or the data")
    return made


FAILED, INFEASIBLE, INTERRUPTED = 1, 3, 130  # exit codes; typer gives 2 where the command line is wrong


def main() -> None:
    """The entry point: errors that hawqfx raises on purpose are printed without a traceback."""
    try:
        app()
    except HawqfxError as error:
        notes = "".join(f"\n({note})" for note in getattr(error, "__notes__", ()))
        print(f"hawqfx: {error}{notes}", file=sys.stderr)
        sys.exit(INFEASIBLE if isinstance(error, InfeasibleBudget) else FAILED)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("hawqfx: interrupted; with --cache FOLDER the same command goes on where it was", file=sys.stderr)
        raise
