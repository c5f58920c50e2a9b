"""From what a user writes on the command line to models, data and functions.

pkg.module:name     a name in a module that Python finds, the working folder among them
path/file.py:name   a name in a file
hf:FOLDER           a model of transformers, from its folder (config.json and safetensors)
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hawqfx.errors import HawqfxError, UsageError

HUGGING_FACE = "hf:"


def named(spec: str) -> Any:
    """The object that a spec names.

    Raises:
        UsageError: if there is none.
        HawqfxError: if the module raises.
    """
    module, _, name = spec.rpartition(":")
    if not module or not name:
        raise UsageError(f"{spec!r}: write it as pkg.module:function or path/file.py:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = _from_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except HawqfxError:
        raise
    except Exception as error:  # the module of a user may raise anything
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        kind = UsageError if absent else HawqfxError
        raise kind(f"{spec!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not hasattr(found, name):
        raise UsageError(f"{spec!r} cannot be loaded: {module} has no {name!r}")
    return getattr(found, name)


def _from_file(path: Path) -> Any:
    """The module of a file, whose neighbours it may import."""
    if not path.is_file():
        raise UsageError(f"{path} is no file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def made(spec: str) -> Any:
    """What the function that a spec names returns.

    Raises:
        UsageError: if there is no such function.
        HawqfxError: if it raises or returns None.
    """
    factory = named(spec)
    if not callable(factory):
        raise UsageError(f"{spec!r} is {factory!r:.60}: name a function that returns the model or the data")
    try:
        found = factory()
    except HawqfxError:
        raise
    except Exception as error:  # the user's function may raise anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise HawqfxError(
            f"{spec!r} raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        ) from error
    if found is None:
        raise HawqfxError(f"{spec!r} returned None: return the model or the data")
    return found


def model_of(spec: str, weights: Path | None = None) -> Any:
    """The model of a spec, with the weights of a checkpoint if there is one.

    Raises:
        UsageError: if there is no such model, or it takes no weights.
        HawqfxError: if either cannot be loaded, or they do not fit.
    """
    model = _hugging_face(Path(spec[len(HUGGING_FACE) :])) if spec.startswith(HUGGING_FACE) else made(spec)
    if weights is None:
        return model
    if not isinstance(model, nn.Module):
        raise UsageError(f"--weights: {spec!r} returns {type(model).__name__}, which takes none")
    try:
        model.load_state_dict(checkpoint(weights))
    except RuntimeError as error:
        raise HawqfxError(f"{weights} does not fit {spec!r}: {error}") from error
    return model.eval()


def checkpoint(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a file of safetensors or of torch; no code in it is run.

    Raises:
        HawqfxError: if the file cannot be read, or holds anything but tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file raises is many things
        reason = str(error)
        if type(error).__name__ == "UnpicklingError":  # torch's own advice is to run the code in the file
            reason = "it holds more than tensors, or is damaged, and no code in it is run: save model.state_dict()"
        raise HawqfxError(f"the checkpoint {path} cannot be read: {reason}") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise HawqfxError(f"the checkpoint {path} holds no tensors by name: save model.state_dict()")
    return found


def _hugging_face(folder: Path) -> nn.Module:
    """The model of a folder, by the class that its configuration names; nothing is fetched and no code of it is run."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{HUGGING_FACE}{folder}: there is no config.json in this folder")
    try:
        import transformers
    except ImportError as error:
        raise HawqfxError(f"{HUGGING_FACE}{folder} needs transformers: pip install 'hawqfx[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        names: Sequence[str] = config.architectures or ()
        kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
        if kind is None:
            raise HawqfxError(f"{HUGGING_FACE}{folder}: transformers has no class {names[0]}")
        model: nn.Module = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except HawqfxError:
        raise
    except Exception as error:  # transformers raises many things
        raise HawqfxError(f"{HUGGING_FACE}{folder} cannot be loaded: {error}") from error
    return model.eval()


def fixed(rules: Sequence[str]) -> dict[str, int]:
    """Pattern -> bits from PATTERN=BITS."""
    found = {}
    for rule in rules:
        pattern, _, bits = rule.rpartition("=")
        if not pattern or not bits.isdecimal():
            raise UsageError(f"--fix {rule}: write it as PATTERN=BITS, such as 'head.*=8'")
        found[pattern] = int(bits)
    return found


def widths(name: str, text: str | None, default: Sequence[int]) -> Sequence[int]:
    """Bits from text such as "2,3,4-6,8"."""
    if text is None:
        return default
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"{name} {text}: write widths as 2,3,4 or 2-8")
        found += range(int(first), int(last or first) + 1)
    return found


def dynamic_shapes(rules: Sequence[str]) -> dict[str, dict[int, Any]] | None:
    """dynamic_shapes= of torch.export from INPUT:AXIS=NAME, where equal names are one dimension; None without rules."""
    dims: dict[str, Any] = {}
    shapes: dict[str, dict[int, Any]] = {}
    for rule in rules:
        place, _, name = rule.partition("=")
        key, _, axis = place.rpartition(":")
        if not key or not axis.isdecimal() or not name.isidentifier():
            raise UsageError(f"--dynamic {rule}: write it as INPUT:AXIS=NAME, such as input_ids:1=sequence")
        shapes.setdefault(key, {})[int(axis)] = dims.setdefault(name, torch.export.Dim(name))
    return shapes or None
