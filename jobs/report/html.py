"""`overtone report`: a job as one HTML page that needs nothing else, from its folder alone.

    Path("report.html").write_text(report("s3://bucket/run-7"))

It reads names, timings, rejects, and of the parts only the few whose pictures it shows. Of very many timings
and rejects it reads only some, which then stand for all. Knows no driver and no cluster.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import yaml

from overtone.jobs.columns import REJECTS, TIMINGS
from overtone.jobs.errors import UserError, VerifyError
from overtone.jobs.folder import JobFolder
from overtone.jobs.media import media_kind, still
from overtone.jobs.parts import PartRow, part_format, part_index, read_footer, read_rows
from overtone.jobs.plan import JobPlan
from overtone.jobs.report import charts
from overtone.jobs.report.pages import data_uri, page, style, svg
from overtone.jobs.report.times import DENOISER, GENERATION
from overtone.jobs.report.timings import COLUMNS, Timings
from overtone.jobs.sampling import checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec
from overtone.jobs.status import status
from overtone.jobs.store import NoSuchObject, Store, open_store
from overtone.jobs.tables import read_all, stride_of, table_of
from overtone.jobs.words import counted, duration
from overtone.progressive.cost import BY_TOKENS
from overtone.progressive.schedule import SamplingPlan

_PICTURE_PX = 256
_PARTS_SHOWN = 6  # that the pictures are from, unless those have too few rows
_REJECTS_SHOWN = 200
_CLASSES_SHOWN = 12
_TEXT_CHARACTERS = 1000  # of a prompt or a message


def report(
    url: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    pictures: int = 48,
    tables: int = 2000,
    now: float | None = None,
) -> str:
    """The page, as text. UserError where there is no job.

    Args:
        pictures: at most this many are shown, from parts that are spread over what is done.
        tables: at most this many tables of timings are read, and as many of rejects.
        now: seconds since 1970; None: this machine's clock.
    """
    now = time.time() if now is None else now
    state = status(url, endpoint_url=endpoint_url, region=region, now=now)
    store = open_store(url, endpoint_url=endpoint_url, region=region)
    spec, job_plan = JobFolder(store).load()
    table, weight, found = _tables(store, "timings/", TIMINGS, COLUMNS, tables)
    planned = _planned(spec)
    step_cost = planned.step_cost if planned else BY_TOKENS
    timings = Timings(table, weight, step_cost)
    notes, shown, versions = _pictures(store, job_plan, pictures)
    if state.rows_truncated:
        notes.append(
            f"Prompts cut: of {counted(state.rows_truncated, 'row')}, whose end no text encoder read. They "
            "have true in the column prompt_truncated."
        )
    if found < state.shards_done:
        missing = f"{state.shards_done - found:,} of {counted(state.shards_done, 'part')}"
        notes.append(
            f"The timings of {missing} are missing, so their time is in no figure; "
            "`overtone verify --repair` rebuilds them."
        )
    return page(
        "overtone.jobs",
        "report.html",
        state=state,
        made_at=_moment(now),
        notes=notes,
        pictures=shown,
        versions=versions,
        speed=_speed(spec, timings) if len(timings) else None,
        sampled=weight > 1,
        rejects=_rejects(store, tables),
        planned=planned,
        counts=step_cost.counts,
        spec=yaml.safe_dump(
            spec.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True, width=80
        ),
        number=_number,
        seconds=_seconds,
        duration=duration,
    )


def _tables(
    store: Store, prefix: str, schema: pa.Schema, columns: Sequence[str], limit: int
) -> tuple[pa.Table, float, int]:
    """(the tables under a prefix as one, how many tables each of those that were read stands for, how many
    there are). VerifyError where one is damaged."""
    # Empty tables were lost with a machine's power, and are made again at the job's end.
    keys = [info.key for info in store.list(prefix) if info.key.endswith(".parquet") and info.size_bytes]
    chosen = keys[:: stride_of(len(keys), limit)]
    empty = schema.empty_table().select(columns)

    def read(key: str) -> pa.Table:
        try:
            return table_of(store.read(key), columns)
        except NoSuchObject:  # replaced or removed while we looked
            return empty
        except (pa.ArrowException, OSError, KeyError) as error:
            raise VerifyError(f"{store.where(key)} cannot be read: {error}") from error

    return pa.concat_tables([empty, *read_all(read, chosen)]), len(keys) / max(1, len(chosen)), len(keys)


@dataclass(frozen=True)
class _Picture:
    """A row of a part, as the page shows it."""

    row_id: str
    prompt: str
    uri: str
    width_px: int
    height_px: int
    video: bool

    @classmethod
    def of(cls, row: PartRow) -> _Picture:
        picture = still(row.data)
        return cls(
            row_id=_cut(row.row_id),
            prompt=_cut(row.prompt),
            uri=data_uri(picture, _PICTURE_PX),
            width_px=picture.width,
            height_px=picture.height,
            video=media_kind(row.data) == "video",
        )


def _pictures(
    store: Store, job_plan: JobPlan, limit: int
) -> tuple[list[str], list[_Picture], list[tuple[str, str]]]:
    """(what went wrong, the pictures of parts that are spread over all, the versions of packages that made
    them)."""
    keys = [info.key for info in store.list("data/") if part_index(job_plan, info.key) is not None]
    per_part = min(job_plan.shard_rows, math.ceil(limit / _PARTS_SHOWN))
    num_parts = min(len(keys), math.ceil(limit / per_part)) if limit else 0
    if num_parts:
        per_part = math.ceil(limit / num_parts)
    notes: list[str] = []
    shown: list[_Picture] = []
    versions: dict[str, dict[str, None]] = {}
    for i in range(num_parts):
        key = keys[i * len(keys) // num_parts]
        format = part_format(key)
        try:
            with store.open(key) as file:
                footer = read_footer(file, format)
                file.seek(0)
                rows = read_rows(file, footer.kind, format, limit=min(per_part, limit - len(shown)))
                shown += [_Picture.of(row) for row in rows]
        except (VerifyError, UserError, ValueError) as error:  # the rest of the page is as good as without
            notes.append(f"Pictures of {key} cannot be shown: {error}")
            continue
        for name, version in footer.versions.items():
            versions.setdefault(name, {})[version] = None
    return notes, shown, [(name, ", ".join(found)) for name, found in versions.items()]


def _speed(spec: JobSpec, timings: Timings) -> dict[str, Any]:
    """What the page says about time."""
    workers, grids, saving = timings.workers(), timings.grids(), timings.saving()
    timeline, sizes = timings.timeline(), timings.batch_sizes()
    wall_s = sum(worker.wall_s for worker in workers)
    gpu = any(worker.device.startswith("cuda") for worker in workers)
    names = {stage for worker in workers for stage, _ in worker.seconds}
    ordered = [*(stage for stage in GENERATION if stage in names), *sorted(names - {*GENERATION})]
    seconds = {name: sum(worker.of(name) for worker in workers) for name in ordered}
    palette = charts.Palette((grid.height, grid.width) for grid in grids)
    several = len(grids) > 1  # or there is nothing to compare
    with style():
        figures = {
            "throughput": charts.throughput(timings.throughput()),
            "stages": charts.stages(workers, palette),
            "timeline": charts.timeline(timeline, palette) if timeline else None,
            "sizes": charts.batch_sizes(sizes) if len(sizes) > 1 else None,
            "grids": charts.grids(grids, palette) if several else None,
            "saving": charts.saving(saving, palette) if several and saving else None,
        }
        drawn = {name: figure and svg(figure, f"chart of {name}") for name, figure in figures.items()}
    return {
        "charts": drawn,
        "rows": timings.rows,
        "rows_per_hour": 3600 * timings.rows / timings.elapsed_s,
        "elapsed_s": timings.elapsed_s,
        "began": _moment(timings.began),
        "unit": "GPU" if gpu else "worker",
        "unit_s": wall_s * ((spec.workers.num_gpus or 1) if gpu else 1),
        "workers": len(workers),
        "devices": ", ".join(sorted({worker.device for worker in workers})),
        "denoise_share": sum(worker.denoise_s for worker in workers) / wall_s,
        "stages": [(name, took, took / wall_s, name in GENERATION) for name, took in seconds.items()],
        "sizes": sizes,
        "grids": grids,
        "saving": None if spec.sampling.mode == "fullres" else saving,
        "timeline": timeline,
        "stage_legend": [
            *palette.legend([name for name in GENERATION if name in names]),
            ("waiting", "waiting"),
        ],
        "denoise_legend": palette.legend([name for name in DENOISER if name in names]),
    }


@dataclass(frozen=True)
class _Rejects:
    total: int
    estimated: bool
    classes: list[tuple[str, int]]
    shown: list[dict[str, Any]]


def _rejects(store: Store, limit: int) -> _Rejects:
    columns = ("row_id", "error_class", "message", "stage", "attempts", "shard", "source")
    table, weight, _ = _tables(store, "rejects/", REJECTS, columns, limit)
    classes = Counter(table["error_class"].to_pylist()).most_common(_CLASSES_SHOWN)
    first = table.sort_by([("shard", "ascending"), ("source", "ascending")]).slice(0, _REJECTS_SHOWN)
    shown = [
        reject | {"row_id": _cut(reject["row_id"]), "message": _cut(reject["message"])}
        for reject in first.to_pylist()
    ]
    return _Rejects(
        total=round(weight * table.num_rows),
        estimated=weight > 1,
        classes=[(name, round(weight * count)) for name, count in classes],
        shown=shown,
    )


def _planned(spec: JobSpec) -> SamplingPlan | None:
    """The stages of a row of the job's own size. None where the model cannot be looked up from here."""
    try:
        return sampling_plan(spec, checkpoint_of(spec))
    except UserError:
        return None


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _number(value: float) -> str:
    """Three digits or, above a thousand, all of them."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _seconds(value: float) -> str:
    """`12 ms`, `1.23 s`, `1,234 s`."""
    return f"{_number(1000 * value)} ms" if value < 1 else f"{_number(value)} s"


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]} ..."
