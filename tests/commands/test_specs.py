"""Models, data and options from what is written on the command line."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hawqfx import cli
from hawqfx.commands import specs
from hawqfx.errors import HawqfxError
from hawqfx.runtime import ort
from tests.nets import Plain, build

NET = "import neighbour\nfrom torch import nn\n\n\ndef make():\n    return nn.Linear(neighbour.SIZE, 2).eval()\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "neighbour.py").write_text("SIZE = 3\n")
    return tmp_path / "net.py"


def test_a_function_in_a_file_may_import_its_neighbours(file: Path) -> None:
    assert specs.model_of(f"{file}:make").in_features == 3


@pytest.mark.parametrize("spec", ["net.py", "nowhere.py:make", "tests.nets:nothing", ":make", "tests.nets:"])
def test_what_is_nowhere_is_refused(spec: str) -> None:
    with pytest.raises(HawqfxError):
        specs.named(spec)


def test_a_module_that_raises_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken_net.py").write_text("1 / 0\n")
    with pytest.raises(HawqfxError, match="ZeroDivisionError"):
        specs.named(f"{tmp_path / 'broken_net.py'}:make")


@pytest.mark.parametrize("kind", ["safetensors", "torch", "nested"])
def test_weights_come_from_a_checkpoint(kind: str, tmp_path: Path, file: Path) -> None:
    weights = {"weight": torch.full((2, 3), 2.0), "bias": torch.ones(2)}
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if kind == "nested" else weights, path)
    model = specs.model_of(f"{file}:make", path)
    assert torch.equal(model.weight.detach(), weights["weight"])
    assert not model.training


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {os.environ['HAWQFX_TEST_MARK']}",)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("HAWQFX_TEST_MARK", str(mark))
    path = tmp_path / "w.pt"
    path.write_bytes(pickle.dumps({"weight": Hostile()}))
    with pytest.raises(HawqfxError, match="cannot be read"):
        specs.checkpoint(path)
    torch.save({"weight": Hostile()}, path)
    with pytest.raises(HawqfxError, match=r"cannot be read: .* no code in it is run: save model\.state_dict\(\)$"):
        specs.checkpoint(path)
    assert not mark.exists()


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, file: Path) -> None:
    save_file({"weight": torch.ones(4, 4)}, tmp_path / "w.safetensors")
    with pytest.raises(HawqfxError, match="does not fit"):
        specs.model_of(f"{file}:make", tmp_path / "w.safetensors")
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(HawqfxError, match="holds no tensors by name"):
        specs.checkpoint(tmp_path / "w.pt")


def test_a_folder_of_hugging_face_is_loaded_by_its_own_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    found = specs.model_of(f"hf:{tmp_path}")
    assert type(found) is BertForSequenceClassification
    assert not found.training
    assert torch.equal(found.classifier.weight, model.classifier.weight)
    with pytest.raises(HawqfxError, match=r"no config\.json"):
        specs.model_of(f"hf:{tmp_path / 'nowhere'}")


def reviews() -> list[dict[str, torch.Tensor]]:
    words = torch.randint(0, 30, (8, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words[:, 0] % 2}]


@pytest.mark.parametrize("kind", ["classifier", "decoder"])
def test_a_folder_of_hugging_face_becomes_a_file(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "classifier":
        BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16)).save_pretrained(tmp_path)
        options, inputs = ["--data", f"{__name__}:reviews"], {"input_ids", "attention_mask"}
    else:
        LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=16)).save_pretrained(tmp_path)
        options = ["--data", f"{__name__}:words", "--tokens", "causal"]
        inputs = {"input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"}
    file = tmp_path / "m.onnx"
    words = ["compile", f"hf:{tmp_path}", "--budget", "weight_bits=6", "--out", str(file), *options]
    result = CliRunner().invoke(cli.app, [*words, "--sensitivity", "mse"])
    assert result.exit_code == 0, result.output
    assert {name for name, *_ in ort.inputs(file)} == inputs
    assert "hf:" not in result.stderr  # nor bars of what is loaded
    assert "Loading" not in result.stderr


def words() -> list[torch.Tensor]:
    return [reviews()[0]["input_ids"]]


def test_widths_and_rules_are_read() -> None:
    assert specs.widths("--weight-bits", "2,4-6,32", ()) == [2, 4, 5, 6, 32]
    assert specs.widths("--weight-bits", None, (8,)) == (8,)
    assert specs.fixed(["head.*=8"]) == {"head.*": 8}
    shapes = specs.dynamic_shapes(["ids:1=length", "mask:1=length", "image:2=height"])
    assert shapes is not None
    assert shapes["ids"][1] is shapes["mask"][1]
    assert list(shapes["image"]) == [2]
    assert specs.dynamic_shapes([]) is None


@pytest.mark.parametrize("text", ["", "two", "2-", "2,,3"])
def test_widths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(HawqfxError, match="--weight-bits"):
        specs.widths("--weight-bits", text, ())


@pytest.mark.parametrize("rule", ["ids=length", "ids:x=length", "ids:1=", "ids:1=a b"])
def test_dimensions_that_are_none_are_refused(rule: str) -> None:
    with pytest.raises(HawqfxError, match="--dynamic"):
        specs.dynamic_shapes([rule])


def test_a_spec_names_a_model_of_a_module() -> None:
    model = specs.model_of("tests.commands.test_specs:plain")
    assert torch.equal(model.state_dict()["head.weight"], build(Plain).state_dict()["head.weight"])


def plain() -> torch.nn.Module:
    return build(Plain)
