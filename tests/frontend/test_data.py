"""Data as people have it: arrays, mappings that are no dicts, what a DataLoader yields."""

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hawqfx.errors import DataError
from hawqfx.frontend.data import gather

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])
ARRAY, LABELS = X.numpy(), Y.numpy()
IDS = np.arange(8).reshape(4, 2)
READ_ONLY = np.broadcast_to(ARRAY, ARRAY.shape)


@pytest.mark.parametrize(
    "data",
    [
        [(ARRAY, LABELS)],
        [(READ_ONLY, Y)],
        [[X, Y]],
        [{"x": ARRAY, "labels": LABELS}],
        {"x": X, "labels": Y},
        UserDict(x=ARRAY, labels=LABELS),  # a BatchEncoding of transformers is one
        [(UserDict(x=X), LABELS)],
        DataLoader(TensorDataset(X, Y), batch_size=4),
    ],
)
def test_inputs_and_targets(data: Any) -> None:
    (batch,) = gather(data)
    assert torch.equal(batch.tensors[0], X)
    assert torch.equal(batch.target, Y)
    assert (batch.kwargs.keys() or {"x"}) == {"x"}


@pytest.mark.parametrize(
    "data", [X, ARRAY, [X], [ARRAY], [(X,)], [[ARRAY]], DataLoader(TensorDataset(X), batch_size=4)]
)
def test_inputs_alone(data: Any) -> None:
    (batch,) = gather(data)
    assert torch.equal(batch.args[0], X)
    assert batch.target is None


def test_several_inputs_of_several_kinds() -> None:
    (batch,) = gather([((ARRAY, IDS, np.float32(2), None), LABELS)])
    assert [tensor.dtype for tensor in batch.tensors] == [torch.float32, torch.int64]
    assert batch.args[2:] == (2.0, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(X, X, Y)], "batch 0 is a tuple of 3: a batch is a tensor, .* several inputs are a tuple in that pair"),
        ([UserDict(input_ids=[[1, 2], [3, 4]])], "batch 0 holds no tensors: .* return_tensors='pt' of a tokenizer"),
        ([np.array(["a", "b"])], "batch 0 has an array of <U1, of which torch makes no tensor"),
        ([X, X[:, :2]], r"batch 1 has inputs of shape \[\(4, 2\)\], batch 0 of shape \[\(4, 3\)\].*dynamic_shapes="),
    ],
)
def test_what_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        gather(data)


def test_sizes_that_vary() -> None:
    assert [batch.args[0].shape[1] for batch in gather([X, X[:, :2]], varying=True)] == [3, 2]
    with pytest.raises(DataError, match=r"batch 1 has inputs of shape \[\(4,\)\], batch 0 of shape \[\(4, 3\)\]"):
        gather([X, X[:, 0]], varying=True)
