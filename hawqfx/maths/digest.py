"""A name for the content of tensors."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(text: str, tensors: Iterable[tuple[str, Tensor]] = ()) -> str:
    """SHA-256 of a text and of tensors with their names, types and shapes, as 64 hexadecimal digits; the order counts.

    Args:
        text: any text.
        tensors: pairs of a name and a tensor, on any device.
    """
    state = hashlib.sha256(f"{len(text)} {text}".encode())
    for name, tensor in tensors:
        content = tensor.detach().cpu().contiguous()
        state.update(f"{name} {content.dtype} {tuple(content.shape)};".encode())
        state.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
