"""The same call gives the same bytes in another process, whatever the order of Python's sets and hashes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CALL = """
import hashlib, pathlib, sys
import hawqfx
from tests.nets import Residual, build, images
folder = pathlib.Path(sys.argv[1])
compiled = hawqfx.compile(build(Residual), "weight_bits=5, bops=6%", images())
compiled.plan.write(folder / "plan.json")
compiled.save(folder / "net.hawqfx")
compiled.export(folder / "model.onnx")
compiled.export(folder / "native.onnx", "native")
for path in sorted(folder.iterdir()):
    print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
"""


def digests(folder: Path, seed: str) -> list[str]:
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CALL, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_bytes_are_equal_across_processes_and_hash_seeds(tmp_path: Path) -> None:
    one, two = (digests(tmp_path / seed, seed) for seed in ("1", "20"))
    assert [line.split()[0] for line in one] == ["model.onnx", "native.onnx", "net.hawqfx", "plan.json"]
    assert one == two
