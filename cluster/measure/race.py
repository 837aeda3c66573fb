"""Which setting to draw next, and on how many rows, until the cheapest that is good enough is known. Pure
numbers: knows no engine, no pictures and no clock.

    race = Race(entrants, rungs=(8, 24, 72, 200), drops=(1.0, 2.0, 5.0))
    while wave := race.wanted():
        for index, rows in wave:
            race.tell(index, scores_of(index, rows))       # float [rows], the first rows of the table
    race.winner(1.0)

Successive halving with a reason for every setting that is left out. Each `drop` is a question: which setting
is the cheapest whose mean score is at most so much below the reference's (entrant 0)? Costs are known before
anything is drawn, so whatever costs more than one that passes need not be drawn for that question; what costs
less is drawn on few rows, and on more until it passes, has all rows, or is *surely* out: by the interval of
the paired bootstrap its loss is above the drop, or a cheaper one is within `TOLERANCE` of it.

Where a line (one kind of ladder at one number of steps) was surely worse, its cheaper members are not tried:
fewer full-size steps do not make it better. They count as untried, not as worse.

For each answer that is no full-resolution setting the cheapest full-resolution one that is as good is looked
for in the same way, and the one below it drawn on all rows, so that the answer has a price to compare with.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from overtone.cluster.measure.worth import at_least, difference, spread
from overtone.progressive.scoring import Difference

TOLERANCE = 0.25
"""Of the allowed drop: by so much a setting may be better than a cheaper one that takes its place."""
_WAVE = 8
"""Lines that are tried at a time, the cheapest first."""


@dataclass(frozen=True)
class Entrant:
    """A setting as far as the race knows it."""

    cost: float
    """Of a row, in full-size steps."""
    line: Hashable
    """Of the settings with this line more cost means more full-size steps."""
    plain: bool
    """Whether all its steps run at full resolution."""


class Draw(NamedTuple):
    """What is wanted: the first `rows` rows at an entrant, of which some may be there."""

    entrant: int
    rows: int


class Race:
    """The state: the scores of each entrant on the first so many rows."""

    def __init__(
        self, entrants: Sequence[Entrant], *, rungs: Sequence[int], drops: Sequence[float], halve: bool = True
    ) -> None:
        """`rungs`: numbers of rows, increasing; the last is all of them. `drops`: the questions, the most
        important first. Without `halve` everything is wanted on all rows."""
        self.entrants, self.rungs, self.drops = list(entrants), tuple(rungs), tuple(drops)
        self.scores: dict[int, np.ndarray] = {}
        self._halve = halve
        self._by_cost = sorted(range(len(self.entrants)), key=lambda i: (self.entrants[i].cost, i))
        self._compare = lru_cache(maxsize=None)(self._compared)
        self._spreads = lru_cache(maxsize=None)(self._usual_spread)

    @property
    def tolerance(self) -> float:
        """By how much less full resolution may score and still count as being as good as an answer."""
        return TOLERANCE * self.drops[0]

    def tell(self, index: int, scores: np.ndarray) -> None:
        """The scores of an entrant's first rows, as many as a rung has, or more than were known."""
        self.scores[index] = np.asarray(scores, np.float64)
        self._spreads.cache_clear()

    def wanted(self) -> list[Draw]:
        """What to draw next, each with a number of rows above those that it has; empty at the end."""
        wave = self._next()
        # Everything is compared with the reference on the same rows.
        most = max((draw.rows for draw in wave), default=0)
        first = [] if self._rows(0) >= most else [Draw(0, most)]
        return first + [draw for draw in wave if draw.entrant != 0]

    def _next(self) -> list[Draw]:
        everything = self.rungs[-1]
        if not self._halve:
            return [Draw(i, everything) for i in range(len(self.entrants)) if self._rows(i) < everything]
        if not self._rows(0):
            return [Draw(0, self.rungs[0])]
        plain = [i for i in self._by_cost if self.entrants[i].plain]
        for drop in self.drops:
            if wave := self._ask(drop, self._by_cost):
                return wave
            answer = self.winner(drop)
            if self.entrants[answer].plain:
                continue
            as_good = max(0.0, -self.difference(answer, 0).mean) + self.tolerance
            if wave := self._ask(as_good, plain):
                return wave
            found = plain.index(self._passing(as_good, plain))
            around = plain[max(0, found - 1) : found + 2]
            if wave := [Draw(i, everything) for i in around if self._rows(i) < everything]:
                return wave
        return []

    def _ask(self, drop: float, pool: Sequence[int]) -> list[Draw]:
        """What to draw next for one question; empty once it is answered."""
        best = self._passing(drop, pool)
        cheaper = [i for i in pool if self.entrants[i].cost < self.entrants[best].cost]
        if untried := [i for i in cheaper if not self._rows(i) and self._promising(i, drop)]:
            lines: dict[Hashable, list[int]] = {}
            for i in untried:
                lines.setdefault(self.entrants[i].line, []).append(i)
            middles = sorted(line[len(line) // 2] for line in lines.values())
            middles.sort(key=lambda i: self.entrants[i].cost)
            return [Draw(i, self.rungs[0]) for i in middles[:_WAVE]]
        unsure = [i for i in cheaper if self._rows(i) and not self._is_out(i, drop, pool)]
        short = [i for i in (*unsure, best) if self._rows(i) < self.rungs[-1]]
        least = min((self._rows(i) for i in short), default=0)
        return [Draw(i, self._rung_above(least)) for i in short if self._rows(i) == least]

    def winner(self, drop: float, *, plain: bool = False) -> int:
        """The cheapest entrant that passes, of those with the most rows; on request of the
        full-resolution ones. The reference always passes."""
        others = max((len(own) for i, own in self.scores.items() if i), default=0)
        least = min(self._rows(0), others) or 1  # interrupted, the reference is ahead of the others
        whole = [i for i in self._by_cost if self._rows(i) >= least]
        return self._passing(drop, [i for i in whole if self.entrants[i].plain or not plain])

    def _passing(self, drop: float, pool: Sequence[int]) -> int:
        passing = (i for i in pool if self._rows(i) and self.difference(i, 0).mean >= -drop)
        return next(passing, 0)

    def _promising(self, index: int, drop: float) -> bool:
        own = self.entrants[index]
        return not any(
            one.line == own.line and one.cost >= own.cost and self._rows(i) and self._is_worse(i, drop)
            for i, one in enumerate(self.entrants)
        )

    def _is_out(self, index: int, drop: float, pool: Sequence[int]) -> bool:
        return self._is_worse(index, drop) or self._stand_in(index, drop, pool) is not None

    def _is_worse(self, index: int, drop: float) -> bool:
        return self.difference(index, 0).high < -drop

    def _stand_in(self, index: int, drop: float, pool: Sequence[int]) -> int | None:
        """A cheaper entrant that is surely within the tolerance of this one, or better."""
        rows = self._rows(index)
        cheaper = [
            i
            for i in pool
            if self.entrants[i].cost < self.entrants[index].cost
            and self._rows(i) >= rows
            and not self._is_worse(i, drop)
        ]
        best = max(cheaper, key=lambda i: self.scores[i][:rows].mean(), default=None)
        return best if best is not None and self.difference(best, index).low >= -TOLERANCE * drop else None

    def fate(self, index: int) -> str:
        """Why an entrant is without all rows, as the end of a sentence; empty where it has them."""
        rows = self._rows(index)
        if rows >= self.rungs[-1]:
            return ""
        if not rows:
            dearer = self.entrants[index].cost > self.entrants[self.winner(self.drops[0])].cost
            return "not tried: it costs more than the choice" if dearer else "not tried: its line was worse"
        if self._is_worse(index, min(self.drops)):
            return f"surely worse, after {rows} rows"
        stand_in = self._stand_in(index, min(self.drops), self._by_cost)
        if stand_in is not None:
            return f"a cheaper one is as good, after {rows} rows"
        return f"not needed for an answer, after {rows} rows"

    def difference(self, index: int, other: int) -> Difference:
        """Mean score of an entrant minus that of another, over the rows that both have."""
        rows = min(self._rows(index), self._rows(other))
        return at_least(self._compare(index, other, rows), self._spreads(rows))

    def _compared(self, index: int, other: int, rows: int) -> Difference:
        return difference(self.scores[index][:rows], self.scores[other][:rows])

    def _usual_spread(self, rows: int) -> float:
        """Of what the settings differ by from the reference, row by row."""
        reference = self.scores[0][:rows]
        return spread([own[:rows] - reference for i, own in self.scores.items() if i and len(own) >= rows])

    def _rows(self, index: int) -> int:
        return len(self.scores.get(index, ()))

    def _rung_above(self, rows: int) -> int:
        return next(rung for rung in self.rungs if rung > rows)
