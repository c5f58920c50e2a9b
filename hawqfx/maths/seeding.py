"""Random streams that depend on a key alone."""

import hashlib

import torch


def generator(*key: object, device: torch.device) -> torch.Generator:
    """A random stream that depends on `key` alone, so on no order and on no number of workers."""

    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)
