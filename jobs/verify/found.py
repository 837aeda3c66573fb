"""What a check found, of one shard and of all: counts, problems, and the words for people. Checks nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from overtone.jobs.report import CARD
from overtone.jobs.words import counted

_KEPT_PROBLEMS = 1000
_SHOWN_PROBLEMS = 20
_SHOWN_IDS = 3
_BLANK_AMONG = 4
_ADVICE = {
    "missing_part": "Run the job again: it makes the missing parts.",
    "missing_derived": "`overtone verify --repair` writes missing timings and rejects again.",
    "wrong_derived": "`overtone verify --repair` writes wrong timings and rejects again.",
    "broken_part": "Delete a broken part and run the job again: it makes it anew.",
    "orphaned_part": "Delete a retry's part whose part before is missing or broken, then run the job again.",
    "blank_media": "Look at the blank pictures: a pipeline whose numbers overflow makes such, and "
    "`model.dtype: float32` mends that. Where they are as asked for, `--allow-blank` lets them pass.",
    "changed_input": "Rows of new or changed input files are in no part: put the files back as they were, or "
    "make them with a new `output`.",
    "remade_differs": "A row that is another one when it is made again was not made as its part says: look "
    "at it, and at the machine and the model's files of its worker.",
    "broken_media": "Delete a part with broken pictures, and those of its shard's later retries, and run the "
    "job again: it makes them anew.",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is not as the job promised. Its `kind` is missing_part, foreign_file, broken_part,
    orphaned_part, wrong_rows, duplicate_rows, broken_media, blank_media, missing_derived, wrong_derived,
    broken_retry, changed_input, unreadable_input or remade_differs."""

    kind: str
    where: str
    """The object, or the input."""
    message: str


@dataclass
class VerifyReport:
    """What was found. `ok` is True only if every input row exists exactly once and all of it can be read."""

    url: str
    rows_expected: int = 0
    """Rows that the input asks for, the refused ones included. 0: the input cannot be read."""
    rows: int = 0
    """Rows found in parts."""
    rejects: int = 0
    shards_total: int = 0
    shards: int = 0
    """Parts of the job itself that were found; those of retries are not among them."""
    retries: int = 0
    """Retries that were begun."""
    retry_parts: int = 0
    """Parts of retries that were found."""
    retry_parts_left: int = 0
    """Parts that the newest retry still has to make. Until it does, their rows are rejects."""
    decoded: bool = True
    """Whether pictures were decoded."""
    repaired: int = 0
    """Parts whose timings and rejects were written again."""
    wrote_card: bool = False
    blank: int = 0
    """Pictures of one colour, where they were decoded."""
    remarks: list[str] = field(default_factory=list)
    """What is worth knowing and no problem."""
    problems: list[Problem] = field(default_factory=list)
    """The first thousand problems; `num_problems` counts all."""
    num_problems: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return not self.num_problems

    def add(self, kind: str, where: str, message: str) -> None:
        """Count a problem, and keep it if it is among the first thousand."""
        self.num_problems[kind] += 1
        if len(self.problems) < _KEPT_PROBLEMS:
            self.problems.append(Problem(kind, where, message))

    def as_dict(self) -> dict[str, Any]:
        """The same as `text`, as data."""
        return {
            "url": self.url,
            "ok": self.ok,
            "rows_expected": self.rows_expected,
            "rows": self.rows,
            "rejects": self.rejects,
            "shards_total": self.shards_total,
            "shards": self.shards,
            "retries": self.retries,
            "retry_parts": self.retry_parts,
            "retry_parts_left": self.retry_parts_left,
            "decoded": self.decoded,
            "repaired": self.repaired,
            "wrote_card": self.wrote_card,
            "blank": self.blank,
            "remarks": self.remarks,
            "num_problems": dict(self.num_problems),
            "problems": [vars(problem) for problem in self.problems],
        }

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.url}: {counted(self.rows, 'row')} and {counted(self.rejects, 'reject')} in "
            f"{self.shards:,} of {counted(self.shards_total, 'part')}, for "
            f"{counted(self.rows_expected, 'row')} asked for"
        ]
        if self.retries:
            lacks = f"; it lacks {counted(self.retry_parts_left, 'part')}" if self.retry_parts_left else ""
            lines.append(f"{counted(self.retry_parts, 'part')} of retries, up to retry {self.retries}{lacks}")
        if self.repaired:
            lines.append(f"wrote the timings and rejects of {counted(self.repaired, 'part')} again")
        if self.wrote_card:
            lines.append(f"wrote {CARD} again")
        lines += self.remarks
        if self.ok:
            read = "every picture decodes" if self.decoded else "pictures were not decoded"
            lines.append(f"every row is there exactly once; checksums agree; {read}")
            return "\n".join(lines)
        total = sum(self.num_problems.values())
        lines.append(f"{counted(total, 'problem')}:")
        lines += [f"  {problem.where}: {problem.message}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        if total > _SHOWN_PROBLEMS:
            counts = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.num_problems.items()))
            lines.append(f"  ... and {total - _SHOWN_PROBLEMS:,} more (in all: {counts})")
        advice = [_ADVICE[kind] for kind in _ADVICE if self.num_problems[kind]]
        return "\n".join(lines + advice)


@dataclass
class Checked:
    """What was found about one shard."""

    row_ids: list[str] = field(default_factory=list)
    """The names of all rows that were made, and of the rejects that are left."""
    rows: int = 0
    rejects: int = 0
    repaired: int = 0
    blank: list[tuple[str, str]] = field(default_factory=list)
    """(part, row_id) of the pictures that are one colour."""
    problems: list[Problem] = field(default_factory=list)

    def add(self, kind: str, where: str, message: str) -> None:
        self.problems.append(Problem(kind, where, message))

    def add_to(self, report: VerifyReport) -> None:
        report.rows += self.rows
        report.rejects += self.rejects
        report.repaired += self.repaired
        for problem in self.problems:
            report.add(problem.kind, problem.where, problem.message)


def shown_ids(row_ids: list[str]) -> str:
    """The first few row_ids, for a message."""
    shown = ", ".join(repr(row_id[:100]) for row_id in row_ids[:_SHOWN_IDS])
    return shown + (", ..." if len(row_ids) > _SHOWN_IDS else "")


class Blanks:
    """The pictures of one colour, and whether they are too few to be what was asked for.

    A picture of one colour is a problem where at most one in four of the job's pictures is one: a pipeline
    whose numbers overflowed makes such pictures among others. Where more are, the job may be of flat
    pictures, which is for its user to say, and so it is a remark. So a job of flat pictures always passes.
    """

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []  # the first of them
        self._count = 0

    def add(self, found: list[tuple[str, str]]) -> None:
        self._count += len(found)
        self._found += found[: _KEPT_PROBLEMS - len(self._found)]

    def report(self, report: VerifyReport, *, allow: bool) -> None:
        """Note them, as problems or as a remark. The counts in `report` are complete by now."""
        report.blank = self._count
        if not self._count:
            return
        if allow or self._count * _BLANK_AMONG > report.rows:
            known = "as you allow" if allow else "which may be what was asked for"
            report.remarks.append(
                f"{self._count:,} of {report.rows:,} pictures are of one colour, {known}: "
                + shown_ids([row_id for _, row_id in self._found])
            )
            return
        for key, row_id in self._found:
            others = report.rows - self._count
            report.add(
                "blank_media",
                key,
                f"row {shown_ids([row_id])}: all of it is one colour, unlike {others:,} others",
            )
        report.num_problems["blank_media"] = self._count
