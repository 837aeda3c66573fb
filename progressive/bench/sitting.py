"""One sitting at a device: lines of a suite measured until its time is used up. Measures nothing itself.

    sitting = Sitting(lab, records, estimates, budget_s=540, repeats=2)
    left = sitting.go(lines)

The first line that is not done and fits into what is left of the budget comes next, by what is estimated of
it, of its baselines, of building its model and of starting a process; one that takes longer than all that
is left is cut off. Each is written when it is known, so that nothing is lost whatever ends the sitting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from overtone.progressive.bench.estimates import Estimates
from overtone.progressive.bench.process import Outcome, Ready
from overtone.progressive.bench.records import Record, Records, over_own_calls
from overtone.progressive.bench.suite import Line, Stack, baselines

CLOSING_S = 3.0
"""Kept back at the end, to kill a process and to write."""
PATIENCE = 3.0
"""A line that takes this many times as long as was estimated is cut off, so that one that hangs leaves time
for others; the next sitting, which knows what it took, gives it more."""
LEAST_LIMIT_S = 90.0
"""A line has at least this long."""


class AnyLab(Protocol):
    """What measures, as `process.LabProcess`."""

    @property
    def ready(self) -> Ready | None: ...
    @property
    def started(self) -> bool: ...
    @property
    def resident(self) -> tuple[str, Stack] | None: ...
    def start(self, limit_s: float) -> Outcome | None: ...
    def measure(self, line: Line, limit_s: float) -> Outcome: ...


class Sitting:
    """Lines and what they are compared with, on one device, within one budget."""

    def __init__(
        self,
        lab: AnyLab,
        records: Records,
        estimates: Estimates,
        *,
        budget_s: float,
        spent_s: float = 0.0,
        repeats: int,
        skip_done: bool = True,
        clock: Callable[[], float] = time.monotonic,
        bases: Callable[[Line], Sequence[Line]] = baselines,
        compare: Callable[[Record, Sequence[Record | None]], Record] = over_own_calls,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`spent_s`: of the budget, before; `repeats`: loops that the lab times of each line; `skip_done`:
        leave out what the records have of this device; `bases`: what a line is compared with, and `compare`
        does it, with the records of those that could be measured."""
        self._lab, self._records, self._estimates = lab, records, estimates
        self._budget_s, self._repeats, self._skip_done = budget_s, repeats, skip_done
        self._clock, self._say = clock, on_progress
        self._bases, self._compare = bases, compare
        self._begin = clock() - spent_s
        self._name = datetime.now(UTC).isoformat(timespec="seconds")
        self._here: dict[str, Record] = {}

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self._budget_s - CLOSING_S - (self._clock() - self._begin)

    @property
    def tried(self) -> int:
        """Lines so far, baselines included."""
        return len(self._here)

    def go(self, lines: Sequence[Line]) -> list[Line]:
        """Measure what there is time for; returns the lines that are left. RuntimeError where no process can
        be started at all."""
        begin = self._clock()
        failed = self._lab.start(self.left_s)
        if failed is not None:
            raise RuntimeError(f"nothing can be measured here: {failed.failed}")
        assert self._lab.ready is not None
        self._estimates.learn_start(self._clock() - begin)
        known = self._records.latest(self._lab.ready.device)
        every = {one.name: one for line in lines for one in (*self._bases(line), line)}
        for name in every.keys() & known.keys():
            self._estimates.learn(every[name], known[name])
        waiting = [
            line for line in lines if not (self._skip_done and line.name in known and known[line.name].done)
        ]
        cut: list[Line] = []
        while waiting and (chosen := self._next(waiting)) is not None:
            for one in self._due(chosen):
                self._measure(one)
            waiting.remove(chosen)
            if not self._here[chosen.name].done:
                cut.append(chosen)
        return [line for line in lines if line in waiting or line in cut]

    def _next(self, waiting: Sequence[Line]) -> Line | None:
        """The first that fits; of a sitting that would do nothing at all, the shortest that may."""
        estimated = [(self._seconds(line), line) for line in waiting]
        fits = next((line for seconds, line in estimated if seconds <= self.left_s), None)
        if fits is not None or self._here:
            return fits
        _, line = min(estimated, key=lambda one: one[0])
        return line if self._estimates.least_s(self._due(line)) <= self.left_s else None

    def _seconds(self, line: Line) -> float:
        return self._estimates.seconds(
            self._due(line),
            started=self._lab.started,
            resident=self._lab.resident,
            repeats=self._repeats,
        )

    def _due(self, line: Line) -> list[Line]:
        """The line after those of its baselines that this sitting has not tried."""
        return [one for one in self._bases(line) if one.name not in self._here] + [line]

    def _measure(self, line: Line) -> None:
        estimate = self._estimates.seconds(
            [line], started=self._lab.started, resident=self._lab.resident, repeats=self._repeats
        )
        self._say(f"{line.name}: about {estimate:.0f} s, {max(0.0, self.left_s):.0f} s left")
        limit_s = max(0.0, min(self.left_s, max(LEAST_LIMIT_S, PATIENCE * estimate)))
        outcome = self._lab.measure(line, limit_s)
        record = self._record(line, outcome)
        self._here[line.name] = record
        self._records.add(record)
        self._estimates.learn(line, record)
        if outcome.start_s is not None:
            self._estimates.learn_start(outcome.start_s)
        over = "" if record.over_plain is None else f", {record.over_plain:.2f}x over plain"
        self._say(f"{line.name}: {record.failed or f'{record.seconds:.2f} s{over}'}")

    def _record(self, line: Line, outcome: Outcome) -> Record:
        assert self._lab.ready is not None
        work, figures = line.work, outcome.figures
        record = Record(
            line=line.name,
            case=line.case,
            stack=line.stack.label,
            rows=line.rows,
            split=work.split,
            cost=work.cost,
            ideal=work.ideal,
            device=self._lab.ready.device,
            sitting=self._name,
            total_s=outcome.seconds,
            failed=outcome.failed,
            about=self._lab.ready.about,
        )
        if figures is None:
            return record
        record = replace(
            record,
            seconds=figures.seconds,
            spread_s=figures.spread_s,
            memory_gib=figures.memory_gib,
            load_s=figures.load_s,
            prepare_s=figures.prepare_s,
            graphs=figures.graphs,
            replays=figures.replays,
            denoise_share=figures.denoise_share,
        )
        bases = [record if one.name == line.name else self._here.get(one.name) for one in self._bases(line)]
        return self._compare(record, [one if one is not None and one.seconds else None for one in bases])
