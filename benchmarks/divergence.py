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
    """Of independent events with probabilities (N, ...), the sum over the events; nats."""
    output, float_output = output.double(), float_output.double()
    each = binary_cross_entropy(output, float_output) - binary_cross_entropy(float_output, float_output)
    return each.flatten(1).sum(1)


def binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Of probabilities and soft labels, element by element.

    Both are kept off 0 and 1 by as much as makes second derivatives safe in float32; so a network that rules out what
    the float network does not gets a large number, and not infinity.
    """
    tiny = 1e-6
    p, q = (tiny + (1 - 2 * tiny) * value for value in (output, target))
    return -(q * p.log() + (1 - q) * (1 - p).log())


def half_squared_distance(output: Tensor, float_output: Tensor) -> Tensor:
    """Of embeddings (N, ...): the KL divergence of Gaussians of variance one; 1 - cosine for vectors of length one."""
    return 0.5 * (output.double() - float_output.double()).flatten(1).square().sum(1)


def relative_squared_distance(output: Tensor, float_output: Tensor) -> Tensor:
    """Half the squared distance of embeddings (N, ...), in units of the float embeddings' mean squared norm over N."""
    return half_squared_distance(output, float_output) / float_output.double().flatten(1).square().sum(1).mean()
