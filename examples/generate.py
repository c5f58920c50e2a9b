"""Text from a file of hawqfx, by onnxruntime and numpy alone.

    python examples/generate.py model.onnx "Once upon a time" --tokenizer FOLDER [--new 40]

The file is made by `hawqfx.compile(model, budget, texts, tokens="causal").export("model.onnx")`.  One file serves the
prompt and single tokens: what it returns as present_0_key is the past_key_values_0_key of the next call.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

PAST = "past_key_values_"


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
    return answers["logits"][:, -1], {name: answers[name.replace(PAST, "present_")] for name in past}


def greedy(
    session: onnxruntime.InferenceSession, tokens: NDArray[np.int64], mask: NDArray[np.int64], new: int
) -> Iterator[NDArray[np.int64]]:
    """The most probable next tokens (batch,), one after another.

    Args:
        session: of the file.
        tokens: of the prompts, (batch, sequence), padded on the left.
        mask: zero where they are padded, (batch, sequence).
        new: tokens to generate.
    """
    past = empty_past(session, len(tokens))
    for _ in range(new):
        logits, past = step(session, tokens, mask, past)
        tokens = logits.argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(tokens)], 1)
        yield tokens[:, 0]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("prompt")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    parser.add_argument("--new", type=int, default=40, help="tokens to generate")
    args = parser.parse_args(words)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{args.tokenizer}/tokenizer.json")
    session = onnxruntime.InferenceSession(args.file, providers=["CPUExecutionProvider"])
    prompt = np.array([tokenizer.encode(args.prompt).ids])
    print(args.prompt, end="", flush=True)
    shown = ""
    found: list[int] = []
    for (token,) in greedy(session, prompt, np.ones_like(prompt), args.new):
        found.append(int(token))
        text = tokenizer.decode(found)
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()


if __name__ == "__main__":
    main()
