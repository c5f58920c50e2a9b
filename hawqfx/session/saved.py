"""A compiled network in one file, in the format of safetensors.

Tensors: codes/KEY, int8, and scale/KEY, float64, of every weight that is quantized; bias/KEY, where a bias was learned;
example/N, the first samples of the calibration inputs, since capture and export run the network.  The metadata are one
text: the SHA-256 of all else, and JSON of the plan (without the scales of weights), the options, what the summary says,
and the digests of the graph before and after lowering.

safetensors holds tensors and texts alone, and checks every size in its header against the file before it takes memory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hawqfx.atomic_write import whole_file
from hawqfx.errors import ExportError, PlanError
from hawqfx.frontend.data import Batch
from hawqfx.maths.digest import digest
from hawqfx.session import plan_json
from hawqfx.session.plan import Plan
from hawqfx.session.record import Calibrated, Trials

FORMAT = 1
KEY = "hawqfx"  # of the metadata
DIGITS = 64  # of a SHA-256


@dataclass(frozen=True, eq=False)
class Saved:
    """The content of a saved file.

    Args:
        plan: with its pins.
        codes: codes/KEY and bias/KEY, as hawqfx.session.pins.stored_codes has them.
        example: the first samples of the calibration inputs.
        keep_float: patterns of names of weights whose layers stay in float.
        target: the processors that files are made for.
        graph: digest of the float graph.
        network: digest of the lowered graph and its tensors.
        calibrated: the data and the losses.
        trials: what was tried beside the plan.
        facts: what else is known of the sites, and of the file's size, as JSON holds it.
    """

    plan: Plan
    codes: Mapping[str, Tensor]
    example: Batch
    keep_float: tuple[str, ...]
    target: str
    graph: str
    network: str
    calibrated: Calibrated
    trials: Trials
    facts: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            ExportError: if the file cannot be written, or the inputs of the model cannot be saved.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.codes.items()}
        quantizers = dict(self.plan.quantizers)
        for key, quantizer in quantizers.items():
            if quantizer is not None and quantizer.per_channel:
                tensors[f"scale/{key}"] = torch.tensor(quantizer.scale, dtype=torch.float64)
                quantizers[key] = replace(quantizer, scale=())
        tree = {
            "format": FORMAT,
            "plan": replace(self.plan, quantizers=quantizers).to_tree(),
            "example": _stored((self.example.args, dict(self.example.kwargs)), tensors),
            "keep_float": self.keep_float,
            "target": self.target,
            "graph": self.graph,
            "network": self.network,
            "calibrated": vars(self.calibrated),
            "trials": self.trials.to_tree(),
            "facts": self.facts,
        }
        text = json.dumps(plan_json.finite(tree), allow_nan=False)
        content = {KEY: digest(text, sorted(tensors.items())) + text}
        apart = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory
        with whole_file(path) as temporary:
            save_file(apart, temporary, content)


def read(path: Path) -> Saved:
    """The content of a saved file.

    Raises:
        PlanError: if it cannot be read, or is damaged.
    """
    text, tensors = _parts(path)
    checksum, text = text[:DIGITS], text[DIGITS:]
    if not text or checksum != digest(text, sorted(tensors.items())):
        raise PlanError(f"{path} is damaged, or no file of Compiled.save(): write it again")
    try:
        return _content(json.loads(text), tensors)
    except plan_json.DAMAGE as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{path} is damaged ({type(error).__name__}: {error}): write it again") from error


def _parts(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The text and the tensors of a file.

    Raises:
        PlanError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(KEY, ""), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{path} cannot be read, or is no file of Compiled.save(): {error}") from error


def read_plan(source: Plan | str | Path) -> Plan:
    """A plan, or that of a file: of JSON, or of Compiled.save().

    Raises:
        PlanError: if the file cannot be read, or has no plan.
    """
    if isinstance(source, Plan):
        return source
    return read(Path(source)).plan if is_saved(source) else Plan.read(source)


def is_saved(source: str | Path) -> bool:
    """Whether a plan is a file in the format of safetensors, which begins with the length of its header, and JSON.

    Raises:
        PlanError: if the file cannot be read.
    """
    try:
        with Path(source).open("rb") as file:
            first = file.read(9)
    except OSError as error:
        raise PlanError(f"the plan {source} cannot be read: {error}") from error
    return first[8:] == b"{" and b"\0" in first[:8]


def _content(tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Saved:
    if tree["format"] != FORMAT:
        raise PlanError(f"the file has format {tree['format']}, this version reads {FORMAT}: save it again")
    for key, entry in tree["plan"]["sites"].items():
        if f"scale/{key}" in tensors:
            entry["quantizer"]["scale"] = tensors[f"scale/{key}"].tolist()
    args, kwargs = _restored(tree["example"], tensors)
    known = tree["calibrated"]
    return Saved(
        plan=Plan(*plan_json.from_tree(tree["plan"])),
        codes={name: tensor for name, tensor in tensors.items() if name.startswith(("codes/", "bias/"))},
        example=Batch(args, kwargs),
        keep_float=tuple(tree["keep_float"]),
        target=tree["target"],
        graph=tree["graph"],
        network=tree["network"],
        calibrated=Calibrated(known["samples"], known["held"], tuple(known["losses"]), known["loss_reason"]),
        trials=Trials.from_tree(tree["trials"]),
        facts=tree["facts"],
    )


def _stored(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A structure of tensors and plain values as JSON holds it; its tensors are added to `tensors`."""
    if isinstance(value, Tensor):
        name = f"example/{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _stored(entry, tensors) for key, entry in value.items()}}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_stored(entry, tensors) for entry in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise ExportError(f"an input of the model is a {type(value).__name__}, which a saved file cannot hold")


def _restored(tree: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _restored(entry, tensors) for key, entry in content.items()}
    if kind == "value":
        return content
    return {"tuple": tuple, "list": list}[kind](_restored(entry, tensors) for entry in content)
