"""Hessian-vector products, Hutchinson's estimate of the trace of Hessian blocks, and power iteration.

For a loss L of tensors x_1 ... x_k with Hessian blocks H_ij and Rademacher probes z_i (entries -1 or +1, independent),

    E[ z_i^T (H z)_i ] = sum_j E[ z_i^T H_ij z_j ] = Tr(H_ii),

since E[z_i z_i^T] is the identity and E[z_i z_j^T] is zero.  So one product H z over all tensors gives an unbiased
estimate of the trace of every diagonal block at once; the other blocks only add variance:

    Var = 2 (||H_ii||_F^2 - sum of squared diagonal entries) + sum_{j != i} ||H_ij||_F^2.

The same holds for any vectors d_i under independent random signs s_i:  E[ s_i d_i^T (H (s d))_i ] = d_i^T H_ii d_i.

Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990); Dong et al., "HAWQ-V2" (NeurIPS
2020), section 3.1, for the use per layer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# returns the vector of a block, a tensor for each tensor of the block
Vectors = Callable[[], Sequence[Tensor]]

_ROW = 4096  # elements of a row: a dot product sums a row in the tensor's type, and the rows in float64


def gradient(loss: Tensor, inputs: Sequence[Tensor], *, again: bool = True) -> tuple[Tensor, ...]:
    """The gradient of a loss; the graph of the loss is kept.

    Args:
        loss: a scalar.
        inputs: the tensors to differentiate by.
        again: whether the gradient will be differentiated once more.

    Returns:
        dL/dx in the shape of every input x; zeros for inputs that the loss does not depend on.
    """
    return torch.autograd.grad(loss, inputs, retain_graph=True, create_graph=again, materialize_grads=True)


def hessian_product(
    gradients: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """One product of the Hessian with a vector, by reverse over reverse mode.

    Args:
        gradients: from `gradient`, in the order of `inputs`; their graph is kept for further products.
        inputs: the tensors x_i.
        vectors: v_i, in the shapes of the inputs.

    Returns:
        sum_j H_ij v_j for every input i, in its shape.
    """
    used = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g.requires_grad]
    if not used:  # the loss is linear in every input
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(
        [g for g, _ in used], inputs, [v for _, v in used], retain_graph=True, materialize_grads=True
    )


def rademacher(like: Tensor, random: torch.Generator) -> Tensor:
    """Independent entries -1 or +1, in the shape of `like`."""
    words = torch.empty(-(-like.numel() // 64), dtype=torch.int64, device=like.device)
    octets = words.random_(-(2**63), None, generator=random).view(torch.uint8)  # 64 signs per draw
    signs = F.embedding(octets.int(), _signs_of_octets(like))
    return signs.reshape(-1)[: like.numel()].reshape(like.shape)


def _signs_of_octets(like: Tensor) -> Tensor:
    """(256, 8): the eight signs of every octet."""
    shifts = torch.arange(8, device=like.device)
    bits = torch.arange(256, device=like.device)[:, None].bitwise_right_shift(shifts) & 1
    return (2 * bits - 1).to(like.dtype)


def dot(x: Tensor, y: Tensor) -> float:
    """<x, y> over all elements of two tensors with the same number of elements."""
    x, y = x.detach().reshape(-1), y.detach().reshape(-1)
    whole = len(x) // _ROW * _ROW
    rows = torch.linalg.vecdot(x[:whole].reshape(-1, _ROW), y[:whole].reshape(-1, _ROW))
    rest = torch.linalg.vecdot(x[whole:], y[whole:])
    return float(rows.sum(dtype=torch.float64) + rest.double())


def is_finite(x: Tensor) -> bool:
    """Whether every element is finite."""
    # A sum is ten times faster than a check of every element, and it is not finite if an element is not.
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


class Hessian:
    """The Hessian of a loss by blocks of tensors, for any number of products with it.

    It holds the graph of the gradient, but no gradient, vector or product.  A vector is made when the backward pass
    comes to its block, and made again when the product of the block is known; both are freed at once.  For the
    activations of a network, they would take more memory than everything else.

    Args:
        loss: a scalar.
        blocks: name of a block -> its tensors.
        look: is called with every block and the gradients of its tensors once, in the order of `blocks`.
        scalars: block -> a scalar whose derivative in the backward pass of a product is the part of the block's
            quadratic form that operators compute themselves (hawqfx.sensitivity.layer_derivatives); other operators
            lead to the block's tensors as ever, and their part is added.
    """

    def __init__(
        self,
        loss: Tensor,
        blocks: Mapping[str, Sequence[Tensor]],
        look: Callable[[str, Sequence[Tensor]], None] = lambda key, gradients: None,
        scalars: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.blocks = {key: list(tensors) for key, tensors in blocks.items()}
        self.vectors, self.scalars = _Current(), scalars
        self.leaves = [x for tensors in self.blocks.values() for x in tensors if x.is_leaf]
        gradients = list(gradient(loss, [x for tensors in self.blocks.values() for x in tensors]))[::-1]
        self.roots: dict[str, list[Tensor]] = {}
        for key, tensors in self.blocks.items():
            own = [gradients.pop() for _ in tensors]
            look(key, [g.detach() for g in own])
            # a gradient without a graph is that of a loss which is linear here
            parts = [(g, number) for number, g in enumerate(own) if g.requires_grad]
            self.roots[key] = [_Pairing.apply(g, self.vectors, key, number) for g, number in parts]  # type: ignore[no-untyped-call]

    def forms(self, vectors: "Mapping[str, Vectors]") -> dict[str, float]:
        """v_i^T (H v)_i for every block i of `vectors`, from one product; v is zero in the other blocks.

        Args:
            vectors: block -> a function that returns its vector, a tensor for each tensor of the block.  It is called
                twice and must return the same values.

        Returns:
            Block -> its quadratic form.
        """
        self.vectors.by_block = vectors
        forms = dict.fromkeys(vectors, 0.0)
        hooks = []
        for key in vectors:
            for number, tensor in enumerate(self.blocks[key]):
                hooks.append(tensor.register_hook(partial(self._add_product, forms, key, number)))
        scalars = {key: self.scalars[key] for key in vectors if key in self.scalars}
        try:
            inner = any(not tensor.is_leaf for key in vectors for tensor in self.blocks[key])
            # The backward pass meets an inner tensor only on its way to leaves, and these leaves are not known here.
            ends = list(self.leaves) if inner else [tensor for key in vectors for tensor in self.blocks[key]]
            roots = [root for key in vectors for root in self.roots[key]]
            if roots and ends:
                ones = [torch.ones_like(root) for root in roots]
                ends = [*scalars.values(), *ends]
                found = torch.autograd.grad(roots, ends, ones, retain_graph=True, allow_unused=True)
                for key, part in zip(scalars, found, strict=False):
                    forms[key] += 0.0 if part is None else float(part)
        finally:
            self.vectors.by_block = {}
            for hook in hooks:
                hook.remove()
        return forms

    def _add_product(self, forms: dict[str, float], key: str, number: int, product: Tensor | None) -> None:
        if product is not None:  # None: the scalar has all of it
            forms[key] += dot(self.vectors.by_block[key]()[number], product)


class _Current:
    """The vectors of the product that is computed now.

    The graph refers to this object and not to the Hessian, which holds the graph: a circle would keep both alive.
    """

    by_block: "Mapping[str, Vectors]" = MappingProxyType({})


class _Pairing(torch.autograd.Function):
    """<g, v> for a vector v that is made only in the backward pass; the value itself is a zero that nothing uses."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, vectors: _Current, key: str, number: int) -> Tensor:
        ctx.vectors, ctx.key, ctx.number = vectors, key, number
        return gradient.new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        return ctx.vectors.by_block[ctx.key]()[ctx.number], None, None, None


def top_eigenvalues(
    gradients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    start: Sequence[Tensor],
    axes: Sequence[int],
    blocks: int,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """The eigenvalue of largest magnitude of every diagonal block of a block-diagonal Hessian, by power iteration.

    Block k belongs to the k-th equal part of every input along its axis.  The iteration works on all blocks at once.

    Args:
        gradients: from `gradient`, in the order of `inputs`.
        inputs: the tensors.
        start: the first vectors, in the shapes of the inputs.
        axes: for each input, the dimension that consists of the blocks.
        blocks: the number of blocks.
        iterations: the largest number of Hessian-vector products.
        tolerance: the iteration stops when no Rayleigh quotient changes by more than this fraction of itself.

    Returns:
        (blocks,) in float64.
    """
    vectors = list(start)
    eigenvalues = torch.zeros(blocks, dtype=torch.float64, device=inputs[0].device)
    for _ in range(iterations):
        norms = _block_dots(vectors, vectors, axes, blocks).sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0.0)  # a block that is zero stays zero
        vectors = [v * _spread(inverse, v, axis) for v, axis in zip(vectors, axes, strict=True)]
        products = hessian_product(gradients, inputs, vectors)
        before, eigenvalues = eigenvalues, _block_dots(vectors, products, axes, blocks)
        if bool(((eigenvalues - before).abs() <= tolerance * eigenvalues.abs()).all()):
            break
        vectors = list(products)
    return eigenvalues


def _block_dots(xs: Sequence[Tensor], ys: Sequence[Tensor], axes: Sequence[int], blocks: int) -> Tensor:
    """(blocks,) in float64: <x, y> within every block."""
    products = [(x.double() * y).movedim(axis, 0).reshape(blocks, -1) for x, y, axis in zip(xs, ys, axes, strict=True)]
    return torch.stack([product.sum(1) for product in products]).sum(0)


def _spread(per_block: Tensor, like: Tensor, axis: int) -> Tensor:
    """A factor per block (blocks,), in a shape that broadcasts over `like`."""
    values = per_block.to(like.dtype).repeat_interleave(like.shape[axis] // len(per_block))
    return values.reshape(-1, *[1] * (like.ndim - 1 - axis))


class Moments(NamedTuple):
    """Independent samples of a quantity.

    Args:
        samples: their number.
        mean: their mean.
        squares: the sum of squared deviations from the mean.
    """

    samples: int
    mean: float
    squares: float

    @staticmethod
    def of(samples: Sequence[float]) -> "Moments":
        """The moments of at least one sample."""
        mean = math.fsum(samples) / len(samples)
        return Moments(len(samples), mean, math.fsum((sample - mean) ** 2 for sample in samples))

    @property
    def variance(self) -> float:
        """The variance of the mean, s^2 / n; infinite for a single sample."""
        return self.squares / (self.samples - 1) / self.samples if self.samples > 1 else math.inf


def pooled(parts: Sequence[Moments], shares: Sequence[float], *, exact: bool = False) -> tuple[float, float]:
    """The mean of sum_b share_b X_b and its standard error, from independent samples of every X_b.

    Args:
        parts: the samples of every X_b.
        shares: the weight of every X_b.
        exact: whether a sample of X_b is its true value; the standard error is zero then.
    """
    mean = math.fsum(share * part.mean for share, part in zip(shares, parts, strict=True))
    if exact:
        return mean, 0.0
    variance = math.fsum(share**2 * part.variance for share, part in zip(shares, parts, strict=True))
    return mean, math.sqrt(variance)


def spread(parts: Sequence[Moments], shares: Sequence[float]) -> tuple[float, float]:
    """The mean of sum_b share_b X_b and its standard error over all that the X_b are samples of, by their spread.

    With weights w of sum 1, the mean m has the variance sum w^2 (x - m)^2 n / (n - 1); that of a single X is its own.

    Args:
        parts: the samples of every X_b.
        shares: the weight of every X_b; their sum is 1.
    """
    mean = math.fsum(share * part.mean for share, part in zip(shares, parts, strict=True))
    if len(parts) == 1:
        return mean, math.sqrt(parts[0].variance)
    squares = math.fsum((share * (part.mean - mean)) ** 2 for share, part in zip(shares, parts, strict=True))
    return mean, math.sqrt(squares * len(parts) / (len(parts) - 1))
