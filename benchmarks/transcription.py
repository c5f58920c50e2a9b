"""Recorded sentences into text: Whisper tiny.en in fewer bits, as two files in onnxruntime.

    python benchmarks/transcription.py [--quick] [--check]

whisper.py's Listener and Writer (the extra `bench`), each compiled to so many bits per weight on average, activations
at 8.  The 191 sentences of four words and more within 30 s whose text is known word by word are scored.  All other
recordings of the same speaker calibrate, one after another in windows that are filled to a length that is drawn: a
window with one recording of one word alone would be silence, nearly all of it.  The listener takes 32 windows, the
writer all of them and what the float network writes of them.

* Nats: the mean negative log likelihood of a token of the known text, given those before it; the text begins with a
  space, as Whisper's own do, and its end counts.
* Word errors: of greedy texts against the known ones, over all words, after transformers' normalizer (jiwer).
* Milliseconds: the listener's of a recording, and the writer's of one token after 16, side by side in one thread.

As many bits over both together are another row: the listener, which loses most, has one more, and the writer, with its
table of words, fewer.  Beside them uniform bits in the same rounding, the float files, and what onnxruntime's own tools
make of these without data (theirs.py).  --quick: 8 windows calibrate and 8 sentences are scored; one width.
"""

import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import data
import jiwer
import numpy as np
import torch
import whisper
from common import Claims, arguments, console
from numpy.typing import NDArray
from rich.table import Table
from speech import RATE, Sound, log_mel, recordings
from theirs import WITHOUT_DATA, without_data
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

import hawqfx
from hawqfx import Compiled
from hawqfx.frontend.criteria import IGNORED_LABEL
from hawqfx.runtime import ort

WIDTHS = (4, 3)
WINDOWS, BATCH = 32, 8  # that the listener calibrates on, and windows or sentences at once
FILLED, PAUSES = 28.0, (0.2, 0.8)  # seconds: of a window, at most, and after a recording in it, from and to
LONGEST = 100  # tokens of a text that is written; the known ones have at most 78
POSITION = 16  # tokens before the one that is timed
PARTS = ("listener", "writer")
MIXED, MORE = "mixed", 1  # bits of the listener beyond those of both together
# claimed: the most nats over float's, in part of these, the most word errors over float's, the least gain in speed
NATS, ERRORS, FASTER = {4: 0.02, 3: 0.10}, 0.003, 2.0

Arrays = Mapping[str, NDArray[Any]]
Paths = Mapping[str, Path]  # of a listener and a writer


class Network(Protocol):
    """Whisper, in whatever form."""

    def heard(self, features: Tensor) -> Arrays: ...

    def written(self, tokens: NDArray[np.int64], held: Arrays) -> tuple[NDArray[np.float32], Arrays]:
        """Logits, and the next past."""


class Trained:
    """The float network in torch."""

    def __init__(self, model: Any) -> None:
        self.listener, self.writer = whisper.Listener(model).eval(), whisper.Writer(model).eval()

    def heard(self, features: Tensor) -> Arrays:
        return self._run(self.listener, {"features": features})

    def written(self, tokens: NDArray[np.int64], held: Arrays) -> tuple[NDArray[np.float32], Arrays]:
        return _split(self._run(self.writer, {"tokens": torch.from_numpy(tokens), **as_tensors(held)}))

    @torch.no_grad()
    def _run(self, part: Any, inputs: Mapping[str, Tensor]) -> Arrays:
        return {name: tensor.numpy() for name, tensor in part(**inputs).items()}


class Files:
    """A listener and a writer in onnxruntime, which keep gigabytes once they have run."""

    def __init__(self, paths: Paths) -> None:
        self.listener, self.writer = (ort.session(paths[part], threads=1) for part in PARTS)

    def heard(self, features: Tensor) -> Arrays:
        return self._run(self.listener, {"features": features.numpy()})

    def written(self, tokens: NDArray[np.int64], held: Arrays) -> tuple[NDArray[np.float32], Arrays]:
        return _split(self._run(self.writer, {"tokens": tokens, **held}))

    def _run(self, session: Any, feed: Mapping[str, Any]) -> Arrays:
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feed)), strict=True))


def _split(answer: Arrays) -> tuple[NDArray[np.float32], Arrays]:
    past = {name.replace("next", "past"): array for name, array in answer.items() if name != "logits"}
    return answer["logits"], past


def as_tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def no_past(batch: int) -> Arrays:
    return {name: tensor.numpy() for name, tensor in whisper.no_past(batch).items()}


def greedy(network: Network, heard: Arrays) -> Iterator[NDArray[np.int64]]:
    """The most probable tokens (N,) one after another; what is no text is never one, and END follows END."""
    batch = len(next(iter(heard.values())))
    tokens, past = np.array([[whisper.START, whisper.ENGLISH]] * batch), no_past(batch)
    over = np.zeros(batch, bool)
    for place in range(LONGEST):
        logits, past = network.written(tokens, {**heard, **past})
        likely = logits[:, -1, : whisper.WORDS].copy()
        if place == 0:
            likely[:, whisper.SILENT] = -np.inf
        found = np.where(over, whisper.END, likely.argmax(-1))
        yield found
        over |= found == whisper.END
        if over.all():
            return
        tokens = found[:, None]


def texts(network: Network, heard: Arrays) -> list[list[int]]:
    """The tokens of greedy texts, without their ends."""
    rows = np.stack(list(greedy(network, heard)), 1)
    return [[int(token) for token in row if token != whisper.END] for row in rows]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (N, L), and what each is to predict (N, L): the prompt predicts the first word, the last word the end."""
    whole = [[whisper.START, whisper.ENGLISH, *row, whisper.END] for row in rows]
    longest = max(map(len, whole)) - 1
    tokens = torch.full((len(rows), longest), whisper.END)
    labels = torch.full((len(rows), longest), IGNORED_LABEL)
    for number, row in enumerate(whole):
        tokens[number, : len(row) - 1] = torch.tensor(row[:-1])
        labels[number, 1 : len(row) - 1] = torch.tensor(row[2:])
    return tokens, labels


def likelihood(network: Network, heard: Arrays, rows: list[list[int]]) -> tuple[float, int]:
    """The sum over tokens of -log p, and their number."""
    tokens, labels = padded(rows)
    logits, _ = network.written(tokens.numpy(), {**heard, **no_past(len(tokens))})
    lost = F.cross_entropy(torch.from_numpy(logits).flatten(0, 1), labels.flatten(), reduction="sum")
    return float(lost), int((labels != IGNORED_LABEL).sum())


@dataclass(frozen=True)
class Sentences:
    """Recordings whose text is known.

    Args:
        features: (n, 80, 3000).
        texts: word by word.
        tokenizer: of the network.
    """

    features: Tensor
    texts: list[str]
    tokenizer: Any

    @property
    def tokens(self) -> list[list[int]]:
        return [self.tokenizer.encode(f" {text}", add_special_tokens=False).ids for text in self.texts]

    def score(self, network: Network) -> dict[str, float]:
        plain, written, lost, count = BasicTextNormalizer(), [], 0.0, 0
        for features, tokens in zip(self.features.split(BATCH), batched(self.tokens), strict=True):
            heard = network.heard(features)
            written += [plain(self.tokenizer.decode(row)) for row in texts(network, heard)]
            more, predicted = likelihood(network, heard, tokens)
            lost, count = lost + more, count + predicted
        return {"nats": lost / count, "word errors": jiwer.wer([plain(text) for text in self.texts], written)}


def batched(rows: list[list[int]]) -> list[list[list[int]]]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def spoken(tokenizer: Any, quick: bool) -> tuple[Sentences, Tensor]:
    """What is scored, and the features of the windows that calibrate."""
    said = {name: text for name, text in data.transcripts().items() if re.search(r"[\[(\d]", text) is None}
    sounds = recordings(longest=30)
    scored = [name for name in sounds if len(said.get(name, "").split()) >= 4]
    others = [sound for name, sound in sounds.items() if name not in scored]
    random = np.random.default_rng(0)
    filled = windows([others[number] for number in random.permutation(len(others))], random)
    some = slice(8 if quick else None)
    sentences = Sentences(
        log_mel([sounds[name] for name in scored[some]]), [said[name] for name in scored[some]], tokenizer
    )
    return sentences, log_mel(filled[some])


def windows(sounds: Sequence[Sound], random: np.random.Generator) -> list[Sound]:
    """Recordings one after another, a pause after each, in windows of as many as fit a length up to FILLED that is
    drawn, and of one at least."""
    found: list[list[Sound]] = []
    room = 0.0
    for sound in sounds:
        pause = np.zeros(int(RATE * random.uniform(*PAUSES)), np.float32)
        seconds = (len(sound) + len(pause)) / RATE
        if seconds > room:
            found.append([])
            room = max(seconds, random.uniform(0, FILLED))
        found[-1] += [sound, pause]
        room -= seconds
    return [np.concatenate(each) for each in found]


def calibration(network: Network, features: Tensor) -> dict[str, list[Any]]:
    """The batches of both parts; those of the writer are each text as a whole, and its second half after the first."""
    found: dict[str, list[Any]] = {
        "listener": list(features[:WINDOWS].split(BATCH)), "writer": []
    }  # fmt: skip
    for batch in features.split(BATCH):
        heard = network.heard(batch)
        tokens, labels = padded(texts(network, heard))
        none, half = no_past(len(tokens)), tokens.shape[1] // 2
        _, past = network.written(tokens[:, :half].numpy(), {**heard, **none})
        for start, held in ((half, past), (0, none)):
            found["writer"].append(
                {"tokens": tokens[:, start:], **as_tensors({**heard, **held}), "labels": labels[:, start:]}
            )
    return found


def milliseconds(files: Mapping[str, Paths], sentences: Sentences) -> dict[str, dict[str, float]]:
    """The median of each part, of all files side by side, for one sentence."""
    one, features = next(iter(files.values())), sentences.features[:1]
    first = Files(one)
    heard = first.heard(features)
    tokens = padded([next(row for row in sentences.tokens if len(row) > POSITION)])[0].numpy()
    _, past = first.written(tokens[:, :POSITION], {**heard, **no_past(1)})
    feeds: dict[str, dict[str, Any]] = {
        "listener": {"features": features.numpy()},
        "writer": {"tokens": tokens[:, POSITION : POSITION + 1], **heard, **past},
    }
    found: dict[str, dict[str, float]] = {name: {} for name in files}
    for part, rounds in (("listener", 5), ("writer", 50)):
        paths: dict[str, str | Path] = {name: each[part] for name, each in files.items()}
        inputs = [feeds[part][name] for name, _, _ in ort.inputs(one[part])]
        for name, times in ort.latency(paths, inputs, rounds=rounds).items():
            found[name][part] = 1e3 * times.median
    return found


def files_of(part: str, network: Compiled, budgets: Mapping[str, float], folder: Path) -> dict[str, Path]:
    """The files of a part: of float, of onnxruntime's tools, of each budget, and of uniform bits."""
    whole = folder / f"{part}.onnx"
    network.export_float(whole)
    theirs = without_data(whole, folder)
    found = {"float": whole, **{kind: theirs[kind] for kind in WITHOUT_DATA}}
    for kind, bits in budgets.items():
        found[kind] = folder / f"{part} {kind}.onnx"
        network.at(f"weight_bits={bits:.4f}", against_uniform=False).export(found[kind])  # these have rows of their own
        if kind.startswith(MIXED):
            even = f"uniform {bits:g}"
            found[even] = folder / f"{part} {even}.onnx"
            network.uniform(int(bits)).export(found[even])
    return found


def budgets_of(part: str, widths: Sequence[int], weights: Mapping[str, int]) -> dict[str, float]:
    """Bits per weight: the same in both parts; and as many over both, the listener with MORE of them."""
    both = {}
    for bits in widths:
        others = (bits * sum(weights.values()) - (bits + MORE) * weights["listener"]) / weights["writer"]
        both[f"{bits} over both"] = bits + MORE if part == "listener" else others
    return {f"{MIXED} {bits}": float(bits) for bits in widths} | both


def _weights(network: torch.nn.Module) -> int:
    """The numbers of matrices and tables."""
    return sum(each.numel() for each in network.parameters() if each.dim() > 1)


def show(found: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("", "nats", "word errors", "MB", "ms, listener", "ms, a token")
    for kind, row in found.items():
        table.add_row(
            kind, f"{row['nats']:.4f}", f"{row['word errors']:.2%}", f"{sum(row['bytes'].values()) / 1e6:.1f}",
            *(f"{row['milliseconds'][part]:.1f}" for part in PARTS),
        )  # fmt: skip
    console.print(table)


def claim(found: Mapping[str, Mapping[str, Any]], claims: Claims, widths: Sequence[int]) -> None:
    whole = found["float"]
    for bits in widths:
        row = found[f"mixed {bits}"]
        more = row["nats"] / whole["nats"] - 1
        claims.add(f"{bits} bits: nats within {NATS[bits]:.0%} of float", more <= NATS[bits], f"{more:+.1%}")
        for part in PARTS:
            gain = whole["milliseconds"][part] / row["milliseconds"][part]
            claims.add(f"{bits} bits: the {part} is {FASTER} times faster than float", gain >= FASTER, f"{gain:.2f}")
    behind = found[f"mixed {widths[0]}"]["word errors"] - whole["word errors"]
    claims.add(f"{widths[0]} bits: word errors within {ERRORS:.1%} of float", behind <= ERRORS, f"{behind:+.2%}")


def main() -> None:
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    source, widths = data.whisper_tiny(), WIDTHS[:1] if options.quick else WIDTHS
    model, tokenizer = whisper.load(source / "model.bin"), Tokenizer.from_file(str(source / "tokenizer.json"))
    sentences, features = spoken(tokenizer, options.quick)
    batches = calibration(Trained(model), features)
    networks = {"listener": whisper.Listener(model).eval(), "writer": whisper.Writer(model).eval()}
    shapes = {"listener": None, "writer": whisper.shapes()}
    weights = {part: _weights(network) for part, network in networks.items()}
    budget, seconds, found = f"weight_bits={widths[0]}", 0.0, {}
    with tempfile.TemporaryDirectory() as folder:
        of_parts: dict[str, dict[str, Path]] = {}
        for part, network in networks.items():  # one after the other, since each takes gigabytes
            start = time.perf_counter()
            compiled = hawqfx.compile(network, budget, batches.pop(part), dynamic_shapes=shapes[part])
            seconds += time.perf_counter() - start
            of_parts[part] = files_of(part, compiled, budgets_of(part, widths, weights), Path(folder))
            del compiled
        files = {kind: {part: of_parts[part][kind] for part in PARTS} for kind in of_parts["listener"]}
        times = milliseconds(files, sentences)
        for kind, paths in files.items():
            sizes = {part: path.stat().st_size for part, path in paths.items()}
            found[kind] = {**sentences.score(Files(paths)), "bytes": sizes, "milliseconds": times[kind]}
            console.print(f"{kind}: {found[kind]}")
    show(found)
    claims = Claims()
    claim(found, claims, widths)
    results = {"files": found, "sentences": len(sentences.texts), "windows": len(features), "seconds": seconds}
    claims.finish("transcription", options, results)


if __name__ == "__main__":
    main()
