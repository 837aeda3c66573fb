"""How sure it is that one setting is better than another, and what a setting is worth in full-resolution
steps. Knows scores and costs alone, no settings.

*Gain at equal quality* is the cost of full resolution that is as good, over the setting's. Full-resolution
settings exist at whole numbers of steps only; between two of them the cost of a quality is read off a
straight line, because rounding up to the next whole step would flatter whatever it is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from overtone.cluster.measure.pace import half_width_of
from overtone.progressive.scoring import Difference, paired_difference

_RESAMPLES = 1000
_RESAMPLES_OF_GAIN = 500


def spread(differences: Sequence[np.ndarray]) -> float:
    """The usual standard deviation of differences, over the rows of each: the median over settings."""
    found = [float(one.std(ddof=1)) for one in differences if len(one) > 1]
    return float(np.median(found)) if found else 0.0


def difference(scores: np.ndarray, others: np.ndarray) -> Difference:
    """Mean of `scores` minus that of `others`, float [N] of the same rows, by a paired bootstrap."""
    return paired_difference(scores, others, resamples=_RESAMPLES)


def at_least(found: Difference, usual_spread: float) -> Difference:
    """The interval, no narrower than Student's t for rows that differ by `usual_spread`: a bootstrap knows
    only of the rows that there are, and where a few of them happen to be alike it is too sure."""
    if found.rows < 2:
        return found
    around = half_width_of(usual_spread, found.rows)
    return replace(found, low=min(found.low, found.mean - around), high=max(found.high, found.mean + around))


@dataclass(frozen=True)
class Gain:
    """Of one setting, over full resolution with fewer steps."""

    value: float
    low: float
    """Ends of the 95 % interval; both the value where one row alone was made."""
    high: float
    bound: Literal["", "at least", "at most"] = ""
    """`at least`: it scores more than the reference, and is compared with full resolution that scores as much
    as that. `at most`: all full resolution that was drawn is better, and the cheapest of it is what it is
    compared with; or what lies between the two nearest was not drawn, and the dearer one is."""

    @property
    def text(self) -> str:
        """The gain and its interval; in front of it how it is bounded."""
        bound = f"{self.bound} " if self.bound else ""
        likely = f" ({self.low:.2f} to {self.high:.2f})" if self.high - self.low >= 0.01 else ""
        return f"{bound}{self.value:.2f}x{likely}"


def gain_at_equal_quality(
    scores: np.ndarray,
    cost: float,
    plain: Sequence[np.ndarray],
    plain_costs: Sequence[float],
    undrawn_costs: Sequence[float] = (),
    tolerance: float = 0.0,
    seed: int = 0,
) -> Gain:
    """Gain of a setting with `scores` [N] and this cost over the full-resolution settings `plain`, [N] each
    over the same rows, in full-size steps. ValueError where there is none of these.

    The first of `plain` is the reference. What scores better than it counts as equally good: above it the
    means of full resolution differ by chance, and which one is the best would decide the price. Full
    resolution that scores less by at most the `tolerance` counts as equally good too.

    Where the two that its quality lies between are not neighbours, because those of `undrawn_costs` are, the
    straight line would promise too much: quality rises steeply at first. The upper one is then the bound.

    The interval is a bootstrap's over rows, drawn for all settings at once: the price of a quality is as
    unsure as the quality.
    """
    if not plain:
        raise ValueError("there is no full-resolution setting to compare with")
    order = np.argsort(plain_costs, kind="stable")
    costs = np.asarray(plain_costs, np.float64)[order]
    stacked = np.stack([scores, *(plain[k] for k in order)]).astype(np.float64)  # [1 + plain, N]
    rows = stacked.shape[1]
    reference = 1 + int(np.flatnonzero(order == 0)[0])
    means = stacked.mean(axis=1)
    better = means[0] > means[reference]
    means[0] = min(means[0], means[reference]) - tolerance
    value = _price(means[0], means[1:], costs) / cost
    bound: Literal["", "at least", "at most"] = ""
    if means[0] < means[1]:
        bound = "at most"
    else:
        bound = "at least" if better else ""
        upper = int(np.argmax(means[1:] >= means[0]))  # the cheapest that is as good
        lower = int(np.argmax(means[1 : upper + 1])) if upper else upper
        between = [one for one in undrawn_costs if costs[lower] < one < costs[upper]]
        if between and means[1 + upper] > means[0]:
            value, bound = float(costs[upper] / cost), "at most"
    if rows < 2:
        return Gain(value, value, value, bound)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(rows, [1 / rows] * rows, _RESAMPLES_OF_GAIN) / rows  # [R, N]
    prices = [
        _price(min(drawn[0], drawn[reference]) - tolerance, drawn[1:], costs) / cost
        for drawn in weights @ stacked.T
    ]
    low, high = np.quantile(prices, (0.025, 0.975))
    return Gain(value, min(value, float(low)), max(value, float(high)), bound)


def _price(quality: float, plain: np.ndarray, costs: np.ndarray) -> float:
    """Cost at which full resolution has this quality: on the line that climbs through those settings that are
    better than all cheaper ones; at its ends the cost of the cheapest and of the best."""
    best = np.maximum.accumulate(plain)
    climbs = np.concatenate([[True], best[1:] > best[:-1]])
    return float(np.interp(quality, best[climbs], costs[climbs]))
