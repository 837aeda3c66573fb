"""The transformer's blocks compiled, one static graph a shape, and none after warm-up. Knows no jobs.

    engine = CompiledEngine(pipe, mode="blocks")
    plan = engine.plan(sampling)
    engine.warm(plan, [(1, 8)] * len(plan.stages), sampling)  # minutes; seconds where a cache knows it all
    engine.denoise(plan, ...)                                 # as `Engine`, for plans that are warm

What changes in a batch job is the grid, the number of rows and, for some families, the length of the text.
Grids and rows are compiled for as they are, which is fastest: a batch smaller than any that is warm is
filled up with copies of its last row, which are dropped at the end. The length of the text, where it varies,
is the one symbolic axis of a graph. A shape that no warm-up has seen raises `Recompiled`: left to itself,
torch would compile it in the middle of a shard, or, past its limit, run it uncompiled with no more than a
log line.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from overtone.progressive import library
from overtone.progressive.caches import transformers
from overtone.progressive.compile.blocks import Blocks, Compile
from overtone.progressive.compile.runner import CompiledRunner
from overtone.progressive.engine import Encoded, Engine
from overtone.progressive.errors import Recompiled
from overtone.progressive.families import Family, Guided
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling

WORTH_IT = 1.05
"""A batch twice as large must make this many times as many rows a second to be worth warming up."""
_WORDS = (1, 4, 40, 120)
"""Lengths of the texts that show which axes are the text's: more than Z-Image's steps of 32 tokens apart."""
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
    """One step's, compiled."""


class CompiledEngine(Engine):
    """An engine whose transformer blocks are compiled. Needs `warm` for every plan before its first batch."""

    def __init__(
        self,
        pipe: Any,
        family: Family | str | None = None,
        *,
        mode: Compile = "blocks",
        cache_dir: str | Path | None = None,
        backend: str | Any = "inductor",
    ) -> None:
        """`cache_dir`: where compiled code is kept and found again, by all processes that name it; unset:
        torch's own folder, which the processes of one user on a machine share. `backend`: as `torch.compile`.
        """
        super().__init__(pipe, family)
        self._lock: Any = nullcontext()
        if cache_dir is not None:
            folder = Path(cache_dir).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # read when torch first compiles
            # Workers of a machine start together: one compiles a shape, the others then load it.
            self._lock = FileLock(folder / "warm-up.lock")
        self._blocks = Blocks(pipe, mode, backend)
        self.runner: CompiledRunner = CompiledRunner(self.call, self.runner)
        self._learned: set[tuple[Guided, bool]] = set()

    def sizes(self, plan: SamplingPlan, index: int, sampling: Sampling) -> tuple[int, ...]:
        """The batch sizes that are warm for stage `index`, increasing."""
        return self.runner.sizes(plan.stages[index], sampling)

    def warm(
        self,
        plan: SamplingPlan,
        batch_sizes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        encoded: TextsOf | None = None,
        search: bool = False,
    ) -> list[WarmUp]:
        """Compile and try every graph that batches of these sizes, some for each stage, can ask for; what is
        warm costs nothing.

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
            (stage, rows)
            for index, (stage, sizes) in enumerate(zip(plan.stages, batch_sizes, strict=True))
            for rows in ([1] if alone else sorted(set(sizes)))
            if stage.steps and rows not in self.sizes(plan, index, sampling)
        ]
        shapes = sum(len(self.runner.keys(stage, sampling)) for stage, _ in missing)
        self._blocks.expect(shapes + self.runner.shapes)
        before: WarmUp | None = None
        full: set[Stage] = set()
        for stage, rows in missing:
            if stage in full:
                continue
            if before is not None and before.stage is not stage:
                before = None
            try:
                with self._lock:
                    now = self._warm_one(plan, stage, rows, sampling, encoded or self._texts)
            except (torch.OutOfMemoryError, MemoryError):
                if before is None:
                    raise
                full.add(stage)
                continue
            except library.RecompileLimit as error:
                raise Recompiled(f"more shapes than torch was told to expect: {error}") from error
            yield now
            if search and before is not None and now.rows_per_s < WORTH_IT * before.rows_per_s:
                full.add(stage)
            before = now

    def _warm_one(
        self, plan: SamplingPlan, stage: Stage, rows: int, sampling: Sampling, texts: TextsOf
    ) -> WarmUp:
        # Two steps, for the second may not be called like the first; and the last one, for models that
        # change hands on the way down. Of each part, for unguided steps may have fewer rows in a call.
        ends = [part.cut(part.first, min(part.first + 2, part.last)) for part in stage.parts]
        if len(transformers(self.pipe)) > 1:
            ends += [part.cut(part.last - 1, part.last) for part in stage.parts]
        plans = [replace(plan, stages=(end,), start=0) for end in ends]  # from noise: the shapes are the same

        def run(text: Encoded) -> None:
            for short in plans:
                self.denoise(short, text, list(range(len(text))), sampling)

        def text(words: int, odd: int) -> Encoded:
            """Prompts of one length but the last, negative ones all of one."""
            same = texts(rows, words, sampling)
            last = texts(1, odd, sampling)
            return Encoded((*same.positive[:-1], *last.positive), same.negative)

        begin, before = time.perf_counter(), library.graphs_compiled()
        varies = self.family.ragged is not None or self.family.text is None
        with self.runner.open():
            if varies:
                self._learn(plan, sampling, texts)
            for odd in (_WORDS[0], _WORDS[-1]) if varies else _WORDS[:1]:
                run(text(_WORDS[0], odd))
        seconds, graphs = time.perf_counter() - begin, library.graphs_compiled() - before
        steps, again = 0, self.call.now()
        withdraw = self.runner.add(stage, sampling, rows)
        try:
            for odd in (_WORDS[2], _WORDS[1]) if varies else _WORDS[:1]:  # lengths not compiled for
                run(text(_WORDS[2] if varies else _WORDS[0], odd))
                steps += sum(end.steps for end in ends)
        except BaseException:
            withdraw()
            raise
        return WarmUp(stage, rows, graphs, seconds, rows * steps / max(self.call.now() - again, 1e-9))

    def _learn(self, plan: SamplingPlan, sampling: Sampling, texts: TextsOf) -> None:
        """Of guided steps and of others before the first is compiled: texts of one length take another way
        through the blocks than a prompt beside a shorter negative one."""

        def call(part: Stage, *words: int) -> Callable[[], Any]:
            text = Encoded.cat([texts(1, n, sampling) for n in words])
            one = replace(plan, stages=(part.one_step(),), start=0)
            return lambda: self.denoise(one, text, list(range(len(text))), sampling)

        for part in (part for stage in plan.stages for part in stage.parts):
            kind = self.call.guided(sampling), bool(part.guided_steps)
            if kind not in self._learned:
                self._blocks.learn_axes([call(part, n) for n in _WORDS])
                self._blocks.learn_axes([call(part, _WORDS[0], n) for n in _WORDS[1:]])
                self._learned.add(kind)

    def _texts(self, rows: int, words: int, sampling: Sampling) -> Encoded:
        one = self.encode([" ".join(["a"] * words)], [""], sampling)
        return one[[0] * rows]
