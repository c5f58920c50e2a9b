"""Exported files as networks that are called."""

from pathlib import Path

import torch
from torch import Tensor

from hawqfx.runtime import ort


class Deployed:
    """A file in onnxruntime, called as the network that it was made of."""

    def __init__(self, path: Path) -> None:
        self.session = ort.session(path)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        names = [value.name for value in self.session.get_inputs()]
        values = [kwargs[name] for name in names] if kwargs else args
        return torch.from_numpy(ort.run(self.session, [value.numpy() for value in values])[0])
