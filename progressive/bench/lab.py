"""Lines of a suite measured: engines built, compiled, warmed up and timed. Knows no budget and no file.

    lab = Lab(torch.device("cuda"), torch.bfloat16, repeats=2)
    lab.measure(line).seconds

The engine of a line is kept for the next one if that needs the same. Whatever cannot be run raises.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from overtone.progressive import library
from overtone.progressive.bench.cases import Case
from overtone.progressive.bench.models import open_pipe, random_text
from overtone.progressive.bench.suite import Line, Stack
from overtone.progressive.bench.timing import own_call, timed
from overtone.progressive.compile import CompiledEngine
from overtone.progressive.denoisers import quantize_blocks
from overtone.progressive.engine import Encoded, Engine
from overtone.progressive.graphs import GraphedEngine, capturer_for
from overtone.progressive.settings import Sampling

OpenPipe = Callable[[Case, torch.device, torch.dtype], Any]


@dataclass(frozen=True)
class Figures:
    """What was measured of a line; see `records.Record`."""

    seconds: float
    spread_s: float
    memory_gib: float
    load_s: float
    prepare_s: float
    graphs: int
    replays: int = 0
    denoise_share: float | None = None
    """Of a job's workers' time."""


class Lab:
    """One device with at most one model on it."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        repeats: int = 2,
        open_pipe: OpenPipe = open_pipe,
        backend: str | Any = "inductor",
    ) -> None:
        """`open_pipe` builds a case's pipeline; `backend`: as `torch.compile`."""
        self._device, self._dtype, self._repeats = device, dtype, repeats
        self._open_pipe, self._backend = open_pipe, backend
        self._of: tuple[str, Stack] | None = None
        self._engine: Engine | None = None
        self._attention_was_set = False

    @property
    def resident(self) -> tuple[str, Stack] | None:
        """The `Line.engine` that is built."""
        return self._of

    def measure(self, line: Line) -> Figures:
        """Time the line's loop, after what it takes to get ready. Whatever the engine, the library or the
        device raises goes through, and the engine is dropped."""
        try:
            begin = time.perf_counter()
            built = line.engine != self._of
            engine = self._built(line) if built else self._engine
            assert engine is not None
            loaded = time.perf_counter()
            graphs, replays = library.graphs_compiled(), _replays(engine)
            loop = self._ready(engine, line)
            ready = time.perf_counter()
            taken, held = zip(*(timed(self._device, loop) for _ in range(self._repeats)), strict=True)
        except BaseException:
            self.empty()
            raise
        return Figures(
            seconds=statistics.median(taken),
            spread_s=max(taken) - min(taken),
            memory_gib=max(held),
            load_s=loaded - begin if built else 0.0,
            prepare_s=ready - loaded,
            graphs=library.graphs_compiled() - graphs,
            replays=_replays(engine) - replays,
        )

    def empty(self) -> None:
        """Drop the engine: the next one may need the room."""
        if self._of is not None and self._of[1].compile != "off":
            torch.compiler.reset()  # else the next engine's graphs count as recompilations of this one's
        self._of = self._engine = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _built(self, line: Line) -> Engine:
        self.empty()
        self._of, stack = line.engine, line.stack
        pipe = self._open_pipe(line.of, self._device, self._dtype)
        if stack.attention or self._attention_was_set:  # the library sets it for all that come later, too
            self._attention_was_set = True
            pipe.transformer.set_attention_backend(stack.attention or "native")
        quantize_blocks(pipe, stack.quantize)
        self._engine = self._around(pipe, stack)
        return self._engine

    def _around(self, pipe: Any, stack: Stack) -> Engine:
        capturer = capturer_for(self._device) if stack.graphs else None
        if stack.graphs and capturer is None:
            raise ValueError(f"graphs need a CUDA device, and this is a {self._device.type}")
        if stack.compile != "off":
            return CompiledEngine(pipe, mode=stack.compile, backend=self._backend, capturer=capturer)
        return Engine(pipe) if capturer is None else GraphedEngine(pipe, capturer=capturer)

    def _ready(self, engine: Engine, line: Line) -> Callable[[], Any]:
        """The line's loop, once all that is done the first time is done."""
        sampling = line.sampling
        plan = engine.plan(sampling)
        text = random_text(engine, line.of.text_tokens, line.rows, guided=line.guided)
        if line.own_call:
            loop, short = own_call(engine, plan, text, sampling), sampling.model_copy(update={"num_steps": 2})
            own_call(engine, engine.plan(short), text, short)()
            return loop
        seeds = list(range(line.rows))
        warm = getattr(engine, "warm", None)
        if warm is not None:
            warm(plan, [(line.rows,)] * len(plan.stages), sampling, encoded=partial(_texts, engine, line))
        for _ in range(2):
            engine.denoise(plan.one_step_each(), text, seeds, sampling)
        return partial(engine.denoise, plan, text, seeds, sampling)


def _replays(engine: Engine) -> int:
    books = getattr(engine, "graphs", None)
    return books.counts.replays if books is not None else 0


def _texts(engine: Engine, line: Line, rows: int, words: int, sampling: Sampling) -> Encoded:
    """Texts to warm up with: of so many tokens where the pipeline takes them at their own length."""
    tokens = words if engine.family.ragged is not None else line.of.text_tokens
    return random_text(engine, tokens, rows, guided=line.guided)
