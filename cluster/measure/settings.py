"""TODO: cluster/measure/settings.py."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from overtone.cluster.worker import Engine
from overtone.jobs.errors import PromptsError, UserError
from overtone.jobs.plan import make_plan
from overtone.jobs.prompts import read_shard
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.progressive.settings import NO_CACHE, Sampling

DELTAS = (0.01, 0.05, 0.10, 0.20)

CACHES: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("first_block", "cache_threshold", (0.05, 0.1)),
    ("taylorseer", "cache_interval", (3, 2)),
)
"""Step caches, with the field that says how much they leave out."""
FULLRES = "fullres"
Judge = Callable[[Image.Image, str], tuple[int, int]]
"""(objects drawn right, objects asked for) of a picture and its prompt."""


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

    found = [setting(FULLRES, FULLRES, mode="fullres", levels=None, scales=None)]
    for kind, how in kinds.items():
        for ladder, grids in ladders.items():
            group = f"{ladder}, {kind}" if kind else ladder
            for delta in deltas:
                name = ", ".join(part for part in (ladder, f"delta {delta:g}", kind) if part)
                found.append(setting(name, group, delta=delta, **how, **grids))
    for cache, key, values in CACHES:
        for value in values:
            name = f"auto ladder, {cache} {value:g}"
            how = kinds[""] | ladders["auto ladder"] | {"cache": cache, key: value}
            found.append(setting(name, f"auto ladder, {cache}", **how))
    return found


def named_like(settings: Sequence[Setting], patterns: Sequence[str]) -> list[Setting]:
    """`fullres` and the settings whose names match one of the patterns, as in a shell; without any, all.
    UserError for a pattern that none matches."""
    names = [setting.name for setting in settings]
    kept = {FULLRES} if patterns else {*names}
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise UserError(f"no setting is named like {pattern!r}; there are: {'; '.join(names)}")
        kept.update(found)
    return [setting for setting in settings if setting.name in kept]


def possible(engine: Engine, setting: Setting) -> bool:
    if setting.sampling.cache == "none":
        return True
    try:
        engine.plan(setting.sampling)
    except ValueError:
        return False
    return True


def sample_rows(spec: JobSpec, count: int) -> list[Row]:
    """Up to `count` good rows, spread evenly over the prompt table. PromptsError where there is none."""
    plan = make_plan(spec)
    step = max(1, plan.num_shards // count)
    per_shard = -(-count // -(-plan.num_shards // step))  # rows over the shards that are looked at
    rows: list[Row] = []
    for index in range(0, plan.num_shards, step):
        shard = plan.shard(index)
        rows += read_shard(spec, plan.files[shard.file], shard.first_row, shard.num_rows).rows[:per_shard]
        if len(rows) >= count:
            break
    if not rows:
        raise PromptsError("none of the prompt table's rows that were looked at can be made")
    return rows[:count]


def tiny_judge(spec: JobSpec, rows: Sequence[Row]) -> Judge | None:
    """The picture world's own judge, where the job's model is the embedded one and draws captions of that
    world at its size; None elsewhere."""
    sizes = {(row.height or spec.sampling.height, row.width or spec.sampling.width) for row in rows}
    if spec.model.id != "tiny" or not sizes <= {(None, None), (256, 256), (256, None), (None, 256)}:
        return None
    from overtone.progressive.tiny import judge, world

    try:
        for row in rows:
            world.parse(row.prompt)
    except ValueError:
        return None
    return judge.judge
