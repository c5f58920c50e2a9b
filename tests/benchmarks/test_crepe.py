"""CREPE's form, and that its loss is the negative logarithm of the distribution that its targets are drawn from."""

import crepe
import torch


def test_frames_go_to_probabilities() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        output = crepe.CrepeTiny().eval()(torch.randn(2, 1024))
    assert output.shape == (2, crepe.PITCHES)
    assert bool(((output > 0) & (output < 1)).all())


def test_the_expected_loss_of_drawn_targets_is_that_of_the_probabilities() -> None:
    random = torch.Generator().manual_seed(0)
    target, output = torch.rand(4, 20, generator=random), torch.rand(4, 20, generator=random)
    losses = torch.stack([crepe.loss(output, crepe.drawn(target, random)) for _ in range(4000)])
    expected = crepe.loss(output, target)
    assert abs(losses.mean() - expected) < 4 * losses.std() / 4000**0.5  # four standard errors of the mean of the draws
