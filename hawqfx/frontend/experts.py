"""Mixtures of experts of transformers, captured densely.

transformers sends each token to the experts that were chosen for it, so that sizes depend on values, and keeps the
weights of all experts in one table.  Here every expert computes every token, and what it says counts by its weight,
which is zero where it was not chosen:

    y = sum over e of w_e(x) down_e(act(up_e(x)))

The outputs are equal but for the order of float sums, and each expert is two linear layers with integer kernels, at the
price of E / k times the multiplications where k of E experts are chosen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def dense_experts(model: nn.Module) -> Iterator[None]:
    """A context in which the experts of a model compute all tokens; the model is the same again after it."""
    experts: list[Any] = [module for module in model.modules() if _has_table(module)]
    for module in experts:
        module.forward = partial(_dense, module)
    try:
        yield
    finally:
        for module in experts:
            del module.forward


def _has_table(module: Any) -> bool:
    """Whether a module is one whose computation transformers lets users choose (use_experts_implementation)."""
    config = getattr(module, "config", None)
    return hasattr(config, "_experts_implementation") and all(
        hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "down_proj", "_apply_gate")
    )


def _dense(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The output of all experts.

    Args:
        module: the experts.
        hidden_states: tokens (T, H).
        top_k_index: numbers (T, k) of the experts that are chosen for each token.
        top_k_weights: their weights (T, k).
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    total: Any = 0
    for number in range(module.down_proj.shape[0]):
        inner = _linear(module, up, number, hidden_states)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        made = _linear(module, "down_proj", number, inner)
        if getattr(module, "has_post_expert_norm", False):
            made = module.post_expert_norm(made)
        share = (top_k_weights * (top_k_index == number)).sum(-1, keepdim=True)
        total = total + made * share.to(made.dtype)
    return total


def _linear(module: Any, name: str, number: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[number]
    bias = getattr(module, f"{name}_bias")[number] if module.has_bias else None
    return F.linear(x, weight.T if module.is_transposed else weight, bias)
