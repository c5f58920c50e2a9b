"""What a tool gets and gives, in a folder between two processes: a network with its calibration data, and an ONNX file.

The network is JSON (plain_network.py), and tensors are loaded as tensors alone: nothing is unpickled.  This module runs
in the tool's own environment, and imports nothing but torch.
"""

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from others import plain_network
from torch import Tensor, fx, library

Weights = dict[str, tuple[int, int]]  # weight -> its bits, and how many elements it has

_torchvision = library.Library("torchvision", "FRAGMENT")


@dataclass(frozen=True)
class Job:
    """A network to quantize, with activations of 8 bits, into `file`.

    Args:
        model: in eval mode, float32, of torch's own modules.
        inputs: of all calibration samples, without targets, (N, ...).
        weights: the names of those to quantize, all of linear layers and convolutions.
        bytes: that these may take, packed; scales and biases are not counted.
        options: of the tool.
        file: where the network goes, in ONNX; its weights may be floats that have been rounded.
    """

    model: fx.GraphModule
    inputs: Tensor
    weights: list[str]
    bytes: float
    options: dict[str, Any]
    file: Path

    def ask(self) -> None:
        """Write the job beside its file; the options must be JSON.

        Raises:
            TypeError: if the model is not of torch's own modules.
        """
        asked = {
            "model": plain_network.described(self.model), "weights": self.weights, "bytes": self.bytes,
            "options": self.options,
        }  # fmt: skip
        self.file.with_suffix(".asked.json").write_text(json.dumps(asked))
        torch.save({"state": self.model.state_dict(), "inputs": self.inputs}, self.file.with_suffix(".tensors"))

    @staticmethod
    def asked(file: Path) -> "Job":
        """The job that was written beside a file."""
        asked = json.loads(file.with_suffix(".asked.json").read_text())
        tensors = torch.load(file.with_suffix(".tensors"), weights_only=True)
        model = plain_network.built(asked.pop("model"), tensors["state"])
        return Job(model=model, inputs=tensors["inputs"], file=file, **asked)


def serve(quantize: Callable[[Job], Weights]) -> None:
    """Do the job whose file the command line names, and write what came of it."""
    file = Path(sys.argv[1])
    job = Job.asked(file)
    before = _processor_seconds()
    weights = quantize(job)
    found = {"weights": weights, "seconds": _processor_seconds() - before, "MiB": _peak_kib() / 1024}
    file.with_suffix(".json").write_text(json.dumps(found))


def answer(file: Path) -> dict[str, Any]:
    """What `serve` wrote: the weights; seconds of the processor, without imports; the most memory, with everything."""
    return json.loads(file.with_suffix(".json").read_text())


def _processor_seconds() -> float:
    """Of this process and those that it waited for, which other work on the machine does not lengthen."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def prepare_torchvision() -> None:
    """Let torchvision be imported where its own operators do not load: those of the package index are built for torch
    with CUDA.  No network here has any of them."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            _torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
