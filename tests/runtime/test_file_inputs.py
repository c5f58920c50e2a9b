"""Inputs of a file at sizes by name: random ones, data that are cut or repeated, sizes that follow, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hawqfx import cli
from hawqfx.benchmark import benchmark
from hawqfx.errors import BackendError, BudgetError, UsageError
from hawqfx.frontend.data import gather
from hawqfx.runtime.backends import Result
from hawqfx.runtime.file_inputs import at_sizes, random_inputs, sizes_in_file
from tests.frontend.test_dimensions import Pixels, seeded
from tests.latency.test_at_shape import decoder, images
from tests.test_decoders import model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """That of a network of images of any height, and that of a decoder."""
    folder = tmp_path_factory.mktemp("files")
    for name, session in (("images", images()), ("decoder", decoder())):
        session.at("weight_bits=6").export(folder / f"{name}.onnx", check=False)
    return folder / "images.onnx", folder / "decoder.onnx"


def pictures() -> list[torch.Tensor]:
    return [torch.randn(3, 1, 8, 10, generator=torch.Generator().manual_seed(0))]


def network() -> nn.Module:
    return seeded(Pixels)


def language() -> nn.Module:
    return model("grouped-query")


def unread() -> Any:
    raise AssertionError("a model is loaded before the arguments are checked")


def test_random_inputs_have_the_sizes_that_are_asked_for(files: tuple[Path, Path]) -> None:
    image, text = files
    assert sizes_in_file(image, {"height": 20}, batch=4) == {"batch": 4, "height": 20}
    assert [array.shape for array in random_inputs(image, {"batch": 4, "height": 20})] == [(4, 1, 20, 10)]
    sizes = sizes_in_file(text, {"sequence": 1, "past": 12})
    assert sizes == {"batch": 1, "sequence": 1, "past": 12, "total": 13}  # the mask of past and new tokens
    tokens, mask, *past = (array.shape for array in random_inputs(text, sizes))
    assert (tokens, mask, set(past)) == ((1, 1), (1, 13), {(1, 2, 12, 8)})


def test_data_are_cut_and_repeated(files: tuple[Path, Path]) -> None:
    (batch,) = gather(pictures())
    (image,) = batch.tensors
    sizes = sizes_in_file(files[0], {"height": 5}, data=batch)
    assert sizes == {"batch": 3, "height": 5}
    assert torch.equal(at_sizes(files[0], batch, sizes).tensors[0], image[:, :, :5])


def test_a_benchmark_is_of_its_shape(files: tuple[Path, Path]) -> None:
    found = benchmark(files[0], ["ort-cpu"], network(), pictures(), shape={"height": 5, "batch": 2}, rounds=2)[
        "ort-cpu"
    ]
    assert isinstance(found, Result)
    assert (found.sizes, found.batch) == ({"batch": 2, "height": 5}, 2)
    assert found.parity is not None  # the float network took it too


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("width=4", "of this network batch, height varies, and no 'width'"),
        ("height", "--at height: write NAME=SIZE"),
        ("height=1.5", "the size '1.5' is no whole number"),
    ],
)
def test_a_shape_that_the_file_has_not_is_refused_before_a_model_is_loaded(
    files: tuple[Path, Path], at: str, message: str
) -> None:
    command = ["bench", str(files[0]), "--at", at, "--model", "tests.runtime.test_file_inputs:unread"]
    error = CliRunner().invoke(cli.app, command).exception
    assert isinstance(error, BudgetError)
    assert message in str(error)


def test_what_follows_from_others_is_not_asked_for(files: tuple[Path, Path]) -> None:
    with pytest.raises(BudgetError, match=r"total=9: it is past \+ sequence; give those"):
        sizes_in_file(files[1], {"total": 9})


def test_data_of_another_number_of_inputs_are_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(
        BackendError, match=r'takes input_ids, attention_mask, past.*; the data have 1 tensors; tokens="causal"'
    ):
        benchmark(files[1], data=pictures())


def test_the_command_times_a_decoder_after_a_past(files: tuple[Path, Path]) -> None:
    command = ["bench", str(files[1]), "--at", "sequence=1@past=12", "--rounds", "2", "--json"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["ort-cpu"]["sizes"] == {"batch": 1, "sequence": 1, "past": 12, "total": 13}


def test_a_decoder_is_compared_with_the_model_that_it_is_of(files: tuple[Path, Path], tmp_path: Path) -> None:
    plan = tmp_path / "net.hawqfx"
    decoder().at("weight_bits=6").save(plan)
    command = ["bench", str(files[1]), "--model", f"{__name__}:language", "--data", "tests.test_decoders:texts"]
    command += ["--tokens", "causal"]
    command += ["--backend", "ort-cpu", "--backend", "torch-cpu", "--plan", str(plan), "--rounds", "2", "--json"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert found["ort-cpu"]["sizes"] == {"batch": 1, "sequence": 6, "past": 6, "total": 12}  # halves of a text
    assert found["ort-cpu"]["parity"]["agreement"] > 0.8
    # the file and the graph that it was made of are as far from the model
    assert found["ort-cpu"]["parity"]["mean"] == pytest.approx(found["torch-cpu"]["parity"]["mean"], rel=1e-3)
    assert found["torch-cpu, float"]["parity"]["largest"] == 0
    at = json.loads(CliRunner().invoke(cli.app, [*command[:8], "--at", "sequence=1@past=20", "--json"]).output)
    assert at["ort-cpu"]["sizes"] == {"batch": 1, "sequence": 1, "past": 20, "total": 21}
    with pytest.raises(UsageError, match="makes a past of the texts by the model"):
        benchmark(files[1], tokens="causal")
