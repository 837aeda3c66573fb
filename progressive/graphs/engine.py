"""An engine whose transformer calls are captured for each shape and replayed. Compiles nothing.

    engine = GraphedEngine(pipe)                              # on a CUDA device
    plan = engine.plan(sampling)
    engine.warm(plan, [(1, 8)] * len(plan.stages), sampling)  # captures; without it the second step does
    engine.denoise(plan, ...)                                 # as `Engine`
    engine.graphs.counts, engine.graphs.refusals

What has no graph runs as it is, so a shape that was not warmed up costs time and is no error.
"""

from __future__ import annotations

import time
from typing import Any

from overtone.progressive.engine import TextsOf, WarmedEngine, WarmUp
from overtone.progressive.families import Family
from overtone.progressive.graphs.books import Graphs
from overtone.progressive.graphs.capture import Capturer, capturer_for
from overtone.progressive.graphs.runner import GraphedRunner
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling

_WORDS = 4
"""Of the texts that a warm-up is made with; where their length varies, each length has graphs of its own."""


class GraphedEngine(WarmedEngine):
    """An engine whose transformer calls take CUDA graphs."""

    def __init__(
        self,
        pipe: Any,
        family: Family | str | None = None,
        *,
        capturer: Capturer | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        """`capturer` unset: CUDA graphs, and a ValueError where there is no CUDA device. `limit_bytes`: see
        `Graphs`."""
        super().__init__(pipe, family)
        if capturer is None:
            capturer = capturer_for(self.device)
        if capturer is None:
            raise ValueError(f"graphs need a CUDA device, and the pipeline is on {self.device}; use `Engine`")
        self.graphs = Graphs(pipe, capturer, limit_bytes=limit_bytes)
        self.runner: GraphedRunner = GraphedRunner(self.call, self.runner, self.graphs)
        self._warm: set[tuple[Any, ...]] = set()

    def sizes(self, plan: SamplingPlan, index: int, sampling: Sampling) -> tuple[int, ...]:
        """The batch sizes that are warm for stage `index`, increasing: also those that have no graph, for
        which `graphs.refusals` has the reason."""
        key = self._key(plan, plan.stages[index], sampling)
        return tuple(sorted(rows for rows, *of in self._warm if tuple(of) == key))

    def _key(self, plan: SamplingPlan, stage: Stage, sampling: Sampling) -> tuple[Any, ...]:
        guided = self.call.guided(sampling), *(bool(part.guided_steps) for part in stage.parts)
        return stage.grid, stage.frames, guided, self.call.at_stage(sampling, plan, stage).cache

    def _warm_one(
        self, plan: SamplingPlan, stage: Stage, rows: int, sampling: Sampling, texts: TextsOf
    ) -> WarmUp:
        begin, before = time.perf_counter(), self.graphs.counts.captures
        plans, text = self._ends(plan, stage), texts(rows, _WORDS, sampling)
        for _ in range(2):  # a call is captured when it comes again, and a stage may have one step
            self._run(plans, text, sampling)
        seconds, again = time.perf_counter() - begin, self.call.now()
        steps = self._run(plans, text, sampling)
        self._warm.add((rows, *self._key(plan, stage, sampling)))
        pace = rows * steps / max(self.call.now() - again, 1e-9)
        return WarmUp(stage, rows, 0, seconds, pace, self.graphs.counts.captures - before)
