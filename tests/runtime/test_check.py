"""A file is run before it is given: what it finds is said, and a file that computes something else is not written."""

from pathlib import Path
from typing import Any

import pytest
import torch

import hawqfx
from hawqfx.errors import BackendError, ExportError
from hawqfx.runtime import check, ort, parity
from hawqfx.runtime.parity import SiteCodes
from tests.nets import Attention, Heads, Plain, QuantizedOutput, Residual, images
from tests.tools import quick


@pytest.fixture(scope="module")
def compiled() -> hawqfx.Compiled:
    return quick(Plain, "weight_bits=6")


def test_a_file_that_is_right_is_given_and_said(compiled: hawqfx.Compiled, tmp_path: Path) -> None:
    compiled.export(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").exists()
    found = check.check(compiled.program, compiled.session.measured, tmp_path / "m.onnx", compiled.session.example)
    assert found.difference <= check.SAME
    assert found.agreement == 1
    assert found.flips is None
    words = " ".join(compiled.summary().split())
    assert "file m.onnx in onnxruntime: outputs within " in words
    assert "the same largest entry in 100.0% of the rows, on 16 samples" in words


@pytest.mark.parametrize(
    ("make", "options"),
    [(Residual, {"budget": "bops=2%"}), (Attention, {"budget": "weight_memory=30%"})],
    ids=["narrow", "schemes"],
)
def test_integer_kernels_have_the_codes_of_the_graph(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    compiled = quick(make, **options)
    compiled.export(tmp_path / "m.onnx")
    batch = compiled.session.context.batches[0]
    inputs = [tensor.numpy() for tensor in batch.tensors]
    compared = parity.optimized_sites(compiled.program, tmp_path / "m.onnx", inputs)
    assert {site.key for site in compared} == {
        key for key, scheme in compiled.plan.schemes.items() if scheme == "static" and not key.endswith("weight")
    }
    for site in compared:
        assert site.largest <= 1
        assert site.flips <= max(1, site.codes // 1000)  # ties


def test_a_file_of_other_codes_is_refused_by_its_first_site(compiled: hawqfx.Compiled, tmp_path: Path) -> None:
    other = compiled.at("weight_bits=3")
    other.export(tmp_path / "other.onnx", check=False)
    batch = compiled.session.context.batches[0]
    with pytest.raises(ExportError, match=r"other codes than the graph at 'relu output': .* differ, by up to \d+"):
        check.check(compiled.program, compiled.session.measured, tmp_path / "other.onnx", batch)


def test_a_file_that_is_wrong_leaves_the_old_one(
    compiled: hawqfx.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a kernel whose outputs are off where no codes tell."""
    right, path = check._outputs, tmp_path / "m.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(check, "_outputs", lambda *a, **k: [2 * output for output in right(*a, **k)])
    with pytest.raises(ExportError, match=r"m\.onnx was not written: the file's outputs differ .* check=False writes"):
        compiled.export(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    compiled.export(path, check=False)
    assert path.stat().st_size > 1000


def test_sums_that_saturate_on_this_processor_are_said(
    compiled: hawqfx.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Simulated, so that the test is the same on every processor: fast kernels that lose a tenth."""
    right = check._outputs

    def saturating(path: Path, inputs: Any, *, exact: bool = False, integers: bool = True) -> list[torch.Tensor]:
        return [output if exact else 0.9 * output for output in right(path, inputs, exact=True)]

    monkeypatch.setattr(check, "_outputs", saturating)
    compiled.export(tmp_path / "m.onnx")
    assert "saturates sums of 8-bit codes: here the file is off by 10.0%, elsewhere not" in caplog.text


@pytest.mark.parametrize(("make", "target", "integers"), [(Heads, "any", False), (Heads, "x86-avx2", True)])
def test_signed_activations_are_checked_without_kernels_that_saturate(
    make: Any, target: str, integers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: onnxruntime has exact kernels for weights on such a processor, none for two activations."""
    asked, run_exactly = [], ort.run_exactly

    def watched(*arguments: Any, optimize: bool) -> Any:
        asked.append(optimize)
        return run_exactly(*arguments, optimize=optimize)

    monkeypatch.setattr(check, "saturates", lambda: True)
    monkeypatch.setattr(ort, "run_exactly", watched)
    quick(make, "weight_bits=6", target=target).export(tmp_path / "m.onnx")
    assert asked == [integers]


def test_a_network_that_onnxruntime_fails_to_run_is_a_backend_error(compiled: hawqfx.Compiled, tmp_path: Path) -> None:
    compiled.export(tmp_path / "net.onnx")
    with pytest.raises(BackendError, match="loads the network and fails to run it"):
        ort.run(ort.session(tmp_path / "net.onnx"), [torch.zeros(1, 5, 8, 8).numpy()])


def test_a_quantized_tensor_that_is_an_output_too_is_compared(tmp_path: Path) -> None:
    """Its site was left out of what is looked at, and the file refused for other sites than the graph's."""
    data = [x for x, _ in images()]
    compiled = quick(QuantizedOutput, "weight_bits=6", data=data, loss=lambda output, _: output[1].square().mean())
    compiled.export(tmp_path / "m.onnx", check=False)
    found = parity.sites(compiled.program, tmp_path / "m.onnx", compiled.session.context.batches[0])
    assert {site.key for site in found} == {site.key for site in compiled.planned.activations}
    assert max(site.largest for site in found) <= 1


@pytest.mark.parametrize(
    ("codes", "flips", "fits"), [(336, 5, True), (336, 11, False), (10_000, 110, True), (4, 3, False)]
)
def test_as_many_codes_lie_on_ties_as_chance_allows(codes: int, flips: int, fits: bool) -> None:
    site, names = SiteCodes("relu", codes, flips, 1), {"relu": "layer1.relu output"}
    if fits:
        check._refuse_wrong([site], names, "other codes")
    else:
        with pytest.raises(ExportError, match=r"other codes at 'layer1\.relu output'"):
            check._refuse_wrong([site], names, "other codes")
