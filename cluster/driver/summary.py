"""How a run of a job ended: its last files, and a summary for people. Knows the job's folder and numbers, no
workers."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from overtone.cluster.driver.tally import Tally
from overtone.jobs.errors import JobError, StoreError, UserError, VerifyError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import JobPlan, Work
from overtone.jobs.report import CARD, contact_sheet, first_pictures, write_card
from overtone.jobs.spec import JobSpec
from overtone.jobs.status import rejects_by_class
from overtone.jobs.store import Store
from overtone.jobs.words import counted, duration, one_line

SHEET = "contact-sheet.png"
SHEET_PICTURES = 48
_TRACEBACK_LINES = 30
_SHOWN_SHARDS = 10


@dataclass
class Ending:
    """What a run has to say at its end besides its numbers; the loop fills it."""

    notes: list[str] = field(default_factory=list)
    """Workers that were retired, shards that were given up."""
    error: JobError | UserError | None = None
    """Why the job ended early, or what the user has to correct; None: it did not."""
    traceback: str = ""
    """Of the exception in a worker that ended the job."""

    def fail(self, message: str) -> None:
        """The job is not done. What ended it before this stays its reason."""
        if self.error is None:
            self.error = JobError(message)
        else:
            self.notes.append(message)

    def add_extra(self, name: str, write: Callable[[], object]) -> None:
        """Write a file that shows what was made. Where that fails, the job is done all the same."""
        try:
            write()
        except Exception as error:  # noqa: BLE001 - whatever it is, the pictures are there
            command = "card" if name == CARD else "sheet"
            text = f"{name} is not written, `overtone {command}` tries again: {one_line(error, 300)}"
            self.notes.append(text)


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
    error: JobError | UserError | None = None
    """Why the job ended early, or what the user has to correct; None: every shard is committed."""
    traceback: str = ""
    """Of the exception in a worker that ended the job."""
    sheet: str | None = None
    """A picture of the first pictures."""
    options: str = ""
    """What commands need besides the output to find it."""
    rejected: tuple[tuple[str, int], ...] = ()
    """The rejects of the whole job by error class, as its folder has them now."""

    @property
    def exit_code(self) -> int:
        """0: done. 2: ended by a mistake to correct. 3: ended early, and the same command goes on."""
        return 0 if self.error is None else self.error.exit_code

    @property
    def nothing_to_do(self) -> bool:
        """Every shard was committed before."""
        return self.error is None and not self.rows and not self.rejects

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [self._headline()]
        rejected, here = sum(count for _, count in self.rejected), self.rejects
        if rejected or here:
            shown = self.rejected if rejected > here else self.reasons
            reasons = ", ".join(f"{count:,} {name}" for name, count in shown)
            earlier = f", {here:,} of them in this run" if rejected > here else ""
            count = max(rejected, here)
            rows = f"{count:,} row{'s' * (count != 1)}"
            lines.append(f"rejected  {rows} ({reasons}){earlier}, see {self.output}/rejects/")
        if self.workers_lost:
            lines.append(f"workers   {self.workers_lost:,} died or were killed on the way")
        lines += self.notes
        if self.traceback:
            lines += ["", *self.traceback.rstrip().splitlines()[-_TRACEBACK_LINES:], ""]
        if isinstance(self.error, UserError):
            lines.append(f"ended: {self.error}")
        elif self.error is not None:
            lines += [f"ended early: {self.error}", "the same command again goes on where it ended"]
        if self.shards_done:
            lines.append(f"pictures  {self.output}/data/")
            if self.sheet:
                lines.append(f"sheet     {self.sheet}")
            where = f"{shlex.quote(self.output)}{self.options}"
            lines += [f"{name:<9} overtone {name} {where}" for name in ("status", "report", "verify")]
        return "\n".join(lines)

    def _headline(self) -> str:
        shards = f"{self.shards_done:,} of {counted(self.shards_total, 'shard')}"
        if self.nothing_to_do:
            return f"{self.name}: nothing to do, {shards} done"
        rate = f", {self.rows / self.seconds:.3g} rows/s" if self.seconds > 0 and self.rows else ""
        return f"{self.name}: {counted(self.rows, 'row')} in {duration(self.seconds)}{rate}; {shards} done"


def conclude(
    spec: JobSpec,
    job_plan: JobPlan,
    work: Work,
    folder: JobFolder,
    tally: Tally,
    ending: Ending,
    began: float,
) -> Summary:
    """The end of a run, whatever the store says. What is done is what lies there now, not what workers said.
    Where all parts are there, their derived tables and the card are completed; a local output also gets a
    sheet of its first pictures."""
    silent = False
    try:
        absent = tally.found(folder.finished(work))
        if absent:
            ending.fail(_absent(absent, folder.store))
        elif len(tally.finished) == work.num_shards:
            folder.repair_derived()
            other = folder.unfinished_retry()
            if other is not None:
                ending.notes.append(
                    f"retry {other.number} lacks parts: the same command again goes on with it"
                )
    except (StoreError, VerifyError) as error:
        ending.fail(f"the end of the job could not be seen to: {error}")
        silent = isinstance(error, StoreError)
    if ending.error is None:
        ending.add_extra(CARD, lambda: write_card(folder.store, spec, job_plan))
        if not folder.store.url.startswith("s3://"):
            ending.add_extra(SHEET, lambda: _write_sheet(folder.store))
    return replace(
        summary_of(spec, job_plan, work, folder.store, began, done=len(tally.finished), silent=silent),
        rows=tally.rows,
        rejects=tally.rejects,
        reasons=tuple(sorted(tally.reasons.items())),
        workers_lost=tally.lost,
        notes=tuple(ending.notes),
        error=ending.error,
        traceback=ending.traceback,
    )


def _absent(shards: Sequence[int], store: Store) -> str:
    shown = ", ".join(str(shard) for shard in shards[:_SHOWN_SHARDS]) + ", ..." * (
        len(shards) > _SHOWN_SHARDS
    )
    return (
        f"{counted(len(shards), 'part')} that workers reported {'is' if len(shards) == 1 else 'are'} not in "
        f"{store.url}/data/ (shards {shown}): "
        "somebody removed them, or a node writes to a folder of its own under that path"
    )


def _write_sheet(store: Store) -> None:
    pictures = list(first_pictures(store, SHEET_PICTURES))
    if pictures:
        store.put(SHEET, contact_sheet(pictures), content_type="image/png")


def summary_of(
    spec: JobSpec,
    job_plan: JobPlan,
    work: Work,
    store: Store,
    began: float,
    *,
    done: int,
    silent: bool = False,
) -> Summary:
    """The summary of a run that made nothing: what holds for any end. A store that is silent about the rest
    leaves it out, and one that is known to be `silent` is not asked."""
    sheet, rejected = None, {}
    with suppress(StoreError, VerifyError):
        if not silent:
            sheet = short(store.where(SHEET)) if store.head(SHEET) is not None else None
            rejected = rejects_by_class(store, job_plan.num_shards)
    config = store.config
    places = (("endpoint-url", config.endpoint_url), ("region", config.region))
    return Summary(
        name=f"{spec.name}, retry {work.number}" if work.number else spec.name,
        output=short(store.url),
        shards_total=work.num_shards,
        shards_done=done,
        rows=0,
        rejects=0,
        seconds=time.monotonic() - began,
        sheet=sheet,
        options="".join(f" --{name} {shlex.quote(value)}" for name, value in places if value),
        rejected=tuple(rejected.items()),
    )


def short(path: str) -> str:
    """Relative to the current folder where it lies in it; anything else as it is."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
