"""Trained networks with real data, that benchmarks compress and score.

The weights and pictures are fetched when first asked for; see data.py.  All but `resnet20` need the extra `bench`.
The data that calibrate are disjoint from those that are scored, and from those that are held out, on which networks
are compared by how far each answer is from the float network's (divergence.py).
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import data
import divergence
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hawqfx import zoo
from hawqfx.frontend.losses import cross_entropy, squared_error


@dataclass(frozen=True)
class Subject:
    """A trained network with real data."""

    name: str
    model: nn.Module  # in eval mode, float32
    calibration: list[Any]  # inputs, a tensor or a dict of keyword inputs; or pairs (inputs, target)
    loss: Callable[[Any, Any], Tensor]  # (output, target) -> mean over the batch
    metric: str
    score: Callable[[Callable[..., Any]], float]  # of the network, or of what is called as it is; higher is better
    samples: int  # that are scored
    held_out: list[Any]  # batches of inputs that do not calibrate
    divergence: Callable[[Tensor, Tensor], Tensor]  # (output, float output) -> (N,) float64, zero where they are equal
    draw: Callable[[Any, torch.Generator], Any] | None = None  # targets from the loss's own distribution
    more: Callable[[Callable[..., Any]], dict[str, float]] = lambda model: {}  # other metrics, by name
    classes: bool = False  # whether the answer is the argmax of the last dimension

    @cached_property
    def held_out_float(self) -> Tensor:
        """What the float network answers to the held-out data."""
        return outputs(self.model, self.held_out)


def divergences(subject: Subject, model: Callable[..., Any]) -> Tensor:
    """How far a network's answers to the held-out data are from the float network's, (n,) float64, in the units of the
    subject's `divergence`."""
    return subject.divergence(outputs(model, subject.held_out), subject.held_out_float)


def resnet20() -> Subject:
    """Fashion-MNIST, the 10,000 test images; held out are the first 1,024 of these, which are scored too."""
    images, labels = data.fashion_mnist("t10k")

    def score(model: Callable[..., Any]) -> float:
        batches = (zoo.standardise(batch) for batch in images.split(500))
        return float((outputs(model, batches).argmax(1) == labels).double().mean())

    held_out = list(zoo.standardise(images[:1024]).split(256))
    return Subject(
        "resnet20", zoo.resnet20(), zoo.calibration(), cross_entropy, "top-1", score, len(images), held_out,
        divergence.kl_divergence, classes=True,
    )  # fmt: skip


def efficientnet_lite0() -> Subject:
    """ImageNet-1k, as far as 154 cut-out photographs show it; see `_efficientnet_lite`."""
    return _efficientnet_lite("efficientnet-lite0", data.efficientnet_lite0_weights(), 224)


def efficientnet_lite2() -> Subject:
    """The same with a larger network and larger pictures."""
    return _efficientnet_lite("efficientnet-lite2", data.efficientnet_lite2_weights(), 260)


def _efficientnet_lite(name: str, weights: Path, side: int) -> Subject:
    """Each of the 154 photographs on white, grey and green is scored.  Of the 108 that have no labels, 64 calibrate and
    44 are held out."""
    import stamps

    folder = str(data.efficientnet_lite_code())
    if folder not in sys.path:
        sys.path.append(folder)
    model: nn.Module = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(name)
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    grounds = [stamps.labelled_pictures(ground, side) for ground in (stamps.WHITE, stamps.GREY, stamps.GREEN)]
    pictures = torch.cat([each for each, _ in grounds])
    classes = [each for _, labels in grounds for each in labels]

    def answers(model: Callable[..., Any]) -> Tensor:
        return outputs(model, map(_standardise, pictures.split(22))).argmax(1)

    def score(model: Callable[..., Any]) -> float:
        found = answers(model).tolist()
        return sum(answer in right for answer, right in zip(found, classes, strict=True)) / len(classes)

    @cache  # not before it is asked for: it takes as long as a score
    def wanted() -> Tensor:
        return answers(model)

    def more(other: Callable[..., Any]) -> dict[str, float]:
        return {"agreement with float": float((answers(other) == wanted()).double().mean())}

    others = _standardise(stamps.unlabelled_pictures(side, np.random.default_rng(0)))
    return Subject(
        name, model, list(others[:64].split(16)), cross_entropy, "top-1", score, len(pictures),
        list(others[64:].split(22)), divergence.kl_divergence, more=more, classes=True,
    )  # fmt: skip


def _standardise(pictures: Tensor) -> Tensor:
    """RGB uint8 -> what the authors of EfficientNet-Lite trained on."""
    return (pictures.float() - 127) / 128


def upconv() -> Subject:
    """Photographs of 128 pixels, of which the network sees the half and is scored by the whole.

    The 44 that are held out from calibration are scored too, by the signal-to-noise ratio of white, 1, to the mean
    squared difference from the photograph.
    """
    import stamps
    import upconv

    model = upconv.load(data.upconv_weights())
    pictures = stamps.unlabelled_pictures(128, np.random.default_rng(0)).float() / 255
    halves = F.interpolate(pictures, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)
    held_out = list(halves[64:].split(11))
    edge = upconv.EDGE
    whole = pictures[64:, :, edge:-edge, edge:-edge].double()

    def score(model: Callable[..., Any]) -> float:
        noise = (outputs(model, held_out).double() - whole).square().flatten(1).mean(1)
        return float(-10 * noise.log10().mean())

    return Subject(
        "upconv", model, list(halves[:32].split(8)), squared_error, "PSNR", score, len(whole), held_out,
        divergence.relative_squared_distance,
    )  # fmt: skip


def yolox_nano() -> Subject:
    """COCO, as far as cut-out photographs show it, pasted into 150 scenes; 32 other scenes are held out."""
    import stamps
    import yolox

    model = yolox.load(data.yolox_nano_onnx())
    for_scoring, for_calibration = stamps.split_coco()
    pictures, truth = stamps.scenes(150, yolox.SIDE, for_scoring, np.random.default_rng(0))

    def found(model: Callable[..., Any]) -> list[Any]:
        return list(map(yolox.detections, outputs(model, map(_bgr, pictures.split(10))).numpy()))

    def score(model: Callable[..., Any]) -> float:
        return yolox.mean_average_precision(found(model), truth)

    def more(model: Callable[..., Any]) -> dict[str, float]:
        return {"mAP": yolox.mean_average_precision(found(model), truth, yolox.OVERLAPS)}

    others, _ = stamps.scenes(32, yolox.SIDE, for_calibration, np.random.default_rng(1))
    calibration = [(batch, outputs(model, [batch])) for batch in _bgr(others).split(8)]
    unseen, _ = stamps.scenes(32, yolox.SIDE, for_scoring, np.random.default_rng(2))
    return Subject(
        "yolox-nano", model, calibration, yolox.distillation, "mAP50", score, len(pictures),
        list(_bgr(unseen).split(8)), yolox.divergence, yolox.drawn, more,
    )  # fmt: skip


def _bgr(pictures: Tensor) -> Tensor:
    """RGB uint8 -> what YOLOX takes, 0 to 255."""
    return pictures.flip(1).float()


def minilm() -> Subject:
    """Sentence embeddings of news, against those of the float network; all texts that do not calibrate are scored, and
    held out."""
    import sentences

    folder = data.minilm_folder()
    model = sentences.load(folder)

    def encoded(texts: list[str], batch: int) -> list[dict[str, Tensor]]:
        inputs = sentences.tokenize(folder, texts)
        columns = [tensor.split(batch) for tensor in inputs.values()]
        return [dict(zip(inputs, row, strict=True)) for row in zip(*columns, strict=True)]

    texts = list(dict.fromkeys(data.lee_background()))  # a few stand there twice
    # Whole texts fill all tokens, first sentences leave some to padding: half of each.
    calibrating = [text if number % 2 else _first_sentence(text) for number, text in enumerate(texts[:64])]
    calibration = [(inputs, outputs(model, [inputs])) for inputs in encoded(calibrating, 16)]
    scored = encoded([*data.lee_documents(), *map(_first_sentence, texts[64:])], 31)
    wanted = outputs(model, scored)

    def score(model: Callable[..., Any]) -> float:
        return float(F.cosine_similarity(outputs(model, scored).double(), wanted.double()).mean())

    lee = encoded(data.lee_documents(), 25)
    pairs = data.wordsim353()
    words = [encoded(list(column), 100) for column in ([one for one, *_ in pairs], [other for _, other, _ in pairs])]

    def more(model: Callable[..., Any]) -> dict[str, float]:
        """Against what people find alike: Pearson's correlation over pairs of documents, Spearman's over words."""
        from scipy.stats import spearmanr  # of the extra `bench`

        documents = F.normalize(outputs(model, lee).double())
        upper = np.triu_indices(len(documents), 1)
        one, other = (F.normalize(outputs(model, batches).double()) for batches in words)
        said = [alike for *_, alike in pairs]
        return {
            "Lee": float(np.corrcoef((documents @ documents.T).numpy()[upper], data.lee_similarities()[upper])[0, 1]),
            "WordSim": float(spearmanr((one * other).sum(1).numpy(), said).statistic),
        }

    return Subject(
        "minilm", model, calibration, _distance, "cosine to float", score, len(wanted), scored,
        divergence.half_squared_distance, _drawn, more,
    )  # fmt: skip


def mails() -> Subject:
    """Spam or not, by MiniLM and a linear head that is trained here on 4,546 mails, of which 64 calibrate; the other
    1,500 are scored, and the first 256 of these are held out."""
    import sentences

    folder = data.minilm_folder()
    contents, spam = data.mails()
    order = np.random.default_rng(0).permutation(len(contents))
    inputs = sentences.tokenize(folder, [sentences.mail_text(contents[number]) for number in order])
    labels = torch.tensor([spam[number] for number in order])

    def batches(start: int, stop: int, size: int) -> list[dict[str, Tensor]]:
        columns = [tensor[start:stop].split(size) for tensor in inputs.values()]
        return [dict(zip(inputs, row, strict=True)) for row in zip(*columns, strict=True)]

    encoder = sentences.load(folder)
    model = sentences.Classifier(encoder, 2)
    model.fit(outputs(encoder, batches(1500, len(contents), 64)), labels[1500:])
    model.eval()
    scored = batches(0, 1500, 50)
    wanted = outputs(model, scored).argmax(1)

    def score(other: Callable[..., Any]) -> float:
        return float((outputs(other, scored).argmax(1) == labels[:1500]).double().mean())

    def more(other: Callable[..., Any]) -> dict[str, float]:
        return {"agreement with float": float((outputs(other, scored).argmax(1) == wanted).double().mean())}

    return Subject(
        "mails", model, batches(1500, 1564, 16), cross_entropy, "accuracy", score, 1500, batches(0, 256, 64),
        divergence.kl_divergence, more=more, classes=True,
    )  # fmt: skip


def crepe_tiny() -> Subject:
    """The pitch of recorded speech, a frame of each recording: 128 calibrate, the others are held out and scored.

    The score is the mean divergence from the float network, negative.
    """
    import crepe
    import speech

    model = crepe.load(data.crepe_tiny_weights())
    random = np.random.default_rng(0)
    sounds = list(speech.recordings().values())
    every = speech.frames([sounds[number] for number in random.permutation(len(sounds))], random)
    held_out = list(every[128:].split(64))
    wanted = outputs(model, held_out)

    def score(other: Callable[..., Any]) -> float:
        return -float(divergence.bernoulli_divergence(outputs(other, held_out), wanted).mean())

    def more(other: Callable[..., Any]) -> dict[str, float]:
        answers = outputs(other, held_out).argmax(1)
        return {"agreement with float": float((answers == wanted.argmax(1)).double().mean())}

    return Subject(
        "crepe-tiny", model, list(every[:128].split(32)), crepe.loss, "-divergence", score, len(wanted), held_out,
        divergence.bernoulli_divergence, crepe.drawn, more, classes=True,
    )  # fmt: skip


def whisper_encoder() -> Subject:
    """Recorded sentences, each at the start of the 30 s that Whisper takes: 16 calibrate, 32 others are held out and
    scored by the mean cosine to the float network's vectors."""
    import speech
    import whisper

    model = whisper.WhisperEncoder(whisper.load(data.whisper_tiny() / "model.bin").model.encoder).eval()
    sounds = list(speech.recordings(2, 30).values())
    drawn = np.random.default_rng(0).permutation(len(sounds))[:48]
    every = speech.log_mel([sounds[number] for number in drawn])
    held_out = list(every[16:].split(4))
    wanted = outputs(model, held_out)

    def score(other: Callable[..., Any]) -> float:
        return float(F.cosine_similarity(outputs(other, held_out).double(), wanted.double(), dim=-1).mean())

    return Subject(
        "whisper-encoder", model, list(every[:16].split(4)), squared_error, "cosine to float", score, len(wanted),
        held_out, divergence.relative_squared_distance,
    )  # fmt: skip


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0]


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """1 - cosine, for embeddings of length one; -log p of a Gaussian with variance one."""
    return 0.5 * (output - target).square().sum(1).mean()


def _drawn(output: Tensor, random: torch.Generator) -> Tensor:
    return output.detach() + torch.randn(output.shape, generator=random)


@torch.no_grad()
def outputs(model: Callable[..., Any], batches: Iterable[Any]) -> Tensor:
    """What a network answers to batches, each a tensor or a dict of keyword inputs."""
    answers = (model(**batch) if isinstance(batch, dict) else model(batch) for batch in batches)
    return torch.cat([torch.as_tensor(answer) for answer in answers])


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "resnet20": resnet20,
    "efficientnet-lite0": efficientnet_lite0,
    "efficientnet-lite2": efficientnet_lite2,
    "upconv": upconv,
    "yolox-nano": yolox_nano,
    "minilm": minilm,
    "mails": mails,
    "crepe-tiny": crepe_tiny,
    "whisper-encoder": whisper_encoder,
}
