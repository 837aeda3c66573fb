"""How a run of a job ended: its last files, and a summary for people. Knows the job's folder and numbers, no
workers."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from overtone.cluster.driver.tally import Tally
from overtone.cluster.faults import first_line
from overtone.jobs.errors import JobError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import JobPlan, Work
from overtone.jobs.report import CARD, contact_sheet, first_pictures, write_card
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store, StoreConfig
from overtone.jobs.words import duration

SHEET = "contact-sheet.png"
SHEET_PICTURES = 48
_TRACEBACK_LINES = 30


@dataclass
class Ending:
    """What a run has to say at its end besides its numbers; the loop fills it."""

    notes: list[str] = field(default_factory=list)
    """Workers that were retired, shards that were given up."""
    error: JobError | None = None
    """Why the job ended early; None: it did not."""
    traceback: str = ""
    """Of the exception in a worker that ended the job."""


@dataclass(frozen=True)
class Summary:
    """One run of a job, ended in any way but a mistake of the user's."""

    name: str
    output: str
    """The job's folder or s3:// URL."""
    shards_total: int
    shards_done: int
    """Committed, by this run or an earlier one."""
    rows: int
    """Rows that this run made and committed."""
    rejects: int
    """Rows that this run rejected."""
    seconds: float
    """From the first look at the job to its end."""
    reasons: tuple[tuple[str, int], ...] = ()
    """This run's rejects by error class."""
    workers_lost: int = 0
    """Worker processes that died or were killed, and were replaced where there was work left."""
    notes: tuple[str, ...] = ()
    """What else the user should know: workers retired, shards given up."""
    error: JobError | None = None
    """Why the job ended early; None: every shard is committed."""
    traceback: str = ""
    """Of the exception in a worker that ended the job."""
    sheet: str | None = None
    """A picture of the first pictures."""
    timings_query: str = ""
    """A shell command that shows where the time went."""

    @property
    def exit_code(self) -> int:
        """0: done. 3: ended early, and the same command goes on."""
        return 0 if self.error is None else self.error.exit_code

    @property
    def nothing_to_do(self) -> bool:
        """Every shard was committed before."""
        return self.error is None and not self.rows and not self.rejects

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [self._headline()]
        if self.rejects:
            reasons = ", ".join(f"{count:,} {name}" for name, count in self.reasons)
            lines.append(f"rejected  {self.rejects:,} rows ({reasons}), see {self.output}/rejects/")
        if self.workers_lost:
            lines.append(f"workers   {self.workers_lost:,} died or were killed on the way")
        lines += self.notes
        if self.traceback:
            lines += ["", *self.traceback.rstrip().splitlines()[-_TRACEBACK_LINES:], ""]
        if self.error is not None:
            lines += [f"ended early: {self.error}", "the same command again goes on where it ended"]
        if self.shards_done:
            lines.append(f"pictures  {self.output}/data/")
            if self.sheet:
                lines.append(f"sheet     {self.sheet}")
            lines.append(f"status    overtone status {shlex.quote(self.output)}")
            if self.timings_query:
                lines.append(f"timings   {self.timings_query}")
        return "\n".join(lines)

    def _headline(self) -> str:
        shards = f"{self.shards_done:,} of {self.shards_total:,} shards"
        if self.nothing_to_do:
            return f"{self.name}: nothing to do, all {self.shards_total:,} shards are done"
        rate = f", {self.rows / self.seconds:.3g} rows/s" if self.seconds > 0 and self.rows else ""
        return f"{self.name}: {self.rows:,} rows in {duration(self.seconds)}{rate}; {shards} done"


def conclude(
    spec: JobSpec,
    job_plan: JobPlan,
    work: Work,
    folder: JobFolder,
    tally: Tally,
    ending: Ending,
    began: float,
) -> Summary:
    """The end of a run. Where all parts are committed, their derived tables and the card are completed first;
    a local output also gets a sheet of its first pictures."""
    store, notes = folder.store, [*ending.notes]
    if len(tally.finished) == work.num_shards:
        folder.repair_derived()
        other = folder.unfinished_retry()
        if other is not None:
            notes.append(f"retry {other.number} lacks parts: the same command again goes on with it")
        with noting(notes, f"{CARD} is not written, `overtone card` tries again"):
            write_card(store, spec, job_plan)
    summary = summary_of(spec, work, store, began, done=len(tally.finished))
    sheet = summary.sheet
    if ending.error is None and not store.url.startswith("s3://"):
        with noting(notes, f"{SHEET} is not drawn, `overtone sheet` tries again"):
            pictures = list(first_pictures(store, SHEET_PICTURES))
            if pictures:
                store.put(SHEET, contact_sheet(pictures), content_type="image/png")
                sheet = short(store.where(SHEET))
    return replace(
        summary,
        rows=tally.rows,
        rejects=tally.rejects,
        reasons=tuple(sorted(tally.reasons.items())),
        workers_lost=tally.lost,
        notes=tuple(notes),
        error=ending.error,
        traceback=ending.traceback,
        sheet=sheet,
    )


@contextmanager
def noting(notes: list[str], what: str) -> Iterator[None]:
    """What is only about the rows, which are committed, never changes how their job ended."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the end of a run: whatever it is, it becomes a note
        notes.append(f"{what}: {first_line(error)}")


def summary_of(spec: JobSpec, work: Work, store: Store, began: float, *, done: int) -> Summary:
    """The summary of a run that made nothing: what holds for any end."""
    return Summary(
        name=f"{spec.name}, retry {work.number}" if work.number else spec.name,
        output=short(store.url),
        shards_total=work.num_shards,
        shards_done=done,
        rows=0,
        rejects=0,
        seconds=time.monotonic() - began,
        sheet=short(store.where(SHEET)) if store.head(SHEET) is not None else None,
        timings_query=timings_query(store.config),
    )


def timings_query(store: StoreConfig) -> str:
    """A command that adds up the job's timings, with what is installed wherever the job runs."""
    place = store.url
    if place.startswith("s3://"):
        place += "/timings"
        if store.endpoint_url:
            split = urlsplit(store.endpoint_url)
            place += "?" + urlencode({"endpoint_override": split.netloc, "scheme": split.scheme})
    else:
        place = os.path.join(short(place), "timings")
    code = (
        "import pyarrow.dataset as ds; "
        f"t = ds.dataset({place!r}).to_table(); "
        "print(*t.group_by(['stage', 'height', 'width']).aggregate("
        "[('rows', 'sum'), ('steps', 'sum'), ('seconds', 'sum')]).sort_by('stage').to_pylist(), sep='\\n')"
    )
    # Double quotes read better than what shlex makes of the single ones, where nothing in it is special.
    quoted = shlex.quote(code) if set('"$`!') & set(code) or "\\" in place else f'"{code}"'
    return f"{shlex.quote(short(sys.executable))} -c {quoted}"


def short(path: str) -> str:
    """Relative to the current folder where it lies in it; anything else as it is."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
