"""The proof that every input row is in the output exactly once, in data or in rejects. Trusts no driver.

One pass over the input beside one pass over the parts, a few shards at a time, in memory that does not grow
with the job but for eight bytes a row, by which rows that are there twice are found. A shard's part must have
each of its input rows, made or rejected; a retry's part each reject of the part before it. So by one step
after the other each row is made in one part, or a reject of the newest.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from itertools import groupby
from operator import itemgetter
from os import cpu_count
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.card import CARD, card_rows, write_card
from jobs.errors import StoreError, UserError, VerifyError
from jobs.folder import RETRIES, JobFolder
from jobs.media import check_media
from jobs.parts import (
    Footer,
    Format,
    PartRow,
    digest,
    part_format,
    part_name,
    part_place,
    part_schema,
    read_footer,
    read_rows,
    rejects_index,
    rejects_name,
    rejects_table,
    stored_schema,
    timings_name,
    timings_place,
    write_derived,
)
from jobs.plan import JobPlan, RetryPlan
from jobs.prompts import expected_row_ids
from jobs.spec import JobSpec
from jobs.store import Store, open_store
from jobs.tables import table_of

_KEPT_PROBLEMS = 1000
_SHOWN_PROBLEMS = 20
_SHOWN_IDS = 3
_SHARDS_AT_ONCE = 8
"""For stores that answer slowly; each holds a few pictures and its row_ids."""
_DECODED_AHEAD = 4


@dataclass(frozen=True)
class Problem:
    """One thing that is not as the job promised. `kind`: missing_part, foreign_file, broken_part,
    orphaned_part, wrong_rows, duplicate_rows, broken_media, missing_derived, wrong_derived, broken_retry or
    unreadable_input."""

    kind: str
    where: str
    """The object, or the input."""
    message: str


@dataclass
class VerifyReport:
    """What was found. `ok` is True only if every input row is there exactly once and all of it can be
    read."""

    url: str
    rows_expected: int = 0
    """Rows that the input asks for, the refused ones included; 0 where it cannot be read."""
    rows: int = 0
    """Rows found in parts."""
    rejects: int = 0
    shards_total: int = 0
    shards: int = 0
    """Parts found, those of retries aside."""
    retries: int = 0
    """Retries that were begun."""
    retry_parts: int = 0
    """Their parts found."""
    retry_parts_left: int = 0
    """Parts that the newest of them still has to make; until then its rows are rejects."""
    decoded: bool = True
    """Whether pictures were decoded."""
    repaired: int = 0
    """Parts whose timings and rejects were written again."""
    wrote_card: bool = False
    problems: list[Problem] = field(default_factory=list)
    """The first thousand; `num_problems` counts all."""
    num_problems: Counter[str] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return not self.num_problems

    def add(self, kind: str, where: str, message: str) -> None:
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
            "num_problems": dict(self.num_problems),
            "problems": [vars(problem) for problem in self.problems],
        }

    def text(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.url}: {self.rows:,} rows and {self.rejects:,} rejects in {self.shards:,} of "
            f"{self.shards_total:,} parts, for {self.rows_expected:,} rows asked for"
        ]
        if self.retries:
            left = f"; it lacks {self.retry_parts_left:,} parts" if self.retry_parts_left else ""
            lines.append(f"{self.retry_parts:,} parts of retries, up to retry {self.retries}{left}")
        if self.repaired:
            lines.append(f"wrote the timings and rejects of {self.repaired:,} parts again")
        if self.wrote_card:
            lines.append(f"wrote {CARD} again")
        if self.ok:
            read = "every picture decodes" if self.decoded else "pictures were not decoded"
            lines.append(f"every row is there exactly once; checksums agree; {read}")
            return "\n".join(lines)
        total = sum(self.num_problems.values())
        lines.append(f"{total:,} problem{'s' if total != 1 else ''}:")
        lines += [f"  {problem.where}: {problem.message}" for problem in self.problems[:_SHOWN_PROBLEMS]]
        if total > _SHOWN_PROBLEMS:
            counts = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.num_problems.items()))
            lines.append(f"  ... and {total - _SHOWN_PROBLEMS:,} more (in all: {counts})")
        advice = [_ADVICE[kind] for kind in _ADVICE if self.num_problems[kind]]
        return "\n".join(lines + advice)


_ADVICE = {
    "missing_part": "Run the job again: it makes the missing parts.",
    "missing_derived": "`overtone verify --repair` writes missing timings and rejects again.",
    "wrong_derived": "`overtone verify --repair` writes wrong timings and rejects again.",
    "broken_part": "Delete a broken part and run the job again: it makes it anew.",
    "orphaned_part": "Delete a retry's part whose part before is missing or broken, then run the job again.",
    "broken_media": "Delete a part with broken pictures, and those of its shard's later retries, and run the "
    "job again: it makes them anew.",
}


def verify(
    url: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    repair: bool = False,
    decode: bool = True,
    on_part: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check the whole output of a job against its input. UserError where there is no job.

    `repair` writes missing or wrong timings, rejects and card again, from the parts; it changes nothing under
    `data/`. `on_part(done, of)` is called after each part.
    """
    store = open_store(url, endpoint_url=endpoint_url, region=region)
    spec, plan = JobFolder(store).load()
    return verify_job(
        store, spec, plan, expected_row_ids(spec, plan), repair=repair, decode=decode, on_part=on_part
    )


def verify_job(
    store: Store,
    spec: JobSpec,
    plan: JobPlan,
    expected: Iterable[tuple[int, list[str]]],
    *,
    repair: bool = False,
    decode: bool = True,
    on_part: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """The same for a job in hand; `expected` gives (shard, row_ids) in shard order, in one piece or
    several."""
    report = VerifyReport(store.url, shards_total=plan.num_shards, decoded=decode)
    there = _There(store, plan, spec.output.format, report)
    seen = _Seen()
    with (
        ThreadPoolExecutor(cpu_count() or 1, "decode") as decoders,
        ThreadPoolExecutor(_SHARDS_AT_ONCE, "shard") as pool,
    ):
        checker = _Checker(store, spec, plan, there, decoders, repair=repair, decode=decode)
        for done, checked in enumerate(_in_order(pool, checker, _by_shard(expected, plan, report)), 1):
            checked.tell(report)
            seen.add(checked.row_ids)
            if on_part is not None:
                on_part(done, plan.num_shards)
    twice = seen.twice()
    if len(twice):
        _name_duplicates(store, spec, plan, there, twice, report)
    if there.parts[0].all() and not report.retry_parts_left and not report.num_problems:
        _check_card(store, spec, plan, report, repair=repair)
    return report


def _in_order(
    pool: ThreadPoolExecutor, checker: _Checker, shards: Iterable[tuple[int, list[str] | None]]
) -> Iterator[_Checked]:
    """`pool.map`, but taking no more ahead than the pool works on."""
    running: deque[Future[_Checked]] = deque()
    for index, row_ids in shards:
        running.append(pool.submit(checker.check, index, row_ids))
        if len(running) > _SHARDS_AT_ONCE:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _check_card(store: Store, spec: JobSpec, plan: JobPlan, report: VerifyReport, *, repair: bool) -> None:
    """A card is not needed, but one that is there must count right: readers refuse data of another length."""
    promised = card_rows(store)
    if promised == report.rows:
        return
    if repair:
        report.wrote_card = write_card(store, spec, plan)
    elif promised is not None:
        report.add("wrong_derived", CARD, f"promises {promised:,} rows, there are {report.rows:,}")


class _There:
    """Which objects exist, by name. Whatever else is under data/, timings/ and rejects/ is reported."""

    def __init__(self, store: Store, plan: JobPlan, format: Format, report: VerifyReport) -> None:
        self.retries = _retries(store, report)
        runs = range(len(self.retries) + 1)
        self.parts = [np.zeros(plan.num_shards, bool) for _ in runs]
        """[shards] bool: the parts, those of the job itself first, then those of each retry."""
        self.timings = [np.zeros(plan.num_shards, bool) for _ in runs]
        self.rejects = np.zeros(plan.num_shards, bool)
        for info in store.list("data/"):
            place = part_place(plan, info.key)
            if place is None or part_format(info.key) != format or not self._owes(*place):
                report.add("foreign_file", info.key, "no part of this job; readers of data/ would see it")
            else:
                self.parts[place[1]][place[0]] = True
        for info in store.list("timings/"):
            place = timings_place(plan, info.key)
            if place is not None and place[1] in runs and self.parts[place[1]][place[0]]:
                self.timings[place[1]][place[0]] = True
            else:
                report.add("foreign_file", info.key, "belongs to no part of this job")
        for info in store.list("rejects/"):
            index = rejects_index(plan, info.key)
            if index is not None and any(parts[index] for parts in self.parts):
                self.rejects[index] = True
            else:
                report.add("foreign_file", info.key, "belongs to no part of this job")
        report.shards = int(self.parts[0].sum())
        report.retries = len(self.retries)
        report.retry_parts = int(sum(parts.sum() for parts in self.parts[1:]))
        if self.retries:
            report.retry_parts_left = self.retries[-1].num_shards - int(self.parts[-1].sum())

    def runs(self, index: int) -> list[int]:
        """The runs that owe a part of a shard, in order: the job itself (0) and some retries."""
        return [0, *(retry.number for retry in self.retries if retry.has(index))]

    def _owes(self, index: int, retry: int) -> bool:
        return not retry or (retry <= len(self.retries) and self.retries[retry - 1].has(index))


def _retries(store: Store, report: VerifyReport) -> list[RetryPlan]:
    try:
        return JobFolder(store).retries()
    except VerifyError as error:
        report.add("broken_retry", RETRIES, str(error))
        return []


def _by_shard(
    expected: Iterable[tuple[int, list[str]]], plan: JobPlan, report: VerifyReport
) -> Iterator[tuple[int, list[str] | None]]:
    """(shard, its row_ids) for every shard in order; None where the input cannot be read any more."""
    following = 0
    try:
        for index, pieces in groupby(expected, key=itemgetter(0)):
            assert index >= following, "the expected rows come in shard order"
            for skipped in range(following, index):
                yield skipped, []
            row_ids = [row_id for _, piece in pieces for row_id in piece]
            report.rows_expected += len(row_ids)
            yield index, row_ids
            following = index + 1
        problem = None
    except (UserError, StoreError) as error:
        problem = error
    if problem is not None:
        report.add("unreadable_input", "input", f"{problem}; the parts from {following} on lack this check")
    for index in range(following, plan.num_shards):
        yield index, None if problem is not None else []


@dataclass
class _Checked:
    """What was found of one shard."""

    row_ids: list[str] = field(default_factory=list)
    """Of all rows that were made, and of the rejects that are left."""
    rows: int = 0
    rejects: int = 0
    repaired: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, kind: str, where: str, message: str) -> None:
        self.problems.append(Problem(kind, where, message))

    def tell(self, report: VerifyReport) -> None:
        report.rows += self.rows
        report.rejects += self.rejects
        report.repaired += self.repaired
        for problem in self.problems:
            report.add(problem.kind, problem.where, problem.message)


class _Checker:
    """Checks shards, several at a time."""

    def __init__(
        self,
        store: Store,
        spec: JobSpec,
        plan: JobPlan,
        there: _There,
        decoders: ThreadPoolExecutor,
        *,
        repair: bool,
        decode: bool,
    ) -> None:
        self._store, self._spec, self._plan = store, spec, plan
        self._there, self._decoders = there, decoders
        self._repair, self._decode = repair, decode

    def check(self, index: int, expected: list[str] | None) -> _Checked:
        """What is wrong with a shard's parts, and the row_ids in them. `expected` None: not known."""
        checked = _Checked()
        footers: list[Footer] = []
        whole = True
        runs = self._there.runs(index)
        for run in runs:
            key = part_name(self._plan, index, self._spec.output.format, run)
            if not self._there.parts[run][index]:
                if run < len(self._there.retries) or not run:  # the newest retry may be under way
                    checked.add("missing_part", key, "the part is missing")
                break
            try:
                footer = self._footer(key, index, run)
                rows = self._rows(key, footer, checked)
            except (VerifyError, StoreError) as error:
                checked.add("broken_part", key, str(error))
                whole = False
                break
            rejected = [reject.row_id for reject in footer.rejects]
            if expected is not None:
                _compare(key, expected, rows + rejected, checked)
            checked.row_ids += rows
            checked.rows += len(rows)
            expected = rejected
            footers.append(footer)
        for run in runs[len(footers) + 1 :]:
            if self._there.parts[run][index]:
                key = part_name(self._plan, index, self._spec.output.format, run)
                checked.add("orphaned_part", key, "the part before it is missing or broken")
                whole = False
        if footers:
            checked.row_ids += expected or []
            checked.rejects = len(footers[-1].rejects)
            if whole:
                self._check_derived(index, footers, checked)
        return checked

    def _footer(self, key: str, index: int, run: int) -> Footer:
        format = self._spec.output.format
        with self._store.open(key) as file:
            footer = read_footer(file, format)
            if format == "parquet":
                file.seek(0)
                self._check_schema(file, footer)
        if (footer.shard, footer.num_shards) != (index, self._plan.num_shards):
            raise VerifyError(f"it is the part of shard {footer.shard} of {footer.num_shards}")
        if footer.retry != run:
            raise VerifyError(f"it was made by retry {footer.retry}, not {run} (0: the job itself)")
        if footer.fingerprint != self._plan.fingerprint:
            raise VerifyError("it was made by another job (its fingerprint differs)")
        shard = self._plan.shard(index)
        if (footer.first_row, footer.input_rows) != (shard.first_row, shard.num_rows):
            raise VerifyError(f"it covers {footer.input_rows} input rows from {footer.first_row} on")
        return footer

    def _check_schema(self, file: Any, footer: Footer) -> None:
        parquet = pq.ParquetFile(file)
        if parquet.metadata.num_rows != footer.rows:
            raise VerifyError(f"it has {parquet.metadata.num_rows} rows, its footer says {footer.rows}")
        wanted = stored_schema(part_schema(self._spec, self._plan.passthrough, footer.kind))
        if not parquet.schema_arrow.equals(wanted):
            raise VerifyError("its columns are not those of this job")

    def _rows(self, key: str, footer: Footer, checked: _Checked) -> list[str]:
        """The row_ids, after the digests of the footer agreed and the pictures were decoded."""
        kind = footer.kind
        row_ids: list[str] = []
        media_sha = sha256()
        decoding: deque[tuple[str, Future[str | None]]] = deque()
        with self._store.open(key) as file:
            for row in read_rows(file, kind, self._spec.output.format):
                row_ids.append(row.row_id)
                media_sha.update(len(row.data).to_bytes(8, "little"))
                media_sha.update(row.data)
                if self._decode:
                    decoding.append((row.row_id, self._decoders.submit(_broken, row)))
                while len(decoding) > _DECODED_AHEAD:
                    _settle(key, *decoding.popleft(), checked)
        for row_id, future in decoding:
            _settle(key, row_id, future, checked)
        if len(row_ids) != footer.rows:
            raise VerifyError(f"it has {len(row_ids)} rows, its footer says {footer.rows}")
        id_digest = digest(row_id.encode() for row_id in row_ids)
        if footer.digests != {"row_id": id_digest, kind: media_sha.hexdigest()}:
            raise VerifyError("its contents are not what was written (checksums differ)")
        return row_ids

    def _check_derived(self, index: int, footers: list[Footer], checked: _Checked) -> None:
        """Timings beside each part, and rejects beside the newest, against the footers."""
        format, problems = self._spec.output.format, []
        for footer in footers:
            name = timings_name(self._plan, index, footer.retry)
            key = part_name(self._plan, index, format, footer.retry)
            if not self._there.timings[footer.retry][index]:
                problems.append(("missing_derived", name, f"is missing beside {key}"))
            elif not self._agrees(name, footer, "timings"):
                problems.append(("wrong_derived", name, f"does not agree with {key}"))
        name, needed = rejects_name(self._plan, index), any(footer.rejects for footer in footers)
        if not self._there.rejects[index]:
            if needed:
                problems.append(("missing_derived", name, f"is missing beside {key}"))
        elif not needed or not self._agrees(name, footers[-1], "rejects"):
            problems.append(("wrong_derived", name, f"does not agree with {key}"))
        if problems and self._repair:
            for footer in footers:
                write_derived(self._store, footer)
            if self._there.rejects[index] and not needed:
                self._store.delete(name)
            checked.repaired += 1
        else:
            for problem in problems:
                checked.add(*problem)

    def _agrees(self, name: str, footer: Footer, folder: str) -> bool:
        try:
            table = table_of(self._store.read(name))
            if folder == "rejects":
                return table.equals(rejects_table(footer))
            # The line of the upload is only here; all others are the footer's.
            attempts = set(table["attempt"].to_pylist())
            return attempts == {footer.attempt} and 0 <= table.num_rows - len(footer.timings) <= 1
        except (pa.ArrowException, OSError, KeyError):
            return False


def _settle(key: str, row_id: str, future: Future[str | None], checked: _Checked) -> None:
    problem = future.result()
    if problem is not None:
        checked.add("broken_media", key, f"row {_shown([row_id])}: {problem}")


def _compare(key: str, expected: list[str], found: list[str], checked: _Checked) -> None:
    wanted, there = Counter(expected), Counter(found)
    if wanted == there:
        return
    missing, extra = list((wanted - there).elements()), list((there - wanted).elements())
    if missing:
        checked.add("wrong_rows", key, f"{len(missing):,} rows are missing: {_shown(missing)}")
    if extra:
        checked.add("wrong_rows", key, f"{len(extra):,} rows are too many: {_shown(extra)}")


def _broken(row: PartRow) -> str | None:
    """Why a row's picture or video is not what the row says; None where it is."""
    try:
        height, width = check_media(row.data)
    except ValueError as error:
        return str(error)
    if (height, width) != (row.height_px, row.width_px):
        return f"{width}x{height} pixels instead of {row.width_px}x{row.height_px}"
    return None


class _Seen:
    """Hashes of all row_ids, eight bytes each."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []

    def add(self, row_ids: list[str]) -> None:
        self._hashes.append(_hashes(row_ids))

    def twice(self) -> np.ndarray:
        """The hashes that came more than once; empties the collection."""
        hashes = np.concatenate(self._hashes) if self._hashes else np.zeros(0, np.uint64)
        self._hashes.clear()
        hashes.sort()
        return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _hashes(row_ids: Iterable[str]) -> np.ndarray:
    """[rows] uint64"""
    joined = b"".join(blake2b(row_id.encode(), digest_size=8).digest() for row_id in row_ids)
    return np.frombuffer(joined, np.uint64)


def _name_duplicates(
    store: Store, spec: JobSpec, plan: JobPlan, there: _There, twice: np.ndarray, report: VerifyReport
) -> None:
    """A second look at the parts, for rows whose hash came twice: by their names, so that none is accused
    wrongly."""
    where: dict[str, list[str]] = {}
    format = spec.output.format
    for index in np.flatnonzero(there.parts[0]).tolist():
        rejected: list[str] = []
        for run in there.runs(index):
            if not there.parts[run][index]:
                break
            key = part_name(plan, index, format, run)
            try:
                with store.open(key) as file:
                    footer = read_footer(file, format)
                    file.seek(0)
                    row_ids = [row.row_id for row in read_rows(file, footer.kind, format)]
            except (VerifyError, StoreError):
                break  # reported before
            rejected = [reject.row_id for reject in footer.rejects]
            _note_suspects(where, key, row_ids, twice)
        _note_suspects(where, key, rejected, twice)
    for row_id, keys in where.items():
        if len(keys) > 1:
            report.add("duplicate_rows", keys[0], f"row {_shown([row_id])} is there again in {keys[1]}")


def _note_suspects(where: dict[str, list[str]], key: str, row_ids: list[str], twice: np.ndarray) -> None:
    for row_id, suspect in zip(row_ids, np.isin(_hashes(row_ids), twice).tolist(), strict=True):
        if suspect:
            where.setdefault(row_id, []).append(key)


def _shown(row_ids: list[str]) -> str:
    shown = ", ".join(repr(row_id[:100]) for row_id in row_ids[:_SHOWN_IDS])
    return shown + (", ..." if len(row_ids) > _SHOWN_IDS else "")
