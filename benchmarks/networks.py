"""Real networks and many kinds of networks through the whole compiler.

    python benchmarks/networks.py [--quick] [--check] [--only NETWORK ...]

* Trained (subjects.py; the extra `bench`): EfficientNet-Lite0 and Lite2, YOLOX-Nano, MiniLM, and MiniLM with a head
  that tells spam.  64 samples calibrate, 32 of YOLOX-Nano; all 8 bits and 4 bits per weight on average, beside what
  onnxruntime's own tool makes on the same samples (theirs.py): the score of the float network and of each file in
  onnxruntime, bytes, latency beside the float file's in the same run (one sample, one thread), seconds to compile, and
  the most memory that the process ever took by then; with other metrics of each: top-1's agreement with the float
  network's, mAP over COCO's ten overlaps, and correlations with what people find alike.
* YOLOX-Nano with weights of 3 bits on average and activations of 4 and 6: one width for all, and mixed in the same
  memory for activations (the peak over the schedule).
* Coverage (layouts.py): random weights, 6 bits per weight on average, chosen by squared error.  Flips are codes
  that differ between the fx graph and onnxruntime without optimizations, of all codes that were compared
  (hawqfx/runtime/parity.py); kernels are those of onnxruntime with optimizations.

The share of MACs counts what torch counts as products of matrices and convolutions; products of kernels that only
onnxruntime fuses are in both.  --quick: three networks of the coverage.  Results are written after each network.
"""

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Claims, console, environment, parser
from deployed import Deployed
from layouts import ARCHITECTURES, build
from rich.table import Table
from subjects import SUBJECTS, Subject
from theirs import THEIRS, their_files
from torch.utils.flop_counter import FlopCounterMode

import hawqfx
from hawqfx import Compiled
from hawqfx.ir.facts import Account
from hawqfx.maths.formats import FLOAT_BITS
from hawqfx.runtime import ort, parity

TRAINED = ("efficientnet-lite0", "efficientnet-lite2", "yolox-nano", "minilm", "mails")
BUDGETS = ("weight_bits=8", "weight_bits=4")
# kernels that multiply matrices or convolve in float
MULTIPLYING = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose", "LSTM", "GRU"}
ISLANDS = {
    "LayerNormalization", "SkipLayerNormalization", "Softmax", "Erf", "Gelu", "FastGelu", "BiasGelu", "HardSigmoid",
    "HardSwish", "Tanh", "BatchNormalization", "Resize", "Relu",
}  # fmt: skip
QUICK = ("U-Net", "BERT", "LSTM classifier")


def share_of_macs(compiled: Compiled) -> float:
    """Of the network's products, those of layers and activations all of whose tensors are integers."""
    bits, program = compiled.plan.bits, compiled.planned
    found = [((layer.weight, layer.input), layer.macs) for layer in program.layers]
    found += [(product.inputs, product.macs) for product in program.products]
    integer = sum(macs for sites, macs in found if all(bits[site] < FLOAT_BITS for site in sites))
    batch = compiled.session.context.batches[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compiled.session.measured.run(batch.args, batch.kwargs)
    return integer / (counter.get_total_flops() / 2 / batch.size + recurrent(compiled))


def recurrent(compiled: Compiled) -> int:
    """Products of LSTMs for one sample, which torch does not count: every weight matrix in every step."""
    total = 0
    for node in compiled.session.measured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.lstm.input):
        tensor, _, weights, *_ = node.args
        steps = tensor.meta["val"].shape[1 if node.args[-1] else 0]
        total += steps * sum(weight.meta["val"].numel() for weight in weights if weight.meta["val"].ndim == 2)
    return total


def trained(name: str, folder: Path) -> dict[str, Any]:
    subject = SUBJECTS[name]()
    found: dict[str, Any] = {"metric": subject.metric, "n": subject.samples, "float": subject.score(subject.model)}
    found["float, more"] = subject.more(subject.model)
    start = time.perf_counter()
    compiled = hawqfx.compile(
        subject.model, BUDGETS[0], subject.calibration, loss=subject.loss, draw=subject.draw
    )  # fmt: skip
    found |= {"seconds": time.perf_counter() - start, "calibration": compiled.session.context.samples}
    found["peak GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    original = folder / "float.onnx"
    compiled.export_float(original)
    paths: dict[str, str | Path] = {"float": original}
    for budget in BUDGETS:
        network = compiled if budget == BUDGETS[0] else compiled.at(budget)
        path = paths[budget] = folder / f"{budget}.onnx"
        network.export(path)
        found[budget] = {"integer MACs": share_of_macs(network), "kernels": parity.kernels(path)}
    theirs = their_files(original, compiled.session.context.batches, folder)
    found["refused"] = {kind: text for kind, text in theirs.items() if isinstance(text, str)}
    paths |= {kind: path for kind, path in theirs.items() if isinstance(path, Path)}
    for kind in paths.keys() - {"float"}:
        deployed = Deployed(Path(paths[kind]))
        found[kind] = found.get(kind, {}) | {
            "score": subject.score(deployed), "more": subject.more(deployed), "bytes": Path(paths[kind]).stat().st_size,
        }  # fmt: skip
    found["float bytes"] = original.stat().st_size
    sample = [tensor.numpy() for tensor in compiled.session.context.batches[0].first(1).tensors]
    times = ort.latency(paths, sample, rounds=100)
    for kind in paths.keys() - {"float"}:
        found[kind]["faster"] = times["float"].median / times[kind].median
        found[kind]["milliseconds"] = 1e3 * times[kind].median
    if name == "yolox-nano":
        found["activations"] = activations(subject, compiled)
    return found


def activations(subject: Subject, compiled: Compiled) -> dict[str, Any]:
    """Weights of 3 bits on average; one width for all activations, and mixed widths in the same memory."""
    keys = [site.key for site in compiled.planned.activations]
    found = {}
    for bits in (4, 6):
        session = compiled.session
        one = session.at("weight_bits=3, activation_memory=100%", fix=dict.fromkeys(keys, bits), against_uniform=False)
        memory = one.planned.about(Account).limits["activation_memory"].amount
        mixed = session.at(f"weight_bits=3, activation_memory={int(memory)}B", against_uniform=False)
        found[f"{bits} bits"] = {
            "bytes": memory, "uniform": subject.score(one.model), "mixed": subject.score(mixed.model)
        }  # fmt: skip
    return found


def covered(name: str, folder: Path) -> dict[str, Any]:
    model, batches = build(name)
    start = time.perf_counter()
    try:
        compiled = hawqfx.compile(model, "weight_bits=6", batches, sensitivity="mse", rounding="nearest")
    except hawqfx.errors.HawqfxError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - start
    path = folder / "model.onnx"
    compiled.export(path)
    same = parity.compare(compiled.program, path, compiled.session.context.batches[0])
    kernels = parity.kernels(path)
    return {
        "seconds": seconds, "flips": same.flips, "codes": same.codes, "worst": same.worst,
        "integer MACs": share_of_macs(compiled), "left float": dict(compiled.planned.left_float), "kernels": kernels,
        "multiplying in float": {k: n for k, n in kernels.items() if k in MULTIPLYING},
        "islands": {k: n for k, n in kernels.items() if k in ISLANDS},
    }  # fmt: skip


def show(results: dict[str, Any], claims: Claims) -> None:
    columns = (
        "score, float", "file", "score", "bytes", "of float", "faster", "integer MACs", "compiled in", "memory", "more",
    )  # fmt: skip
    table = Table("network", *columns)
    for name in [name for name in TRAINED if name in results]:
        found = results[name]
        for kind in [kind for kind in (*BUDGETS, *THEIRS) if kind in found]:
            row = found[kind]
            ours = ("", "", "")
            if kind in BUDGETS:
                ours = (f"{row['integer MACs']:.1%}", f"{found['seconds']:.0f} s", f"{found['peak GB']:.1f} GB")
            table.add_row(
                name, f"{found['float']:.4f} ({found['metric']}, n={found['n']})", kind,
                f"{row['score']:.4f}", f"{row['bytes']:,}", f"{row['bytes'] / found['float bytes']:.1%}",
                f"{row['faster']:.2f}", *ours,
                ", ".join(f"{n} {v:.3f}" for n, v in row["more"].items()),
            )  # fmt: skip
        more = ", ".join(f"{n} {v:.3f}" for n, v in found["float, more"].items())
        console.print(f"{name}, float: {more}")
    console.print(table)
    for bits, row in results.get("yolox-nano", {}).get("activations", {}).items():
        claims.add(
            f"YOLOX-Nano: mixed activation bits beat {bits} at the same activation memory",
            row["mixed"] > row["uniform"],
            f"mAP50 {row['mixed']:.4f} against {row['uniform']:.4f} in {row['bytes']:,.0f} bytes",
        )
    table = Table("network", "integer MACs", "in float", "flips", "codes", "compiled in")
    for name in ARCHITECTURES:
        found = results.get(name)
        if found is None:
            continue
        if "refused" in found:
            table.add_row(name, "refused", found["refused"])
            continue
        floats = ", ".join(f"{n} {k}" for k, n in {**found["multiplying in float"], **found["islands"]}.items())
        table.add_row(
            name, f"{found['integer MACs']:.1%}", floats, str(found["flips"]), f"{found['codes']:,}",
            f"{found['seconds']:.0f} s",
        )  # fmt: skip
    console.print(table)
    rows = {name: results[name] for name in ARCHITECTURES if name in results}
    claims.add(
        "every architecture is compiled and exported",
        not any("refused" in row for row in rows.values()),
        f"{sum('refused' not in row for row in rows.values())} of {len(rows)}",
    )
    # one in a hundred thousand values lies so near to a tie that float sums in another order cross it
    claims.add(
        "the file computes what the graph computes: flips of codes at ties alone",
        all(row["flips"] <= 1e-5 * row["codes"] + 3 for row in rows.values() if "flips" in row),
        ", ".join(f"{row['flips']} of {row['codes']:,}" for row in rows.values() if "flips" in row),
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=(*TRAINED, *ARCHITECTURES), default=[*TRAINED, *ARCHITECTURES])
    args = options.parse_args()
    path = RESULTS / "networks.json"
    results: dict[str, Any] = {}
    if path.exists() and not args.quick:
        results = json.loads(path.read_text())["networks"]
    with tempfile.TemporaryDirectory() as name:
        for network in QUICK if args.quick else args.only:
            examine = trained if network in TRAINED else covered
            results[network] = examine(network, Path(name)) | {"environment": environment()}
            console.print(f"{network} done")
            if not args.quick:
                path.write_text(json.dumps({"networks": results}, indent=1) + "\n")
    claims = Claims()
    show(results, claims)
    claims.finish("networks", args, {"networks": results, "seed": 0})


if __name__ == "__main__":
    main()
