"""What engines that get ready for a shape before its first batch have in common: the order in which they do.

`warm` goes through the stages of a plan and the batch sizes that may come. What is done for one of them is
the engine's own: compile/engine.py compiles, graphs/engine.py captures. Knows no jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from overtone.progressive.caches import transformers
from overtone.progressive.engine.engine import Engine
from overtone.progressive.engine.text import Encoded
from overtone.progressive.families import Family
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling

WORTH_IT = 1.05
"""A batch twice as large must make this many times as many rows a second to be worth warming up."""
TextsOf = Callable[[int, int, Sampling], Encoded]
"""(rows, words, sampling) -> as many prompts of as many words."""


@dataclass(frozen=True)
class WarmUp:
    """What one batch size of one stage took to get ready."""

    stage: Stage
    rows: int
    graphs: int
    """Compiled for it, or loaded from the cache."""
    seconds: float
    rows_per_s: float
    """One step's, once it was ready."""
    captures: int = 0
    """Calls of the transformer captured for it."""


class WarmedEngine(Engine):
    """An engine that gets ready for shapes. Its own part: `sizes`, `_warm_one` and, if need be, `_expect`."""

    turns: AbstractContextManager[object] = nullcontext()
    """Held while one shape is made ready."""

    def __init__(self, pipe: Any, family: Family | str | None = None) -> None:
        """As `Engine`."""
        super().__init__(pipe, family)
        self._paces: dict[tuple[Stage, int], float] = {}
        """Rows a second of each batch size that was tried."""
        self._fits: dict[Stage, int] = {}
        """The largest batch size that memory holds, where a larger one was tried."""
        self._enough: dict[Stage, int] = {}
        """The batch size at which a search has ended."""

    def sizes(self, plan: SamplingPlan, index: int, sampling: Sampling) -> tuple[int, ...]:
        """The batch sizes that are warm for stage `index`, increasing."""
        raise NotImplementedError

    def _expect(self, missing: Sequence[tuple[Stage, int]], sampling: Sampling) -> None:
        """These stages and batch sizes are about to be made ready."""

    def _warm_one(
        self, plan: SamplingPlan, stage: Stage, rows: int, sampling: Sampling, texts: TextsOf
    ) -> WarmUp:
        raise NotImplementedError

    def warm(
        self,
        plan: SamplingPlan,
        batch_sizes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        encoded: TextsOf | None = None,
        search: bool = False,
    ) -> list[WarmUp]:
        """Get ready for all that batches of these sizes, some for each stage, can ask for, and try it; what
        is warm costs nothing.

        `encoded`: texts to do it with; unset: from the text encoders. `search`: at each stage go up the sizes
        only while that makes more rows a second. Sizes that memory does not hold are left out; where that is
        all of a stage's, the error goes through. Recompiled where a second try still compiles something.
        """
        return list(self.warm_each(plan, batch_sizes, sampling, encoded=encoded, search=search))

    def warm_each(
        self,
        plan: SamplingPlan,
        batch_sizes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        encoded: TextsOf | None = None,
        search: bool = False,
    ) -> Iterator[WarmUp]:
        """`warm`, one batch size of one stage at a time."""
        alone = self.row_by_row(sampling)
        missing = [
            (index, rows)
            for index, (stage, sizes) in enumerate(zip(plan.stages, batch_sizes, strict=True))
            for rows in ([1] if alone else sorted(set(sizes)))
            if stage.steps and rows not in self.sizes(plan, index, sampling)
            if not self._too_many(stage, rows, search)
        ]
        self._expect([(plan.stages[index], rows) for index, rows in missing], sampling)
        for index, rows in missing:
            stage = plan.stages[index]
            if self._too_many(stage, rows, search):
                continue
            smaller = [size for size in self.sizes(plan, index, sampling) if size < rows]
            try:
                with self.turns:
                    now = self._warm_one(plan, stage, rows, sampling, encoded or self._texts)
            except (torch.OutOfMemoryError, MemoryError):
                if not smaller:
                    raise
                self._fits[stage] = smaller[-1]
                continue
            self._paces[stage, rows] = now.rows_per_s
            yield now
            before = self._paces.get((stage, max(smaller, default=0)), 0.0)
            if search and now.rows_per_s < WORTH_IT * before:
                self._enough[stage] = rows

    def _too_many(self, stage: Stage, rows: int, search: bool) -> bool:
        return rows > self._fits.get(stage, rows) or (search and rows > self._enough.get(stage, rows))

    def _ends(self, plan: SamplingPlan, stage: Stage) -> list[SamplingPlan]:
        """Short plans that make all calls of a stage: two steps, for the second may not be called like the
        first; and the last one, for models that change hands on the way down. Of each part, for unguided
        steps may have fewer rows in a call."""
        ends = [part.cut(part.first, min(part.first + 2, part.last)) for part in stage.parts]
        if len(transformers(self.pipe)) > 1:
            ends += [part.cut(part.last - 1, part.last) for part in stage.parts]
        return [replace(plan, stages=(end,), start=0) for end in ends]  # from noise: the shapes are the same

    def _run(self, plans: Sequence[SamplingPlan], text: Encoded, sampling: Sampling) -> int:
        """Make some rows by these plans; the number of steps."""
        for plan in plans:
            self.denoise(plan, text, list(range(len(text))), sampling)
        return sum(stage.steps for plan in plans for stage in plan.stages)

    def _texts(self, rows: int, words: int, sampling: Sampling) -> Encoded:
        one = self.encode([" ".join(["a"] * words)], [""], sampling)
        return one[[0] * rows]
