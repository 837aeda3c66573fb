"""What the parts of a job hold in all, read from their footers, for its card. Reads no rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from overtone.jobs.media import Kind
from overtone.jobs.parts import Footer, part_format, part_place, read_footer
from overtone.jobs.plan import JobPlan
from overtone.jobs.store import ObjectInfo, Store
from overtone.jobs.tables import read_all


@dataclass(frozen=True)
class Contents:
    """What the parts of a job hold in all."""

    kind: Kind
    parts: int
    rows: int
    size_bytes: int
    rejects: Counter[str]
    """By error class."""
    versions: dict[str, tuple[str, ...]]
    """The versions of the packages that took part. There are several where a job was continued after an
    upgrade."""
    devices: tuple[str, ...]
    commits: tuple[str, ...]
    """Of the hub, that the model was loaded from; there are several where a branch moved on meanwhile."""
    truncated: int | None
    """Rows whose prompt every text encoder cut; None: not known."""


def contents(store: Store, job_plan: JobPlan) -> Contents:
    """Read the footers of all parts. VerifyError for a part that is broken."""
    parts = [(place, info) for info in store.list("data/") if (place := part_place(job_plan, info.key))]
    newest = {shard: run for (shard, run), _ in sorted(parts, key=lambda part: part[0])}
    infos = [info for _, info in parts]
    return _summed(infos, read_all(lambda info: _footer(store, info), infos), newest)


def _footer(store: Store, info: ObjectInfo) -> Footer:
    with store.open(info.key) as file:
        return read_footer(file, part_format(info.key))


def _summed(parts: list[ObjectInfo], footers: Iterable[Footer], newest: dict[int, int]) -> Contents:
    """`newest` has for each shard the retry (0: the job itself) whose part has the shard's rejects."""
    rows, rejects, kinds = 0, Counter[str](), set()
    versions: dict[str, set[str]] = {}
    devices, commits = set[str](), set[str]()
    cut: list[int] = []
    for footer in footers:  # one at a time: they hold all timings
        rows += footer.rows
        if newest[footer.shard] == footer.retry:
            rejects.update(reject.error_class for reject in footer.rejects)
        cut += [] if footer.truncated is None else [footer.truncated]
        kinds.add(footer.kind)
        devices.add(footer.device)
        commits |= {footer.model_commit} - {""}
        for name, number in footer.versions.items():
            versions.setdefault(name, set()).add(number)
    return Contents(
        kind="video" if "video" in kinds else "image",
        parts=len(parts),
        rows=rows,
        size_bytes=sum(info.size_bytes for info in parts),
        rejects=rejects,
        versions={name: tuple(sorted(numbers)) for name, numbers in versions.items()},
        devices=tuple(sorted(devices)),
        commits=tuple(sorted(commits)),
        truncated=sum(cut) if cut else None,
    )
