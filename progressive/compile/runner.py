"""Chunks filled up to sizes that are warm, and run with compiling forbidden. Knows no texts and no warm-up.

`CompiledRunner` wraps another `StageRunner`: what it allows is in its books, which `warm` (compile/engine.py)
writes. While they are open, graphs may be compiled and rows go as they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from overtone.progressive.engine import PipelineCall, StageInput, StageRunner
from overtone.progressive.errors import Recompiled
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling


class CompiledRunner:
    """The runner of an engine whose blocks are compiled."""

    def __init__(self, call: PipelineCall, inner: StageRunner) -> None:
        self._call, self._inner = call, inner
        self._warm: dict[tuple[Any, ...], set[int]] = {}
        self._open = False

    def chunks(
        self, plan: SamplingPlan, index: int, rows: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """Chunks of warm sizes: the last row of a smaller one is listed again until it is full. Recompiled
        where no size of this stage is warm."""
        chunks = self._inner.chunks(plan, index, rows, sampling)
        stage = plan.stages[index]
        if self._open or not stage.steps:
            return chunks
        sizes = self.sizes(stage, sampling)
        if not sizes:
            height, width = stage.grid
            raise Recompiled(
                f"no graph was compiled for a grid of {height} x {width} ({plan.height_px} x "
                f"{plan.width_px} px); call `warm` with this plan before its first batch"
            )
        most = sizes[-1]
        parts = [chunk[k : k + most] for chunk in chunks for k in range(0, len(chunk), most)]
        return [
            part + [part[-1]] * (next(size for size in sizes if size >= len(part)) - len(part))
            for part in parts
        ]

    def run(self, given: StageInput) -> torch.Tensor:
        """The inner runner's; Recompiled where it would compile anything."""
        if self._open:
            return self._inner.run(given)
        with sealed():
            return self._inner.run(given)

    def sizes(self, stage: Stage, sampling: Sampling) -> tuple[int, ...]:
        """The numbers of rows that are warm for this stage, increasing."""
        warm = [self._of(key) for key in self.keys(stage, sampling)]
        return tuple(sorted(set.intersection(*warm))) if warm else ()

    def add(self, stage: Stage, sampling: Sampling, rows: int) -> Callable[[], None]:
        """From now on this many rows of this stage count as warm; what is returned takes that back."""
        new = [self._of(key) for key in self.keys(stage, sampling) if rows not in self._of(key)]
        for warm in new:
            warm.add(rows)

        def withdraw() -> None:
            for warm in new:
                warm.discard(rows)

        return withdraw

    @property
    def shapes(self) -> int:
        """The number of combinations of grid, guidance and rows that are warm."""
        return sum(map(len, self._warm.values()))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within it graphs may be compiled, and rows go as they are given."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def keys(self, stage: Stage, sampling: Sampling) -> set[tuple[Any, ...]]:
        """What makes the stage's shapes, but for the number of rows: one, or two where some of its steps are
        unguided."""
        guided = self._call.guided(sampling)
        return {(stage.grid, stage.frames, guided, bool(part.guided_steps)) for part in stage.parts}

    def _of(self, key: tuple[Any, ...]) -> set[int]:
        return self._warm.setdefault(key, set())


@contextmanager
def sealed() -> Iterator[None]:
    """Within it nothing is compiled: code that would be compiled raises Recompiled."""
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        raise Recompiled(f"a shape was met that no warm-up had seen: {error}") from error
