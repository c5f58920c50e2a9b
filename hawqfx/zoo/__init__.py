"""A trained network and real images to try hawqfx on: ResNet-20 on Fashion-MNIST.

The images are a sample of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; copyright Zalando SE, MIT licence, see
FASHION_MNIST_LICENSE beside this file): 512 training images for calibration and 2,000 test images.  The weights were
trained by benchmarks/train_resnet20.py.
"""

from importlib import resources

from safetensors.torch import load
from torch import Tensor

from hawqfx.zoo.resnet import ResNet20

MEAN, STD = 0.2860, 0.3530  # of the pixels of the 60,000 training images, on a scale from 0 to 1
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def resnet20() -> ResNet20:
    """The trained network in eval mode.

    Returns:
        A module that takes images (N, 1, 28, 28) from `standardise`, and returns logits (N, 10).

    Raises:
        RuntimeError: if the weights beside this file do not fit the network.
    """
    model = ResNet20()
    missing, unexpected = model.load_state_dict(_read("resnet20_fashion_mnist.safetensors"), strict=False)
    if unexpected or any("num_batches_tracked" not in name for name in missing):
        raise RuntimeError(f"the weights do not fit the network: missing {missing}, unexpected {unexpected}")
    return model.eval()


def calibration(batch: int = 128) -> list[tuple[Tensor, Tensor]]:
    """Training data for calibration.

    Args:
        batch: images in a batch.

    Returns:
        Batches of images (N, 1, 28, 28) float32, standardised, and labels (N,) int64; 512 images in all.
    """
    return _batches("calibration", batch)


def evaluation(batch: int = 500) -> list[tuple[Tensor, Tensor]]:
    """Test data.

    Args:
        batch: images in a batch.

    Returns:
        Batches of images (N, 1, 28, 28) float32, standardised, and labels (N,) int64; 2,000 of the 10,000 test images.
    """
    return _batches("test", batch)


def standardise(images: Tensor) -> Tensor:
    """Raw images (N, 28, 28) uint8 -> inputs of the network (N, 1, 28, 28) float32, with mean 0 and deviation 1."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


def _batches(split: str, batch: int) -> list[tuple[Tensor, Tensor]]:
    sample = _read("fashion_mnist_sample.safetensors")
    images, labels = standardise(sample[f"{split}_images"]), sample[f"{split}_labels"].long()
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def _read(name: str) -> dict[str, Tensor]:
    return load(resources.files(__package__).joinpath(name).read_bytes())
