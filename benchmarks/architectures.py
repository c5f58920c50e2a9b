"""What enters: networks of transformers with random weights (tiny_transformers.py), compiled, exported and run.

    python benchmarks/architectures.py [--quick] [--check] [--only NAME ...]

Each is compiled to 7 bits per weight, under a budget of 9 that leaves room for a few in float, and its file is run in
onnxruntime.  "float" is the largest difference of the captured float network's outputs from those of transformers
itself; "file" the mean difference of the file's outputs from those of the fake-quantized graph, operator by operator;
"kernels" the same with onnxruntime's fused integer kernels, whose products meet rounding ties in another order.  In
deep networks of random weights a flipped tie grows, so that the bar of both is what quantization itself does to the
outputs.  All are of the largest or the mean output.  The share of multiplications in integers counts those of
layers and of products of activations among all that torch counts in the float network.  With 7 bits sums saturate on no
processor.

A network that hawqfx refuses is listed with the first sentence of the refusal.  --quick: four networks.
"""

import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import Claims, console, each_network, parser
from rich.table import Table
from tiny_transformers import TINY, Tiny
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import hawqfx
from hawqfx.errors import HawqfxError
from hawqfx.runtime import ort

QUICK = ("LlamaForCausalLM", "MixtralForCausalLM", "T5ForConditionalGeneration", "SegformerForSemanticSegmentation")
WIDTHS = (2, 3, 4, 5, 6, 7)
FLOAT, FILE = 1e-3, 1e-2  # float32 sums in another order, through a network; flipped ties
MOST = 200  # characters of a message


def examine(tiny: Tiny) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        found = _compiled(tiny)
    except HawqfxError as error:
        found = {"outcome": "refused", "message": " ".join(str(error).split())[:MOST]}
    except Exception as error:  # what the benchmark is to find
        found = {"outcome": "crashed", "message": f"{type(error).__name__}: {' '.join(str(error).split())}"[:MOST]}
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def _compiled(tiny: Tiny) -> dict[str, Any]:
    model, batches = tiny.build(), tiny.batches()
    compiled = hawqfx.compile(
        model, "weight_bits=9", batches, sensitivity="mse", rounding="nearest", weight_bits=WIDTHS, target="x86-avx2"
    )
    inputs = batches[0]
    with torch.no_grad():
        own, ours, graph = model(**inputs), compiled.session.measured.run((), inputs), compiled.model(**inputs)
    reference = _tensors({name: value for name, value in own.items() if _entry(ours, name) is not None})
    feed = [inputs[node.name].numpy() for node in compiled.model.graph.find_nodes(op="placeholder")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        compiled.export(path)
        plain, fused = (
            [torch.from_numpy(each) for each in ort.run(ort.session(path, optimize=optimize), feed)]
            for optimize in (False, True)
        )
    quantized, exact = _tensors(graph), _tensors(ours)
    differences = {
        "float": max(_largest(one, other) for one, other in zip(exact, reference, strict=True)),
        "file": max(_mean(one, other) for one, other in zip(plain, quantized, strict=True)),
        "kernels": max(_mean(one, other) for one, other in zip(fused, quantized, strict=True)),
        "quantization": max(_mean(one, other) for one, other in zip(quantized, exact, strict=True)),
    }
    most = max(FILE, differences["quantization"])
    holds = differences["float"] < FLOAT and differences["file"] < most and differences["kernels"] < most
    return {
        "outcome": "compiled" if holds else "differs",
        "message": "; ".join(compiled.planned.notes)[:MOST],
        "in_integers": _share(compiled, inputs),
        "in_float": dict(compiled.planned.left_float),
        **differences,
    }


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if hasattr(output, "get") else None


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _largest(one: Tensor, other: Tensor) -> float:
    """The largest difference, of the largest element."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30)) if other.numel() else 0.0


def _mean(one: Tensor, other: Tensor) -> float:
    """The mean difference, of the mean element."""
    one, other = one.double(), other.double()
    return float((one - other).abs().mean() / other.abs().mean().clamp_min(1e-30)) if other.numel() else 0.0


def _share(compiled: hawqfx.Compiled, inputs: dict[str, Tensor]) -> float:
    """The share of multiplications that integer kernels do."""
    planned, samples = compiled.planned, len(next(iter(inputs.values())))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        planned.run((), inputs)
    macs = sum(layer.macs for layer in planned.layers) + sum(product.macs for product in planned.products)
    return min(1.0, 2 * macs * samples / max(1, counter.get_total_flops()))


def table(results: dict[str, dict[str, Any]]) -> Table:
    rows = Table("network", "outcome", "in integers", "float", "file", "kernels", "s", "message", title="what enters")
    for name, found in results.items():
        numbers = [f"{found[key]:.0e}" if key in found else "-" for key in ("float", "file", "kernels")]
        share = f"{found['in_integers']:.0%}" if "in_integers" in found else "-"
        rows.add_row(name, found["outcome"], share, *numbers, f"{found['seconds']:.0f}", found["message"][:60])
    return rows


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--only", nargs="+", default=[], help="these networks; those of earlier runs stay")
    args = arguments.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tiny = {each.name: each for each in TINY}
    names = args.only or (list(QUICK) if args.quick else list(tiny))
    if args.quick:
        results = {name: examine(tiny[name]) for name in names}
    else:
        results = each_network("architectures", names, lambda name: examine(tiny[name]))
    console.print(table(results))
    outcomes = [found["outcome"] for found in results.values()]
    good = sum(outcome in ("compiled", "refused") for outcome in outcomes)
    claims = Claims()
    claims.add(
        "at least 95% compile with parity or are refused by a sentence",
        good >= 0.95 * len(outcomes),
        f"{outcomes.count('compiled')} compiled, {outcomes.count('refused')} refused, of {len(outcomes)}",
    )
    claims.add("no raw error", "crashed" not in outcomes, f"{outcomes.count('crashed')} crashed")
    args.quick = True  # each_network has written the results
    claims.finish("architectures", args, {})


if __name__ == "__main__":
    main()
