"""How long a line of a suite will take, from those that were measured. Measures nothing and knows no torch.

    estimates = Estimates(PRIORS["cuda"], known=records.all)
    estimates.seconds(line, started=True, resident=("flux1-dev", Stack()), repeats=2)

A line takes the start of a process, the building of its model, what is compiled for its shapes, and loops.
Each of these is estimated from the nearest line that tells of it; where none does, from the priors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from overtone.progressive.bench.records import CUT, Record
from overtone.progressive.bench.suite import Line, Stack

SAFETY = 1.25
"""An estimate is this much longer than what it comes from says."""


@dataclass(frozen=True)
class Priors:
    """What is believed before anything is measured. Seconds, and FLOPs a second."""

    start_s: float
    load_s: float
    shape_s: dict[str, float]
    """To get one shape ready, by `Stack.compile`."""
    flops_per_s: float


PRIORS: dict[str, Priors] = {
    # An H200 compiled four graphs of FLUX.1 and ran both their loops in 47 s; it makes 420e12 FLOPs a second.
    "cuda": Priors(25.0, 15.0, {"off": 1.0, "blocks": 12.0, "max": 90.0}, 250e12),
    "cpu": Priors(15.0, 3.0, {"off": 1.0, "blocks": 60.0, "max": 240.0}, 5e9),
}


@dataclass(frozen=True)
class _Seen:
    """A line, and what it took."""

    line: Line
    record: Record


class Estimates:
    """Seconds of lines, better with each that is learnt."""

    def __init__(self, priors: Priors) -> None:
        self._priors = priors
        self._seen: list[_Seen] = []
        self._starts: list[float] = []
        self._least: dict[str, float] = {}

    def learn_start(self, start_s: float) -> None:
        """A process took so long to start."""
        self._starts.append(start_s)

    def learn(self, line: Line, record: Record) -> None:
        """A line was tried."""
        if record.failed.startswith(CUT):
            self._least[line.name] = record.total_s * SAFETY
        elif record.seconds is not None:
            self._seen.append(_Seen(line, record))

    def seconds(
        self, lines: Sequence[Line], *, started: bool, resident: tuple[str, Stack] | None, repeats: int
    ) -> float:
        """Of these lines one after the other. `started`: a process runs; `resident`: the engine it has."""
        total = 0.0 if started else max(self._starts, default=self._priors.start_s)
        for line in lines:
            one = self._prepare(line) + repeats * self._loop(line)
            if line.engine != resident:
                one += self._load(line)
                resident = line.engine
            total += max(SAFETY * one, self._least.get(line.name, 0.0))
        return total

    def least_s(self, lines: Iterable[Line]) -> float:
        """What is known that these lines take at least, for they were cut off."""
        return sum(self._least.get(line.name, 0.0) for line in lines)

    def _load(self, line: Line) -> float:
        same = self._nearest(lambda seen: seen.line.case == line.case and seen.record.load_s > 0)
        return max((seen.record.load_s for seen in same), default=self._priors.load_s)

    def _prepare(self, line: Line) -> float:
        def compiled_alike(seen: _Seen) -> bool:
            return seen.line.stack.compile == line.stack.compile

        alike = self._nearest(
            lambda seen: seen.line.name == line.name,
            lambda seen: seen.line.engine == line.engine and seen.line.rows == line.rows,
            lambda seen: seen.line.case == line.case and compiled_alike(seen),
            compiled_alike,
        )
        shapes = [seen.record.prepare_s / max(1, seen.line.work.grids) for seen in alike]
        return max(shapes, default=self._priors.shape_s[line.stack.compile]) * line.work.grids

    def _loop(self, line: Line) -> float:
        alike = self._nearest(
            lambda seen: seen.line.name == line.name,
            lambda seen: seen.line.engine == line.engine and seen.line.setting == line.setting,
            lambda seen: seen.line.engine == line.engine,
            lambda seen: seen.line.case == line.case,
            lambda seen: True,
        )
        rates = [seen.line.work.flops / max(seen.record.seconds or 0.0, 1e-9) for seen in alike]
        return line.work.flops / min(rates, default=self._priors.flops_per_s)

    def _nearest(self, *alike: Callable[[_Seen], bool]) -> list[_Seen]:
        """What was seen that is alike in the first of these ways in which anything is."""
        return next((found for way in alike if (found := list(filter(way, self._seen)))), [])
