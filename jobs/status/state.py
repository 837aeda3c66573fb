"""The state of a job as a reader of its folder sees it: as data, as a line, as a screenful. Reads nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from overtone.jobs.words import counted, duration


@dataclass(frozen=True)
class WorkerSeen:
    """A worker, as the timings show it."""

    worker: str
    device: str
    node: str
    parts: int
    rows: int
    seconds: float
    """In all stages; stages that overlap count twice."""


@dataclass(frozen=True, slots=True)
class RejectSeen:
    """A row that was rejected, and why."""

    row_id: str
    error_class: str
    message: str


@dataclass(frozen=True)
class Status:
    """A job's state. What begins with `rows_` counts input rows, unless it says otherwise."""

    url: str
    name: str
    model: str
    mode: str
    fingerprint: str
    rows_total: int
    rows_done: int
    rows_rejected: int
    rows_left: int
    """The rows of a retry that are not tried again yet are among them."""
    shards_total: int
    shards_done: int
    size_bytes: int
    """Of all parts."""
    epoch: int
    """How many drivers have taken the job up."""
    rows_quarantined: int
    """Rows that killed workers, in the newest retry where there is one, else in the job."""
    retry: int
    """The newest retry of rejects; 0: there is none."""
    retry_shards_total: int
    """Shards of that retry."""
    retry_shards_done: int
    rows_per_second: float | None
    """Over the last minutes of work; None: not known."""
    eta_s: float | None
    """Seconds to go at that rate. None: the job is done, the rate is not known, or nothing happens any
    more."""
    last_part_s: float | None
    """Seconds since the last part; None: there is none, or the store does not say."""
    seconds_by_stage: dict[str, float]
    """Over all workers."""
    workers: tuple[WorkerSeen, ...]
    rejects_by_class: dict[str, int]
    """These are samples, not input rows: a row that asks for several images may count several times."""
    newest_rejects: tuple[RejectSeen, ...]
    """A few of them, the last one first."""
    rows_truncated: int | None
    """Rows whose prompt every text encoder cut; None: not known."""
    sampled: bool
    """Whether seconds and rejects are estimates from some of the parts."""
    unit: str = "row"
    """What is counted until the job is done: `input row` where one may ask for several rows."""

    @property
    def several(self) -> bool:
        """Whether an input row may ask for several images, each of which is a row of its own."""
        return self.unit != "row"

    @property
    def rows_made(self) -> int:
        """Rows in all parts, by the timings."""
        return sum(worker.rows for worker in self.workers)

    @property
    def rejected(self) -> int:
        """Rows that are rejected now. Where they are the input rows, those that a retry is yet to try are
        left, and not rejected."""
        return sum(self.rejects_by_class.values()) if self.several else self.rows_rejected

    @property
    def finished(self) -> bool:
        """Whether every part exists, those of the newest retry too."""
        return (self.shards_done, self.retry_shards_done) == (self.shards_total, self.retry_shards_total)

    @property
    def percent(self) -> int:
        """The share of the rows that are done or rejected. It is 100 only where all are."""
        return 100 * (self.rows_total - self.rows_left) // self.rows_total if self.rows_total else 100

    def as_dict(self) -> dict[str, Any]:
        """The same as `text`, as data."""
        return {**asdict(self), "rows_made": self.rows_made, "finished": self.finished}

    def line(self) -> str:
        """One line: rows and pace."""
        rejected = f", {self.rejected:,} rejected" if self.rejected else ""
        done = self.rows_total - self.rows_left
        return f"{done:,} of {counted(self.rows_total, self.unit)} ({self.percent}%){rejected}; {self.pace()}"

    def counts(self) -> str:
        """How many rows are made, rejected, and left."""
        total = counted(self.rows_total, self.unit)
        if self.several:
            return (
                f"{counted(self.rows_made, 'row')} made, {self.rejected:,} rejected, "
                f"{self.rows_left:,} of {total} left"
            )
        return f"{self.rows_done:,} of {total} done, {self.rows_rejected:,} rejected, {self.rows_left:,} left"

    def text(self) -> str:
        """A screenful for a terminal."""
        lines = [
            f"{self.name}: {self.counts()} ({self.percent}%)",
            f"{self.shards_done:,} of {counted(self.shards_total, 'shard')}, {_size(self.size_bytes)}; model "
            f"{self.model}, {self.mode}",
            self.pace(),
        ]
        if self.retry:
            lines.append(
                f"retry {self.retry} of rejects: {self.retry_shards_done:,} of "
                f"{counted(self.retry_shards_total, 'shard')}"
            )
        if self.rejects_by_class:
            reasons = ", ".join(f"{count:,} {name}" for name, count in self.rejects_by_class.items())
            lines.append(f"rejects: {reasons}")
        if self.rows_truncated:
            lines.append(
                f"prompts cut: of {counted(self.rows_truncated, 'row')}, whose end no text encoder read "
                "(column prompt_truncated)"
            )
        if self.rows_quarantined:
            lines.append(f"{counted(self.rows_quarantined, 'row')} killed workers, and will not be run again")
        total = sum(self.seconds_by_stage.values())
        if total:
            about = " (estimated from some parts)" if self.sampled else ""
            lines += ["", f"{'stage':<14}{'seconds':>12}{'share':>8}{about}"]
            lines += [
                f"{stage:<14}{seconds:>12,.1f}{seconds / total:>8.1%}"
                for stage, seconds in sorted(self.seconds_by_stage.items(), key=lambda item: -item[1])
            ]
        if self.workers:
            lines += ["", f"{'worker':<20}{'device':<24}{'parts':>8}{'rows':>10}"]
            lines += [f"{w.worker:<20}{w.device:<24}{w.parts:>8,}{w.rows:>10,}" for w in self.workers]
        return "\n".join(lines)

    def pace(self) -> str:
        """Rows a second, time to go and the last sign of life, or that the job is done."""
        if self.finished:
            return "finished"
        last = "" if self.last_part_s is None else f"; last part {duration(self.last_part_s)} ago"
        if self.rows_per_second is None:
            return ("no part yet" if not self.shards_done else "rate not known yet") + last
        if self.eta_s is None:
            return f"nothing has been written for a while; it made {self.rows_per_second:.3g} rows/s{last}"
        return f"{self.rows_per_second:.3g} rows/s, ETA {duration(self.eta_s)}{last}"


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} TB"
