"""Hessian-vector products and Hutchinson's estimate of the trace of Hessian blocks.

For a loss L of tensors x_1 ... x_k with Hessian blocks H_ij and Rademacher probes z_i (entries -1 or +1, independent),

    E[ z_i^T (H z)_i ] = sum_j E[ z_i^T H_ij z_j ] = Tr(H_ii),

since E[z_i z_i^T] is the identity and E[z_i z_j^T] is zero.  So one product H z over all tensors gives an unbiased
estimate of the trace of every diagonal block at once; the other blocks only add variance:

    Var = 2 (||H_ii||_F^2 - sum of squared diagonal entries) + sum_{j != i} ||H_ij||_F^2.

Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990); Dong et al., "HAWQ-V2" (NeurIPS
2020), section 3.1, for the use per layer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gradient(loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """dL/dx for every x, ready to be differentiated again; zeros where L does not depend on x."""
    return torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)


def rademacher(like: Tensor, random: torch.Generator) -> Tensor:
    """Independent entries -1 or +1, in the shape of `like`."""
    coins = torch.randint(0, 2, like.shape, generator=random, device=like.device, dtype=torch.int8)
    return coins.to(like.dtype).mul_(2).sub_(1)


def trace_samples(
    gradients: Sequence[Tensor], inputs: Sequence[Tensor], random: torch.Generator, *, last: bool
) -> list[float]:
    """One unbiased sample of Tr(H_ii) for every input, from one Hessian-vector product (reverse over reverse).

    `gradients` come from `gradient`; their graph is kept for further probes unless this is the `last`.
    """
    probes = [rademacher(x, random) for x in inputs]
    differentiable = [(g, z) for g, z in zip(gradients, probes, strict=True) if g.requires_grad]
    if not differentiable:  # the loss is linear in every input
        return [0.0] * len(inputs)
    products = torch.autograd.grad(
        [g for g, _ in differentiable],
        inputs,
        [z for _, z in differentiable],
        retain_graph=not last,
        materialize_grads=True,
    )
    return [float((z * hz).sum(dtype=torch.float64)) for z, hz in zip(probes, products, strict=True)]


def mean_and_stderr(samples: Sequence[float]) -> tuple[float, float]:
    """The mean of independent samples and its standard error, sqrt(s^2 / n); infinite for a single sample."""
    n = len(samples)
    mean = math.fsum(samples) / n
    if n == 1:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((sample - mean) ** 2 for sample in samples) / (n - 1) / n)
