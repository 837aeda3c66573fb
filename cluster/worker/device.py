"""The device's only loop: rows are planned, batched and denoised stage by stage. Knows no commits.

    for event in device.generate(attempt, rows, upcoming): ...

Rows of one size make a batch, which goes through the stages together: on each grid in chunks of as many rows
as are best there, so that a coarse stage, whose rows are small, takes more at once. An event comes before
anything that takes time, and after each chunk that was decoded; in between, the caller can look after other
things. What an exception means is decided by `cluster.faults` alone: a row that cannot be made becomes a
reject of the attempt here, and anything else ends it with `Failed`.

The tour of a row's way continues in progressive/engine/trajectories.py.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext

from overtone.cluster.dispatch import Event
from overtone.cluster.faults import Failure, Verdict, first_line, verdict_for
from overtone.cluster.worker.attempt import Attempt, Batch, Failed, ids_of
from overtone.cluster.worker.batch_sizes import BatchSizes
from overtone.cluster.worker.known_sizes import KnownSizes
from overtone.cluster.worker.memory import memory_of
from overtone.cluster.worker.pictures import Pictures
from overtone.cluster.worker.protocol import Compiles, Engine, Warmed, device_name
from overtone.cluster.worker.starts import sized
from overtone.cluster.worker.texts import Texts
from overtone.jobs.errors import SizeError
from overtone.jobs.parts import StageTime, Timing
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.progressive.schedule import SamplingPlan, Stage

_log = logging.getLogger(__name__)

Upcoming = Callable[[int], list[Row]]
"""Gives the first rows of what comes after an attempt's own, as many as are asked for or are known."""


class Device:
    """A resident engine, its texts and its pictures; remembers how many rows fit."""

    def __init__(self, spec: JobSpec, engine: Engine) -> None:
        self._spec, self._engine = spec, engine
        self._cuda = str(engine.device).startswith("cuda")
        alone = engine.row_by_row(spec.sampling)
        searches = self._cuda and spec.workers.batch_size == "auto"
        share = min(1.0, spec.workers.num_gpus or 1.0)
        self._memory = memory_of(engine, share) if searches else None
        self._sizes = BatchSizes(
            spec.workers.batch_size,
            gpu=self._cuda,
            alone=alone,
            known=KnownSizes.of_job(spec, device_name(engine)) if searches else None,
            memory=self._memory,
        )
        self._texts = Texts(engine, spec.sampling)
        self._pictures = Pictures(spec.output, engine, self._judge)
        self._begun: set[SamplingPlan] = set()
        """Plans of which a batch was begun."""
        self._rates: dict[Stage, dict[int, float]] = {}
        """Rows a second of the chunks that an engine compiled for, by their rows, until all are tried."""

    def generate(
        self, attempt: Attempt, rows: Sequence[Row], upcoming: Upcoming = lambda count: []
    ) -> Iterator[Event]:
        """Make rows: afterwards each is among the attempt's pictures or its rejects."""
        rows = self._sized(rows)
        if self._spec.model.offload == "model" and not attempt.careful:
            yield attempt.alive()
            self._encode_all(attempt, rows)
        for together, sampling_plan, following in self._batches(attempt, rows, upcoming):
            yield from self._batch(attempt, together, sampling_plan, following)
        yield from self._pictures.collect_decoded(attempt)

    def _encode_all(self, attempt: Attempt, rows: Sequence[Row]) -> None:
        """Where the model's parts take turns on the device, the text encoders have theirs once a shard."""
        try:
            encoded = self._texts.encode_all(rows)
        except Exception as error:  # noqa: BLE001 - met again, and judged, with the batch that it comes from
            _log.info("the shard's prompts are encoded group by group: %s", first_line(error))
            return
        timing = attempt.timing_of_shard("text_encode", len(rows), encoded.begin, encoded.seconds)
        attempt.record([timing])

    def _batches(
        self, attempt: Attempt, rows: Sequence[Row], upcoming: Upcoming
    ) -> Iterator[tuple[list[Row], SamplingPlan, list[Row]]]:
        """(rows to make together, their stages, the rows that most likely come next): suspects first, each
        alone, then runs of one size in source order."""
        suspects = set(attempt.assignment.suspects)
        sizes: dict[tuple[int | None, int | None], list[Row]] = {}
        for row in rows:
            if row.row_id not in suspects:
                sizes.setdefault((row.height, row.width), []).append(row)
        for row in rows:
            if row.row_id in suspects:
                sampling_plan = self._plan(attempt, [row])
                if sampling_plan is not None:
                    yield [row], sampling_plan, []
        for same in sizes.values():
            sampling_plan = self._plan(attempt, same)
            while sampling_plan is not None and same:
                count = 1 if attempt.assignment.isolate else self._sizes.batch(sampling_plan)
                yield same[:count], sampling_plan, same[count : 2 * count] or self._sized(upcoming(count))
                same = same[count:]

    def _sized(self, rows: Sequence[Row]) -> list[Row]:
        return sized(rows, self._engine.family, self._spec.sampling) if self._spec.pictured else list(rows)

    def _plan(self, attempt: Attempt, rows: Sequence[Row]) -> SamplingPlan | None:
        """The stages of rows of one size; None, and the rows rejected, where the model cannot make it."""
        attempt.phase = "plan"
        height_px, width_px = rows[0].height, rows[0].width
        try:
            return self._engine.plan(self._spec.sampling, height_px=height_px, width_px=width_px)
        except (ValueError, OverflowError) as error:  # a schedule's shift by size may overflow
            attempt.reject(rows, SizeError(first_line(error)))
            return None

    def _batch(
        self, attempt: Attempt, rows: list[Row], sampling_plan: SamplingPlan, following: list[Row]
    ) -> Iterator[Event]:
        """Take rows through all stages; where they cannot begin together, in smaller batches."""
        attempt.phase = "compile"
        try:  # before any of the rows is started: none is to blame for the time it takes
            for _ in self.warm_up(sampling_plan, wholly=sampling_plan in self._begun):
                yield attempt.alive()
        except Exception as error:
            if verdict_for(error) is not Verdict.HALVE_BATCH:
                raise
            attempt.reject(rows, error)  # not even one of them fits
            return
        self._begun.add(sampling_plan)
        todo = [rows]
        while todo:
            attempt.stop_if_asked()
            rows = todo.pop()
            yield attempt.begin_rows(rows)
            try:
                batch = self._begin(attempt, rows, sampling_plan, following)
            except Exception as error:  # noqa: BLE001 - the row boundary: it becomes data
                ended, again = self._judge(attempt, list(range(len(rows))), error)
                rejected = [rows[index] for index in ended]
                attempt.reject(rejected, error)
                yield from attempt.end_rows(rejected)
                todo += reversed([[rows[index] for index in indices] for indices in again])
                continue
            left = list(range(len(rows)))
            for index in range(len(sampling_plan.stages)):
                left = yield from self._stage(attempt, batch, index, left)

    def warm_up(self, sampling_plan: SamplingPlan, *, wholly: bool = False) -> Iterator[None]:
        """Let an engine that compiles do so for the chunks that the next rows with this plan come in, so that
        the first pictures wait for nothing else; `wholly`: for every chunk that such rows can come in. One
        shape at a time; once it has, nothing is left to do."""
        if not isinstance(self._engine, Compiles):
            return
        stages, sampling, search = (
            sampling_plan.stages,
            self._spec.sampling,
            self._sizes.searches(sampling_plan),
        )
        sizes = [
            self._sizes.possible(stage, stages[-1]) if wholly else (self._sizes.next(stage, stages[-1]),)
            for stage in stages
        ]
        try:
            for shape in self._engine.warm_each(sampling_plan, sizes, sampling, search=search):
                _log.info("%s", shape)
                if isinstance(shape, Warmed):
                    self._rates.setdefault(shape.stage, {})[shape.rows] = shape.rows_per_s
                yield
        except Exception as error:
            if wholly or verdict_for(error) is not Verdict.HALVE_BATCH:
                raise
            error.__traceback__ = None  # its frames hold what did not fit
            self._free_memory()
            yield from self.warm_up(sampling_plan, wholly=True)  # smaller ones may fit
        if wholly:
            for stage in stages:
                self._sizes.tried(stage, self._rates.pop(stage, {}))

    def _begin(
        self, attempt: Attempt, rows: list[Row], sampling_plan: SamplingPlan, following: list[Row]
    ) -> Batch:
        """The batch, its prompts encoded and its rows ready to go; the prompts that come next are begun."""
        attempt.phase = "text_encode"
        encoded = self._texts.encode(rows, [] if attempt.careful else following)
        begin, seconds = encoded.begin, encoded.seconds
        timing = attempt.timing(attempt.num_batches, "text_encode", ids_of(rows), begin, seconds)
        attempt.phase = "denoise"
        seeds = [row.seed for row in rows]
        trajectories = self._engine.begin(sampling_plan, encoded.prompts, seeds, self._spec.sampling)
        attempt.record([timing])
        number, attempt.num_batches = attempt.num_batches, attempt.num_batches + 1
        stages: list[list[StageTime]] = [[] for _ in rows]
        return Batch(number, rows, sampling_plan, trajectories, stages, [0.0] * len(rows), encoded.truncated)

    def _stage(
        self, attempt: Attempt, batch: Batch, index: int, rows: list[int]
    ) -> Generator[Event, None, list[int]]:
        """Take rows of a batch through a stage, in chunks, or in ever smaller ones where that fails. Returns
        the rows that are left; the others are rejected."""
        stage, full = batch.sampling_plan.stages[index], batch.sampling_plan.stages[-1]
        waiting, again, left = list(rows), list[list[int]](), list[int]()
        while waiting or again:
            attempt.stop_if_asked()
            if again:
                chunk = again.pop()
            else:
                count = self._sizes.next(stage, full)
                chunk, waiting = waiting[:count], waiting[count:]
            most = self._sizes.limit(stage, len(chunk))
            if most < len(chunk):  # its other half was found not to fit
                again.append(chunk[most:])
                chunk = chunk[:most]
            yield attempt.begin_rows(batch.pick(chunk))
            attempt.phase = "denoise"
            try:
                self._denoise(attempt, batch, index, chunk)
            except Exception as error:  # noqa: BLE001 - the row boundary: it becomes data
                ended, smaller = self._judge(attempt, chunk, error, stage)
                again += reversed(smaller)
                attempt.reject(batch.pick(ended), error)
                yield from attempt.end_rows(batch.pick(ended))
                if smaller and verdict_for(error) is Verdict.HALVE_BATCH:
                    yield from self._warm_smaller(attempt, batch.sampling_plan)
                continue
            left += chunk
            if stage is full:
                yield from self._pictures.submit_decode(attempt, batch, chunk)
        return sorted(left)

    def _warm_smaller(self, attempt: Attempt, sampling_plan: SamplingPlan) -> Iterator[Event]:
        """After a chunk that memory did not hold: an engine that compiles would fill a smaller one up to the
        same size again."""
        attempt.phase = "compile"
        try:
            for _ in self.warm_up(sampling_plan, wholly=True):
                yield attempt.alive()
        except Exception as error:
            if verdict_for(error) is not Verdict.HALVE_BATCH:
                raise  # else the rows themselves fail again, and are judged

    def _denoise(self, attempt: Attempt, batch: Batch, index: int, chunk: list[int]) -> None:
        begin, timings, waiting = time.time(), list[Timing](), list(chunk)
        tokens = len(chunk) * batch.sampling_plan.stages[index].tokens
        with nullcontext() if self._memory is None else self._memory.watching(tokens):
            reports = batch.trajectories.run(index, chunk)
        for report in reports:
            together = waiting[: report.rows]  # an engine may take fewer at once, in the same order
            grid = {"height": report.height, "width": report.width, "tokens": report.tokens}
            ids, seconds, steps = batch.ids(together), report.seconds, report.steps
            timings.append(
                attempt.timing(batch.number, report.kind, ids, begin, seconds, steps=steps, **grid)
            )
            begin += seconds
            share = seconds / report.rows
            for row in together:
                batch.denoise_seconds[row] += share
            if report.kind == "denoise":
                waiting = waiting[report.rows :]
                self._sizes.done(batch.sampling_plan.stages[index], report.rows, seconds)
                for row in together:
                    batch.stages[row].append(StageTime(**grid, steps=steps, seconds=share))
        attempt.record(timings)

    def _judge(
        self, attempt: Attempt, chunk: list[int], error: Exception, stage: Stage | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """What a chunk's exception asks for: (rows to reject, chunks to try again). `stage` is the one that
        it was in, whose chunks are too large if there was not enough memory."""
        failure, half = Failure.of(error, attempt.phase), (len(chunk) + 1) // 2
        if failure.verdict is Verdict.HALVE_BATCH:
            error.__traceback__ = None  # its frames hold the chunk's tensors
            self._free_memory()
            if stage is not None and len(chunk) > 1:
                half = self._sizes.failed(stage, len(chunk))
                _log.warning(
                    "out of memory with %d rows on the %d x %d grid; %d a batch from now on",
                    *(len(chunk), stage.height, stage.width, half),
                )
        elif failure.verdict is Verdict.REJECT_ROW:
            bad = [row for row in chunk if row in getattr(error, "rows", ())]
            good = [row for row in chunk if row not in bad]
            if bad:
                return bad, [good] if good else []
        else:
            raise Failed(failure) from error
        if len(chunk) == 1:
            return chunk, []
        return [], [chunk[k : k + half] for k in range(0, len(chunk), half)]

    def _free_memory(self) -> None:
        gc.collect()
        if self._cuda:
            import torch

            torch.cuda.empty_cache()

    def close(self) -> None:
        """Finish what the threads have in hand, and end them."""
        self._texts.close()
        self._pictures.close()
