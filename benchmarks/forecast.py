"""How near the forecast of `hawqfx compile --dry-run` is: seconds and memory, foreseen and found.

    python benchmarks/forecast.py [--quick] [--check]

Networks of random weights, of the package and of subjects.py (the extra `bench`), each compiled in a process of its own
with one thread, after a forecast in another.  Memory is the largest resident set of the process.
"""

import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

from common import Claims, console, parser
from rich.table import Table

FACTORS = {"seconds": 2.0, "bytes": 1.3}  # that the forecast promises
CASES = {
    "resnet20": {}, "resnet20, hawq-v2": {"sensitivity": "hawq-v2"}, "resnet20, measured": {"sensitivity": "measured"},
    "resnet20, compensated": {"rounding": "compensated"}, "mobile": {}, "wide": {}, "efficientnet-lite0": {},
    "minilm": {}, "crepe-tiny": {},
}  # fmt: skip


def case(name: str) -> tuple[Any, list[Any], dict[str, Any]]:
    """A model, its data and options."""
    import torch
    from torch import nn

    from hawqfx import zoo

    torch.manual_seed(0)
    if name.startswith("resnet20"):
        return zoo.resnet20(), zoo.calibration()[:2], CASES[name]
    if name in ("efficientnet-lite0", "minilm", "crepe-tiny"):
        import subjects

        subject = getattr(subjects, name.replace("-", "_"))()
        return subject.model, subject.calibration, CASES[name]
    if name == "wide":
        layers = [nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 10)]
        return nn.Sequential(*layers).eval(), [torch.randn(256, 2048)], {}
    parts: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU6()]
    for _ in range(4):
        parts += [nn.Conv2d(32, 96, 1), nn.ReLU6(), nn.Conv2d(96, 96, 3, 1, 1, groups=96), nn.ReLU6()]
        parts += [nn.Conv2d(96, 32, 1)]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    return model, [torch.randn(16, 3, 64, 64) for _ in range(4)], {}


def measured(name: str, foresee: bool) -> dict[str, float]:
    import hawqfx
    from hawqfx.forecast import forecast

    model, data, options = case(name)
    start = time.perf_counter()
    if foresee:
        told = forecast(model, "weight_bits=4", data, **options)
        return {"seconds": told.seconds, "bytes": told.bytes}
    hawqfx.compile(model, "weight_bits=4", data, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "bytes": peak}


def apart(name: str, *more: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--measure", help="run one case here")
    options.add_argument("--foresee", action="store_true", help="with --measure: the forecast alone")
    args = options.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, args.foresee)))
        return
    table = Table("network", "seconds foreseen", "found", "ratio", "MB foreseen", "found", "ratio")
    results, claims = {}, Claims()
    for name in list(CASES)[:1] if args.quick else CASES:
        told, found = apart(name, "--foresee"), apart(name)
        results[name] = {"foreseen": told, "found": found}
        ratios = {key: told[key] / found[key] for key in told}
        table.add_row(
            name, f"{told['seconds']:.1f}", f"{found['seconds']:.1f}", f"{ratios['seconds']:.2f}",
            f"{told['bytes'] / 1e6:.0f}", f"{found['bytes'] / 1e6:.0f}", f"{ratios['bytes']:.2f}",
        )  # fmt: skip
        for key, ratio in ratios.items():
            most = FACTORS[key]
            claims.add(f"{name}: {key} within a factor of {most:g}", 1 / most <= ratio <= most, f"{ratio:.2f}")
    console.print(table)
    claims.finish("forecast", args, {"cases": results})


if __name__ == "__main__":
    main()
