"""How many rows a GPU's memory holds: read from it while chunks run. Knows no batch and no stage.

    memory = memory_of(engine, share=1.0)       # None on a CPU, which swaps where a GPU gives up
    with memory.watching(tokens=8 * 1024): ...  # a chunk of eight rows of 1,024 tokens
    memory.most(4096)                           # rows of 4,096 tokens that fit, as far as is known

What a chunk takes beside the model is taken to grow in proportion to its tokens, as it does but for masks:
attention keeps no matrix of all pairs. The largest chunk that was seen tells of all others, and a part of
what is free is left for the VAE, for texts and for gaps between blocks of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from overtone.cluster.worker.protocol import Meter, OwnDevice

ROOM = 0.92
"""Share of the memory that may be in use at the peak of a chunk."""


class Memory:
    """What chunks took, and what others would."""

    def __init__(self, meter: Meter, share: float = 1.0) -> None:
        """`share`: of the device, for a worker that has it with others."""
        self._meter, self._share = meter, share
        self._tokens = 0
        self._taken = 0

    @contextmanager
    def watching(self, tokens: int) -> Iterator[None]:
        """A chunk of so many tokens runs within it. One that fails tells nothing."""
        before = self._meter.held()
        self._meter.begin()
        yield
        if tokens >= self._tokens:
            self._tokens, self._taken = tokens, max(0, self._meter.peak() - before)

    def most(self, tokens: int) -> int | None:
        """Rows of so many tokens that fit together, at least 1; None: no chunk has shown what one takes."""
        if not self._taken:
            return None
        room = ROOM * self._share * self._meter.available() - self._meter.held()
        return max(1, int(room * self._tokens / self._taken / tokens))


def memory_of(engine: Any, share: float) -> Memory | None:
    """The memory of an engine's device; None where nothing is known of it."""
    if isinstance(engine, OwnDevice):
        return Memory(engine.meter, share)
    if str(engine.device).startswith("cuda"):
        return Memory(_Cuda(engine.device), share)
    return None


class _Cuda:
    """Torch's own counts."""

    def __init__(self, device: Any) -> None:
        import torch  # loaded already, by whoever made the engine

        self._cuda, self._device = torch.cuda, device

    def available(self) -> int:
        free, _ = self._cuda.mem_get_info(self._device)
        return int(free) + self._cuda.memory_reserved(self._device)

    def held(self) -> int:
        return int(self._cuda.memory_allocated(self._device))

    def begin(self) -> None:
        self._cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return int(self._cuda.max_memory_allocated(self._device))
