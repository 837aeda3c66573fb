"""The settings that `overtone tune` compares: one sweep, or the part of it that a user names. Knows no rows,
and runs nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from overtone.cluster.worker import Engine
from overtone.jobs.errors import UserError
from overtone.progressive.settings import NO_CACHE, Sampling

DELTAS = (0.01, 0.05, 0.10, 0.20)
"""The deltas that are tried where the user names none."""
CACHES: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("first_block", "cache_threshold", (0.05, 0.1)),
    ("taylorseer", "cache_interval", (3, 2)),
)
"""Step caches, with the field that says how much they leave out."""
FULLRES = "fullres"
"""The setting that all others are compared to."""


@dataclass(frozen=True)
class Setting:
    """One candidate: a name for people, the group that shares a mark in the plot, and what it means."""

    name: str
    group: str
    sampling: Sampling


def sweep(base: Sampling, *, deltas: Sequence[float] = DELTAS) -> list[Setting]:
    """The candidates: `fullres` first; at each delta one level and the automatic ladder, in the modes
    `dct_rewind` and `dct_matched` with coupled noise, and in `dct_rewind` with fresh noise; and the automatic
    ladder at `base`'s delta with each step cache."""
    ladders: dict[str, dict[str, Any]] = {
        "one level": {"levels": 1, "scales": None},
        "auto ladder": {"levels": None, "scales": "auto"},
    }
    kinds: dict[str, dict[str, Any]] = {
        "": {"mode": "dct_rewind", "noise": "coupled"},
        "matched": {"mode": "dct_matched", "noise": "coupled"},
        "fresh noise": {"mode": "dct_rewind", "noise": "fresh"},
    }

    def setting(name: str, group: str, **changes: Any) -> Setting:
        plain = base.model_dump() | {"transition_sigmas": None} | NO_CACHE | changes
        return Setting(name, group, Sampling.model_validate(plain))

    settings = [setting(FULLRES, FULLRES, mode="fullres", levels=None, scales=None)]
    for kind, how in kinds.items():
        for ladder, grids in ladders.items():
            group = f"{ladder}, {kind}" if kind else ladder
            for delta in deltas:
                name = ", ".join(part for part in (ladder, f"delta {delta:g}", kind) if part)
                settings.append(setting(name, group, delta=delta, **how, **grids))
    for cache, key, values in CACHES:
        for value in values:
            name = f"auto ladder, {cache} {value:g}"
            how = kinds[""] | ladders["auto ladder"] | {"cache": cache, key: value}
            settings.append(setting(name, f"auto ladder, {cache}", **how))
    return settings


def named_like(settings: Sequence[Setting], patterns: Sequence[str]) -> list[Setting]:
    """`fullres` and the settings whose names match one of the patterns, as in a shell; without any, all.
    UserError for a pattern that none matches."""
    names = [setting.name for setting in settings]
    kept = {FULLRES} if patterns else {*names}
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise UserError(f"no setting is named like {pattern!r}; there are: {'; '.join(names)}")
        kept.update(matching)
    return [setting for setting in settings if setting.name in kept]


def possible(engine: Engine, setting: Setting) -> bool:
    """Whether the engine's pipeline can have the setting's step cache; every other setting is possible."""
    if setting.sampling.cache == "none":
        return True
    try:
        engine.plan(setting.sampling)
    except ValueError:
        return False
    return True
