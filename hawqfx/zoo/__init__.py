"""A trained network and real images to try hawqfx on: ResNet-20 on Fashion-MNIST.

The images are a sample of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; copyright Zalando SE, MIT licence, see
FASHION_MNIST_LICENSE beside this file): 512 training images for calibration and 2,000 test images.  The weights were
trained by benchmarks/train_resnet20.py.
"""

from importlib import resources

from safetensors.torch import load
from torch import Tensor

from hawqfx.zoo.resnet import ResNet20

MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, on a scale of 0 to 1
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def resnet20() -> ResNet20:
    """The trained network, in eval mode: images (N, 1, 28, 28) from `standardise` to logits (N, 10)."""
    model = ResNet20()
    missing, unexpected = model.load_state_dict(_read("resnet20_fashion_mnist.safetensors"), strict=False)
    if unexpected or any("num_batches_tracked" not in name for name in missing):
        raise RuntimeError(f"the weights do not fit the network: missing {missing}, unexpected {unexpected}")
    return model.eval()


def calibration(batch: int = 128) -> list[tuple[Tensor, Tensor]]:
    """512 training images and labels, in batches ready for the network."""
    return _batches("calibration", batch)


def evaluation(batch: int = 500) -> list[tuple[Tensor, Tensor]]:
    """2,000 of the 10,000 test images and labels, in batches ready for the network."""
    return _batches("test", batch)


def standardise(images: Tensor) -> Tensor:
    """Raw images (N, 28, 28) uint8 -> network input (N, 1, 28, 28) float32."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)


def _batches(split: str, batch: int) -> list[tuple[Tensor, Tensor]]:
    sample = _read("fashion_mnist_sample.safetensors")
    images, labels = standardise(sample[f"{split}_images"]), sample[f"{split}_labels"].long()
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def _read(name: str) -> dict[str, Tensor]:
    return load(resources.files(__package__).joinpath(name).read_bytes())
