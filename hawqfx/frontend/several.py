"""The criterion of several outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hawqfx.frontend.criteria import Criterion
from hawqfx.frontend.outputs import Key, entries, targets_by_output


@dataclass(frozen=True)
class Part:
    """One of several outputs.

    Args:
        key: its number in a tuple, or its name in a mapping.
        criterion: of this output alone.
        scale: what its loss is multiplied by, so that the losses of all outputs can be added.
    """

    key: Key
    criterion: Criterion
    scale: float = 1.0


@dataclass(frozen=True)
class DrawnOutputs:
    """Drawn targets of several outputs.

    If L_k is the mean over c_k draws, the gradient of sum_k sqrt(s_k c_k) L_k has the second moment
    sum_k s_k c_k E[g_k g_k^T], because draws are independent and of mean slope zero: the Gauss-Newton matrix of
    sum_k s_k L_k, from a single draw.

    Args:
        targets: by key.
        weights: sqrt(s_k c_k) by key.
    """

    targets: Mapping[Key, Any]
    weights: Mapping[Key, float]


@dataclass(frozen=True)
class Several(Criterion):
    """The sum of the scaled losses of several outputs in a tuple, list or mapping.

    Args:
        parts: the outputs that count.
        keys: those of all outputs.
    """

    parts: tuple[Part, ...]
    keys: tuple[Key, ...]

    def mean(self, output: Any, target: Any) -> Tensor:
        drawn = isinstance(target, DrawnOutputs)
        weights = target.weights if drawn else {part.key: part.scale for part in self.parts}
        targets = target.targets if drawn else self._targets(target)
        found = entries(output)
        terms = [weights[part.key] * part.criterion.mean(found[part.key], targets[part.key]) for part in self.parts]
        return torch.stack(terms).sum()

    def values(self, output: Any, target: Any, samples: int) -> Tensor:
        targets, found = self._targets(target), entries(output)
        terms = [part.scale * part.criterion.values(found[part.key], targets[part.key], samples) for part in self.parts]
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def expectation(self, output: Any, target: Any = None) -> dict[Key, Any]:
        targets, found = self._targets(target), entries(output)
        return {part.key: part.criterion.expectation(found[part.key], targets[part.key]) for part in self.parts}

    def complete(self, output: Any, target: Any) -> dict[Key, Any]:
        targets, found = self._targets(target), entries(output)
        return {part.key: part.criterion.complete(found[part.key], targets[part.key]) for part in self.parts}

    def draw(self, output: Any, random: torch.Generator, target: Any = None) -> DrawnOutputs:
        given, found = self._targets(target), entries(output)
        targets = {part.key: part.criterion.draw(found[part.key], random, given[part.key]) for part in self.parts}
        counts = {part.key: part.criterion.draws(targets[part.key]) or 1 for part in self.parts}
        return DrawnOutputs(targets, {part.key: (part.scale * counts[part.key]) ** 0.5 for part in self.parts})

    def draws(self, target: Any) -> int:
        return 1

    def _targets(self, target: Any) -> Mapping[Key, Any]:
        return targets_by_output(target, self.keys, [part.key for part in self.parts])
