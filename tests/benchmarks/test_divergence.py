"""Divergences from the float output: against torch's distributions, by hand, and zero where the outputs are equal."""

from collections.abc import Callable

import divergence
import pytest
import torch
import yolox
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

EXACT = 1e-12  # absolute: both sides are float64 sums of at most a few hundred terms near one


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def detections(seed: int) -> Tensor:
    """Of three images with five anchor points, as YOLOX gives them: box, object and 80 classes."""
    raw = normal(3, 5, 85, seed=seed)
    return torch.cat([raw[..., :4], raw[..., 4:].sigmoid()], -1)


@pytest.mark.parametrize("shape", [(6, 10), (4, 7, 10)])
def test_kl_is_the_mean_over_tokens_of_that_of_categorical_distributions(shape: tuple[int, ...]) -> None:
    output, reference = normal(*shape), normal(*shape, seed=1)
    expected = kl_divergence(Categorical(logits=reference.double()), Categorical(logits=output.double()))
    found = divergence.kl_divergence(output, reference)
    torch.testing.assert_close(found, expected.reshape(shape[0], -1).mean(1), atol=EXACT, rtol=0)


def test_bernoulli_is_the_sum_over_events() -> None:
    output, reference = normal(5, 360).sigmoid(), normal(5, 360, seed=1).sigmoid()
    expected = kl_divergence(Bernoulli(probs=reference.double()), Bernoulli(probs=output.double())).sum(1)
    found = divergence.bernoulli_divergence(output, reference)
    # probabilities are kept off 0 and 1 by 1e-6, which moves each of 360 logarithms of at most 5 by about as much
    torch.testing.assert_close(found, expected, atol=360 * 5e-6, rtol=0)


def test_bernoulli_is_finite_where_a_probability_is_rounded_to_zero_or_one() -> None:
    output, reference = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    found = divergence.bernoulli_divergence(output, reference)
    assert bool(torch.isfinite(found).all())
    assert float(found) > 10  # nats: both events were ruled out


def test_distances_by_hand() -> None:
    output, reference = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert divergence.half_squared_distance(output, reference).tolist() == [12.5, 0.0]
    assert divergence.relative_squared_distance(output, reference).tolist() == [1.25, 0.0]  # norms 16 and 4: mean 10


def test_the_distance_of_unit_vectors_is_one_less_cosine() -> None:
    one, other = (torch.nn.functional.normalize(normal(8, 384, seed=seed).double()) for seed in (0, 1))
    found = divergence.half_squared_distance(one, other)
    torch.testing.assert_close(found, 1 - (one * other).sum(1), atol=EXACT, rtol=0)


def test_detections_diverge_by_the_distillation_loss_above_its_least() -> None:
    output, reference = detections(0).double(), detections(1).double()
    found = yolox.divergence(output, reference)
    assert bool((found > 0).all())
    for number in range(3):
        part = slice(number, number + 1)
        excess = yolox.distillation(output[part], reference[part]) - yolox.distillation(
            reference[part], reference[part]
        )
        torch.testing.assert_close(found[number], excess, atol=1e3 * EXACT, rtol=0)  # sums of 5 x 85 terms of up to 14


@pytest.mark.parametrize(
    ("function", "output"),
    [
        (divergence.kl_divergence, normal(4, 10)),
        (divergence.kl_divergence, normal(4, 7, 10)),
        (divergence.bernoulli_divergence, normal(4, 360).sigmoid()),
        (divergence.half_squared_distance, normal(4, 384)),
        (divergence.relative_squared_distance, normal(4, 20, 384)),
        (yolox.divergence, detections(0)),
    ],
)
def test_equal_outputs_do_not_diverge(function: Callable[[Tensor, Tensor], Tensor], output: Tensor) -> None:
    found = function(output, output.clone())
    assert found.dtype == torch.float64
    assert found.tolist() == [0.0] * len(output)
