"""explain, report, inspect, passes and doctor: the commands that measure nothing."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hawqfx import pipeline
from hawqfx.commands import specs
from hawqfx.commands.compiling import Weights
from hawqfx.commands.doctor import examined
from hawqfx.commands.output import Json, as_json, check_out, in_bytes, show
from hawqfx.pass_manager.base import Analysis, options_of
from hawqfx.session.load import load
from hawqfx.session.saved import read_plan


def explain(
    plan: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="a plan, as `compile --plan` or `--save` writes it")
    ],
    site: Annotated[str | None, typer.Argument(help="a site, or a pattern of sites; without one, the whole")] = None,
    json: Json = False,
) -> None:
    """Say why a plan has the bits that it has."""
    found = read_plan(plan)
    if not json:
        print(found.explain(site))
        return
    tree = found.to_tree()
    if site is not None:
        tree["sites"] = {key: tree["sites"][key] for key in found.matching(site)}
    as_json(tree)


def report(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="a compiled network, as `compile --save` writes it")
    ],
    model: Annotated[str, typer.Argument(help="the float model, as for compile")],
    weights: Weights = None,
    out: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("report.html"),
    json: Json = False,
) -> None:
    """Write a page that shows a compiled network; it needs no network."""
    check_out(out)
    load(file, specs.model_of(model, weights)).report(out)
    size = out.stat().st_size
    if json:
        as_json({"file": str(out), "bytes": size})
    else:
        print(f"{out}: {size:,} bytes")


def inspect(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="an ONNX file, of hawqfx or of another tool")
    ],
    json: Json = False,
) -> None:
    """List the weights of a file: layer, shape, bits, bytes and how they are stored, from the file alone."""
    from hawqfx.export.inspection import stored_weights, texts

    weights, said = stored_weights(file), texts(file)
    if json:
        as_json(
            {"file": str(file), "bytes": file.stat().st_size, "metadata": said, "weights": list(map(asdict, weights))}
        )
        return
    table = Table("weight", "layer", "shape", "bits", "bytes", "stored as")
    for each in weights:
        shape = "x".join(map(str, each.shape))
        table.add_row(each.name, each.layer, shape, str(each.bits), f"{each.bytes:,}", each.format)
    show(table)
    for key, text in sorted(said.items()):
        print(f"{key}: {text}")
    total = sum(each.bytes for each in weights)
    print(f"{file}: {in_bytes(file.stat().st_size)}, {in_bytes(total)} of them {len(weights)} weights")


def passes(json: Json = False) -> None:
    """List the passes in the order in which they run, then those that run when asked for, each with its options."""
    rows: list[dict[str, Any]] = []
    for step in pipeline.every_pass():
        rows.append(
            {
                "pass": step.name,
                "kind": "analysis" if isinstance(step, Analysis) else "rewrite",
                "needs": [fact.__name__ for fact in step.needs],
                "gives": [fact.__name__ for fact in step.gives],
                "options": {entry.name: entry.metadata.get("doc", "") for entry in options_of(step)},
            }
        )
    if json:
        as_json(rows)
        return
    table = Table("pass", "kind", "needs", "gives", "options")
    for row in rows:
        options = "\n".join(f"{name}: {doc}" for name, doc in row["options"].items())
        table.add_row(row["pass"], row["kind"], ", ".join(row["needs"]), ", ".join(row["gives"]), options)
    show(table, 160)


def doctor(json: Json = False) -> None:
    """Say what this machine has, what is missing, and how to install it."""
    found = examined()
    if json:
        as_json(found)
        return
    table = Table("what", "found")
    for key, value in found.items():
        if key == "advice":
            continue
        entries = value.items() if isinstance(value, dict) else [("", value)]
        table.add_row(key, "\n".join(f"{name}: " * bool(name) + _in_words(entry) for name, entry in entries))
    show(table)
    for line in found["advice"]:
        print(line)


def _in_words(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
