"""Do exported files load, and compute the same, in old and new versions of onnxruntime?

    python benchmarks/runtimes.py [--quick] [--check]

Makes an environment for each version in the user's cache folder (`pip install onnxruntime==...`, from the package
index), runs files there in a process of its own, and compares their outputs with those of the onnxruntime installed
here.  Files: ResNet-20 (hawqfx.zoo) with 2 to 8 bits, a MobileNetV2, a U-Net and a BERT (layouts.py), the BERT
also with linear layers dynamic and weight-only, each in the portable packing, for 1.20 and later, and in the native
one, for 1.24 and later.  --quick: ResNet-20 alone.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from common import Claims, arguments, console
from layouts import build
from rich.table import Table

import hawqfx
from hawqfx import Compiled, zoo
from hawqfx.export.opsets import Packing
from hawqfx.maths.formats import Scheme
from hawqfx.runtime import ort

VERSIONS = {"1.20.1": ("portable",), "1.24.1": ("portable", "native"), "newest": ("portable", "native")}
SCHEMES: tuple[Scheme, ...] = ("dynamic", "weight-only")
ELSEWHERE = """
import json, sys, time
import numpy, onnxruntime
found = {"version": onnxruntime.__version__}
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
for name, path in json.loads(sys.argv[1]).items():
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = numpy.load(path + ".npz")
        outputs = session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
        numpy.save(f"{path}.{sys.argv[2]}.npy", outputs[0])
        found[name] = "ran"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"[:300]
print(json.dumps(found))
"""


def python_with(version: str) -> Path:
    """The interpreter of an environment with this onnxruntime, made where it is not there yet."""
    folder = Path(platformdirs.user_cache_dir("hawqfx")) / "runtimes" / version
    python = folder / "bin" / "python"
    wanted = "onnxruntime" if version == "newest" else f"onnxruntime=={version}"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", wanted], check=True)
        (folder / "ready").touch()
    return python


def networks(quick: bool) -> dict[str, Compiled]:
    widths = (2, 3, 4, 5, 6, 7, 8)
    session = hawqfx.compile(
        zoo.resnet20(), "weight_bits=8", zoo.calibration()[:1], samples=64, sensitivity="mse"
    ).session
    keys = [site.key for site in session.measured.weights]
    every = session.at("weight_bits=8", fix={key: widths[at % len(widths)] for at, key in enumerate(keys)})
    found = {"ResNet-20": every}
    for name in () if quick else ("MobileNetV2", "U-Net", "BERT"):
        model, batches = build(name)
        found[name] = hawqfx.compile(model, "weight_bits=5", batches, sensitivity="mse", rounding="nearest")
    if not quick:
        for scheme in SCHEMES:
            model, batches = build("BERT")
            found[f"BERT {scheme}"] = hawqfx.compile(
                model, "weight_memory=100%", batches, sensitivity="mse", rounding="nearest", schemes=(scheme,)
            )
    return found


def written(quick: bool, folder: Path) -> dict[str, Path]:
    """Files by network and packing, each with its inputs beside it."""
    found = {}
    packings: tuple[Packing, ...] = ("portable", "native")
    for name, compiled in networks(quick).items():
        for packing in packings:
            path = folder / f"{name}-{packing}.onnx"
            compiled.export(path, packing)
            names = [value.name for value in ort.session(path).get_inputs()]
            tensors = compiled.session.context.batches[0].first(2).tensors
            values: dict[str, Any] = {key: tensor.numpy() for key, tensor in zip(names, tensors, strict=True)}
            np.savez(f"{path}.npz", **values)
            found[f"{name}, {packing}"] = path
    return found


def main() -> None:
    args = arguments(__doc__)
    table, claims, results = Table("onnxruntime", "file", "result"), Claims(), []
    with tempfile.TemporaryDirectory() as name:
        files = written(args.quick, Path(name))
        for version, packings in VERSIONS.items():
            there = {key: str(path) for key, path in files.items() if key.rpartition(" ")[2] in packings}
            command = [str(python_with(version)), "-c", ELSEWHERE, json.dumps(there), version]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(answer.stdout.splitlines()[-1])
            for key, path in there.items():
                row = {"asked": version, "version": found["version"], "file": key, "result": found[key]}
                if found[key] == "ran":
                    inputs = np.load(f"{path}.npz")
                    session = ort.session(path)
                    ours = ort.run(session, [inputs[value.name] for value in session.get_inputs()])[0]
                    theirs = np.load(f"{path}.{version}.npy")
                    row |= {"equal": bool(np.array_equal(ours, theirs)), "largest": float(np.abs(ours - theirs).max())}
                results.append(row)
                same = "" if "equal" not in row else f", largest difference {row['largest']:.2g}"
                table.add_row(found["version"], key, found[key] + same)
    console.print(table)
    ran = [row for row in results if row["result"] == "ran"]
    claims.add("every file loads and runs", len(ran) == len(results), f"{len(ran)} of {len(results)}")
    # weight-only layers multiply floats, and versions differ in the order of their sums
    equal, near = sum(row["equal"] for row in ran), max(row["largest"] for row in ran)
    alike = all(row["equal"] or ("weight-only" in row["file"] and row["largest"] < 1e-6) for row in ran)
    claims.add(
        "the outputs are those of the version installed here", alike,
        f"{equal} of {len(ran)} exactly, the largest difference {near:.2g}",
    )  # fmt: skip
    claims.finish("runtimes", args, {"files": results})


if __name__ == "__main__":
    main()
