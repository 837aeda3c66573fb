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
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from overtone.progressive import library
from overtone.progressive.compile.blocks import Blocks, Compile
from overtone.progressive.compile.runner import CompiledRunner
from overtone.progressive.engine import Encoded, TextsOf, WarmedEngine, WarmUp
from overtone.progressive.errors import Recompiled
from overtone.progressive.families import Family, Guided
from overtone.progressive.graphs import Capturer, GraphedRunner, Graphs
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling

_WORDS = (1, 4, 40, 120)
"""Lengths of the texts that show which axes are the text's: more than Z-Image's steps of 32 tokens apart."""


class CompiledEngine(WarmedEngine):
    """An engine whose transformer blocks are compiled. Needs `warm` for every plan before its first batch."""

    def __init__(
        self,
        pipe: Any,
        family: Family | str | None = None,
        *,
        mode: Compile = "blocks",
        cache_dir: str | Path | None = None,
        backend: str | Any = "inductor",
        capturer: Capturer | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        """`cache_dir`: where compiled code is kept and found again, by all processes that name it; unset:
        torch's own folder, which the processes of one user on a machine share. `backend`: as `torch.compile`.
        `capturer`: captures the calls of the transformer, compiled blocks and all, such as `CudaGraphs`;
        unset: none does. `limit_bytes`: see `Graphs`.
        """
        super().__init__(pipe, family)
        if cache_dir is not None:
            folder = Path(cache_dir).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # read when torch first compiles
            # Workers of a machine start together: one compiles a shape, the others then load it.
            self.turns = FileLock(folder / "warm-up.lock")
        self._blocks = Blocks(pipe, mode, backend)
        self.graphs = None if capturer is None else Graphs(pipe, capturer, limit_bytes=limit_bytes)
        inner = self.runner if self.graphs is None else GraphedRunner(self.call, self.runner, self.graphs)
        self.runner: CompiledRunner = CompiledRunner(self.call, inner)
        self._learned: set[tuple[Guided, bool]] = set()

    def sizes(self, plan: SamplingPlan, index: int, sampling: Sampling) -> tuple[int, ...]:
        """The batch sizes that are warm for stage `index`, increasing."""
        return self.runner.sizes(plan.stages[index], sampling)

    def _expect(self, missing: Sequence[tuple[Stage, int]], sampling: Sampling) -> None:
        shapes = sum(len(self.runner.keys(stage, sampling)) for stage, _ in missing)
        self._blocks.expect(shapes + self.runner.shapes)

    def warm_each(self, *args: Any, **kwargs: Any) -> Iterator[WarmUp]:
        """`warm`, one batch size of one stage at a time."""
        try:
            yield from super().warm_each(*args, **kwargs)
        except library.RecompileLimit as error:
            raise Recompiled(f"more shapes than torch was told to expect: {error}") from error

    def _warm_one(
        self, plan: SamplingPlan, stage: Stage, rows: int, sampling: Sampling, texts: TextsOf
    ) -> WarmUp:
        plans, graphs = self._ends(plan, stage), self.graphs

        def run(words: int, odd: int) -> int:
            """With prompts of one length but the last, negative ones all of one."""
            same = texts(rows, words, sampling)
            last = texts(1, odd, sampling)
            return self._run(plans, Encoded((*same.positive[:-1], *last.positive), same.negative), sampling)

        begin, before = time.perf_counter(), library.graphs_compiled()
        captured = 0 if graphs is None else graphs.counts.captures
        varies = self.family.ragged is not None or self.family.text is None
        with self.runner.open(), nullcontext() if graphs is None else graphs.left():
            if varies:
                self._learn(plan, sampling, texts)
            for odd in (_WORDS[0], _WORDS[-1]) if varies else _WORDS[:1]:
                run(_WORDS[0], odd)
        compiled = library.graphs_compiled() - before
        # Then lengths that were not compiled for.
        others = [(_WORDS[2], odd) for odd in (_WORDS[2], _WORDS[1])] if varies else [(_WORDS[0], _WORDS[0])]
        withdraw = self.runner.add(stage, sampling, rows)
        try:
            for lengths in () if graphs is None else 2 * others:  # a call is captured when it comes again
                run(*lengths)
            seconds, again = time.perf_counter() - begin, self.call.now()
            steps = sum(run(*lengths) for lengths in others)
        except BaseException:
            withdraw()
            raise
        pace = rows * steps / max(self.call.now() - again, 1e-9)
        captures = 0 if graphs is None else graphs.counts.captures - captured
        return WarmUp(stage, rows, compiled, seconds, pace, captures)

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
