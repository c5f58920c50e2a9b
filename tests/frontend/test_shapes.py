"""Batches at a shape: sizes by name, cut and repeated data, sizes that follow from others, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from hawqfx.errors import BudgetError
from hawqfx.frontend import decoders
from hawqfx.frontend.capture import capture
from hawqfx.frontend.data import Batch, gather
from hawqfx.frontend.shapes import at_shape, check_shape
from hawqfx.ir.program import Program
from tests.frontend.test_dimensions import Pixels, Sequences, seeded, tokens
from tests.test_decoders import model, texts


def pixels(sizes: Any = None) -> tuple[Program, Batch]:
    (batch,) = gather([torch.randn(3, 1, 8, 10, generator=torch.Generator().manual_seed(0))])
    return capture(seeded(Pixels), batch, {"x": {2: Dim.DYNAMIC} if sizes is None else sizes}), batch


def decoder() -> tuple[Program, Batch]:
    """The first batch holds 6 texts, each with 6 new tokens after 6 past ones."""
    made = decoders.causal_decoder(model("grouped-query"))
    first, *_ = gather(decoders.decoder_batches(made, texts()), varying=True)
    return capture(made, first, decoders.shapes_of_decoder(2)), first


def sizes_of(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in batch.tensors]


def test_one_sample_and_the_sizes_of_the_data_where_none_are_asked_for() -> None:
    program, data = pixels()
    batch, shape = at_shape(program, data, {})
    assert shape == {"batch": 1, "height": 8}
    assert torch.equal(batch.tensors[0], data.tensors[0][:1])
    program, data = decoder()
    batch, shape = at_shape(program, data, {})
    assert shape == {"batch": 1, "sequence": 6, "past": 6}
    assert sizes_of(batch) == [(1, 6), (1, 12), *[(1, 2, 6, 8)] * 4]
    assert batch.target is None


def test_data_are_cut_and_repeated() -> None:
    program, data = pixels()
    (image,) = data.tensors
    batch, shape = at_shape(program, data, {"height": 20, "batch": 4})
    assert shape == {"batch": 4, "height": 20}
    wanted = torch.cat([image, image[:1]])
    assert torch.equal(batch.tensors[0], torch.cat([wanted, wanted, wanted[:, :, :4]], 2))
    assert torch.equal(at_shape(program, data, {"height": 5})[0].tensors[0], image[:1, :, :5])


@pytest.mark.parametrize("asked", [{"sequence": 1}, {"sequence": 1, "past": 128}, {"past": 0}, {"batch": 2, "past": 1}])
def test_the_mask_of_a_decoder_stands_for_past_and_new_tokens(asked: dict[str, int]) -> None:
    program, data = decoder()
    batch, shape = at_shape(program, data, asked)
    assert shape == {"batch": 1, "sequence": 6, "past": 6} | asked
    samples, new, past = shape["batch"], shape["sequence"], shape["past"]
    assert sizes_of(batch) == [(samples, new), (samples, past + new), *[(samples, 2, past, 8)] * 4]
    check_shape(program, data, asked)


def test_a_past_is_made_of_nothing_where_the_data_have_none() -> None:
    program, _ = decoder()
    made = decoders.causal_decoder(model("grouped-query"))
    _, start = gather(decoders.decoder_batches(made, texts()), varying=True)
    batch, _ = at_shape(program, start, {"past": 3})
    assert sizes_of(batch)[2:] == [(1, 2, 3, 8)] * 4
    check_shape(program, start, {"past": 3})


def test_sizes_that_follow_from_others() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(x + y.reshape(y.shape[0], 2, x.shape[1], 3).sum(1))

    half = Dim("half")
    (data,) = gather([((torch.randn(4, 5, 3), torch.randn(4, 10, 3)), torch.zeros(4, 5, 2))])
    program = capture(seeded(Halves), data, {"x": {1: half}, "y": {1: 2 * half}})
    for asked in ({"half": 7}, {"2*half": 14}, {"half": 7, "2*half": 14}):
        batch, shape = at_shape(program, data, asked)
        assert sizes_of(batch) == [(1, 7, 3), (1, 14, 3)]
        assert shape == {"batch": 1, "half": 7, "2*half": 14}
    for wrong in ({"2*half": 13}, {"half": 7, "2*half": 16}):
        with pytest.raises(BudgetError, match=r"2\*half=1[36]: the network takes"):
            at_shape(program, data, wrong)


def test_a_tensor_without_a_batch_dimension_stays_whole() -> None:
    class Anchored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor, anchors: Tensor) -> Tensor:
            return self.head(x) + anchors.sum()

    (data,) = gather([((torch.randn(4, 3), torch.randn(7, 4)), torch.zeros(4, 2))])
    batch, shape = at_shape(capture(seeded(Anchored), data), data, {"batch": 2})
    assert sizes_of(batch) == [(2, 3), (7, 4)]
    assert shape == {"batch": 2}


def test_a_graph_of_one_size_has_no_shape_to_ask_for() -> None:
    example = tokens(6)
    exported = torch.export.export(seeded(Sequences), (), example)
    (data,) = gather([example])
    program = capture(exported, data)
    batch, shape = at_shape(program, data, {})
    assert (sizes_of(batch), shape) == ([(4, 6), (4, 6)], {})
    with pytest.raises(BudgetError, match=r"batch=1: of this network nothing varies, and no 'batch'"):
        at_shape(program, data, {"batch": 1})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sequence": 1}, r"sequence=1: of this network batch, height varies, and no 'sequence'"),
        ({"height": 1.5}, r"height=1\.5: a size is a whole number"),
        ({"height": True}, r"height=True: a size is a whole number"),
        ({"height": 2}, r"height=2: the network was captured for at least 4"),
        ({"height": 17}, r"height=17: the network was captured for at most 16"),
    ],
)
def test_shapes_that_a_graph_cannot_take_are_refused(asked: Any, message: str) -> None:
    program, data = pixels({2: Dim("height", min=4, max=16)})
    with pytest.raises(BudgetError, match=message):
        at_shape(program, data, asked)


def test_shapes_that_only_a_run_refuses() -> None:
    program, data = decoder()
    with pytest.raises(BudgetError, match=r"total=4: it is past \+ sequence; give those"):
        check_shape(program, data, {"total": 4})
    with pytest.raises(BudgetError, match=r"cannot run at batch=1, sequence=0, past=6: "):
        check_shape(program, data, {"sequence": 0})
    images, data = pixels()
    with pytest.raises(BudgetError, match=r"computes nothing at batch=0, height=8: give sizes above zero"):
        check_shape(images, data, {"batch": 0})
    learned = decoders.causal_decoder(model("learned positions"))
    first, *_ = gather(decoders.decoder_batches(learned, texts()), varying=True)
    program = capture(learned, first, decoders.shapes_of_decoder(2))
    with pytest.raises(BudgetError, match=r"cannot run at batch=1, sequence=1, past=64: "):  # of 64 positions
        check_shape(program, first, {"sequence": 1, "past": 64})
