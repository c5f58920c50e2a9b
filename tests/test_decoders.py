"""Causal language models that generate: the cache in and out, one file for prompts and single tokens."""

import copy
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import hawqfx
from hawqfx.errors import CaptureError, DataError, HawqfxError
from hawqfx.frontend import decoders
from hawqfx.frontend.capture import capture
from hawqfx.frontend.data import gather
from hawqfx.maths.formats import Scheme
from tests.nets import Plain, build

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("generate", ROOT / "examples" / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)

WORDS, NEW = 60, 8
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 64,
}  # fmt: skip
BLOCKS = "tied head in blocks"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped-query": ("Llama", {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64}),
    "tied head": ("Qwen3", {**SIZES, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8,
                            "tie_word_embeddings": True}),
    "learned positions": ("GPT2", {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                                   "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}),
}  # fmt: skip
KINDS[BLOCKS] = KINDS["tied head"]


@cache
def model(kind: str) -> Any:
    name, sizes = KINDS[kind]
    made = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    torch.manual_seed(0)
    found = made(getattr(transformers, f"{name}Config")(**sizes)).eval()
    for parameter in found.parameters():  # those of a normal of .02 would make every answer alike
        if parameter.ndim == 2:
            parameter.data.mul_(4)
    return found


def texts(count: int = 6, length: int = 12) -> Tensor:
    return torch.randint(2, WORDS, (count, length), generator=torch.Generator().manual_seed(1))


@cache
def compiled(kind: str) -> hawqfx.Compiled:
    schemes: tuple[Scheme, ...] | None = ("weight-only",) if kind == BLOCKS else None
    return hawqfx.compile(
        model(kind), "weight_bits=6", texts(), tokens="causal", sensitivity="mse", schemes=schemes, block_sizes=(32,)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def of(kind: str) -> onnxruntime.InferenceSession:
        path = tmp_path_factory.mktemp("decoders") / f"{kind}.onnx"
        compiled(kind).export(path)
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_the_captured_decoder_is_the_model(kind: str) -> None:
    """From the start and in the middle of texts, padded on the left or not: transformers' own logits."""
    own, (first, *_) = model(kind), compiled(kind).session.context.batches
    program = capture(decoders.causal_decoder(own), first, decoders.shapes_of_decoder(2))
    tokens, mask = texts(), torch.ones(6, 12, dtype=torch.long)
    mask[1, :3], tokens[1, :3] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        wanted = own(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    for batch in gather(
        decoders.decoder_batches(decoders.causal_decoder(own), [{"input_ids": tokens, "attention_mask": mask}]),
        varying=True,
    ):
        found = program.run((), dict(batch.kwargs))["logits"]
        new = found.shape[1]
        seen = mask[:, -new:].bool()  # what padding answers, nobody reads
        assert float((found - wanted[:, -new:]).abs()[seen].max()) < 1e-5 * float(wanted.abs().max())  # float32 sums


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_by_one_are_those_of_the_whole(kind: str, files: Any) -> None:
    """In onnxruntime: the logits of a text at once are those of its tokens one after another, and the graph's."""
    session, tokens = files(kind), texts(2, 9).numpy()
    names = [output.name for output in session.get_outputs()]
    feed = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **generate.empty_past(session, 2)}
    whole = dict(zip(names, session.run(names, feed), strict=True))["logits"]
    past = generate.empty_past(session, 2)
    for at in range(tokens.shape[1]):
        mask = np.ones((2, at + 1), np.int64)
        logits, past = generate.step(session, tokens[:, at : at + 1], mask, past)
        # a code at a tie may flip where sums are taken in another order
        assert np.abs(logits - whole[:, at]).mean() < 1e-2 * np.abs(whole[:, at]).mean()
    graph = compiled(kind).model(**{name.replace(".", "_"): torch.from_numpy(value) for name, value in feed.items()})
    assert float((graph["logits"] - torch.from_numpy(whole)).abs().mean()) < 1e-2 * float(graph["logits"].abs().mean())


class _Quantized:
    """transformers' model with the fake-quantized graph in place of its forward."""

    graph: Any

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        held = past_key_values.layers
        config = self.config.get_text_config()  # type: ignore[attr-defined]
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        past = {}
        for number in range(2):
            known = number < len(held) and held[number].is_initialized
            for part in ("key", "value"):
                empty = torch.zeros(len(input_ids), heads, 0, width)
                past[decoders.past_name(number, part)] = getattr(held[number], f"{part}s") if known else empty
        out = self.graph(input_ids=input_ids, attention_mask=attention_mask, **past)
        pairs = [(out[f"present_{number}_key"], out[f"present_{number}_value"]) for number in range(2)]
        return CausalLMOutputWithPast(logits=out["logits"], past_key_values=decoders._cache(pairs))


@pytest.mark.parametrize("kind", KINDS)
def test_generated_tokens_are_those_of_transformers(kind: str, files: Any) -> None:
    """Greedy, from two prompts of which one is padded on the left, token by token."""
    own = model(kind)
    other = copy.copy(own)
    other.__class__ = type("Quantized", (_Quantized, type(own)), {})
    object.__setattr__(other, "graph", compiled(kind).model)
    tokens, mask = texts(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2], tokens[0, :2] = 0, 0
    with torch.no_grad():
        wanted = other.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[:, 7:]
    found = np.stack(list(generate.greedy(files(kind), tokens.numpy(), mask.numpy(), NEW)), 1)
    assert found.tolist() == wanted.tolist()
    assert len({*found.flatten()}) > 2


def test_the_file_has_named_dimensions(files: Any) -> None:
    session = files("grouped-query")
    shapes = {each.name: each.shape for each in session.get_inputs()}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "total"]
    assert shapes["past_key_values.0.key"] == ["batch", 2, "past", 8]
    outputs = [each.name for each in session.get_outputs()]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]


def test_names_of_weights_are_the_models_own() -> None:
    names = {name for name, _ in model("grouped-query").named_parameters()}
    assert {site.key for site in compiled("grouped-query").planned.weights} <= names


@pytest.mark.parametrize("labelled", [True, False])
def test_the_loss_is_that_of_transformers(labelled: bool) -> None:
    """Of the whole texts, one of them padded: the batch from the start has the mean cross-entropy of transformers, with
    labels or without, which are then the texts themselves."""
    own, tokens, mask = model("grouped-query"), texts(), torch.ones(6, 12, dtype=torch.long)
    tokens[2, :2], mask[2, :2] = 0, 0
    labels = tokens.clone()
    labels[2, :2] = -100
    labels[0, 4] = 7 if labelled else labels[0, 4]  # differs from the input
    data = {"input_ids": tokens, "attention_mask": mask} | ({"labels": labels} if labelled else {})
    found = hawqfx.compile(own, "weight_bits=8", [data], tokens="causal", sensitivity="mse")
    context = found.session.context
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    wanted_labels = labels.clone()
    wanted_labels[2, 2] = -100  # the first token follows padding
    with torch.no_grad():
        wanted = float(own(input_ids=tokens, attention_mask=mask, position_ids=positions, labels=wanted_labels).loss)
    whole = context.batches[1]
    loss = context.loss_at(found.session.measured.run((), dict(whole.kwargs)), whole.target, 1)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_texts_of_padding_alone_predict_nothing() -> None:
    """The second half of a short text, padded on the right, is left out."""
    mask = torch.ones(6, 12, dtype=torch.long)
    mask[1, 5:] = 0
    data = {"input_ids": texts(), "attention_mask": mask}
    found = hawqfx.compile(model("grouped-query"), "weight_bits=8", [data], tokens="causal", sensitivity="mse")
    assert [batch.size for batch in found.session.context.batches] == [5, 6]
    mask[:, 5:] = 0
    with pytest.raises(DataError, match="nothing is left to predict"):
        hawqfx.compile(model("grouped-query"), "weight_bits=8", [data], tokens="causal", sensitivity="mse")


def test_generation_ends_where_transformers_ends(files: Any) -> None:
    """By a token that is generated: the end of one text, and then of both."""
    session, tokens = files("grouped-query"), texts(2, 7)
    mask = np.ones((2, 7), np.int64)
    free = np.stack(list(generate.greedy(session, tokens.numpy(), mask, NEW)), 1)
    end = int(free[0, 2])
    found = np.stack(list(generate.greedy(session, tokens.numpy(), mask, NEW, end)), 1)
    for row, unbounded in zip(found, free, strict=True):
        stop = next((at for at, token in enumerate(unbounded) if token == end), NEW)
        assert row[: stop + 1].tolist() == unbounded[: min(stop + 1, found.shape[1])].tolist()
        assert set(row[stop:].tolist()) <= {end}


def test_characters_of_several_tokens_come_whole() -> None:
    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    pieces = list(generate.streamed(decode, "caf\u00e9 \u20ac ok".encode()))
    assert "".join(pieces) == "caf\u00e9 \u20ac ok"
    assert "\ufffd" not in "".join(pieces)
    cut = "caf\u00e9".encode()[:-1]
    assert "".join(generate.streamed(decode, cut)) == "caf\ufffd"  # an unfinished one comes at the end


def test_a_saved_decoder_is_loaded_for_the_model_itself(tmp_path: Path) -> None:
    one = compiled("grouped-query")
    one.save(tmp_path / "net.hawqfx")
    other = hawqfx.load(tmp_path / "net.hawqfx", model("grouped-query"))
    one.export(tmp_path / "one.onnx")
    other.export(tmp_path / "other.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()


def test_a_plan_in_blocks_gives_the_same_file(tmp_path: Path) -> None:
    """Its scales are followed, those of the table among them, and its codes come out as they were."""
    one = compiled(BLOCKS)
    other = hawqfx.compile(model(BLOCKS), None, texts(), tokens="causal", plan=one.plan)
    one.export(tmp_path / "one.onnx")
    other.export(tmp_path / "other.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()


def test_the_model_is_as_it_was() -> None:
    own = model("grouped-query")
    before = type(own)
    decoders.causal_decoder(own)
    assert type(own) is before
    assert "takes_positions" not in vars(own)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), "at least 4"),
        (torch.zeros(2, 8), "whole numbers"),
        ({"input_ids": torch.zeros(2, 8, dtype=torch.long), "pixel_values": torch.zeros(2, 3)}, "a batch is tokens"),
    ],
)
def test_data_that_are_no_texts_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hawqfx.compile(model("grouped-query"), "weight_bits=6", data, tokens="causal")


def test_slips_are_refused() -> None:
    with pytest.raises(CaptureError, match="causal language models"):
        hawqfx.compile(build(Plain), "weight_bits=6", texts(), tokens="causal")
    config = transformers.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    reads: nn.Module = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(CaptureError, match="T5ForConditionalGeneration encodes its input first"):
        hawqfx.compile(reads, "weight_bits=6", texts(), tokens="causal")
    with pytest.raises(HawqfxError, match='must be "causal"'):
        hawqfx.compile(model("grouped-query"), "weight_bits=6", texts(), tokens="masked")  # type: ignore[arg-type]
    with pytest.raises(HawqfxError, match="vary already"):
        hawqfx.compile(model("grouped-query"), "weight_bits=6", texts(), tokens="causal", dynamic_shapes={})
    training: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**KINDS["grouped-query"][1])).train()
    with pytest.raises(CaptureError, match="train mode"):
        hawqfx.compile(training, "weight_bits=6", texts(), tokens="causal")
