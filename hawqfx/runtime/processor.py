"""This processor: the instructions that onnxruntime's integer kernels use."""

import platform
from pathlib import Path

_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")  # of integer kernels
_PROCESSOR = Path("/proc/cpuinfo")


def instructions() -> tuple[str, ...] | None:
    """The instructions of this processor that onnxruntime's integer kernels use, as Linux names them; None on other
    systems, which do not tell."""
    if not _PROCESSOR.is_file():
        return None
    lines = _PROCESSOR.read_text().splitlines()
    known = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    return tuple(name for name in _INSTRUCTIONS if name in known)


def has_vnni() -> bool:
    """Whether this is known to be a processor with VNNI."""
    return any("vnni" in name for name in instructions() or ())


def saturates() -> bool:
    """Whether sums of signed codes saturate here (hawqfx.export.targets): an x86 processor not known to have VNNI."""
    return platform.machine() in ("x86_64", "AMD64") and not has_vnni()
