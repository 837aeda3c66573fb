"""Draws candidates and measures what they drew, batch by batch; what an earlier sitting drew is not drawn
again. Knows no race: whoever calls it says which candidate next, and on how many rows.

The reference must be drawn on a batch before the others are: all of them are compared with its pictures.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from overtone.cluster.measure.candidates import Candidate, Size
from overtone.cluster.measure.kept import Kept
from overtone.cluster.measure.pace import Countdown, OnProgress
from overtone.cluster.measure.scorers import Judge
from overtone.cluster.measure.trial import Trial, measure
from overtone.cluster.worker import Engine, compile_for, encode_rows
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.progressive.scoring import Scorer

SHOWN_ROWS = 6
"""Rows whose pictures are kept for the report."""
_MEASURING = 2
"""Batches that may wait to be measured."""


class Batch(NamedTuple):
    """Rows of one size."""

    rows: list[Row]
    size: Size


def in_batches(rows: Sequence[Row], batch_size: int) -> list[Batch]:
    """The rows in batches of one size each, as far as possible in their order."""
    sizes: dict[Size, list[list[Row]]] = {}
    for row in rows:
        of_size = sizes.setdefault((row.height, row.width), [])
        if not of_size or len(of_size[-1]) == batch_size:
            of_size.append([])
        of_size[-1].append(row)
    place = {row.row_id: number for number, row in enumerate(rows)}
    batches = [Batch(batch, size) for size, of_size in sizes.items() for batch in of_size]
    return sorted(batches, key=lambda batch: place[batch.rows[0].row_id])


def device_name(engine: Engine) -> str:
    """The GPU's name, or `CPU`."""
    cuda = str(engine.device).startswith("cuda")
    return torch.cuda.get_device_name(engine.device) if cuda else "CPU"


class Budget:
    """The time that may be spent. `spent` is asked before each batch."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if minutes is None else clock() + 60 * minutes

    @property
    def spent(self) -> bool:
        return self._end is not None and self._clock() >= self._end


class OutOfTime(Exception):
    """The budget is spent."""


class Drawing:
    """The trials of all candidates, the first of which is the reference, on batches in one order."""

    def __init__(
        self,
        spec: JobSpec,
        engine: Engine,
        candidates: Sequence[Candidate],
        batches: Sequence[Batch],
        *,
        judge: Judge | None,
        scorer: Scorer | None,
        kept: Kept,
        budget: Budget,
        on_progress: OnProgress,
    ) -> None:
        self.trials = [Trial(candidate) for candidate in candidates]
        self.batches = list(batches)
        self.asked = 0
        """Batches that were asked for so far, over all candidates."""
        self._judge, self._scorer, self._kept, self._budget = judge, scorer, kept, budget
        self._on_progress, self._wave = on_progress, 0
        self._maker = _Maker(spec, engine)
        # Beside the next batch: to measure a picture of the embedded model takes as long as to draw it.
        self._measurer = ThreadPoolExecutor(
            1, "measure", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        )
        self._measuring: deque[Future[None]] = deque()
        self._references: dict[int, list[Any]] = {}

    @property
    def made(self) -> int:
        """Batches that are measured, over all candidates."""
        return sum(len(trial.batches) for trial in self.trials)

    def batches_of(self, rows: int) -> int:
        """How many batches from the first on have so many rows together."""
        count = total = 0
        while total < rows:
            total, count = total + len(self.batches[count].rows), count + 1
        return count

    def draw(self, wave: Sequence[tuple[int, int]]) -> None:
        """Candidates, by their numbers, each on so many rows from the first on. They take turns at each
        batch: a machine that slows down does so for all of them. OutOfTime where the budget ends before."""
        self._wave += 1
        steps = [
            (number, index)
            for number in range(len(self.batches))
            for index, rows in sorted(wave)
            if number < self.batches_of(rows) and number not in self.trials[index].batches
        ]
        self.asked += len(steps)
        countdown = Countdown(
            {
                (number, index): self.trials[index].candidate.entrant.cost * len(self.batches[number].rows)
                for number, index in steps
            }
        )
        try:
            for number, index in steps:
                self._step(number, index, countdown)
        finally:  # what was drawn before Ctrl-C is measured and kept too
            self._collect(0)

    def _step(self, number: int, index: int, countdown: Countdown) -> None:
        trial, batch = self.trials[index], self.batches[number]
        setting, step = trial.candidate.setting, (number, index)
        known = self._kept.load(number, setting)
        if known is not None and (index != 0 or known[1]):
            trial.batches[number] = known[0]
            countdown.known(step)
            return
        if self._budget.spent:
            raise OutOfTime
        what = f"round {self._wave}, {setting.name}, {_rows_from(self.batches, number)}"
        self._on_progress(countdown.progress(what))
        seconds, media = self._maker.make(trial.candidate, batch)
        if index == 0:
            self._remember(number, media)
        reference = self._reference(number)
        shown = SHOWN_ROWS - sum(len(one.rows) for one in self.batches[:number])

        def found() -> None:
            measured = measure(
                batch.rows, seconds, media, reference, judge=self._judge, scorer=self._scorer, shown=shown
            )
            trial.batches[number] = measured
            self._kept.save(number, setting, measured, media if index == 0 else ())

        self._measuring.append(self._measurer.submit(found))
        self._collect(0 if index == 0 else _MEASURING)  # the reference's pictures may be read again at once
        countdown.done(step)

    def _collect(self, most: int) -> None:
        """Wait until at most so many batches are being measured; raises what measuring raised."""
        while len(self._measuring) > most:
            self._measuring.popleft().result()

    def _remember(self, number: int, media: list[Any]) -> None:
        """The reference's pictures: of one batch, where the others can be read again."""
        if self._kept.path is not None:
            self._references.clear()
        self._references[number] = media

    def _reference(self, number: int) -> list[Any]:
        if number not in self._references:
            known = self._kept.load(number, self.trials[0].candidate.setting)
            self._remember(number, known[1] if known and known[1] else self._again(number))
        return self._references[number]

    def _again(self, number: int) -> list[Any]:
        """The reference's pictures once more: what was kept of them is gone."""
        return self._maker.make(self.trials[0].candidate, self.batches[number])[1]


def _rows_from(batches: Sequence[Batch], number: int) -> str:
    first = sum(len(batch.rows) for batch in batches[:number]) + 1
    return f"rows {first} to {first + len(batches[number].rows) - 1}"


class _Maker:
    """Makes rows, each grid and batch size warm before it is timed."""

    def __init__(self, spec: JobSpec, engine: Engine) -> None:
        self._spec, self._engine = spec, engine
        self._warm: set[Hashable] = set()
        self._encoded: tuple[list[Row], Any] = ([], None)

    def make(self, candidate: Candidate, batch: Batch) -> tuple[float, list[Any]]:
        """(seconds of denoising and expansions, what was made)."""
        engine, plan, sampling = self._engine, candidate.plans[batch.size], candidate.setting.sampling
        seeds = [row.seed for row in batch.rows]
        if self._encoded[0] is not batch.rows:
            self._encoded = batch.rows, encode_rows(engine, batch.rows, self._spec.sampling)
        encoded = self._encoded[1]
        shapes = {(stage.grid, len(seeds), sampling.cache) for stage in plan.stages}
        if not shapes <= self._warm:
            self._warm |= shapes
            compile_for(engine, plan, len(seeds), sampling)
            engine.denoise(plan.one_step_each(), encoded, seeds, sampling)
        latents, reports = engine.denoise(plan, encoded, seeds, sampling)
        return sum(report.seconds for report in reports), list(engine.decode(plan, latents))
