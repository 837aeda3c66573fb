"""How far a measurement is, how long the rest of it takes, and how sure the mean of a few samples is. Knows
nothing of what is measured.

    countdown = Countdown(weights)                # one weight a step: what it is expected to cost
    countdown.done(3)                             # step 3 was made now
    countdown.progress("one level, delta 0.05")   # 3 of 17, 12m left
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from overtone.jobs.words import duration

_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # 97.5 %, 1 to 10 degrees of freedom


def half_width(samples: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean of independent samples (Student's t); None for fewer than two."""
    if len(samples) < 2:
        return None
    return half_width_of(statistics.stdev(samples), len(samples))


def half_width_of(deviation: float, count: int) -> float:
    """The same, of at least two samples with this standard deviation."""
    return _STUDENT[min(count - 2, len(_STUDENT) - 1)] * deviation / math.sqrt(count)


@dataclass(frozen=True)
class Progress:
    """A measurement on its way."""

    done: int
    total: int
    """0: not known yet."""
    what: str
    """That comes next."""
    left_s: float | None
    """Seconds until the end, as far as can be told; None: nothing was measured yet."""

    def text(self) -> str:
        """One line: what comes next, and how long the rest takes."""
        if not self.total:
            return self.what
        left = "" if self.left_s is None else f"; about {duration(self.left_s)} left"
        return f"{min(self.done + 1, self.total)} of {self.total}: {self.what}{left}"


OnProgress = Callable[[Progress], None]
"""Called before each step of a measurement."""


def silent(progress: Progress) -> None:
    """An `OnProgress` that tells nobody."""


class Countdown:
    """Reckons the time that is left from the time that the steps made so far took, by their weights."""

    def __init__(
        self, weights: Mapping[Hashable, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._left = dict(weights)
        self._total = len(self._left)
        self._clock = clock
        self._made = self._took = 0.0
        self._began = clock()

    def known(self, step: Hashable) -> None:
        """A step need not be made: it is known from an earlier sitting."""
        self._left.pop(step)
        self._began = self._clock()

    def done(self, step: Hashable) -> None:
        """A step was made since the one before."""
        now = self._clock()
        self._made += self._left.pop(step)
        self._took += now - self._began
        self._began = now

    @property
    def counts(self) -> tuple[int, int]:
        """(steps that are done or known, all steps)."""
        return self._total - len(self._left), self._total

    def progress(self, what: str) -> Progress:
        """How far it is, before `what`."""
        left = sum(self._left.values()) * self._took / self._made if self._made else None
        return Progress(*self.counts, what, left)
