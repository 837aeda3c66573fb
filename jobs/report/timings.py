"""What the timings of a job say: its batches, grids and workers, and where their time went. Knows no store.

    timings = Timings(table)           # the tables of any number of shards, one after the other, `COLUMNS`
    timings.workers(), timings.grids(), timings.saving(), timings.throughput(), timings.timeline()

A batch is the rows that the timings number together. On each grid they are denoised together, or in several
chunks. A worker denoises on one thread, and everything else may run beside it. Working time is counted in
seconds from the job's beginning, without the pauses in which nobody worked on it, so that a job that was
resumed a day later is not said to have taken a day.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from overtone.jobs.report.times import (
    DENOISER,
    GENERATION,
    Bar,
    Batches,
    Clock,
    GridTime,
    Saving,
    Throughput,
    Timeline,
    What,
    WorkerTime,
    groups,
    merged,
    until,
)
from overtone.progressive.cost import BY_TOKENS, StepCost

COLUMNS = (
    *("shard", "attempt", "batch", "stage", "rows", "height", "width", "tokens", "steps", "seconds"),
    *("start_s", "start", "worker", "device", "node"),
)
"""The columns of the timings that are used."""
_PAUSE_S = 60.0  # shorter is no pause, whatever the length of an attempt
_INTERVALS = 80
_TIMELINE_BATCHES = 4
_OVER_SHARDS = 1.5  # how much longer a timeline may be in order to show what happens between two shards


class Timings:
    """The lines of a job's timings.

    Args:
        table: it has `COLUMNS`. Lines without a `start` cannot be placed in time and are left out.
        weight: how many lines each line stands for, where only some of the tables were read.
        step_cost: what a step costs by its image tokens.
    """

    def __init__(self, table: pa.Table, weight: float = 1.0, step_cost: StepCost = BY_TOKENS) -> None:
        table = table.combine_chunks()
        table = table.filter(pc.is_valid(table["start"]))
        self.weight, self._step_cost = weight, step_cost
        self._stage = table["stage"].to_numpy(zero_copy_only=False).astype(str)
        self._batch, self._rows, self._height, self._width, self._tokens, self._steps = (
            pc.fill_null(table[name], -1).to_numpy()
            for name in ("batch", "rows", "height", "width", "tokens", "steps")
        )
        self._seconds = table["seconds"].to_numpy()
        self._begin = table["start"].cast(pa.int64()).to_numpy() / 1e6
        self._end = self._begin + self._seconds
        # A shard has an attempt of the job's, and one of each retry's that tried its rejects again.
        first, self._attempt = groups(
            table["shard"].to_numpy(), table["attempt"].to_numpy(zero_copy_only=False).astype(str)
        )
        about = table.select(["worker", "device", "node"]).take(first).to_pylist()
        who = [(attempt["worker"], attempt["device"], attempt["node"]) for attempt in about]
        self.names = sorted(set(who))
        """(worker, device, node) of each worker."""
        self._worker = np.array([self.names.index(name) for name in who], np.int64)  # [attempts]
        self._attempt_begin = self._begin[first] - table["start_s"].to_numpy()[first]
        self._attempt_end = self._attempt_begin + 1e-6  # however short, an attempt took time
        np.maximum.at(self._attempt_end, self._attempt, self._end)

    def __len__(self) -> int:
        """Lines."""
        return len(self._stage)

    @property
    def rows(self) -> float:
        """Samples that were made."""
        return self.weight * float(self._rows[self._stage == "part_write"].sum())

    @property
    def began(self) -> float:
        """When the first attempt began, in seconds since 1970."""
        return float(self._attempt_begin.min())

    @property
    def elapsed_s(self) -> float:
        """Working time from the first attempt's beginning to the last one's end."""
        return self._clock.total_s

    @cached_property
    def _clock(self) -> Clock:
        usual_s = float(np.median(self._attempt_end - self._attempt_begin))
        return Clock(self._attempt_begin, self._attempt_end, max(_PAUSE_S, 2 * self.weight * usual_s))

    @cached_property
    def _generated(self) -> tuple[np.ndarray, np.ndarray]:
        """(lines of `GENERATION` of batches that were denoised, the batch of each)."""
        lines = np.flatnonzero(np.isin(self._stage, GENERATION) & (self._batch >= 0))
        _, batch = groups(self._attempt[lines], self._batch[lines])
        denoised = np.unique(batch[self._stage[lines] == "denoise"])
        known = np.isin(batch, denoised)
        return lines[known], np.searchsorted(denoised, batch[known])

    @cached_property
    def batches(self) -> Batches:
        """All batches that were denoised."""
        lines, batch = self._generated
        num = int(batch.max(initial=-1)) + 1
        begin, end, tokens = np.full(num, np.inf), np.full(num, -np.inf), np.zeros(num, np.int64)
        np.minimum.at(begin, batch, self._begin[lines])
        np.maximum.at(end, batch, self._end[lines])
        denoise = self._stage[lines] == "denoise"
        np.maximum.at(tokens, batch[denoise], self._tokens[lines[denoise]])
        full = denoise & (self._tokens[lines] == tokens[batch])  # [lines] on the batch's largest grid
        row_steps = self._rows * np.maximum(1, self._steps)

        def total(values: np.ndarray, of: np.ndarray) -> np.ndarray:
            return np.bincount(batch[of], values[lines[of]], num)

        def common(values: np.ndarray) -> np.ndarray:
            found = np.zeros(num, np.int64)
            found[batch[full]] = values[lines[full]]
            return found

        worker, height, width = (
            common(values) for values in (self._worker[self._attempt], self._height, self._width)
        )
        in_time = np.argsort(begin, kind="stable")
        earliest, _ = groups(worker[in_time], height[in_time], width[in_time])
        first = np.zeros(num, bool)
        first[in_time[earliest]] = True
        return Batches(
            attempt=common(self._attempt),
            worker=worker,
            rows=total(self._rows, full),
            begin=begin,
            end=end,
            height=height,
            width=width,
            tokens=tokens,
            row_steps=total(row_steps, denoise),
            row_cost=total(row_steps * self._costs(self._tokens), denoise),
            seconds=total(self._seconds, np.isin(self._stage[lines], DENOISER)),
            full_step_s=total(self._seconds, full) / total(row_steps, full),
            first=first,
        )

    def _costs(self, tokens: np.ndarray) -> np.ndarray:
        """Of a step on so many image tokens each, all its passes; steps that leave one out are not told apart
        from those that do not, here and on the full grid."""
        known, places = np.unique(tokens, return_inverse=True)
        return np.array([self._step_cost.step(int(one)) for one in known], float)[places]

    def batch_sizes(self) -> dict[int, int]:
        """How many chunks on the largest grid of their batch had how many rows."""
        lines, batch = self._generated
        full = (self._stage[lines] == "denoise") & (self._tokens[lines] == self.batches.tokens[batch])
        sizes = Counter(self._rows[lines[full]].tolist())
        return {rows: round(self.weight * count) for rows, count in sorted(sizes.items())}

    def workers(self) -> list[WorkerTime]:
        """Each worker's time, in the order of `names`."""
        worker = self._worker[self._attempt]
        made = np.bincount(worker, np.where(self._stage == "part_write", self._rows, 0), len(self.names))
        found = []
        for number, name in enumerate(self.names):
            own = self._worker == number
            wall_s = self._clock.at(self._attempt_end[own].max()) - self._clock.at(
                self._attempt_begin[own].min()
            )
            lines = np.flatnonzero(worker == number)
            found.append(
                WorkerTime(
                    *name,
                    rows=self.weight * float(made[number]),
                    wall_s=float(wall_s),
                    seconds=self._sums(lines, self._seconds),
                    exposed=self._exposed(lines),
                )
            )
        return found

    def grids(self) -> list[GridTime]:
        """Each grid that was denoised on, the smallest first."""
        lines, batch = self._generated
        own = (self._stage[lines] == "denoise") & self.batches.counted[batch]
        lines = lines[own]
        first, group = groups(self._height[lines], self._width[lines], self._tokens[lines])
        total = self._seconds[lines].sum()
        found = []
        for number, line in enumerate(lines[first]):
            same = lines[group == number]
            seconds, steps, rows = self._seconds[same], np.maximum(1, self._steps[same]), self._rows[same]
            found.append(
                GridTime(
                    height=int(self._height[line]),
                    width=int(self._width[line]),
                    tokens=int(self._tokens[line]),
                    batches=round(self.weight * len(same)),
                    batch_rows=float(np.median(rows)),
                    steps=float(np.median(steps)),
                    step_s=float(np.median(seconds / steps)),
                    step_row_s=float(np.median(seconds / steps / rows)),
                    row_s=float(np.median(seconds / rows)),
                    share=float(seconds.sum() / total) if total else 0.0,
                    points=seconds / steps / rows,
                )
            )
        return sorted(found, key=lambda grid: (grid.tokens, grid.height))

    def saving(self) -> Saving | None:
        """None where nothing was denoised, or in no time."""
        batches, counted = self.batches, self.batches.counted
        rows, seconds = batches.rows[counted], float(batches.seconds[counted].sum())
        if not seconds:
            return None
        full_s = batches.row_steps * batches.full_step_s
        full_cost = batches.row_steps * self._costs(batches.tokens)
        lines, batch = self._generated
        own = lines[counted[batch] & np.isin(self._stage[lines], DENOISER)]
        return Saving(
            ideal=float(full_cost[counted].sum() / batches.row_cost[counted].sum()),
            measured=float(np.median((full_s / batches.seconds)[counted])),
            row_s={
                what: took / self.weight / float(rows.sum())
                for what, took in self._sums(own, self._seconds).items()
            },
            warming=bool((batches.first & counted).any()),
        )

    def throughput(self) -> Throughput:
        """Rows and workers over time. A row counts evenly over the time in which its batch was made."""
        clock, batches = self._clock, self.batches
        edges = np.linspace(0, clock.total_s, _INTERVALS + 1)
        length_s = clock.total_s / _INTERVALS
        made = until(edges, clock.at(batches.begin), clock.at(batches.end), batches.rows)
        # The next attempt begins while the last one is committed, so that a worker may have two in hand.
        spans = [self._spans(worker) for worker in range(len(self.names))]
        begin, end = (clock.at(np.concatenate(sides)) for sides in zip(*spans, strict=True))
        worked = until(edges, begin, end, end - begin)
        return Throughput(
            edges_s=edges,
            rows_per_minute=self.weight * np.diff(made) * 60 / length_s,
            workers=self.weight * np.diff(worked) / length_s,
            pauses=clock.pauses,
        )

    def timeline(self) -> Timeline | None:
        """A few consecutive batches of the worker that made the most. None where nothing was denoised.

        They are the quickest ones, but batches on both sides of a shard's end are preferred as long as they
        do not take much longer (`_OVER_SHARDS`), because they show what happens between two shards.
        """
        batches = self.batches
        if not len(batches.rows):
            return None
        worker = int(np.bincount(batches.worker).argmax())
        own = np.flatnonzero(batches.worker == worker)
        own = own[np.argsort(batches.begin[own], kind="stable")]
        later = own[~batches.first[own]]
        own = later if len(later) >= 2 else own
        length = min(_TIMELINE_BATCHES, len(own))
        windows = np.lib.stride_tricks.sliding_window_view(own, length)  # [windows, length]
        one_shard = (batches.attempt[windows] == batches.attempt[windows[:, :1]]).all(axis=1)
        spans = batches.end[windows[:, -1]] - batches.begin[windows[:, 0]]
        window = windows[np.argmin(spans * np.where(one_shard, _OVER_SHARDS, 1.0))]
        begin, end = float(batches.begin[window[0]]), float(batches.end[window[-1]])
        lines, batch = self._generated
        number = {int(which): k for k, which in enumerate(window)}
        of_window = np.isin(batch, window)
        of_batch = dict(zip(lines[of_window].tolist(), batch[of_window].tolist(), strict=True))
        theirs = self._worker[self._attempt] == worker
        bars = []
        for line in np.flatnonzero(theirs & (self._end > begin) & (self._begin < end)).tolist():
            starts, ends = max(begin, self._begin[line]), min(end, self._end[line])
            which = number[of_batch[line]] if line in of_batch else None
            bars.append(Bar(self._what(line), float(starts - begin), float(ends - starts), which))
        return Timeline(self.names[worker][0], end - begin, tuple(bars))

    def _spans(self, worker: int) -> tuple[np.ndarray, np.ndarray]:
        """(begins, ends) of the times in which a worker had an attempt in hand."""
        own = self._worker == worker
        return merged(self._attempt_begin[own], self._attempt_end[own], 0.0)

    def _what(self, line: int) -> What:
        stage = str(self._stage[line])
        grid = (int(self._height[line]), int(self._width[line])) if stage == "denoise" else None
        return stage, grid

    def _sums(self, lines: np.ndarray, seconds: np.ndarray) -> dict[What, float]:
        """The `seconds` of some of the lines, weighted and summed by stage and grid."""
        denoise = self._stage[lines] == "denoise"
        grids = (np.where(denoise, side[lines], -1) for side in (self._height, self._width))
        first, group = groups(self._stage[lines], *grids)
        sums = self.weight * np.bincount(group, seconds[lines], len(first))
        return {self._what(line): float(total) for line, total in zip(lines[first], sums, strict=True)}

    def _exposed(self, lines: np.ndarray) -> dict[What, float]:
        """The seconds of a worker's lines of `GENERATION`, without those that ran beside the denoiser."""
        lines = lines[np.isin(self._stage[lines], GENERATION)]
        denoising = np.isin(self._stage[lines], DENOISER)
        seconds = self._seconds.copy()
        if denoising.any():
            clock = Clock(self._begin[lines[denoising]], self._end[lines[denoising]], 0.0)
            other = lines[~denoising]
            seconds[other] -= clock.at(self._end[other]) - clock.at(self._begin[other])
        return self._sums(lines, seconds)
