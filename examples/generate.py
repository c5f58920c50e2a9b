"""Text from a file of hawqfx, by onnxruntime and numpy alone.

    python examples/generate.py model.onnx "Once upon a time" --tokenizer FOLDER [--new 40]

The file is made by `hawqfx.compile(model, budget, texts, tokens="causal").export("model.onnx")`.  One file serves the
prompt and single tokens: what it returns as present.0.key is the past_key_values.0.key of the next call.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

PAST, PRESENT = "past_key_values.", "present."


def empty_past(session: onnxruntime.InferenceSession, batch: int) -> dict[str, NDArray[np.float32]]:
    """The past at the start of a text: no tokens."""
    return {
        each.name: np.zeros((batch, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith(PAST)
    }


def step(
    session: onnxruntime.InferenceSession, tokens: NDArray[np.int64], mask: NDArray[np.int64], past: Mapping[str, Any]
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """The logits (batch, words) after the last token, and the next past."""
    names = [output.name for output in session.get_outputs()]
    answers = dict(zip(names, session.run(names, {"input_ids": tokens, "attention_mask": mask, **past}), strict=True))
    return answers["logits"][:, -1], {name: answers[name.replace(PAST, PRESENT)] for name in past}


def greedy(
    session: onnxruntime.InferenceSession,
    tokens: NDArray[np.int64],
    mask: NDArray[np.int64],
    new: int,
    end: int | None = None,
) -> Iterator[NDArray[np.int64]]:
    """The most probable next tokens (batch,), one after another; after its end a text goes on with the end.

    Args:
        session: of the file.
        tokens: of the prompts, (batch, sequence), padded on the left.
        mask: zero where they are padded, (batch, sequence).
        new: tokens to generate, at most.
        end: the token that ends a text; None: there is none.
    """
    past, over = empty_past(session, len(tokens)), np.zeros(len(tokens), bool)
    for _ in range(new):
        logits, past = step(session, tokens, mask, past)
        found = logits.argmax(-1)
        if end is not None:
            found = np.where(over, end, found)
            over |= found == end
        yield found
        if over.all():
            return
        tokens = found[:, None]
        mask = np.concatenate([mask, np.ones_like(tokens)], 1)


def streamed(decode: Callable[[list[int]], str], tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, piece by piece, as soon as its characters are whole: one may take several tokens, and decodes
    to the replacement character until then."""
    found: list[int] = []
    shown = ""
    for token in tokens:
        found.append(int(token))
        text = decode(found)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield decode(found)[len(shown) :]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("prompt")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    parser.add_argument("--new", type=int, default=40, help="tokens to generate, at most")
    parser.add_argument("--end", type=int, help="the token that ends a text, eos_token_id of the model's configuration")
    args = parser.parse_args(words)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{args.tokenizer}/tokenizer.json")
    session = onnxruntime.InferenceSession(args.file, providers=["CPUExecutionProvider"])
    prompt = np.array([tokenizer.encode(args.prompt).ids])
    print(args.prompt, end="", flush=True)
    tokens = (found[0] for found in greedy(session, prompt, np.ones_like(prompt), args.new, args.end))
    for piece in streamed(tokenizer.decode, tokens):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
