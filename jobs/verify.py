"""The proof that every input row is in the output exactly once, in data or in rejects. Trusts no driver.

One pass over the input beside one pass over the parts, shard by shard, in memory that does not grow with the
job but for eight bytes a row, by which rows that are there twice are found.
"""

from __future__ import annotations

import io
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
from jobs.folder import JobFolder
from jobs.media import check_media
from jobs.parts import (
    Footer,
    Format,
    PartRow,
    part_format,
    part_index,
    part_name,
    part_schema,
    read_footer,
    read_rows,
    rejects_name,
    rejects_table,
    stored_schema,
    timings_name,
    write_derived,
)
from jobs.plan import JobPlan
from jobs.prompts import expected_row_ids
from jobs.spec import JobSpec
from jobs.store import Store, open_store

_KEPT_PROBLEMS = 1000
_SHOWN_PROBLEMS = 20
_SHOWN_IDS = 3


@dataclass(frozen=True)
class Problem:
    """One thing that is not as the job promised. `kind`: missing_part, foreign_file, broken_part, wrong_rows,
    duplicate_rows, broken_media, missing_derived, wrong_derived or unreadable_input."""

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
    """Parts found."""
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
    "broken_media": "Delete a part with broken pictures and run the job again: it makes it anew.",
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
    found = _parts(store, plan, spec.output.format, report)
    derived = _derived(store, plan, found, report)
    seen = _Seen()
    with ThreadPoolExecutor(cpu_count() or 1, "decode") as pool:
        checker = _Checker(store, spec, plan, report, derived, pool, repair=repair, decode=decode)
        for done, (index, row_ids) in enumerate(_by_shard(expected, plan, report), 1):
            if not found[index]:
                name = part_name(plan, index, spec.output.format)
                report.add("missing_part", name, "the part is missing")
            else:
                seen.add(checker.check(index, row_ids))
            if on_part is not None:
                on_part(done, plan.num_shards)
    twice = seen.twice()
    if len(twice):
        _name_duplicates(store, spec, plan, found, twice, report)
    if found.all() and not report.num_problems:
        _check_card(store, spec, plan, report, repair=repair)
    return report


def _check_card(store: Store, spec: JobSpec, plan: JobPlan, report: VerifyReport, *, repair: bool) -> None:
    """A card is not needed, but one that is there must count right: readers refuse data of another length."""
    promised = card_rows(store)
    if promised == report.rows:
        return
    if repair:
        report.wrote_card = write_card(store, spec, plan)
    elif promised is not None:
        report.add("wrong_derived", CARD, f"promises {promised:,} rows, there are {report.rows:,}")


def _parts(store: Store, plan: JobPlan, format: Format, report: VerifyReport) -> np.ndarray:
    """[shards] bool: which parts exist. Everything else under data/ is reported."""
    found = np.zeros(plan.num_shards, bool)
    for info in store.list("data/"):
        index = part_index(plan, info.key)
        if index is None or part_format(info.key) != format:
            report.add("foreign_file", info.key, "no part of this job; readers of data/ would see it")
        else:
            found[index] = True
    report.shards = int(found.sum())
    return found


def _derived(store: Store, plan: JobPlan, found: np.ndarray, report: VerifyReport) -> dict[str, np.ndarray]:
    """{"timings" and "rejects": [shards] bool}: which of them exist. Everything else there is reported."""
    there = {}
    for folder, name in (("timings", timings_name), ("rejects", rejects_name)):
        there[folder] = np.zeros(plan.num_shards, bool)
        for info in store.list(f"{folder}/"):
            digits = info.key.removeprefix(f"{folder}/part-").removesuffix(".parquet")
            index = int(digits) if digits.isascii() and digits.isdigit() else -1
            if 0 <= index < plan.num_shards and info.key == name(plan, index) and found[index]:
                there[folder][index] = True
            else:
                report.add("foreign_file", info.key, "belongs to no part of this job")
    return there


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


class _Checker:
    """Checks one part after the other."""

    def __init__(
        self,
        store: Store,
        spec: JobSpec,
        plan: JobPlan,
        report: VerifyReport,
        derived: dict[str, np.ndarray],
        pool: ThreadPoolExecutor,
        *,
        repair: bool,
        decode: bool,
    ) -> None:
        self._store, self._spec, self._plan, self._report = store, spec, plan, report
        self._derived, self._pool, self._repair, self._decode = derived, pool, repair, decode

    def check(self, index: int, expected: list[str] | None) -> list[str]:
        """Reports what is wrong with a part; returns the row_ids in it, rejects included."""
        key = part_name(self._plan, index, self._spec.output.format)
        try:
            footer = self._footer(key, index)
            rows = self._rows(key, footer)
        except (VerifyError, StoreError) as error:
            self._report.add("broken_part", key, str(error))
            return []
        everything = rows + [reject.row_id for reject in footer.rejects]
        self._report.rows += len(rows)
        self._report.rejects += len(footer.rejects)
        if expected is not None:
            self._compare(key, expected, everything)
        self._check_derived(key, footer)
        return everything

    def _footer(self, key: str, index: int) -> Footer:
        format = self._spec.output.format
        with self._store.open(key) as file:
            footer = read_footer(file, format)
            if format == "parquet":
                file.seek(0)
                self._check_schema(file, footer)
        if (footer.shard, footer.num_shards) != (index, self._plan.num_shards):
            raise VerifyError(f"it is the part of shard {footer.shard} of {footer.num_shards}")
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

    def _rows(self, key: str, footer: Footer) -> list[str]:
        """The row_ids, after the digests of the footer agreed and the pictures were decoded."""
        kind = footer.kind
        row_ids: list[str] = []
        id_sha, media_sha = sha256(), sha256()
        decoding: deque[tuple[str, Future[str | None]]] = deque()
        with self._store.open(key) as file:
            for row in read_rows(file, kind, self._spec.output.format):
                row_ids.append(row.row_id)
                for sha, value in ((id_sha, row.row_id.encode()), (media_sha, row.data)):
                    sha.update(len(value).to_bytes(8, "little"))
                    sha.update(value)
                if self._decode:
                    decoding.append((row.row_id, self._pool.submit(_broken, row)))
                while len(decoding) > 32:
                    self._settle(key, *decoding.popleft())
        for row_id, future in decoding:
            self._settle(key, row_id, future)
        if len(row_ids) != footer.rows:
            raise VerifyError(f"it has {len(row_ids)} rows, its footer says {footer.rows}")
        if footer.digests != {"row_id": id_sha.hexdigest(), kind: media_sha.hexdigest()}:
            raise VerifyError("its contents are not what was written (checksums differ)")
        return row_ids

    def _settle(self, key: str, row_id: str, future: Future[str | None]) -> None:
        problem = future.result()
        if problem is not None:
            self._report.add("broken_media", key, f"row {_shown([row_id])}: {problem}")

    def _compare(self, key: str, expected: list[str], found: list[str]) -> None:
        wanted, there = Counter(expected), Counter(found)
        if wanted == there:
            return
        missing, extra = list((wanted - there).elements()), list((there - wanted).elements())
        if missing:
            self._report.add("wrong_rows", key, f"{len(missing):,} rows are missing: {_shown(missing)}")
        if extra:
            self._report.add("wrong_rows", key, f"{len(extra):,} rows are too many: {_shown(extra)}")

    def _check_derived(self, key: str, footer: Footer) -> None:
        """Timings and rejects beside the part, against its footer."""
        problems = []
        for folder, name, needed in (
            ("timings", timings_name, True),
            ("rejects", rejects_name, bool(footer.rejects)),
        ):
            derived = name(self._plan, footer.shard)
            if not self._derived[folder][footer.shard]:
                if needed:
                    problems.append(("missing_derived", derived, f"is missing beside {key}"))
            elif not needed or not self._agrees(derived, footer, folder):
                problems.append(("wrong_derived", derived, f"does not agree with {key}"))
        if problems and self._repair:
            write_derived(self._store, footer)
            if not footer.rejects and self._derived["rejects"][footer.shard]:
                self._store.delete(rejects_name(self._plan, footer.shard))
            self._report.repaired += 1
        else:
            for problem in problems:
                self._report.add(*problem)

    def _agrees(self, name: str, footer: Footer, folder: str) -> bool:
        try:
            table = pq.read_table(io.BytesIO(self._store.read(name)))
            if folder == "rejects":
                return table.equals(rejects_table(footer))
            # The line of the upload is only here; all others are the footer's.
            attempts = set(table["attempt"].to_pylist())
            return attempts == {footer.attempt} and 0 <= table.num_rows - len(footer.timings) <= 1
        except (pa.ArrowException, OSError, KeyError):
            return False


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
    store: Store, spec: JobSpec, plan: JobPlan, found: np.ndarray, twice: np.ndarray, report: VerifyReport
) -> None:
    """A second look at the parts, for rows whose hash came twice: by their names, so that none is accused
    wrongly."""
    where: dict[str, list[str]] = {}
    for index in np.flatnonzero(found).tolist():
        key = part_name(plan, index, spec.output.format)
        try:
            with store.open(key) as file:
                footer = read_footer(file, spec.output.format)
                file.seek(0)
                row_ids = [row.row_id for row in read_rows(file, footer.kind, spec.output.format)]
        except (VerifyError, StoreError):
            continue  # reported before
        row_ids += [reject.row_id for reject in footer.rejects]
        suspects = np.isin(_hashes(row_ids), twice)
        for row_id, suspect in zip(row_ids, suspects.tolist(), strict=True):
            if suspect:
                where.setdefault(row_id, []).append(key)
    for row_id, keys in where.items():
        if len(keys) > 1:
            report.add("duplicate_rows", keys[0], f"row {_shown([row_id])} is there again in {keys[1]}")


def _shown(row_ids: list[str]) -> str:
    shown = ", ".join(repr(row_id[:100]) for row_id in row_ids[:_SHOWN_IDS])
    return shown + (", ..." if len(row_ids) > _SHOWN_IDS else "")
