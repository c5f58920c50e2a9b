"""Checks of single arguments: each refuses what it cannot use, with the argument's name and a way out."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawqfx.atomic_write import check_folder
from hawqfx.errors import CaptureError, UsageError
from hawqfx.maths.formats import BLOCKS, FLOAT_BITS, STATIC_BITS


def whole(name: str, value: Any, least: float = -math.inf, why: str = "") -> None:
    """Refuse a value that is no whole number, or below `least`.

    Raises:
        UsageError: with the reason `why`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{name}={value!r}: give a whole number")
    if int(value) < least:
        raise UsageError(f"{name}={value}: {why}")


def cache_folder(cache: str | Path | None) -> Path | None:
    """The folder of a cache, which need not exist.

    Raises:
        UsageError: if it is no folder and none can be made there.
    """
    if cache is None:
        return None
    folder = Path(cache)
    try:
        if not folder.is_dir():  # one that takes no files may hold all that is asked for
            check_folder(folder)
    except OSError as error:
        raise UsageError(f"the cache {folder} cannot be used: {error}") from error
    return folder


def bits(name: str, wanted: Any) -> tuple[int, ...]:
    """Widths in ascending order, each once.

    Raises:
        UsageError: unless they are from 2 to 8, with 32 for float beside them.
    """
    if isinstance(wanted, str) or not isinstance(wanted, (Sequence, set, frozenset)):
        raise UsageError(f"{name}={wanted!r}: give several bit widths, such as (4, 8)")
    widths = tuple(wanted)
    known = all(isinstance(width, Integral) and (width in STATIC_BITS or width == FLOAT_BITS) for width in widths)
    if not known or not set(widths) - {FLOAT_BITS}:
        raise UsageError(f"{name}: bit widths must be from 2 to 8, with 32 for float beside them, not {widths}")
    return tuple(sorted(set(widths)))


def block_sizes(wanted: Any) -> tuple[int, ...]:
    """Inputs of a block in ascending order, each once.

    Raises:
        UsageError: unless they are some of those that there are kernels for.
    """
    if isinstance(wanted, str) or not isinstance(wanted, (Sequence, set, frozenset)) or not wanted:
        raise UsageError(f"block_sizes={wanted!r}: give several, such as {BLOCKS}")
    if not set(wanted) <= set(BLOCKS):
        raise UsageError(f"block_sizes={wanted!r}: must be some of {', '.join(map(str, BLOCKS))}")
    return tuple(sorted(set(wanted)))


def patterns(name: str, wanted: Any) -> tuple[str, ...]:
    """Patterns of names.

    Raises:
        UsageError: if they are no sequence of texts.
    """
    if isinstance(wanted, str):
        raise UsageError(f"{name}={wanted!r}: give a list of patterns, such as [{wanted!r}]")
    if not isinstance(wanted, (Sequence, set, frozenset)) or not all(isinstance(each, str) for each in wanted):
        raise UsageError(f"{name}={wanted!r}: give a list of patterns of names, such as ['head.*']")
    return tuple(wanted)


def fixed(wanted: Any) -> tuple[tuple[str, int], ...]:
    """Pairs of a pattern of names and bits.

    Raises:
        UsageError: if they are no mapping from texts to widths that exist.
    """
    if wanted is None:
        return ()
    if not isinstance(wanted, Mapping) or not all(isinstance(pattern, str) for pattern in wanted):
        raise UsageError(f"fix={wanted!r}: give a dict from patterns of names to bits, such as {{'head.*': 8}}")
    for pattern, width in wanted.items():
        if not isinstance(width, Integral) or not (width in STATIC_BITS or width == FLOAT_BITS):
            raise UsageError(f"fix {pattern!r}: bits are from 2 to 8, or 32 for float, not {width!r}")
    return tuple(wanted.items())


def model(given: Any) -> None:
    """Refuse what is no model.

    Raises:
        CaptureError: unless it is an nn.Module or an ExportedProgram.
    """
    if not isinstance(given, (nn.Module, torch.export.ExportedProgram)):
        hint = ": call it, and give what it returns" if isinstance(given, type) else ""
        raise CaptureError(
            f"the model is {type(given).__name__} {given!r:.60}{hint}; an nn.Module in eval mode, an fx.GraphModule or "
            "an ExportedProgram is needed"
        )
