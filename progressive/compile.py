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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from filelock import FileLock
from torch.utils import _pytree as pytree

from progressive.caches import repeated_blocks, row_by_row, transformers
from progressive.engine import Encoded, Engine
from progressive.families import Family
from progressive.schedule import SamplingPlan, Stage
from progressive.settings import Sampling

Compile = Literal["off", "blocks", "max"]
"""`blocks`: inductor's defaults. `max`: with autotuning. Without CUDA graphs: they would hand one block's
output to the next call of the same block."""
COMPILE: tuple[Compile, ...] = get_args(Compile)

WORTH_IT = 1.05
"""A batch twice as large must make this many times as many rows a second to be worth warming up."""

_WORDS = (1, 4, 40, 120)
"""Lengths of the texts that show which axes are the text's: more than Z-Image's steps of 32 tokens apart."""
_GRAPHS_A_SHAPE = 16
"""Most graphs of one kind of block for one grid and batch size: with a mask and without, for the prompt and
the negative one, and for blocks that are called with other strides than the rest."""


TextsOf = Callable[[int, int, Sampling], Encoded]
"""(rows, words, sampling) -> as many prompts of as many words."""


class Recompiled(RuntimeError):
    """A shape was met that no warm-up had seen, or more of them than torch was told to expect."""


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


def compile_blocks(engine: Engine, mode: Compile, *, shapes: int, backend: str | Any = "inductor") -> Blocks:
    """Compile the transformers' repeated blocks for `shapes` combinations of grid and batch size, each by
    itself. More of them than that are an error. Nothing is compiled until a shape is first met."""
    blocks = Blocks(engine.pipe, mode, backend)
    blocks.expect(shapes)
    return blocks


class Blocks:
    """The compiled blocks of a pipeline's transformers. Their own `forward` is replaced, for good."""

    def __init__(self, pipe: Any, mode: Compile, backend: str | Any = "inductor") -> None:
        """ValueError for a pipeline whose transformer names no repeated blocks."""
        self.graphs = 0
        """Compiled so far."""
        self._shapes: dict[str, list[list[tuple[int, ...]]]] | None = None
        self._axes: dict[str, set[int]] = {}
        if mode == "off":
            return
        found = {
            f"{number}.{path}": block
            for number, transformer in enumerate(transformers(pipe))
            for path, block in repeated_blocks(transformer).items()
        }
        if not found:
            raise ValueError(
                f"{type(pipe).__name__} cannot be compiled: its transformer has no list of blocks; "
                "use `compile: off`"
            )
        tuned = "max-autotune-no-cudagraphs" if mode == "max" and backend == "inductor" else None
        for name, block in found.items():
            # The block's own computation alone: hooks, of step caches for one, stay outside and uncompiled.
            compiled = torch.compile(
                block.forward, backend=backend, fullgraph=True, dynamic=False, mode=tuned
            )
            block.forward = self._forward(name, block.forward, compiled)

    def expect(self, shapes: int) -> None:
        """Let torch keep graphs for this many combinations of grid and batch size. Whole graphs make meeting
        the limit an error (`FailOnRecompileLimitHit`)."""
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _GRAPHS_A_SHAPE * shapes)
        config.accumulated_recompile_limit = max(
            config.accumulated_recompile_limit, 4 * _GRAPHS_A_SHAPE * shapes
        )

    def _forward(
        self, name: str, plain: Callable[..., Any], compiled: Callable[..., Any]
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._shapes is not None:
                for key, tensor in _tensors(name, args, kwargs):
                    self._shapes.setdefault(key, [[]])[-1].append(tuple(tensor.shape))
                return plain(*args, **kwargs)
            if self._axes:
                for key, tensor in _tensors(name, args, kwargs):
                    for axis in self._axes.get(key, ()):
                        torch._dynamo.maybe_mark_dynamic(tensor, axis)
            return compiled(*args, **kwargs)

        return forward

    def learn_axes(self, calls: Sequence[Callable[[], Any]]) -> None:
        """Find the axes of the blocks' inputs that follow the text: those that differ between these calls,
        which run uncompiled and must differ in nothing but the length of their text."""
        seen: dict[str, list[list[tuple[int, ...]]]] = {}
        try:
            for call in calls:
                self._shapes = {}
                call()
                for key, shapes in self._shapes.items():
                    seen.setdefault(key, []).extend(shapes)
        finally:
            self._shapes = None
        for key, of_calls in seen.items():
            for same in zip(*of_calls, strict=False):  # the same use of the input in each call
                axes = {axis for axis, sizes in enumerate(zip(*same, strict=False)) if len(set(sizes)) > 1}
                self._axes.setdefault(key, set()).update(axes)


def _tensors(name: str, args: Any, kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
    for path, leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            yield f"{name}{pytree.keystr(path)}", leaf


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
        self._warm: dict[tuple[Any, ...], set[int]] = {}
        self._warming = self._learned = False

    def sizes(self, plan: SamplingPlan, index: int, sampling: Sampling) -> tuple[int, ...]:
        """The batch sizes that are warm for stage `index`, increasing."""
        return tuple(sorted(self._warm.get(self._key(plan.stages[index], sampling), ())))

    def _key(self, stage: Stage, sampling: Sampling) -> tuple[Any, ...]:
        """What makes a shape, but for the number of rows."""
        return stage.grid, stage.frames, self._guided(sampling)

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
        alone = row_by_row(sampling)
        missing = [
            (stage, rows)
            for index, (stage, sizes) in enumerate(zip(plan.stages, batch_sizes, strict=True))
            for rows in ([1] if alone else sorted(set(sizes)))
            if stage.steps and rows not in self.sizes(plan, index, sampling)
        ]
        self._blocks.expect(len(missing) + sum(map(len, self._warm.values())))
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
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                raise Recompiled(f"more shapes than torch was told to expect: {error}") from error
            yield now
            if search and before is not None and now.rows_per_s < WORTH_IT * before.rows_per_s:
                full.add(stage)
            before = now

    def _warm_one(
        self, plan: SamplingPlan, stage: Stage, rows: int, sampling: Sampling, texts: TextsOf
    ) -> WarmUp:
        # Two steps, for the second may not be called like the first; and the last one, for models that
        # change hands on the way down.
        ends = [_cut(stage, stage.first, min(stage.first + 2, stage.last))]
        if len(transformers(self.pipe)) > 1:
            ends.append(_cut(stage, stage.last - 1, stage.last))
        plans = [replace(plan, stages=(end,)) for end in ends]

        def run(text: Encoded) -> None:
            for short in plans:
                self.denoise(short, text, list(range(len(text))), sampling)

        def text(words: int, odd: int) -> Encoded:
            """Prompts of one length but the last, negative ones all of one."""
            same = texts(rows, words, sampling)
            last = texts(1, odd, sampling)
            return Encoded((*same.positive[:-1], *last.positive), same.negative)

        begin, before = time.perf_counter(), _compiled()
        varies = self.family.ragged is not None or self.family.text is None
        with self._open():
            if varies and not self._learned:
                one = replace(plan, stages=(_cut(stage, stage.first, stage.first + 1),))
                self._learn(one, sampling, texts)
            for odd in (_WORDS[0], _WORDS[-1]) if varies else _WORDS[:1]:
                run(text(_WORDS[0], odd))
        seconds, graphs = time.perf_counter() - begin, _compiled() - before
        steps, again = 0, self._now()
        self._warm.setdefault((key := self._key(stage, sampling)), set()).add(rows)
        try:
            for odd in (_WORDS[2], _WORDS[1]) if varies else _WORDS[:1]:  # lengths not compiled for
                run(text(_WORDS[2] if varies else _WORDS[0], odd))
                steps += sum(end.steps for end in ends)
        except BaseException:
            self._warm[key].discard(rows)
            raise
        return WarmUp(stage, rows, graphs, seconds, rows * steps / max(self._now() - again, 1e-9))

    def _learn(self, plan: SamplingPlan, sampling: Sampling, texts: TextsOf) -> None:
        def call(*words: int) -> Callable[[], Any]:
            text = Encoded.cat([texts(1, n, sampling) for n in words])
            return lambda: self.denoise(plan, text, list(range(len(text))), sampling)

        self._blocks.learn_axes([call(n) for n in _WORDS])
        self._blocks.learn_axes([call(_WORDS[0], n) for n in _WORDS[1:]])
        self._learned = True

    def _texts(self, rows: int, words: int, sampling: Sampling) -> Encoded:
        one = self.encode([" ".join(["a"] * words)], [None], sampling)
        return one[[0] * rows]

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Within it graphs may be compiled, and rows go as they are given."""
        self._warming = True
        try:
            yield
        finally:
            self._warming = False

    # What `Engine` calls at every stage.

    def _batches(
        self, plan: SamplingPlan, index: int, rows: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        batches = super()._batches(plan, index, rows, sampling)
        if self._warming or not plan.stages[index].steps:
            return batches
        sizes = self.sizes(plan, index, sampling)
        if not sizes:
            height, width = plan.stages[index].grid
            raise Recompiled(
                f"no graph was compiled for a grid of {height} x {width} ({plan.height_px} x "
                f"{plan.width_px} px); call `warm` with this plan before its first batch"
            )
        most = sizes[-1]
        parts = [batch[k : k + most] for batch in batches for k in range(0, len(batch), most)]
        return [
            part + [part[-1]] * (next(size for size in sizes if size >= len(part)) - len(part))
            for part in parts
        ]

    def _run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._warming:
            return super()._run(*args, **kwargs)
        with _sealed():
            return super()._run(*args, **kwargs)


def _compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _cut(stage: Stage, first: int, last: int) -> Stage:
    """Steps [first, last) of a stage."""
    sigmas = stage.sigmas[first - stage.first : last - stage.first + 1]
    return replace(stage, first=first, last=last, sigmas=sigmas)


@contextmanager
def _sealed() -> Iterator[None]:
    """Within it nothing is compiled: whatever would be raises Recompiled."""
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        raise Recompiled(f"a shape was met that no warm-up had seen: {error}") from error
