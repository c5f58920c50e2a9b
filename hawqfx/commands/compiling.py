"""compile and pareto: the commands that measure."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from hawqfx import pipeline
from hawqfx.allocation.rules import QUANTIZED, Order
from hawqfx.commands import specs
from hawqfx.commands.output import Json, as_json, check_out, in_bytes, offering, show
from hawqfx.commands.settings import either
from hawqfx.compiler import compile as compile_model
from hawqfx.compiler import pareto as pareto_of
from hawqfx.errors import UsageError
from hawqfx.export.opsets import Packing
from hawqfx.export.targets import WIDEST
from hawqfx.forecast import forecast
from hawqfx.options import usable_device
from hawqfx.pass_manager.base import Analysis, Observer
from hawqfx.pass_manager.observers import Dump, PrintAfter, TimePasses
from hawqfx.sensitivity.distributed import launched
from hawqfx.session.compiled import Compiled
from hawqfx.session.frontier import LIMITS
from hawqfx.session.report import float_file_bytes

Model = Annotated[
    str,
    typer.Argument(help="pkg.module:factory or path/file.py:factory, returning an eval-mode model; or hf:FOLDER"),
]
Data = Annotated[str, typer.Option(help="pkg.module:loader or path/file.py:loader, returning an iterable of batches")]
Weights = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="checkpoint of the model: safetensors, or torch's tensors by name"),
]
Sensitivity = Annotated[
    str | None,
    typer.Option(
        help=f"one of {', '.join(pipeline.METRICS)}; by default the first, or hawq-v2 for a loss of one's own",
        autocompletion=offering(*pipeline.METRICS),
    ),
]
Probes = Annotated[int | None, typer.Option(min=2, help="the most probes per batch")]
Samples = Annotated[int | None, typer.Option(min=1, help="take so many samples of the data")]
Cache = Annotated[Path | None, typer.Option(help="folder to keep measurements in, and to go on from")]
Tokens = Annotated[
    str | None,
    typer.Option(help="causal, for a language model that is to generate", autocompletion=offering("causal")),
]
Dynamic = Annotated[
    list[str] | None, typer.Option(help="INPUT:AXIS=NAME, a size that varies, such as input_ids:1=sequence")
]
Loss = Annotated[str | None, typer.Option(help="pkg.module:function of (output, target); by default chosen")]
Draw = Annotated[str | None, typer.Option(help="pkg.module:function of (output, generator) that draws targets")]
WeightBits = Annotated[str | None, typer.Option(help="widths such as 2-8 or 2,4,8; 32 is float")]
ActivationBits = Annotated[str | None, typer.Option(help="widths such as 4,6,8; 32 is float")]
Schemes = Annotated[
    list[str] | None,
    typer.Option(help="static, dynamic or weight-only; may be repeated", autocompletion=offering(*QUANTIZED)),
]
BlockSizes = Annotated[str | None, typer.Option(help="inputs that share a scale in weight-only layers: 32,64,128")]
Rounding = Annotated[
    str,
    typer.Option(
        help="sequential, compensated, nearest or learned",
        autocompletion=offering("sequential", "compensated", "nearest", "learned"),
    ),
]


def compile(
    context: typer.Context,
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="the ONNX file to write")],
    budget: Annotated[
        str | None, typer.Option(help="such as 'size=12.5%', 'size=1.2MB, bops=2%' or 'latency=20ms@sequence=1'")
    ] = None,
    weights: Weights = None,
    plan: Annotated[Path | None, typer.Option(help="write the plan here, as JSON")] = None,
    save: Annotated[Path | None, typer.Option(help="write plan, codes and ranges here, for bench and load()")] = None,
    report: Annotated[
        Path | None, typer.Option(help="write the page here, with the frontier, which a saved file does not know")
    ] = None,
    from_plan: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="follow this plan, in place of a budget")
    ] = None,
    reround: Annotated[bool, typer.Option("--reround", help="take the bits of --from-plan alone")] = False,
    packing: Annotated[
        str,
        typer.Option(
            help="portable (onnxruntime >= 1.20) or native (>= 1.24)", autocompletion=offering(*get_args(Packing))
        ),
    ] = "portable",
    loss: Loss = None,
    draw: Draw = None,
    metric: Annotated[str | None, typer.Option(help="pkg.module:function of (output, target), for drop=")] = None,
    holdout: Annotated[str | None, typer.Option(help="pkg.module:loader of data to validate a drop on")] = None,
    sensitivity: Sensitivity = None,
    probes: Probes = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    schemes: Schemes = None,
    block_sizes: BlockSizes = None,
    rounding: Rounding = "sequential",
    bias_correction: Annotated[bool | None, typer.Option(help="by default with all but nearest")] = None,
    keep_float: Annotated[list[str] | None, typer.Option(help="pattern of weights that stay in float")] = None,
    fix: Annotated[list[str] | None, typer.Option(help="PATTERN=BITS, the width of the sites so named")] = None,
    rule: Annotated[
        str, typer.Option(help="exact, or hawq-v2 for the paper's own", autocompletion=offering(*get_args(Order)))
    ] = "exact",
    interactions: Annotated[bool, typer.Option("--interactions", help="measure pairs of weights too")] = False,
    refine: Annotated[int, typer.Option(min=0, help="times that the plan is measured again where it stands")] = 0,
    tokens: Tokens = None,
    dynamic: Dynamic = None,
    samples: Samples = None,
    batch: Annotated[int | None, typer.Option(min=1, help="the most samples to measure at once")] = None,
    cache: Cache = None,
    device: Annotated[str, typer.Option(help="where to measure, such as cuda")] = "cpu",
    target: Annotated[
        str, typer.Option(help="any, or x86-avx2 for x86 without VNNI", autocompletion=offering(*WIDEST))
    ] = "any",
    threads: Annotated[int, typer.Option(min=1, help="of the runs that latency= is for")] = 1,
    check: Annotated[bool, typer.Option(help="run the file first, and refuse it if it differs")] = True,
    seed: int = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be measured, and stop")] = False,
    dump: Annotated[Path | None, typer.Option(help="write the graph after every pass into this folder")] = None,
    print_after: Annotated[str | None, typer.Option(help="print the graph after this pass")] = None,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="print seconds per pass")] = False,
    json: Json = False,
) -> None:
    """Compile a trained model to a packed integer ONNX file.

    `torchrun --nproc-per-node=N -m hawqfx compile ...` shares the measuring among N processes.
    """
    timing = TimePasses()
    observers = [timing, *_observers(dump, print_after)]
    if packing not in get_args(Packing):
        raise UsageError(f"--packing {packing}: must be one of {', '.join(get_args(Packing))}")
    check_out(out, plan, save, report)
    budget, from_plan = either(context, budget=budget, from_plan=from_plan)
    options: dict[str, Any] = {
        "loss": "auto" if loss is None else specs.named(loss),
        "draw": None if draw is None else specs.named(draw),
        "metric": None if metric is None else specs.named(metric),
        "sensitivity": _metric(sensitivity, probes),
        "weight_bits": specs.widths("--weight-bits", weight_bits, range(2, 9)),
        "activation_bits": specs.widths("--activation-bits", activation_bits, (4, 6, 8)),
        "schemes": schemes or None,
        "block_sizes": specs.widths("--block-sizes", block_sizes, (32, 64, 128)),
        "rounding": rounding,
        "bias_correction": bias_correction,
        "keep_float": keep_float or (),
        "fix": specs.fixed(fix or ()),
        "rule": rule,
        "interactions": interactions,
        "refine": refine,
        "plan": from_plan,
        "reround": reround,
        "tokens": tokens,
        "dynamic_shapes": specs.dynamic_shapes(dynamic or ()),
        "samples": samples,
        "batch": batch,
        "cache": cache,
        "device": device,
        "target": target,
        "threads": threads,
        "seed": seed,
    }
    with launched(usable_device(device)) as rank:
        network, batches = specs.model_of(model, weights), specs.made(data)
        if dry_run:
            told = forecast(network, budget, batches, **options)
            if rank == 0:
                as_json(told.to_json()) if json else print(told)
            return
        compiled = compile_model(
            network,
            budget,
            batches,
            holdout=None if holdout is None else specs.made(holdout),
            observers=observers if rank == 0 else (),
            console=None if rank == 0 else Console(quiet=True),
            **options,
        )
    if rank != 0:  # the first process writes and speaks for all
        return
    compiled.export(out, packing, check=check)  # type: ignore[arg-type]
    if plan is not None:
        compiled.plan.write(plan)
    if save is not None:
        compiled.save(save)
    if report is not None:
        compiled.report(report)
    if json:
        as_json(_result(compiled, out))
        return
    print(compiled.summary())
    if time_passes:
        Console().print(timing.table())
    print(_last_lines(compiled, out))


def _observers(dump: Path | None, print_after: str | None) -> list[Observer]:
    found: list[Observer] = []
    if dump is not None:
        found.append(Dump(folder(dump)))
    if print_after is not None:
        names = [step.name for step in pipeline.every_pass()]
        if print_after not in names:
            raise UsageError(f"--print-after {print_after}: the passes are {', '.join(names)}")
        found.append(PrintAfter(print_after))
    return found


def _result(compiled: Compiled, path: Path) -> dict[str, Any]:
    """What compile found, for programs."""
    float_loss, loss = compiled.calibration_loss()
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "weight_bytes": compiled.weight_bytes,
        "float_weight_bytes": compiled.planned.float_bytes(),
        "budget": compiled.budget,
        "bits": {compiled.plan.name(key): bits for key, bits in compiled.plan.bits.items()},
        "predicted_loss_increase": compiled.predicted_loss,
        "calibration_loss": {"float": float_loss, "compiled": loss},
        "scores": {data: {"float": exact, "compiled": found} for data, (exact, found) in compiled.scores.items()},
        "check": compiled.checks.get(path.name),
    }


def _last_lines(compiled: Compiled, path: Path) -> str:
    """The file, its size beside the budget and the float weights, and the loss or the metric."""
    size, whole = path.stat().st_size, float_file_bytes(compiled.planned)
    reference, what = (compiled.planned.float_bytes(), "weights") if whole is None else (whole, "file")
    float_loss, loss = compiled.calibration_loss()
    lines = [
        f"{path}: {in_bytes(size)} ({size:,} bytes), {size / reference:.1%} of float32's {what} of "
        f"{in_bytes(reference)}; budget {compiled.budget}"
    ]
    for data, (exact, found) in compiled.scores.items():
        lines.append(f"metric on the {data}: {found:.4g}, float32 {exact:.4g}")
    if not compiled.scores:
        lines.append(f"loss on the calibration data: {loss:.4g}, float32 {float_loss:.4g}")
    return "\n".join(lines)


def pareto(
    model: Model,
    data: Data,
    weights: Weights = None,
    limit: Annotated[
        str, typer.Option(help="size, weight_bits, bops or activation_memory", autocompletion=offering(*LIMITS))
    ] = "size",
    points: Annotated[int, typer.Option(min=2, help="budgets, a constant factor apart")] = 30,
    evaluate: Annotated[int, typer.Option(min=0, help="how many of them to run on the data")] = 5,
    loss: Loss = None,
    draw: Draw = None,
    sensitivity: Sensitivity = None,
    probes: Probes = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    rounding: Rounding = "sequential",
    keep_float: Annotated[list[str] | None, typer.Option(help="pattern of weights that stay in float")] = None,
    dynamic: Dynamic = None,
    samples: Samples = None,
    cache: Cache = None,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Print the whole curve of a budget against the predicted loss, from one measurement."""
    frontier = pareto_of(
        specs.model_of(model, weights),
        specs.made(data),
        limit=limit,
        points=points,
        evaluate=evaluate,
        loss="auto" if loss is None else specs.named(loss),
        draw=None if draw is None else specs.named(draw),
        sensitivity=_metric(sensitivity, probes),
        weight_bits=specs.widths("--weight-bits", weight_bits, range(2, 9)),
        activation_bits=specs.widths("--activation-bits", activation_bits, (4, 6, 8)),
        rounding=rounding,
        keep_float=keep_float or (),
        dynamic_shapes=specs.dynamic_shapes(dynamic or ()),
        samples=samples,
        cache=cache,
        seed=seed,
    )
    if json:
        as_json([point.to_json() for point in frontier.points])
    else:
        show(frontier.table())


def _metric(name: str | None, probes: int | None) -> Analysis | None:
    """The metric of a name with its probes; None: the default, which goes by the loss."""
    if name is None and probes is None:
        return None
    metric = pipeline.metric(name)
    if probes is None:
        return metric
    if "probes" not in {field.name for field in fields(metric)}:  # type: ignore[arg-type]
        raise UsageError(f"--probes: the metric {name} draws none")
    return replace(metric, probes=probes)  # type: ignore[type-var]


def folder(path: Path) -> Path:
    """The folder, which is made if it does not exist."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {path} cannot be made: {error}") from error
    return path
