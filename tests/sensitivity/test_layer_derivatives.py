"""Second derivatives of layers against torch's own, and quadratic forms against products with the whole Hessian."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hawqfx.frontend.capture import capture
from hawqfx.frontend.context import Context
from hawqfx.ir.program import Program
from hawqfx.maths.curvature import Hessian, dot, gradient, hessian_product
from hawqfx.sensitivity.double_backward import for_forms, twice_differentiable
from hawqfx.sensitivity.forward import forward
from hawqfx.sensitivity.layer_derivatives import LAYERS
from tests.nets import Attention, Depthwise, Plain, Residual, SharedLayer, TiedWeights, TokenMlp, build
from tests.tools import after, context

aten = torch.ops.aten
CASES: list[tuple[Any, list[tuple[int, ...]], list[Any]]] = [
    (aten.linear.default, [(4, 3), (5, 3), (5,)], []),
    (aten.linear.default, [(2, 3, 4), (5, 4), (5,)], []),
    (aten.linear.default, [(4,), (5, 4), (5,)], []),
    (aten.linear.default, [(2, 3, 4), (4,), ()], []),
    (aten.conv1d.default, [(2, 4, 7), (8, 4, 3), (8,)], [[2], [1], [2], 1]),
    (aten.conv2d.default, [(2, 4, 7, 7), (8, 4, 3, 3), (8,)], []),
    (aten.conv2d.default, [(2, 4, 7, 7), (8, 2, 3, 3), (8,)], [[2, 1], [1, 0], [1, 1], 2]),
    (aten.conv2d.default, [(2, 4, 7, 7), (8, 1, 3, 3), (8,)], [[1, 1], [1, 1], [1, 1], 4]),
    (aten.conv3d.default, [(2, 4, 7, 7, 7), (8, 4, 3, 3, 3), (8,)], [[1, 1, 1], [1, 1, 0], [1, 2, 1], 1]),
]


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("operator", "shapes", "options"), CASES)
@pytest.mark.parametrize("data", [False, True])
def test_derivatives_are_torchs_own(operator: Any, shapes: list[Any], options: list[Any], data: bool) -> None:
    """First ones and products with the Hessian; data: an input of the network, which is not differentiated."""
    inputs = [drawn(shape, seed).requires_grad_(not (data and seed == 0)) for seed, shape in enumerate(shapes)]
    variables, found = inputs[data:], []
    for function in (operator, LAYERS[operator]):
        y = function(*inputs, *options)
        first = gradient((y**3).sum(), variables)
        vectors = [drawn(tuple(g.shape), 7 + number) for number, g in enumerate(first)]
        found.append([y, *first, *hessian_product(first, variables, vectors)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)  # float64, summed in another order


@pytest.mark.parametrize(("operator", "shapes", "options"), CASES)
@pytest.mark.parametrize("data", [False, True])
def test_a_quadratic_form_is_that_of_torchs_product(
    operator: Any, shapes: list[Any], options: list[Any], data: bool
) -> None:
    x, weight, bias = (drawn(shape, seed) for seed, shape in enumerate(shapes))
    start = x if data else x.clone().requires_grad_()
    weight.requires_grad_()
    scalar = weight.new_zeros((), requires_grad=True)
    stand_in: Any = for_forms(LAYERS, {weight: scalar})[operator]
    blocks = {"weight": [weight]} if data else {"weight": [weight], "x": [start]}
    vectors = {key: [drawn(tuple(t.shape), 7 + len(key)) for t in tensors] for key, tensors in blocks.items()}

    def loss(function: Callable[..., Tensor]) -> Tensor:  # the layer twice, so that its parts are added up
        return (function(start.sin(), weight, bias, *options) * function(start, weight, bias, *options) ** 2).sum()

    variables = [tensor for tensors in blocks.values() for tensor in tensors]
    flat = [v for block in vectors.values() for v in block]
    wanted = hessian_product(gradient(loss(operator), variables), variables, flat)
    found = Hessian(loss(stand_in), blocks, scalars={"weight": scalar}).forms(
        {key: partial(list, block) for key, block in vectors.items()}
    )
    for key, v, product in zip(blocks, flat, wanted, strict=True):
        assert found[key] == pytest.approx(dot(v, product), rel=1e-10)  # float64, summed in another order


class TiedHead(nn.Module):
    """A table that is looked up, and multiplied with at the end; only the second is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(self.table(tokens))).mean(1), self.table.weight)


def products_and_forms(program: Program, work: Context) -> list[dict[tuple[int, str], float]]:
    """Of one vector for every site, by both ways; then of the weights alone, of the first site, and of all again."""
    operators = twice_differentiable(program, work.batches[0])
    found = []
    for forms in (False, True):
        run = forward(program, work.batches[0], operators, forms=forms)
        assert run.forms.keys() == ({site.key for site in program.weights} if forms else set())
        loss = work.loss_of(run.output, work.batches[0], 0)
        hessian = Hessian(loss, run.tensors, scalars=run.forms)
        vectors: dict[str, Callable[[], list[Tensor]]] = {
            key: partial(list, [drawn(tuple(x.shape), 31 * number + place).to(x.dtype) for place, x in enumerate(xs)])
            for number, (key, xs) in enumerate(run.tensors.items())
        }
        weights = {site.key: vectors[site.key] for site in program.weights}
        first = {key: vectors[key] for key in list(vectors)[:1]}
        found.append({
            (ask, key): value
            for ask, wanted in enumerate((vectors, weights, first, vectors))
            for key, value in hessian.forms(wanted).items()
        })  # fmt: skip
    return found


@pytest.mark.parametrize("make", [Plain, Residual, SharedLayer, TiedWeights, Depthwise, Attention, TokenMlp])
def test_forms_of_a_network_are_those_of_its_products(make: Callable[[], nn.Module]) -> None:
    program, work = after("find_sites", make), context()
    products, forms = products_and_forms(program, work)
    scale = max(map(abs, products.values()))
    for key, value in products.items():
        assert forms[key] == pytest.approx(value, rel=1e-4, abs=1e-5 * scale), key  # float32, summed in another order


def test_a_table_that_is_a_layer_too_has_the_parts_of_both() -> None:
    tokens = torch.arange(12).reshape(4, 3) % 6
    work = context([(tokens, torch.tensor([0, 1, 2, 3]))])
    program = capture(build(TiedHead), work.batches[0])
    weight = program.tensor("table.weight").detach().requires_grad_()
    scalar = weight.new_zeros((), dtype=torch.float64, requires_grad=True)
    operators = twice_differentiable(program, work.batches[0])
    vector = drawn(tuple(weight.shape), 3).to(weight.dtype)
    found = []
    for table in (operators, for_forms(operators, {weight: scalar})):
        output = program.run(work.batches[0].args, {}, tensors={"table.weight": weight}, at=(), operators=table)
        loss = work.loss_of(output, work.batches[0], 0)
        scalars = {} if table is operators else {"table": scalar}
        found.append(Hessian(loss, {"table": [weight]}, scalars=scalars).forms({"table": lambda: [vector]})["table"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)  # float32, summed in another order
    assert abs(found[0]) > 1e-3


def test_forms_take_four_products_of_a_layer_and_no_weight_gradient() -> None:
    """What a form saves: of the six products of a layer's Hessian-vector product, the two that lead to the weight."""
    weight, x = drawn((5, 4), 1).requires_grad_(), drawn((3, 4), 0).requires_grad_()
    scalar = weight.new_zeros((), requires_grad=True)
    counts = []
    for table, scalars in ((LAYERS, {}), (for_forms(LAYERS, {weight: scalar}), {"w": scalar})):
        loss = (table[aten.linear.default](x, weight) ** 3).sum()
        hessian = Hessian(loss, {"w": [weight], "x": [x]}, scalars=scalars)
        vectors = {"w": lambda: [weight.detach()], "x": lambda: [x.detach()]}
        with torch.profiler.profile() as profile:
            hessian.forms(vectors)
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::mm"))
    assert counts == [6, 4]
