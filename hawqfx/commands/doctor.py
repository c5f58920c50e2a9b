"""What this machine has, what is missing, and how to install it."""

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import platformdirs
import torch

from hawqfx.frontend.memory import free_memory
from hawqfx.runtime import ort
from hawqfx.runtime.processor import instructions, saturates

# package -> what it is for, and the extra that installs it
OPTIONAL = {"transformers": ("models from hf:FOLDER", "hf"), "matplotlib": ("figures in notebooks", "notebook")}
PACKAGES = ("torch", "onnx", "onnxruntime", "ortools", "networkx", "numpy", "safetensors")


def examined() -> dict[str, Any]:
    """Versions, processor, memory, providers, folders, and a sentence for each thing that is missing or slow."""
    free = free_memory(torch.device("cpu"))
    cache = Path(os.environ.get("HAWQFX_CACHE") or platformdirs.user_cache_dir("hawqfx"))
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("hawqfx", *PACKAGES)},
        "processor": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
            "instructions": instructions(),
        },
        "torch": {"cuda": torch.version.cuda, "devices": torch.cuda.device_count() if torch.cuda.is_available() else 0},
        "onnxruntime providers": ort.providers(),
        "free memory, MB": free // 2**20,
        "cache": {"folder": str(cache), "free, MB": _free_disk(cache)},
    }
    return found | {"advice": list(_advice(found))}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _free_disk(folder: Path) -> int:
    """Megabytes that are free where the folder is, or where it would be made."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free // 2**20


def _advice(found: dict[str, Any]) -> list[str]:
    said = []
    for name in PACKAGES:
        if found["versions"][name] is None:
            said.append(f"{name} is missing: pip install hawqfx")
    for name, (use, extra) in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            said.append(f"{name} is not installed, for {use}: pip install 'hawqfx[{extra}]'")
    if saturates():
        said.append("this processor has no VNNI: sums of signed codes saturate here; compile with target='x86-avx2'")
    if found["torch"]["cuda"] and not found["torch"]["devices"]:
        said.append("torch is built with CUDA and sees no device; a build for processors is gigabytes smaller")
    if found["free memory, MB"] < 2000:
        said.append("less than 2 GB of memory are free: give batch= and samples= to measure in parts")
    return said or ["nothing is missing"]
