"""Time and memory of measuring, side by side in one run, in units of one ordinary gradient by the weights.

    python benchmarks/sensitivity.py [--quick] [--check]

ResNet-50 at 224 pixels (own definition, random weights: time does not depend on them) and ResNet-20 on Fashion-MNIST,
both with batch-norm folded, as they are measured; the gradient that is the unit is taken of the network as it was
trained, and of the folded one. Each figure is the median of interleaved rounds, all of them with freed memory kept in
the process (sensitivity/malloc.py). Peak memory is measured in a process of its own. Against: one product per layer,
as other programs take it (the graph of the gradient kept, the kindest way to do it), and PyHessian 0.1's trace of the
whole model (extra `bench`; its values are compared, too).  --quick: ResNet-20 alone.
"""

import contextlib
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Claims, arguments, console
from rich.table import Table
from torch import fx, nn

from hawqfx import pipeline, zoo
from hawqfx.frontend.capture import capture
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import gather
from hawqfx.frontend.losses import cross_entropy
from hawqfx.ir.program import Program
from hawqfx.maths import curvature
from hawqfx.maths.seeding import generator
from hawqfx.pass_manager.manager import run
from hawqfx.passes.fisher import Fisher
from hawqfx.passes.hawq_v2 import HawqV2
from hawqfx.sensitivity.double_backward import twice_differentiable
from hawqfx.sensitivity.forward import Forward, forward
from hawqfx.sensitivity.malloc import keep_freed_memory
from hawqfx.sensitivity.quantity import Measurement, Quantity

FURTHER = 3  # further probes in a round
NETWORKS = {"ResNet-50": 8, "ResNet-20": 128}  # batch
PROBES = {"ResNet-50": 5, "ResNet-20": 50}  # for the comparison with PyHessian


def subject(name: str) -> tuple[nn.Module, Program, Context]:
    """A network, its folded program with its sites, and a context of one batch."""
    if name == "ResNet-50":
        from resnet50 import resnet50

        random = torch.Generator().manual_seed(0)
        images = torch.randn(NETWORKS[name], 3, 224, 224, generator=random)
        data: list[Any] = [(images, torch.randint(0, 1000, (NETWORKS[name],), generator=random))]
        model: nn.Module = resnet50()
    else:
        model, data = zoo.resnet20(), zoo.calibration()[:1]
    context = Context(gather(data), cross_entropy)
    return model, run(pipeline.recipe().rewrite, capture(model, context.batches[0]), context), context


class Work:
    """What is timed."""

    def __init__(self, name: str) -> None:
        self.model, self.program, self.context = subject(name)
        self.batch = self.context.batches[0]
        self.operators = twice_differentiable(self.program, self.batch)
        self.everything = [Quantity(site.key) for site in self.program.sites]
        self.weights = [Quantity(site.key) for site in self.program.weights]

    def gradient(self) -> None:
        weights = {site.key: self.program.tensor(site.key).detach().requires_grad_() for site in self.program.weights}
        output = self.program.run(self.batch.args, {}, tensors=weights, at=())
        torch.autograd.grad(self.context.loss_of(output, self.batch, 0), list(weights.values()))

    def gradient_as_trained(self) -> None:
        parameters = list(self.model.parameters())
        torch.autograd.grad(self.context.loss_of(self.model(*self.batch.args), self.batch, 0), parameters)

    def opened(self) -> Measurement:
        return HawqV2().open(self.program, self.context, 0, self.operators)

    def graph_of_products(self) -> tuple[Forward, curvature.Hessian]:
        """The graph of the gradient for products with the Hessian, as other programs take them, not for forms."""
        run = forward(self.program, self.batch, self.operators)
        return run, curvature.Hessian(self.context.loss_of(run.output, self.batch, 0), run.tensors)

    def layers_one_by_one(self, run: Forward, hessian: curvature.Hessian, probe: int) -> float:
        """A product per layer, on the graph of the gradient that all layers share."""
        total = 0.0
        for site, _ in self.weights:
            random = generator(0, "alone", probe, site, device=torch.device("cpu"))
            vectors = [curvature.rademacher(x, random) for x in run.tensors[site]]
            total += sum(hessian.forms({site: partial(list, vectors)}).values())
        return total

    def layers_with_graphs_of_their_own(self, probe: int) -> None:
        """Forward, gradient and product for each layer anew, as scripts do that treat a layer at a time."""
        for site, _ in self.weights:
            run = forward(self.program, self.batch, self.operators)
            loss = self.context.loss_of(run.output, self.batch, 0)
            (gradient,) = torch.autograd.grad(loss, run.tensors[site], create_graph=True)
            signs = curvature.rademacher(gradient, generator(0, "own", probe, site, device=torch.device("cpu")))
            (product,) = torch.autograd.grad(gradient, run.tensors[site], signs)
            curvature.dot(signs, product)

    def pyhessian(self, probes: int) -> list[float]:
        """Samples of the trace over all weights; biases are left out, as sites leave them."""
        from pyhessian import hessian

        graph = fx.GraphModule(self.program.graph, self.program.graph.graph)
        keys = {site.key for site in self.program.weights}
        kept = [(p, p.requires_grad) for _, p in graph.named_parameters()]
        try:
            for name, parameter in graph.named_parameters():
                parameter.requires_grad_(name in keys)
            with contextlib.redirect_stdout(io.StringIO()):
                whole = hessian(graph, cross_entropy, data=(self.batch.args[0], self.batch.target), cuda=False)
                samples: list[float] = whole.trace(maxIter=probes, tol=-1.0)  # never before
            assert len(samples) == probes
            return samples
        finally:
            for parameter, required in kept:
                parameter.requires_grad_(required)
                parameter.grad = None


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def times(work: Work, rounds: int) -> dict[str, float]:
    """Median seconds: of a gradient, the first probe, a further probe, and so on."""
    seen: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        seen.setdefault(name, []).append(seconds)

    for _ in range(rounds):
        note("gradient, folded", timed(work.gradient)[0])
        note("gradient, as trained", timed(work.gradient_as_trained)[0])
        opening, measurement = timed(work.opened)
        note("first probe", opening + timed(partial(measurement.sample, 0, work.everything))[0])
        for probe in range(1, 1 + FURTHER):
            note("further probe", timed(partial(measurement.sample, probe, work.everything))[0])
        note("further probe, weights alone", timed(partial(measurement.sample, 9, work.weights))[0])
        del measurement
        graph = work.graph_of_products()
        note("layers one by one, a probe", timed(partial(work.layers_one_by_one, *graph, 0))[0])
        del graph
        opening, backward = timed(lambda: Fisher().open(work.program, work.context, 0, {}))
        drawing = [timed(partial(backward.sample, probe, work.everything))[0] for probe in range(8)]
        note("fisher, a probe of 8", (opening + sum(drawing)) / 8)
        del backward
    return {name: statistics.median(values) for name, values in seen.items()}


def against_pyhessian(work: Work, probes: int) -> dict[str, float]:
    """Seconds and traces of both at equal probes, the weights alone."""
    theirs, samples = timed(lambda: work.pyhessian(probes))

    def ours() -> list[float]:
        measurement = work.opened()
        return [sum(measurement.sample(probe, work.weights).values()) for probe in range(probes)]

    with keep_freed_memory():
        seconds, own = timed(ours)
    (mine, error), (other, noise) = (curvature.pooled([curvature.Moments.of(x)], [1.0]) for x in (own, samples))
    return {
        "probes": probes, "seconds": seconds, "pyhessian seconds": theirs, "trace": mine, "stderr": error,
        "pyhessian trace": other, "pyhessian stderr": noise,
    }  # fmt: skip


def peak(name: str, what: str) -> int:
    """Bytes that `what` adds to the memory of a fresh process, at its peak."""
    command = [sys.executable, __file__, "--peak", name, what]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak_here(name: str, what: str) -> int:
    work = Work(name)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    if what == "gradient, folded":
        work.gradient()
    elif what == "gradient, as trained":
        work.gradient_as_trained()
    else:
        measurement = work.opened()
        for probe in range(2):
            measurement.sample(probe, work.everything)
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def examine(name: str, claims: Claims, table: Table) -> dict[str, Any]:
    work = Work(name)
    with keep_freed_memory():
        work.gradient()
        seconds = times(work, 3 if name == "ResNet-50" else 7)
        alone = timed(partial(work.layers_with_graphs_of_their_own, 0))[0]
        first = timed(lambda: work.opened().sample(0, work.weights))[0]
    memory = {what: peak(name, what) for what in ("gradient, folded", "gradient, as trained", "probes")}
    for what, value in seconds.items():
        ratios = (value / seconds[unit] for unit in ("gradient, folded", "gradient, as trained"))
        table.add_row(name, what, f"{value:.3f}", *(f"{ratio:.2f}" for ratio in ratios))
    for what, most in {"first probe": 3.0, "further probe": 1.8, "fisher, a probe of 8": 1.1}.items():
        trained, folded = (seconds[what] / seconds[f"gradient, {how}"] for how in ("as trained", "folded"))
        claims.add(
            f"{name}: {what} at most {most} gradients of the network as trained",
            trained <= most,
            f"{trained:.2f}; {folded:.2f} of the network with batch-norm folded",
        )
    trained, folded = (memory["probes"] / memory[f"gradient, {how}"] for how in ("as trained", "folded"))
    claims.add(
        f"{name}: peak memory at most 3.0 gradients of the network as trained",
        trained <= 3,
        f"{trained:.2f}; {folded:.2f} of the network with batch-norm folded; {memory['probes'] / 1e6:.0f} MB",
    )
    ratio = seconds["layers one by one, a probe"] / seconds["further probe, weights alone"]
    bar = {"ResNet-50": 25, "ResNet-20": 1}[name]
    claims.add(
        f"{name}: all layers at least {bar} times faster than one at a time",
        ratio >= bar,
        f"{ratio:.1f} times, on one graph for all; {alone / first:.1f} times, where each has a graph of its own",
    )
    seconds |= {"layers with graphs of their own, a probe": alone, "first probe, weights alone": first}
    found = {"batch": NETWORKS[name], "sites": len(work.everything), "seconds": seconds, "peak bytes": memory}
    try:
        return found | {"pyhessian": compare(name, claims, work)}
    except ImportError:
        console.print("PyHessian is not installed: pip install '.[bench]'")
        return found


def compare(name: str, claims: Claims, work: Work) -> dict[str, float]:
    both = against_pyhessian(work, PROBES[name])
    faster = both["pyhessian seconds"] / both["seconds"]
    claims.add(f"{name}: faster than PyHessian at equal probes", faster > 1, f"{faster:.2f} times")
    noise = (both["stderr"] ** 2 + both["pyhessian stderr"] ** 2) ** 0.5
    claims.add(
        f"{name}: PyHessian's trace within three standard errors",
        abs(both["trace"] - both["pyhessian trace"]) <= 3 * noise,
        f"{both['trace']:.4g} against {both['pyhessian trace']:.4g}, +-{noise:.2g}, {both['probes']:.0f} probes",
    )
    return both


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        print(_peak_here(*sys.argv[2:]))
        return
    args = arguments(__doc__)
    claims = Claims()
    table = Table("network", "what", "seconds", "gradients, folded", "gradients, as trained")
    names = ["ResNet-20"] if args.quick else list(NETWORKS)
    results = {name: examine(name, claims, table) for name in names}
    console.print(table)
    claims.finish("sensitivity", args, {"networks": results})


if __name__ == "__main__":
    main()
