"""How far a network's answers are from those of the float network, sample by sample.

Where the answer is a distribution, or the loss is the negative logarithm of one, that is the Kullback-Leibler
divergence of the network's distribution from the float network's, in nats.  Each function takes the two outputs and
returns (N,) float64, zero where they are equal and nowhere negative but for rounding.
"""

from torch import Tensor


def kl_divergence(output: Tensor, float_output: Tensor) -> Tensor:
    """Of the classes in the last dimension of logits (N, ..., classes), the mean over the dimensions between; nats."""
    p, q = (logits.double().log_softmax(-1) for logits in (float_output, output))
    return (p.exp() * (p - q)).sum(-1).reshape(len(output), -1).mean(1)


def bernoulli_divergence(output: Tensor, float_output: Tensor) -> Tensor:
    """Of independent events with probabilities (N, ...), the sum over the events; nats.

    A probability that is 0 or 1 in float32 is taken as the least or the greatest that float32 tells from these, so that
    a network that rules out what the float network does not gets a large number, and not infinity.
    """
    tiny = 2.0**-24  # 1 - 2^-24 is the greatest float32 below 1
    p, q = (probability.double().clamp(tiny, 1 - tiny) for probability in (float_output, output))
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return each.reshape(len(output), -1).sum(1)


def half_squared_distance(output: Tensor, float_output: Tensor) -> Tensor:
    """Of embeddings (N, ...): the KL divergence of Gaussians of variance one; 1 - cosine for vectors of length one."""
    return 0.5 * (output.double() - float_output.double()).flatten(1).square().sum(1)


def relative_squared_distance(output: Tensor, float_output: Tensor) -> Tensor:
    """Half the squared distance of embeddings (N, ...), in units of the float embeddings' mean squared norm over N."""
    return half_squared_distance(output, float_output) / float_output.double().flatten(1).square().sum(1).mean()
