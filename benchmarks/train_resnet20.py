"""Train the ResNet-20 that hawqfx.zoo ships: Fashion-MNIST, random crops and flips, SGD with a one-cycle schedule.

    python benchmarks/train_resnet20.py --epochs 30 --out resnet20.safetensors

A checkpoint is written after every epoch, and a run that was stopped goes on from it.  On a CPU with bfloat16
instructions an epoch takes about half a minute on two cores.  The weights of the last epoch are kept: nothing is
selected on the test images.
"""

import argparse
import time
from pathlib import Path

import torch
from data import fashion_mnist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hawqfx.zoo import standardise
from hawqfx.zoo.resnet import ResNet20


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image (N, 1, H, W) by up to two pixels, and flip half of them left to right."""
    n, _, height, width = images.shape
    background = images.min()
    padded = F.pad(images[:, 0], (2, 2, 2, 2), value=float(background))
    shift = torch.randint(0, 5, (2, n, 1), generator=generator)
    rows, columns = shift[0] + torch.arange(height), shift[1] + torch.arange(width)
    flipped = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return right / len(labels)


def train(epochs: int, batch: int, learning_rate: float, seed: int, device: str, checkpoint: Path) -> nn.Module:
    images, labels = fashion_mnist("train")
    test_images, test_labels = fashion_mnist("t10k")
    images, test_images = standardise(images), standardise(test_images).to(device)
    test_labels = test_labels.to(device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = ResNet20().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        start, total = time.perf_counter(), 0.0
        model.train()
        for chosen in torch.randperm(len(images), generator=generator)[: steps * batch].split(batch):
            x = augment(images[chosen], generator).to(device, memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16):
                loss = F.cross_entropy(model(x), labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        score = accuracy(model, test_images, test_labels)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{epochs}  loss {total / steps:.4f}  test {score:.4f}  {seconds:.0f} s", flush=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save(state | {"generator": generator.get_state(), "epoch": epoch + 1}, checkpoint)
    return model.cpu().eval()


def sample(count: int, split: str, seed: int) -> dict[str, Tensor]:
    """`count` images of a split, the same number of each class, in random order."""
    images, labels = fashion_mnist(split)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = int(labels.max()) + 1
    share = [count // classes + (label < count % classes) for label in range(classes)]
    chosen = torch.cat([order[labels[order] == label][: share[label]] for label in range(classes)])
    chosen = chosen[torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1))]
    name = {"train": "calibration", "t10k": "test"}[split]
    return {f"{name}_images": images[chosen], f"{name}_labels": labels[chosen].to(torch.uint8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("resnet20.safetensors"))
    parser.add_argument("--sample", type=Path, help="write the sample of images that hawqfx.zoo ships here, and stop")
    args = parser.parse_args()
    if args.sample:
        save_file(sample(512, "train", args.seed) | sample(2000, "t10k", args.seed), args.sample)
        return
    model = train(args.epochs, args.batch, args.learning_rate, args.seed, args.device, args.out.with_suffix(".ckpt"))
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if "num_batches" not in name}
    save_file(weights, args.out)


if __name__ == "__main__":
    main()
