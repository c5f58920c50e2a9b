"""How near the forecast of `hawqfx compile --dry-run` is: seconds and memory, foreseen and found.

    python benchmarks/forecast.py [--quick] [--check] [--only CASE ...]

Networks of random weights, of the package and of subjects.py (the extra `bench`), each compiled in a process of its own
with one thread, after a forecast in another.  Memory is the largest resident set of the process.

The decoders are Llamas with SmolLM2's words, the largest of its shape, compiled as in language.py; the last lines tell
how their memory grows, and what a billion weights would take if it went on so.
"""

import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

from common import Claims, console, each_network, parser
from rich.table import Table

FACTORS = {"seconds": 2.0, "bytes": 1.3}  # that the forecast promises
CASES = {
    "resnet20": {}, "resnet20, hawq-v2": {"sensitivity": "hawq-v2"}, "resnet20, measured": {"sensitivity": "measured"},
    "resnet20, compensated": {"rounding": "compensated"}, "mobile": {}, "wide": {}, "efficientnet-lite0": {},
    "minilm": {}, "crepe-tiny": {},
}  # fmt: skip
# hidden size, heads, their groups and layers; 30, 60 and 135 million weights
DECODERS = {"decoder-30M": (256, 4, 2, 25), "decoder-60M": (384, 6, 2, 26), "decoder-135M": (576, 9, 3, 30)}
WORDS, WINDOWS = 49152, (16, 256)


def case(name: str) -> tuple[Any, list[Any], dict[str, Any]]:
    """A model, its data and options."""
    import torch
    from torch import nn

    from hawqfx import zoo

    torch.manual_seed(0)
    if name in DECODERS:
        return decoder(*DECODERS[name])
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


def decoder(hidden: int, heads: int, groups: int, layers: int) -> tuple[Any, list[Any], dict[str, Any]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hawqfx.passes.gauss_newton import GaussNewton

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=True,
    )  # fmt: skip
    options = {
        "tokens": "causal", "schemes": ("weight-only",), "block_sizes": (32,), "sensitivity": GaussNewton(probes=32)
    }  # fmt: skip
    return LlamaForCausalLM(config).eval(), list(torch.randint(WORDS, WINDOWS).split(2)), options


def growth(results: dict[str, Any]) -> dict[str, float]:
    """Bytes of memory by weights, fitted to the decoders by a line, and what a billion weights would take."""
    import numpy as np

    found = [results[name]["found"] for name in DECODERS]
    slope, start = np.polyfit([each["weights"] for each in found], [each["bytes"] for each in found], 1)
    return {"bytes of a weight": float(slope), "bytes of none": float(start), "1B": float(start + slope * 1e9)}


def measured(name: str, foresee: bool) -> dict[str, float]:
    import hawqfx
    from hawqfx.forecast import forecast

    model, data, options = case(name)
    weights = sum(parameter.numel() for parameter in model.parameters())
    start = time.perf_counter()
    if foresee:
        told = forecast(model, "weight_bits=4", data, **options)
        return {"seconds": told.seconds, "bytes": told.bytes, "weights": weights}
    hawqfx.compile(model, "weight_bits=4", data, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "bytes": peak, "weights": weights}


def apart(name: str, *more: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def examine(name: str) -> dict[str, Any]:
    return {"foreseen": apart(name, "--foresee"), "found": apart(name)}


def show(results: dict[str, Any], claims: Claims) -> None:
    table = Table("network", "seconds foreseen", "found", "ratio", "MB foreseen", "found", "ratio")
    for name, result in results.items():
        told, found = result["foreseen"], result["found"]
        ratios = {key: told[key] / found[key] for key in FACTORS}
        table.add_row(
            name, f"{told['seconds']:.1f}", f"{found['seconds']:.1f}", f"{ratios['seconds']:.2f}",
            f"{told['bytes'] / 1e6:.0f}", f"{found['bytes'] / 1e6:.0f}", f"{ratios['bytes']:.2f}",
        )  # fmt: skip
        for key, ratio in ratios.items():
            most = FACTORS[key]
            claims.add(f"{name}: {key} within a factor of {most:g}", 1 / most <= ratio <= most, f"{ratio:.2f}")
    console.print(table)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--measure", help="run one case here")
    options.add_argument("--foresee", action="store_true", help="with --measure: the forecast alone")
    options.add_argument("--only", nargs="+", choices=[*CASES, *DECODERS], default=[*CASES, *DECODERS])
    args = options.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, args.foresee)))
        return
    quick = [*CASES][:1]
    results = {name: examine(name) for name in quick} if args.quick else each_network("forecast", args.only, examine)
    claims = Claims()
    show(results, claims)
    more = growth(results) if DECODERS.keys() <= results.keys() else {}
    for key, value in more.items():
        console.print(f"{key}: {value:,.1f}")
    claims.finish("forecast", args, {"networks": results, "growth": more})


if __name__ == "__main__":
    main()
