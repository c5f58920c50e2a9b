"""CPU seconds of hawqfx.compile, pass by pass and outside the passes, and of importing it.

    python benchmarks/compile_time.py [--against PATH] [--quick] [--check]

Three compilations: ResNet-8 (the blocks of hawqfx.zoo's ResNet-20 that begin a stage) with 1,024 images of
Fashion-MNIST at 3 bits; that of `hawqfx demo`; EfficientNet-Lite0 with 64 pictures at 4 bits (subjects.py; the extra
`bench`).  Each runs in a process of its own with one thread, three times; a figure is the median of CPU seconds, which
other programs disturb less than they do a clock.  The seconds of a pass contain the checks of its promise.

--against PATH: the same in another checkout of hawqfx, such as the last release, run in turns with this one.

--quick: ResNet-8 alone, once.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from common import Claims, console, parser
from rich.table import Table

ROOT, REPEATS = Path(__file__).parents[1], 3
IMPORT, OUTSIDE, TOTAL = "import compile", "outside the passes", "compile in all"
WORKLOADS = ("resnet8", "demo", "efficientnet-lite0")


def _workload(name: str) -> tuple[Any, str, Any]:
    """A model, a budget and calibration data."""
    from hawqfx import zoo

    if name == "demo":
        return zoo.resnet20(), "size=12.5%", zoo.calibration()
    if name == "efficientnet-lite0":
        import subjects

        subject = subjects.efficientnet_lite0()
        return subject.model, "weight_bits=4", subject.calibration
    import data
    import torch

    model = zoo.resnet20()
    model.blocks = torch.nn.Sequential(*(model.blocks[first] for first in (0, 3, 6)))
    model.eval()  # a new container is in train mode
    images, labels = (part[:1024] for part in data.fashion_mnist("train"))
    batches = zip(zoo.standardise(images).split(128), labels.split(128), strict=True)
    return model, "weight_bits=3", list(batches)


def measured(name: str) -> dict[str, float]:
    """CPU seconds of a compilation in this process, by the name of a pass, or IMPORT, OUTSIDE or TOTAL."""
    start = time.process_time()
    from hawqfx.compiler import compile as compile_model
    from hawqfx.pass_manager.base import Observer

    imported = time.process_time() - start
    passes: dict[str, float] = {}

    class CpuSeconds(Observer):
        def before(self, number: int, step: Any, program: Any) -> None:
            passes[step.name] = passes.get(step.name, 0.0) - time.process_time()

        def after(self, number: int, step: Any, program: Any, seconds: float) -> None:
            passes[step.name] += time.process_time()

    model, budget, batches = _workload(name)
    start = time.process_time()
    compile_model(model, budget, batches, observers=[CpuSeconds()])
    total = time.process_time() - start
    return passes | {OUTSIDE: total - sum(passes.values()), TOTAL: total, IMPORT: imported}


def _measured_apart(name: str, checkout: Path) -> dict[str, float]:
    """What `measured` returns in a process of its own, with the hawqfx of a checkout."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name],
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(run[key] for run in runs) for key in runs[0]}


def compared(name: str, checkouts: Mapping[str, Path], repeats: int) -> dict[str, dict[str, float]]:
    """The medians of CPU seconds in every checkout, which take turns."""
    runs: dict[str, list[dict[str, float]]] = {title: [] for title in checkouts}
    for _ in range(repeats):
        for title, checkout in checkouts.items():
            runs[title].append(_measured_apart(name, checkout))
    return {title: _medians(found) for title, found in runs.items()}


def _table(name: str, found: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("", *found, title=f"{name}: CPU seconds")
    for key in dict.fromkeys(key for seconds in found.values() for key in seconds):
        table.add_row(key, *(f"{seconds[key]:.2f}" if key in seconds else "" for seconds in found.values()))
    return table


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--against", type=Path, metavar="PATH", help="another checkout of hawqfx to compare with")
    options.add_argument("--measure", choices=WORKLOADS, help="measure one in this process, and print JSON")
    args = options.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure)))
        return
    checkouts = ({"before": args.against.resolve()} if args.against else {}) | {"now": ROOT}
    claims, results = Claims(), {}
    for name in WORKLOADS[:1] if args.quick else WORKLOADS:
        results[name] = compared(name, checkouts, 1 if args.quick else REPEATS)
        console.print(_table(name, results[name]))
        if args.against:
            before, now = (found[TOTAL] for found in results[name].values())
            claims.add(f"{name} compiles in less time than before", now < before, f"{now:.1f} s, before {before:.1f} s")
    claims.finish("compile_time", args, {"cpu_seconds": results})


if __name__ == "__main__":
    main()
