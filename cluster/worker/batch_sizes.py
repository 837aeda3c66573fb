"""How many rows denoise together, by grid: what runs out of memory is remembered. Knows no engine.

    sizes = BatchSizes("auto", gpu=True, known=known, memory=memory)
    rows = sizes.next(stage, full)          # for the next chunk of this stage
    sizes.done(stage, rows, seconds)        # it was denoised; the next one may be larger
    rows = sizes.failed(stage, rows)        # it ran out of memory; this many instead

The spec's `batch_size` is the size of such a chunk at full size. A batch, the rows that go through the stages
together, has as many rows as the largest chunk of any stage.
"""

from __future__ import annotations

from typing import Any, Literal

from overtone.cluster.worker.known_sizes import KnownSizes
from overtone.cluster.worker.memory import Memory
from overtone.progressive.schedule import SamplingPlan, Stage

CPU_BATCH = 4
"""Rows a chunk where `batch_size: auto` runs on a CPU, which larger ones do not make faster."""
BATCH_MAX = 64
"""Largest chunk that `batch_size: auto` tries, and that a coarse stage gets of itself."""
WORTH_IT = 1.05
"""A chunk twice as large must make this many times as many rows a second to be kept."""


class BatchSizes:
    """The size of the next chunk on each grid.

    A number is the rows at full size; a coarse stage starts with as many as have no more tokens, up to
    `BATCH_MAX`. `auto` on a GPU doubles each grid's chunk while that makes more rows a second and `memory`
    has room, then stays with the best. Where an earlier job has done so on the grid (`known`), its best is
    taken and nothing is tried; where it has on another one, that tells what to begin with. `alone`: the
    engine takes rows one at a time whatever it is given, so each is a chunk.
    """

    def __init__(
        self,
        setting: int | Literal["auto"],
        *,
        gpu: bool,
        alone: bool = False,
        known: KnownSizes | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._alone, self._memory = alone, memory
        self.grows = setting == "auto" and gpu and not alone
        """Whether larger chunks are tried, on grids that nothing is known of."""
        self._known = known if self.grows else None
        self._first = setting if isinstance(setting, int) else 1 if gpu else CPU_BATCH
        self._sizes: dict[Any, int] = {}
        self._limits: dict[Any, int] = {}
        self._rates: dict[Any, dict[int, float]] = {}
        self._settled: set[Any] = set()
        self._warm: set[tuple[Any, int]] = set()

    def first(self, stage: Stage, full: Stage) -> int:
        """Rows that a stage of a plan whose last stage is `full` starts with."""
        if self._alone:
            return 1
        if self._known is not None:
            rows = self._known.rows(stage) or self._known.guess(stage)
            if rows is not None:
                return min(rows, BATCH_MAX, self._room(stage))
        return max(self._first, min(BATCH_MAX, self._first * full.tokens // stage.tokens))

    def searches(self, sampling_plan: SamplingPlan) -> bool:
        """Whether larger chunks are tried at any stage of a plan."""
        return self.grows and not all(map(self._is_known, sampling_plan.stages))

    def _is_known(self, stage: Stage) -> bool:
        return self._known is not None and self._known.rows(stage) is not None

    def _room(self, stage: Stage) -> int:
        """Rows that memory holds, as far as is known."""
        most = None if self._memory is None else self._memory.most(stage.tokens)
        return BATCH_MAX if most is None else most

    def possible(self, stage: Stage, full: Stage) -> tuple[int, ...]:
        """All sizes that a chunk of this stage may come to, but for the last rows of a shard: what it starts
        with, what is left of that when memory runs out, and what `auto` goes up to."""
        sizes = {self.first(stage, full)}
        while min(sizes) > 1:
            sizes.add(min(sizes) // 2)
        while self.grows and not self._is_known(stage) and max(sizes) < BATCH_MAX:
            sizes.add(min(BATCH_MAX, 2 * max(sizes)))
        return tuple(sorted(sizes))

    def next(self, stage: Stage, full: Stage) -> int:
        """Rows for the next chunk of this stage."""
        key = _key(stage)
        if key not in self._sizes:
            self._sizes[key] = self.first(stage, full)
            if self._is_known(stage):
                self._settled.add(key)
        return self._sizes[key]

    def batch(self, sampling_plan: SamplingPlan) -> int:
        """Rows to take through the stages together: enough for the largest chunk of any."""
        stages = sampling_plan.stages
        return max(self.next(stage, stages[-1]) for stage in stages)

    def done(self, stage: Stage, rows: int, seconds: float) -> None:
        """A chunk was denoised."""
        key = _key(stage)
        if not self.grows or key in self._settled or rows != self._sizes.get(key):
            return
        if (key, rows) not in self._warm:  # the first of a size also compiles and plans memory
            self._warm.add((key, rows))
            return
        rates = self._rates.setdefault(key, {})
        rates[rows] = rows / max(seconds, 1e-9)
        larger = min(2 * rows, self._limits.get(key, BATCH_MAX), BATCH_MAX, self._room(stage))
        if rates[rows] < WORTH_IT * rates.get(rows // 2, 0.0):
            self._settle(stage, rows // 2)
        elif larger <= rows:
            self._settle(stage, rows)
        else:
            self._sizes[key] = larger

    def tried(self, stage: Stage, rates: dict[int, float]) -> None:
        """These sizes, rows -> rows a second, were tried before the first batch, by an engine that compiles:
        the search is made."""
        sizes = sorted(rates)
        if not self.grows or not sizes or self._is_known(stage):
            return
        best = sizes[0]
        for size in sizes[1:]:
            if rates[size] < WORTH_IT * rates[best]:
                break
            best = size
        self._rates[_key(stage)] = dict(rates)
        self._settle(stage, best)

    def _settle(self, stage: Stage, rows: int) -> None:
        key = _key(stage)
        self._sizes[key] = rows
        self._settled.add(key)
        if self._known is not None:
            self._known.keep(stage, rows, self._rates[key])

    def limit(self, stage: Stage, rows: int) -> int:
        """How many of these rows are not known to be too many."""
        return min(rows, self._limits.get(_key(stage), rows))

    def failed(self, stage: Stage, rows: int) -> int:
        """A chunk of this many rows, above 1, ran out of memory; the size to continue with."""
        key, half = _key(stage), max(1, rows // 2)
        self._limits[key] = min(half, self._limits.get(key, half))
        self._sizes[key] = min(self._limits[key], self._sizes.get(key, half))
        self._settled.add(key)
        return self._sizes[key]


def _key(stage: Stage) -> tuple[int, int, int]:
    return stage.height, stage.width, stage.frames
