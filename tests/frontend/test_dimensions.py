"""Lengths and sizes that vary: in the data, in the graph, and in the file, under their names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import hawqfx
from hawqfx.errors import DataError, UsageError
from hawqfx.frontend.capture import capture
from hawqfx.frontend.data import Batch
from hawqfx.runtime import ort


class Sequences(nn.Module):
    """An embedding, causal attention with a mask, and a head of each token."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.table, self.qkv, self.head = nn.Embedding(30, 8), nn.Linear(8, 24), nn.Linear(8, 5)
        self.causal = causal

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.table(input_ids)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        mask = None if self.causal else (attention_mask > 0)[:, None, None]
        x = x + F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal).squeeze(1)
        return {"logits": self.head(torch.relu(x) * attention_mask[..., None])}


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.stem(x)))


def seeded(make: Any) -> Any:
    torch.manual_seed(0)
    return make().eval()


def tokens(length: int, batch: int = 4) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = 0
    return {"input_ids": torch.randint(0, 30, (batch, length), generator=random), "attention_mask": mask}


def shapes(path: Path) -> tuple[list[list[Any]], list[list[Any]]]:
    session = ort.session(path)
    return [value.shape for value in session.get_inputs()], [value.shape for value in session.get_outputs()]


def compiled(model: Any, data: Any, **options: Any) -> hawqfx.Compiled:
    return hawqfx.compile(model, "weight_bits=7", data, rounding="nearest", sensitivity="mse", **options)


L = Dim("tokens")
GIVEN: dict[str, tuple[Any, str]] = {
    "named": ({"input_ids": {1: L}, "attention_mask": {1: L}}, "tokens"),
    "whole": (({0: Dim("n"), 1: L}, {0: Dim("n"), 1: L}), "tokens"),
    "dynamic": ({key: {1: Dim.DYNAMIC} for key in ("input_ids", "attention_mask")}, "sequence"),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("how", GIVEN)
def test_sequences_of_any_length(tmp_path: Path, how: str, causal: bool) -> None:
    given, name = GIVEN[how]
    model = seeded(lambda: Sequences(causal))
    made = compiled(model, [tokens(6), tokens(9)], dynamic_shapes=given)
    made.export(tmp_path / "model.onnx")
    batch = "n" if how == "whole" else "batch"
    assert shapes(tmp_path / "model.onnx") == ([[batch, name]] * 2, [[batch, name, 5]])
    for length, size in ((6, 4), (3, 1), (17, 2)):
        inputs = tokens(length, size)
        (output,) = ort.run(ort.session(tmp_path / "model.onnx"), [value.numpy() for value in inputs.values()])
        expected = made.model(**inputs)["logits"].detach().numpy()
        # float32 sums in another order; a tie that they flip moves the output by a step of 8 bits
        assert np.abs(output - expected).max() < 0.01 * np.abs(expected).max()
    assert not made.planned.left_float


def test_a_length_varies_behind_every_causal_layer() -> None:
    """A triangle of a length that varies is made in the graph; in the shapes that it was made with, later layers would
    see one length alone."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                q, k, v = layer(x).chunk(3, -1)
                x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return x

    model, data = seeded(Twice), torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    made = compiled(model, data, dynamic_shapes={"x": {1: Dim("tokens", max=48)}})
    longer = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made.session.measured.graph(longer), model(longer))


def test_images_of_any_size(tmp_path: Path) -> None:
    data = [torch.randn(2, 1, size, size + 2, generator=torch.Generator().manual_seed(size)) for size in (8, 11)]
    made = compiled(seeded(Pixels), data, dynamic_shapes={"x": {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}})
    made.export(tmp_path / "model.onnx")
    assert shapes(tmp_path / "model.onnx") == (
        [["batch", 1, "height", "width"]],
        [["batch", 2, "height", "width"]],
    )


def test_an_input_that_python_has_a_function_of_keeps_the_names_of_its_dimensions(tmp_path: Path) -> None:
    """torch.nn.Sequential calls its input `input`; fx calls the node input_1."""
    compiled(seeded(lambda: nn.Sequential(nn.Linear(8, 3))), [torch.randn(4, 8)]).export(tmp_path / "model.onnx")
    assert shapes(tmp_path / "model.onnx") == ([["batch", 8]], [["batch", 3]])


def test_an_exported_program_stays_dynamic(tmp_path: Path) -> None:
    example = tokens(6)
    dynamic = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in example}
    exported = torch.export.export(seeded(Sequences), (), example, dynamic_shapes=dynamic)
    made = compiled(exported, [example, tokens(9)])
    made.export(tmp_path / "model.onnx")
    made.export_float(tmp_path / "float.onnx")
    for file in ("model.onnx", "float.onnx"):
        assert shapes(tmp_path / file) == ([["batch", "sequence"]] * 2, [["batch", "sequence", 5]])
    with pytest.raises(UsageError, match="an ExportedProgram has those that it was exported with"):
        compiled(exported, [example], dynamic_shapes=dynamic)


def test_sizes_that_the_graph_does_not_take_are_refused_with_both_shapes() -> None:
    example = tokens(6)
    exported = torch.export.export(seeded(Sequences), (), example)
    with pytest.raises(DataError, match=r"batch 1 has input_ids of shape \(4, 9\), and the model .* \(4, 6\)"):
        compiled(exported, [example, tokens(9)])


class Comparing(nn.Module):
    """Asks in Python whether two batches are of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[0] != y.shape[0]:
            raise ValueError("as many of the one as of the other")
        return self.head(x) + self.head(y.repeat_interleave(1, 0))


def test_inputs_whose_batches_must_be_equal(tmp_path: Path) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    made = compiled(seeded(Comparing), [((x, x + 1), torch.zeros(6, dtype=torch.long))])
    made.export(tmp_path / "model.onnx")
    assert shapes(tmp_path / "model.onnx") == ([["batch", 4]] * 2, [["batch", 3]])


class Keywords(nn.Module):
    """Takes what it does not know by name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, **rest: Tensor) -> Tensor:
        return self.head(x) + rest["y"].sum(-1, keepdim=True)


def test_inputs_that_a_model_takes_as_keywords_without_a_name(tmp_path: Path) -> None:
    x, model = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), seeded(Keywords)
    made = compiled(model, [{"x": x, "y": x + 1}])
    assert "forward" not in vars(model)
    made.export(tmp_path / "model.onnx")
    assert shapes(tmp_path / "model.onnx") == ([["batch", 4]] * 2, [["batch", 3]])


def test_the_batch_varies_beside_what_is_given_of_inputs_in_a_list() -> None:
    class Several(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return sum(tensor.sum(-1) for tensor in tensors)  # type: ignore[return-value]

    example = Batch((torch.zeros(3, 5), torch.zeros(3, 5)), {})
    program = capture(Several().eval(), example, {"tensors": ({1: Dim("length")}, {1: Dim("length")})})
    sizes = [node.meta["val"].shape for node in program.graph.graph.find_nodes(op="placeholder")]
    assert [[isinstance(size, torch.SymInt) for size in shape] for shape in sizes] == [[True, True]] * 2
