"""The settings that `overtone tune` searches, by their names: all of them, or the part that a user names.
Knows no rows, and runs nothing.

A name says the ladder, the delta, what else is unusual and, unless it is the spec's own, the number of steps:
`one level, delta 0.45, 6 steps`. `fullres` alone is the reference.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from overtone.jobs.errors import UserError
from overtone.progressive.settings import NO_CACHE, Sampling

DELTAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""The deltas that are tried where the user names none."""
FULLRES = "fullres"
"""The setting that all others are compared to: full resolution with the spec's own number of steps."""

_FEW, _MANY, _GROWTH = 3, 20, 1.1
"""Every number of steps from the first to the second is tried, then each a tenth above the one before."""
_LADDERS: dict[str, dict[str, Any]] = {
    "one level": {"levels": 1, "scales": None},
    "auto ladder": {"levels": None, "scales": "auto"},
}
_KINDS: dict[str, dict[str, Any]] = {
    "": {"mode": "dct_rewind", "noise": "coupled"},
    "matched": {"mode": "dct_matched", "noise": "coupled"},
    "fresh noise": {"mode": "dct_rewind", "noise": "fresh"},
}
"""How a ladder can be run, with the keys of `Sampling` that say it: each with every ladder, delta and number
of steps. The spec's own, which may be another, is the one that is searched."""
_INTERVAL = {"guidance above 0.4": (0.4, 1.0)}
"""The noise levels within which guidance can run, where the spec gives none. With full resolution too, so
that a ladder is not praised for passes that anybody can leave out."""
_EXTRAS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((f"taylorseer {n}", {"cache": "taylorseer", "cache_interval": n}) for n in (2, 3)),
    *((f"first_block {x:g}", {"cache": "first_block", "cache_threshold": x}) for x in (0.05, 0.1)),
    ("magcache 0.06", {"cache": "magcache", "cache_threshold": 0.06}),
    ("seacache 0.25", {"cache": "seacache", "cache_threshold": 0.25}),
)
"""What can be added to a setting at the spec's own number of steps, with the keys that say it."""


@dataclass(frozen=True)
class Setting:
    """One candidate: a name for people, the group that shares a mark in the plot, and what it means."""

    name: str
    group: str
    sampling: Sampling
    steps: int
    usual: bool = True
    """Whether it is searched where the user names none."""

    @property
    def plain(self) -> bool:
        """Whether it is full resolution without a step cache, which anybody can have."""
        return self.sampling.mode == "fullres" and self.sampling.cache == "none"


def reference(base: Sampling, **changes: Any) -> Sampling:
    """Full resolution with `base`'s number of steps."""
    plain = {"mode": "fullres", "levels": None, "scales": None, "transition_sigmas": None} | NO_CACHE
    return Sampling.model_validate(base.model_dump() | plain | changes)


def step_numbers(most: int) -> tuple[int, ...]:
    """The numbers of steps that are tried up to a spec's own, which is the last."""
    numbers = list(range(1 if most <= 2 * _FEW else _FEW, min(most, _MANY) + 1))
    while numbers[-1] < most:
        numbers.append(min(most, int(numbers[-1] * _GROWTH + 0.5)))
    return tuple(numbers)


def space(
    base: Sampling, num_steps: int, *, steps: Sequence[int] = (), deltas: Sequence[float] = ()
) -> list[Setting]:
    """All settings that have a name, from `base`, whose own number of steps is `num_steps`.

    The reference comes first, then full resolution with fewer steps; then, for each number of steps, one
    level and the automatic ladder at each delta, in the mode and noise of `base` (these are searched) and in
    the others; the searched ones once more with guidance in an interval, where `base` has none; at the end
    step caches on full resolution and on the automatic ladder at `base`'s delta.
    UserError for a number of steps above the spec's own: the reference must be the most that is asked for.
    """
    if above := [n for n in steps if n > num_steps]:
        raise UserError(
            f"--steps: {above[0]} is above the spec's own number, {num_steps}, which the others are compared "
            f"to; take a larger one with --set sampling.num_steps={above[0]}"
        )
    numbers = sorted(set(steps or step_numbers(num_steps)), reverse=True)
    own = {"mode": "dct_rewind" if base.mode == "fullres" else base.mode, "noise": base.noise}
    kinds = {_kind(**own): own} | {kind: how for kind, how in _KINDS.items() if how != own}

    def setting(parts: Sequence[str], n: int, *, usual: bool = True, **changes: Any) -> Setting:
        named = [*parts, *([f"{n} steps"] if n != num_steps else [])]
        group = ", ".join(part for part in parts if not part.startswith("delta "))
        plain = base.model_dump() | {"transition_sigmas": None} | NO_CACHE | {"num_steps": n} | changes
        return Setting(", ".join(named), group, Sampling.model_validate(plain), n, usual)

    plain: dict[str, Any] = {"mode": "fullres", "levels": None, "scales": None}
    intervals = [] if base.guidance_interval else list(_INTERVAL.items())
    found = [setting([FULLRES], n, **plain) for n in dict.fromkeys((num_steps, *numbers))]
    found += [
        setting([FULLRES, named], n, **plain, guidance_interval=levels)
        for named, levels in intervals
        for n in numbers
    ]
    ways = [(kind, how, how == own) for kind, how in kinds.items()]
    ways += [(named, own | {"guidance_interval": levels}, True) for named, levels in intervals]
    for words, how, usual in ways:
        for ladder, grids in _LADDERS.items():
            for n in numbers:
                for delta in sorted(deltas or DELTAS):
                    parts = [ladder, f"delta {delta:g}", *([words] if words else [])]
                    found.append(setting(parts, n, usual=usual, delta=delta, **how, **grids))
    if num_steps in numbers:
        how = own | _LADDERS["auto ladder"]
        for name, extra in _EXTRAS:
            ratios = {"cache_ratios": base.cache_ratios} if extra["cache"] == "magcache" else {}
            keys = extra | ratios
            usual = keys["cache"] == "taylorseer"  # what others leave out is not known beforehand
            found.append(setting([FULLRES, name], num_steps, usual=usual, **plain, **keys))
            found.append(setting(["auto ladder", name], num_steps, usual=usual, **how, **keys))
    return found


def _kind(mode: str, noise: str) -> str:
    """The name of a mode and noise; of `dct_rewind` with coupled noise, the usual ones, it is empty."""
    words = {"dct_rewind": "", "dct_matched": "matched", "dct": "no rewind"}[mode]
    return ", ".join(word for word in (words, "fresh noise" if noise == "fresh" else "") if word)


def named_like(settings: Sequence[Setting], patterns: Sequence[str]) -> list[Setting]:
    """The settings whose names match one of the patterns, as in a shell, and full resolution with guidance as
    they have it, which they are compared to; without any pattern, those that are usually searched. UserError
    for a pattern that none matches."""
    names = [setting.name for setting in settings]
    kept = {setting.name for setting in settings if setting.usual and not patterns}
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise UserError(
                f"--only: no setting is named like {pattern!r}; there are, at the spec's number of steps: "
                + "; ".join(name for name in names if not name.endswith(" steps"))
            )
        kept.update(matching)
    intervals = {setting.sampling.guidance_interval for setting in settings if setting.name in kept}
    intervals.add(settings[0].sampling.guidance_interval)
    return [
        setting
        for setting in settings
        if setting.name in kept or (setting.plain and setting.sampling.guidance_interval in intervals)
    ]
