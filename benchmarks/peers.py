"""hawqfx beside other tools: the same network, calibration data and bytes of weights, and one judge.

    python benchmarks/peers.py [--quick] [--check] [--only CASE ...] [--tools NAME ...] [--minutes N]
        [--steps N] [--epochs N] [--light]

Trained networks (subjects.py), with weights of so many bits on average and activations of 8:

* hawqfx by default, and with rounding="learned";
* Sony's Model Compression Toolkit: mixed precision by its budget of bytes, with 2, 4 and 8 bits, as its own targets
  have them, and with all widths that hawqfx has; the latter with its gradient step too, which by default weighs each
  sample by curvature, which takes most of its time, and with --light does not;
* AIMET's AdaRound, with uniform bits, or where their average is no whole number with the bits that hawqfx chose.

Each runs in a process of its own with one thread (others/), on the same calibration inputs without targets.  The others
have environments of their own in the user's cache, made by pip when they are first asked for (a few GB; to begin anew,
remove the folder).  What cannot be installed, fails or is not done within the minutes is in the table with its message.

A tool gives an ONNX file, and the bits of each weight.  Bytes are these bits times elements, by one function for all;
scales and biases are not counted.  Files run in onnxruntime and are judged here: the score, and on held-out data the
agreement with the float network's argmax, and the mean divergence from its output (divergence.py) with its standard
error.  Seconds are those of the processor, from the loaded network to the file, so other work does not count; memory is
the most that the process had, with its imports.  Seed 0.
Results are written after each tool, so a run may be stopped and gone on with --only and --tools.
--quick: hawqfx alone on ResNet-20 at 2.5 bits, with its first 128 calibration images and 256 held-out ones.
"""

import hashlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import data
import torch
from common import Claims, console, each_network, parser
from deployed import Deployed
from others import exchange
from rich.table import Table
from subjects import SUBJECTS, Subject, outputs
from torch import Tensor, fx, nn
from torch.nn import functional as F

# network, and bits of a weight on average
CASES = {f"{name}, {bits:g} bits": (name, bits) for name, bits in (
    ("resnet20", 4), ("resnet20", 3), ("resnet20", 2.5), ("efficientnet-lite0", 4),
)}  # fmt: skip
TORCH = ("torch==2.13.0", "torchvision==0.28.0", "onnx==1.23.2", "numpy==2.4.6", "scipy==1.17.1", "protobuf==7.36.2")
MCT = (
    "model_compression_toolkit==2.6.1", "mct-quantizers==1.7.0", "edge-mdt-cl==1.1.1", "onnxruntime==1.32.0",
    "networkx==3.5", "matplotlib==3.9.4", "pydantic==2.11.10", "PuLP==3.3.2", "scikit-image==0.26.0",
    "scikit-learn==1.9.1", *TORCH,
)  # fmt: skip
AIMET = ("aimet-torch==2.42.0", "onnxscript==0.7.2", "onnx-ir==1.1.0", *TORCH)
ALL_WIDTHS = [2, 3, 4, 5, 6, 7, 8]  # those of hawqfx
IMAGES = 32  # that MCT scores layers by, its default

Row = dict[str, Any]  # {"failed": message}, or the figures
Options = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A way to quantize.

    Args:
        module: that runs in an environment with `packages`; none: that of hawqfx.
        options: for a number of bits, from the bits of each weight in hawqfx's plan.
    """

    module: str
    packages: tuple[str, ...]
    options: Callable[[float, dict[str, int]], Options]


def tools(steps: int, epochs: int, attention: bool) -> dict[str, Tool]:
    """All of them by name, hawqfx's plan first: others take its bits."""
    return {
        "hawqfx": Tool("others.ours", (), lambda bits, plan: {}),
        "hawqfx, learned": Tool("others.ours", (), lambda bits, plan: {"rounding": "learned"}),
        "MCT, 2/4/8 bits": Tool("others.sony_mct", MCT, lambda bits, plan: {"widths": [2, 4, 8], "images": IMAGES}),
        "MCT, 2 to 8 bits": Tool("others.sony_mct", MCT, lambda bits, plan: {"widths": ALL_WIDTHS, "images": IMAGES}),
        f"MCT, gradient step, {epochs} epochs{'' if attention else ', light'}": Tool(
            "others.sony_mct", MCT,
            lambda bits, plan: {"widths": ALL_WIDTHS, "images": IMAGES, "epochs": epochs, "attention": attention},
        ),
        f"AIMET AdaRound, {steps} steps": Tool(
            "others.aimet", AIMET,
            lambda bits, plan: {"bits": int(bits) if bits % 1 == 0 else plan, "steps": steps},
        ),
    }  # fmt: skip


def examine(
    subject: Subject,
    bits: float,
    chosen: Mapping[str, Tool],
    minutes: float,
    earlier: Mapping[str, Row] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """What every tool makes of a network, beside what others made earlier; kept after each."""
    model = plain(subject.model)
    inputs = torch.cat([batch[0] if isinstance(batch, tuple) else batch for batch in subject.calibration])
    names = [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    budget = packed_bytes({name: (bits, model.get_parameter(name).numel()) for name in names})
    rows: dict[str, Row] = dict(earlier or {})
    found: dict[str, Any] = {
        "metric": subject.metric, "n": subject.samples, "held out": len(subject.held_out_float),
        "calibration": len(inputs), "float": subject.score(subject.model), "bytes": budget, "tools": rows,
    }  # fmt: skip
    for name, tool in chosen.items():
        options = tool.options(bits, rows.get("hawqfx", {}).get("bits", {}))
        with tempfile.TemporaryDirectory() as folder:
            job = exchange.Job(model, inputs, names, budget, options, Path(folder) / "model.onnx")
            rows[name] = result(tool, job, subject, minutes)
        keep(found)
        shown = {key: value for key, value in rows[name].items() if key != "bits"}
        console.print(f"{subject.name}, {bits:g} bits, {name}: {shown}")
    return found


def plain(model: nn.Module) -> fx.GraphModule:
    """The network of torch's own modules, whatever classes it was written with; others look for these."""
    traced = fx.symbolic_trace(model)
    for node in traced.graph.find_nodes(op="call_function", target=F.conv2d):
        x, weight, bias, stride, padding, dilation, groups = node.args
        kernel = traced.get_parameter(weight.target)
        size = (kernel.shape[2], kernel.shape[3])
        layer = nn.Conv2d(kernel.shape[1] * groups, kernel.shape[0], size, stride, padding, dilation, groups)
        layer.weight, layer.bias = kernel, None if bias is None else traced.get_parameter(bias.target)
        name = weight.target.removesuffix("weight") + "conv"
        traced.add_submodule(name, layer)
        with traced.graph.inserting_before(node):
            node.replace_all_uses_with(traced.graph.call_module(name, (x,)))
        traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    return fx.GraphModule(traced, traced.graph).eval()  # with nothing but what the graph still names


def packed_bytes(weights: Mapping[str, tuple[float, int]]) -> float:
    """Of weights -> (bits, elements)."""
    return sum(bits * elements for bits, elements in weights.values()) / 8


def result(tool: Tool, job: exchange.Job, subject: Subject, minutes: float) -> Row:
    """The figures of a tool, or the message with which it failed."""
    try:
        python = environment(tool)
        start = time.perf_counter()
        job.ask()
        run([python, "-m", tool.module, str(job.file)], job.file.parent, minutes)
        elapsed = time.perf_counter() - start
        return judged(job.file, subject) | {"elapsed": elapsed}
    except Exception as error:  # whatever a tool, pip or the runtime of its file raises
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def environment(tool: Tool) -> str:
    """The Python of the environment with a tool's packages, which is made if it is not there."""
    if not tool.packages:
        return sys.executable
    digest = hashlib.sha256("\n".join(tool.packages).encode()).hexdigest()[:8]
    folder = data.cache_folder().parent / "peers" / f"{tool.packages[0]}-{digest}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        run([sys.executable, "-m", "venv", "--clear", str(folder)], Path.cwd(), None)
        run([str(python), "-m", "pip", "install", "--quiet", *tool.packages], folder, None)
        ready.touch()
    return str(python)


def run(command: Sequence[str], folder: Path, minutes: float | None) -> None:
    """Run a command in a folder, where it finds the modules of benchmarks.

    Raises:
        RuntimeError: with the last line that the command wrote, if it fails or takes longer.
    """
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    limit = None if minutes is None else 60 * minutes
    try:
        done = subprocess.run(
            command, cwd=folder, env=variables, timeout=limit, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {minutes:g} minutes") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"ended with {done.returncode}")


def judged(file: Path, subject: Subject) -> Row:
    """The figures of a file and of what came with it."""
    deployed = Deployed(file)
    answers = outputs(deployed, subject.held_out)
    divergences = subject.divergence(answers, subject.held_out_float)
    told = exchange.answer(file)
    return {
        "score": subject.score(deployed), "more": subject.more(deployed),
        "agreement": agreement(answers, subject.held_out_float), "divergence": float(divergences.mean()),
        "stderr": float(divergences.std() / math.sqrt(len(divergences))), "bytes": packed_bytes(told["weights"]),
        "seconds": told["seconds"], "MiB": told["MiB"],
        "bits": {name: bits for name, (bits, _) in told["weights"].items()},
    }  # fmt: skip


def agreement(answers: Tensor, wanted: Tensor) -> float:
    return float((answers.argmax(-1) == wanted.argmax(-1)).double().mean())


def quick() -> Subject:
    full = SUBJECTS["resnet20"]()
    return replace(full, calibration=full.calibration[:1], held_out=full.held_out[:1])


def show(results: Mapping[str, Any]) -> None:
    table = Table("case", "tool", "bytes", "score", "agreement", "divergence", "seconds", "MiB")
    for case, found in results.items():
        title = f"{case}, {found['metric']}, float {found['float']:.4f}, n={found['n']}, held out {found['held out']}"
        for name, row in found["tools"].items():
            if "failed" in row:
                table.add_row(title, name, row["failed"])
            else:
                table.add_row(
                    title, name, f"{row['bytes']:,.0f}", f"{row['score']:.4f}",
                    ", ".join(f"{share:.3f}" for share in (row["agreement"], *row["more"].values())),
                    f"{row['divergence']:.4g} +- {row['stderr']:.1g}", f"{row['seconds']:.0f}", f"{row['MiB']:.0f}",
                )  # fmt: skip
            title = ""
    console.print(table)


def claim(results: Mapping[str, Any], claims: Claims) -> None:
    """Learned codes are nearer to float than what any other tool made, and in half of its time where it learns too."""
    for case, found in results.items():
        done = {name: row for name, row in found["tools"].items() if "failed" not in row}
        mine = done.get("hawqfx, learned")
        others = {name: row for name, row in done.items() if not name.startswith("hawqfx")}
        if mine is None or not others:
            continue
        best = min(others, key=lambda name: others[name]["divergence"])
        spread = math.hypot(mine["stderr"], others[best]["stderr"])
        claims.add(
            f"{case}: hawqfx is nearer to float than every other tool", mine["divergence"] < others[best]["divergence"],
            f"{mine['divergence']:.4g} against {others[best]['divergence']:.4g} +- {spread:.1g} of {best}",
        )  # fmt: skip
        claims.add(
            f"{case}: in at most half of the time of that tool", mine["seconds"] <= others[best]["seconds"] / 2,
            f"{mine['seconds']:.0f} s against {others[best]['seconds']:.0f} s",
        )  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--tools", nargs="+", default=[""], help="those whose names begin so")
    options.add_argument("--minutes", type=float, default=60, help="after which a tool is stopped")
    options.add_argument("--steps", type=int, default=1000, help="of AdaRound for each layer")
    options.add_argument("--epochs", type=int, default=30, help="of MCT's gradient step")
    options.add_argument("--light", action="store_true", help="MCT's gradient step without its weights of samples")
    args = options.parse_args()
    every = tools(args.steps, args.epochs, not args.light)
    chosen = {name: tool for name, tool in every.items() if name.startswith(tuple(args.tools))}
    if args.quick:
        ours = {name: tool for name, tool in chosen.items() if not tool.packages}
        results = {"resnet20, 2.5 bits": examine(quick(), 2.5, ours, args.minutes)}
    else:
        results = each_network("peers", (), lambda case: {})
        for case in args.only:

            def keep(found: dict[str, Any], case: str = case) -> None:
                results.update(each_network("peers", [case], lambda _: found))

            name, bits = CASES[case]
            earlier = results.get(case, {}).get("tools")
            examine(SUBJECTS[name](), bits, chosen, args.minutes, earlier, keep)
    show(results)
    claims = Claims()
    claim(results, claims)
    claims.finish("peers", args, {"networks": results})


if __name__ == "__main__":
    main()
