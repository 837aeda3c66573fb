"""The noise of a row: a function of its seed and a purpose alone. Knows no batch, worker or device.

Streams are told apart by hashing, never by arithmetic on seeds, so no two rows, stages or purposes share
one. The generator is NumPy's Philox with a key of 128 bits: torch's CPU generator keeps 32 bits of its
seed, and among a million rows hundreds of pairs would get the same noise.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BASE = "base"
"""Purpose of the noise that a trajectory starts from, on the full grid."""


def expansion(stage: int) -> str:
    """Purpose of the fresh noise that the expansion after stage `stage` adds."""
    return f"expand/{stage}"


def sampler(stage: int) -> str:
    """Purpose of the noise that a stochastic scheduler asks for while it steps through stage `stage`."""
    return f"sampler/{stage}"


def whole_seeds(seeds: Iterable[Any]) -> list[int]:
    """Seeds as Python's own numbers, from any kind of whole numbers: numpy's, a tensor's. ValueError for any
    other value."""
    try:
        return [operator.index(seed) for seed in seeds]
    except TypeError:
        raise ValueError(f"seeds are {seeds!r}; they must be whole numbers") from None


def _key(seed: int, purpose: str) -> bytes:
    """16 bytes that name a stream. ValueError unless -2**63 <= seed < 2**64; -1 and 2**64 - 1 differ."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be from -2**63 to 2**64 - 1")
    message = seed.to_bytes(9, "little", signed=True) + purpose.encode()
    return hashlib.blake2b(message, digest_size=16, person=b"overtone.noise").digest()


def row_noise(seed: int, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one row: float32 on the CPU, [*shape] without a batch axis.

    The same seed, purpose and shape give the same bits in any batch, process and on any device.
    """
    stream = np.random.Generator(np.random.Philox(key=int.from_bytes(_key(seed, purpose), "little")))
    return torch.from_numpy(stream.standard_normal(tuple(shape), dtype=np.float32))


def batch_noise(seeds: Sequence[int], purpose: str, shape: Sequence[int]) -> Tensor:
    """The rows' noise stacked: float32 on the CPU, [len(seeds), *shape]."""
    return torch.stack([row_noise(seed, purpose, shape) for seed in seeds])


def row_generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of one row for code that takes nothing else, such as a pipeline's `generator`.

    torch keeps 32 bits of what seeds it: for noise that must never repeat between rows use `row_noise`.
    """
    return torch.Generator().manual_seed(int.from_bytes(_key(seed, purpose)[:8], "little"))
