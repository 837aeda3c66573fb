"""The shards of a job, and the fingerprint of all that its samples depend on. Knows no rows and no store.

    plan = make_plan(spec)
    plan.shard(42), plan.num_shards, plan.fingerprint
    difference(old, new)                      # why a job cannot be resumed under another spec

Shards are not stored: they follow from the files' row counts, so a plan of ten million shards is as small as
its list of files.

A driver works at a whole job or at a retry of its rejects (`jobs.retry_plan`). `Work` is what it asks of
either, so that it need not know which one it has.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.columns import GENERATION
from overtone.jobs.errors import PromptsError, VerifyError
from overtone.jobs.prompts import FileList, file_changes, list_files
from overtone.jobs.sampling import entry_of
from overtone.jobs.spec import JobSpec
from overtone.jobs.tables import table_of
from overtone.progressive.families import EDITION, FAMILIES, Family

MAX_SHARDS = 100_000_000
_VERSION = 1
_ENTRY = "entry."
_OF_PROMPTS = ("columns", "delimiter", "encoding", "keep")
_OF_PARTS = ("keep", "output.")  # settings that change what stands beside a sample, or how it is kept


def make_plan(spec: JobSpec) -> JobPlan:
    """The plan of a job, from the footers of its input files. PromptsError where they cannot be used.

    That no two rows have one row_id takes a pass over the rows: `jobs.prompts.check_row_ids`.
    """
    files, shard_rows = list_files(spec), spec.shards.rows
    entry = entry_of(spec)
    # Left out where it is the first edition, as settings that came later are: jobs begun before go on.
    samples = spec.samples() | ({"entry": entry} if entry else {})
    plan = JobPlan(files, shard_rows, samples)
    if plan.num_shards > MAX_SHARDS:
        raise PromptsError(
            f"{plan.num_rows:,} rows in shards of {shard_rows:,} are {plan.num_shards:,} shards, at most "
            f"{MAX_SHARDS:,} are possible; set shards.rows to a larger number"
        )
    return plan


class Work(Protocol):
    """What one run of a job is to make: a `JobPlan`, which is the whole job, or a `RetryPlan`."""

    @property
    def number(self) -> int:
        """0 for the job itself, and for a retry its number; part of the parts' names."""

    @property
    def num_shards(self) -> int:
        """How many parts it makes."""

    @property
    def num_rows(self) -> int:
        """How many input rows it tries."""

    def has(self, index: int, /) -> bool:
        """Whether it tries any row of this shard of the job."""

    def rows_of(self, index: int, /) -> int:
        """How many input rows of this shard it tries."""

    def left_out(self, num_shards: int, /) -> Iterable[int]:
        """The shards of a job of so many of which it tries no row."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A contiguous run of rows of one input file."""

    index: int
    """From 0; the number in the part's name."""
    file: int
    """Index in `JobPlan.files`."""
    first_row: int
    """Index in the file of the shard's first row."""
    num_rows: int
    """Rows of the input; a row that asks for several images makes more."""


@dataclass(frozen=True, eq=False)
class JobPlan:
    """Which rows make which part. Immutable: a job is planned once, and every resume must plan the same."""

    files: FileList
    """The input files in order, with as many of their rows as the job uses."""
    shard_rows: int
    """Rows a shard; the last of a file may have fewer, for shards never span files."""
    samples: dict[str, Any]
    """`JobSpec.samples()`, the settings that change samples; and as `entry` the edition of the family's entry
    that makes them (`jobs.sampling.entry_of`)."""
    generation: int = GENERATION
    """Of the output's columns (`jobs.columns`), as the job began with them. No sample depends on it."""
    edition: int = EDITION
    """The newest edition of families' entries when the job began. A worker compares it with that of the model
    that it has loaded, for `samples` cannot say it of a model that only a worker knows."""

    @cached_property
    def _first_shards(self) -> np.ndarray:
        """[files + 1] int64: index of each file's first shard; the last entry counts all shards."""
        shards = -(-self.files.num_rows // self.shard_rows)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(shards, dtype=np.int64)])

    @property
    def number(self) -> int:
        """0: as `Work`, a plan is the job itself and no retry."""
        return 0

    @property
    def num_shards(self) -> int:
        return int(self._first_shards[-1])

    @cached_property
    def num_rows(self) -> int:
        """Rows of the input that the job uses."""
        return int(self.files.num_rows.sum())

    @cached_property
    def unit(self) -> str:
        """What people call a row of the input: `input row` where one may ask for several rows."""
        return "input row" if self.files.gives("num_images") else "row"

    @property
    def passthrough(self) -> pa.Schema:
        """The columns that pass through to the output, the same for every shard, under their output names."""
        return self.files.passthrough

    def shard(self, index: int) -> Shard:
        """O(log files). IndexError outside [0, num_shards)."""
        if not self.has(index):
            raise IndexError(f"shard {index} of {self.num_shards}")
        file = int(np.searchsorted(self._first_shards, index, side="right")) - 1
        first_row = (index - int(self._first_shards[file])) * self.shard_rows
        num_rows = min(self.shard_rows, int(self.files.num_rows[file]) - first_row)
        return Shard(index=index, file=file, first_row=first_row, num_rows=num_rows)

    def has(self, index: int) -> bool:
        """Whether the job has a shard of this number."""
        return 0 <= index < self.num_shards

    def rows_of(self, index: int) -> int:
        """Input rows of a shard. IndexError as `shard`."""
        return self.shard(index).num_rows

    def left_out(self, num_shards: int) -> Iterable[int]:
        """None: the plan has every shard of its job."""
        assert num_shards == self.num_shards
        return ()

    def shards(self) -> Iterator[Shard]:
        """All of them, in order, made as they are asked for."""
        for file, num_rows in enumerate(self.files.num_rows.tolist()):
            first_shard = int(self._first_shards[file])
            for k, first_row in enumerate(range(0, num_rows, self.shard_rows)):
                yield Shard(first_shard + k, file, first_row, min(self.shard_rows, num_rows - first_row))

    def as_begun(self, kept: JobPlan) -> JobPlan:
        """This plan with the columns that the job began with, `kept`: another version may see more of them in
        the same files. All parts of a job have the same columns."""
        paths = self.files.table["path"]
        table = kept.files.table.set_column(kept.files.table.schema.get_field_index("path"), "path", paths)
        return replace(
            self, files=FileList(table, kept.passthrough), generation=kept.generation, edition=kept.edition
        )

    @cached_property
    def fingerprint_parts(self) -> dict[str, Any]:
        """What the fingerprint is made of; the files by one digest, in order."""
        return {
            "version": _VERSION,
            "samples": self.samples,
            "shards": {"rows": self.shard_rows},
            "prompts": {
                "files": len(self.files),
                "rows": self.num_rows,
                "size_bytes": int(self.files.size_bytes.sum()),
                "digest": self.files.digest(),
            },
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the canonical JSON of `fingerprint_parts`."""
        return sha256(_canonical(self.fingerprint_parts)).hexdigest()

    def to_parquet_bytes(self) -> bytes:
        """One row a file, with its shards; settings, fingerprint and counts in the schema's metadata."""
        first = self._first_shards
        table = self.files.table.append_column("first_shard", pa.array(first[:-1]))
        table = table.append_column("num_shards", pa.array(np.diff(first)))
        about = {
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "num_shards": self.num_shards,
            "num_rows": self.num_rows,
            "shard_rows": self.shard_rows,
            "samples": self.samples,
            "generation": self.generation,
            "edition": self.edition,
            "passthrough": base64.b64encode(self.passthrough.serialize().to_pybytes()).decode(),
        }
        sink = io.BytesIO()
        pq.write_table(
            table.replace_schema_metadata({"overtone": _canonical(about)}), sink, compression="zstd"
        )
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> JobPlan:
        """The plan of `to_parquet_bytes`. VerifyError where the bytes are not one, or not a whole one."""
        try:
            table = table_of(data)
            about = json.loads(table.schema.metadata[b"overtone"])
            if about["version"] != _VERSION:
                raise VerifyError(
                    f"the plan was written by another version of overtone (plan version {about['version']}, "
                    f"this one reads {_VERSION}); go on with that version, or choose a new output folder"
                )
            passthrough = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(about["passthrough"])))
            files = FileList(
                table.drop_columns(["first_shard", "num_shards"]).replace_schema_metadata(), passthrough
            )
            begun = about.get("generation", 1), about.get("edition", 1)
            plan = cls(files, about["shard_rows"], about["samples"], *begun)
            if plan.fingerprint != about["fingerprint"]:
                raise ValueError("its fingerprint is not that of its contents")
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, VerifyError):
                raise
            raise VerifyError(f"the job's plan (_job/plan.parquet) is damaged: {error}") from error
        return plan


def difference(old: JobPlan, new: JobPlan) -> list[str]:
    """Why two fingerprints differ, one sentence each, for people; empty where they do not."""
    before, after = _flat(old.samples), _flat(new.samples)
    lines = [
        other_entry(FAMILIES[key.removeprefix(_ENTRY)], before.get(key) or 1, after.get(key) or 1)
        if key.removeprefix(_ENTRY) in FAMILIES
        else f"{_key(key)} was {_shown(before.get(key))}, now {_shown(after.get(key))}"
        for key in _changed(old, new)
    ]
    if old.shard_rows != new.shard_rows:
        lines.append(f"shards.rows was {old.shard_rows}, now {new.shard_rows}")
    return lines + file_changes(old.files, new.files)


def mismatch(old: JobPlan, new: JobPlan) -> str:
    """What a folder of the old plan holds, for whoever brings the new one, and what may change in it."""
    changed, files = _changed(old, new), file_changes(old.files, new.files)
    same = not files and all(key.startswith(_OF_PARTS) for key in changed)
    what = "the same samples, but in other parts" if same else "another job, whose samples would differ"
    version = bool(changed) and not files and all(key.startswith(_ENTRY) for key in changed)
    undo = (
        "Go on with the version of overtone that began it" if version else "Undo that to go on with the job"
    )
    return (
        f"{what}: {'; '.join(difference(old, new))}. "
        f"{undo}, or choose a new `output`; "
        "what may change is `workers`, `faults`, `name`, and where the prompts and the output are"
    )


def other_entry(family: Family, before: int, after: int) -> str:
    """Why samples of a family differ between two versions of overtone that know these editions of its entry
    (`Family.changes`)."""
    changes = "; ".join(family.changes[before - 1 : after - 1])
    return f"overtone makes samples of {family.name} in another way{changes and f' ({changes})'}"


def _changed(old: JobPlan, new: JobPlan) -> list[str]:
    before, after = _flat(old.samples), _flat(new.samples)
    return [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; what is empty is left out."""
    if isinstance(value, dict):
        return {
            k: v
            for name, inner in value.items()
            for k, v in _flat(inner, f"{key}.{name}" if key else name).items()
        }
    return {key: value}


def _key(key: str) -> str:
    """The spec's name of one of `JobSpec.samples`."""
    return f"prompts.{key}" if key.partition(".")[0] in _OF_PROMPTS else key


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
