"""Learned quantizers begin as the quantizers that they are made of, and their gradients pass through the rounding."""

import pytest
import torch

from hawqfx.maths.learned import LearnedActivation, LearnedWeight, chosen, round_through


def weight() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (4, 5), codes of 3 bits that are not all the nearest, and a scale per row."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(4, 5, generator=random)
    scale = values.abs().amax(1, keepdim=True) / 3
    codes = ((values / scale).round() + torch.randint(-1, 2, values.shape, generator=random)).clamp(-4, 3)
    return values, codes, scale


def test_a_weight_begins_with_its_codes() -> None:
    values, codes, scale = weight()
    learned = LearnedWeight(values, codes.to(torch.int8), scale, -4, 3)
    assert torch.equal(learned.codes.detach(), codes)
    torch.testing.assert_close(learned().detach(), codes * scale, rtol=1e-6, atol=0)  # exp(log(s)) in float32


def test_a_code_moves_once_the_offset_is_half_of_one() -> None:
    values, codes, scale = weight()
    learned = LearnedWeight(values, codes.to(torch.int8), scale, -8, 7)
    with torch.no_grad():
        learned.offset.add_(torch.tensor([0.49, -0.49, 0.51, -0.51, 0.0]))
    assert torch.equal(learned.codes.detach(), codes + torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0]))


def test_a_scale_keeps_its_sign() -> None:
    values, codes, scale = weight()
    learned = LearnedWeight(values, codes.to(torch.int8), -scale, -8, 7)
    torch.testing.assert_close(learned(), codes * -scale)
    with torch.no_grad():
        learned.log_scale.add_(1.0)
    torch.testing.assert_close(learned.scale.detach(), -scale * torch.e)


def test_codes_stay_in_their_range() -> None:
    values, codes, scale = weight()
    learned = LearnedWeight(values, codes.to(torch.int8), scale, -4, 3)
    with torch.no_grad():
        learned.offset.add_(torch.tensor([100.0, -100.0, 0.3, -7.0, 2.0]))
    assert float(learned.codes.min()) == -4
    assert float(learned.codes.max()) == 3
    assert torch.equal(learned.codes, learned.codes.round())


def test_gradients_pass_through_the_rounding() -> None:
    x = torch.tensor([0.2, 1.7, -2.5], requires_grad=True)
    round_through(x).square().sum().backward()
    assert round_through(x).tolist() == [0.0, 2.0, -2.0]  # half to even
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 4.0, -4.0]


def test_the_range_of_an_activation_ends_at_its_ceiling() -> None:
    quantizer = LearnedActivation(0.02, 0, 255, ceiling=6.0)
    with torch.no_grad():
        quantizer.log_scale.fill_(0.0)
    assert float(quantizer(torch.tensor([100.0]))) == pytest.approx(6.0, rel=1e-6)


def test_the_scale_of_an_activation_has_the_gradient_of_lsq() -> None:
    """d/ds of s clip(round(x / s)) is round(x / s) - x / s within the range, and the end of the range beyond (Esser et
    al. 2020, equation 3); by the logarithm of s, s times as much."""
    x, scale = torch.tensor([-0.3, 0.34, 1.9, 10.0]), 0.5
    for value in x.tolist():
        quantizer = LearnedActivation(scale, 0, 3)
        quantizer(torch.tensor([value])).sum().backward()
        ratio = value / scale
        wanted = 0.0 if ratio < 0 else 3.0 if ratio > 3 else round(ratio) - ratio
        assert quantizer.log_scale.grad is not None
        torch.testing.assert_close(float(quantizer.log_scale.grad), scale * wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", [0.0, 0.25, 0.5, 1.0])
def test_so_many_elements_are_chosen_independently(part: float) -> None:
    drawn = chosen(torch.Size((300, 333)), part, torch.Generator().manual_seed(0)).double()
    n = drawn.numel()  # 99,900: a mean within 4 standard errors of sqrt(part (1 - part) / n)
    assert abs(float(drawn.mean()) - part) <= 4 * (part * (1 - part) / n) ** 0.5
    flat = drawn.flatten() - part
    for lag in (1, 7, 8):  # bytes of the same word and of the next
        assert abs(float((flat[:-lag] * flat[lag:]).mean())) <= 4 * part * (1 - part) / n**0.5
