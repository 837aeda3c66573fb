"""The check of one shard: its parts, their rows and pictures, what is derived. Knows no other shard."""

from __future__ import annotations

from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.errors import StoreError, VerifyError
from overtone.jobs.media import look_at
from overtone.jobs.parts import (
    Footer,
    PartRow,
    digest,
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
from overtone.jobs.plan import JobPlan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store
from overtone.jobs.tables import table_of
from overtone.jobs.verify.found import Checked, shown_ids
from overtone.jobs.verify.names import There
from overtone.jobs.words import counted

_DECODED_AHEAD = 4


class Checker:
    """The checks of a job's shards. Several threads may use it at once."""

    def __init__(
        self,
        store: Store,
        spec: JobSpec,
        job_plan: JobPlan,
        there: There,
        decoders: ThreadPoolExecutor,
        *,
        repair: bool,
        decode: bool,
    ) -> None:
        self._store, self._spec, self._job_plan = store, spec, job_plan
        self._there, self._decoders = there, decoders
        self._repair, self._decode = repair, decode

    def check(self, index: int, expected: list[str] | None) -> Checked:
        """What is wrong with a shard's parts, and the row_ids in them. `expected` None: the input cannot be
        read."""
        checked = Checked()
        footers: list[Footer] = []
        whole = True
        runs = self._there.runs(index)
        for run in runs:
            key = part_name(self._job_plan, index, self._spec.output.format, run)
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
                key = part_name(self._job_plan, index, self._spec.output.format, run)
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
        if (footer.shard, footer.num_shards) != (index, self._job_plan.num_shards):
            raise VerifyError(f"it is the part of shard {footer.shard} of {footer.num_shards}")
        if footer.retry != run:
            raise VerifyError(f"it was made by retry {footer.retry}, not {run} (0: the job itself)")
        if footer.fingerprint != self._job_plan.fingerprint:
            raise VerifyError("it was made by another job (its fingerprint differs)")
        shard = self._job_plan.shard(index)
        if (footer.first_row, footer.input_rows) != (shard.first_row, shard.num_rows):
            raise VerifyError(
                f"it covers {counted(footer.input_rows, 'input row')} from {footer.first_row} on"
            )
        return footer

    def _check_schema(self, file: Any, footer: Footer) -> None:
        parquet = pq.ParquetFile(file)
        if parquet.metadata.num_rows != footer.rows:
            raise VerifyError(
                f"it has {counted(parquet.metadata.num_rows, 'row')}, its footer says {footer.rows}"
            )
        job_plan = self._job_plan
        wanted = stored_schema(
            part_schema(self._spec, job_plan.passthrough, footer.kind, job_plan.generation)
        )
        if not parquet.schema_arrow.equals(wanted):
            raise VerifyError("its columns are not those of this job")

    def _rows(self, key: str, footer: Footer, checked: Checked) -> list[str]:
        """The row_ids of a part. VerifyError where its rows do not agree with the digests of the footer; a
        picture that cannot be decoded is a problem of its own."""
        kind = footer.kind
        row_ids: list[str] = []
        media_sha = sha256()
        decoding: deque[tuple[str, Future[str | bool]]] = deque()
        with self._store.open(key) as file:
            for row in read_rows(file, kind, self._spec.output.format):
                row_ids.append(row.row_id)
                media_sha.update(len(row.data).to_bytes(8, "little"))
                media_sha.update(row.data)
                if self._decode:
                    decoding.append((row.row_id, self._decoders.submit(_look, row)))
                while len(decoding) > _DECODED_AHEAD:
                    _settle(key, *decoding.popleft(), checked)
        for row_id, future in decoding:
            _settle(key, row_id, future, checked)
        if len(row_ids) != footer.rows:
            raise VerifyError(f"it has {counted(len(row_ids), 'row')}, its footer says {footer.rows}")
        id_digest = digest(row_id.encode() for row_id in row_ids)
        if footer.digests != {"row_id": id_digest, kind: media_sha.hexdigest()}:
            raise VerifyError("its contents are not what was written (checksums differ)")
        return row_ids

    def _check_derived(self, index: int, footers: list[Footer], checked: Checked) -> None:
        """Compare the timings beside each part, and the rejects beside the newest, with the footers."""
        format, problems = self._spec.output.format, []
        for footer in footers:
            name = timings_name(self._job_plan, index, footer.retry)
            key = part_name(self._job_plan, index, format, footer.retry)
            if not self._there.timings[footer.retry][index]:
                problems.append(("missing_derived", name, f"is missing beside {key}"))
            elif not self._agrees(name, footer, "timings"):
                problems.append(("wrong_derived", name, f"does not agree with {key}"))
        name, needed = rejects_name(self._job_plan, index), any(footer.rejects for footer in footers)
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
            # The line of the upload exists only here; all others are the footer's.
            attempts = set(table["attempt"].to_pylist())
            return attempts == {footer.attempt} and 0 <= table.num_rows - len(footer.timings) <= 1
        except (pa.ArrowException, OSError, KeyError):
            return False


def _settle(key: str, row_id: str, future: Future[str | bool], checked: Checked) -> None:
    found = future.result()
    if isinstance(found, str):
        checked.add("broken_media", key, f"row {shown_ids([row_id])}: {found}")
    elif found:
        checked.blank.append((key, row_id))


def _compare(key: str, expected: list[str], found: list[str], checked: Checked) -> None:
    wanted, there = Counter(expected), Counter(found)
    if wanted == there:
        return
    missing, extra = list((wanted - there).elements()), list((there - wanted).elements())
    if missing:
        checked.add("wrong_rows", key, f"{counted(len(missing), 'row')} missing: {shown_ids(missing)}")
    if extra:
        checked.add("wrong_rows", key, f"{counted(len(extra), 'row')} too many: {shown_ids(extra)}")


def _look(row: PartRow) -> str | bool:
    """Why a row's picture or video is not what the row says; else whether all of it is one colour."""
    try:
        seen = look_at(row.data)
    except ValueError as error:
        return str(error)
    if (seen.height_px, seen.width_px) != (row.height_px, row.width_px):
        return (
            f"{seen.height_px}x{seen.width_px} pixels instead of {row.height_px}x{row.width_px} "
            "(width x height)"
        )
    return seen.blank
