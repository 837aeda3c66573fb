"""A search on its way: the race says what it wants, the drawing draws it, and the race is told the scores.
Knows no plans, no files and no figures of the report.

    search = Search(drawing, race, scorer)
    complete = search.run()                   # False: it was interrupted, or its budget is spent
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from overtone.cluster.measure.drawing import Drawing, OutOfTime
from overtone.cluster.measure.race import Race
from overtone.progressive.scoring import Scorer

_FIRST_ROWS, _HALVING = 8, 3
"""Rows on which many settings are drawn, and how many times as many the survivors are drawn on, again and
again."""


def rungs(batch_sizes: Sequence[int]) -> list[int]:
    """Numbers of rows at which settings are judged, each the end of a batch; the last is all of them."""
    found: list[int] = []
    total = 0
    for size in batch_sizes:
        total += size
        if total >= (found[-1] * _HALVING if found else _FIRST_ROWS):
            found.append(total)
    if found and total < 2 * found[-1]:
        found.pop()
    return [*found, total]


class Search:
    """The race and the drawing, told of each other."""

    def __init__(
        self, drawing: Drawing, race: Race, scorer: Scorer | None, trusted_from: float = -math.inf
    ) -> None:
        """`scorer` None: fidelity decides; as it does where the reference's first rows score less than
        `trusted_from` on average."""
        self.drawing, self.race = drawing, race
        self.scorer = scorer
        """That decides; None: fidelity does."""
        self._trusted_from = trusted_from

    def run(self) -> bool:
        """Draw until nothing is wanted: True. False after Ctrl-C and at the end of the budget."""
        try:
            while wave := self.race.wanted():
                self.drawing.draw(wave)
                for index, _ in wave:
                    self._tell(index)
            return True
        except (KeyboardInterrupt, OutOfTime):
            for index, trial in enumerate(self.drawing.trials):
                if trial.batches:
                    self._tell(index)
            return False

    def _tell(self, index: int) -> None:
        trial = self.drawing.trials[index]
        if index == 0 and not self.race.scores and self.scorer is not None:
            # Decided once, by the first rows: what is asked of the others depends on it.
            if trial.scores(fidelity=False).mean() < self._trusted_from:
                self.scorer = None
        self.race.tell(index, trial.scores(fidelity=self.scorer is None))
