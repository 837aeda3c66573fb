"""What changed between two lists of input files, one sentence a file, for people. Opens no file, and guesses
nothing: a file is said to have changed in what the two plans know of it.

    changes(kept.files, planned.files)       # ["mine.csv: 57 rows, was 56"]
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from overtone.jobs.prompts.input_file import FileList
from overtone.jobs.spec import is_url

_SHOWN = 10
_CONTENT_HASH = re.compile(r"[0-9a-f]{64}")


def file_changes(old: FileList, new: FileList) -> list[str]:
    """Why the rows of two lists differ; empty where they do not. Of many differences ten are shown."""
    before, after = _by_name(old), _by_name(new)
    lines = [f"input file {name} {_gone(_cut(after))}" for name in before if name not in after]
    lines += [f"input file {name} {_come(_cut(before))}" for name in after if name not in before]
    both = [(name, file, after[name]) for name, file in before.items() if name in after]
    lines += [f"{name}: {what}" for name, was, now in both if (what := _contents(was, now))]
    lines = lines or [f"{name}: {what}" for name, was, now in both if (what := _stamp(was, now))]
    if not lines and [*before] != [*after]:
        lines = [f"the order of the input files changed: {_first_moved(before, after)}"]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN:,} more such differences of input files"]
    return lines


class _File(NamedTuple):
    """What a plan knows of a file's contents."""

    path: str
    size_bytes: int
    etag: str
    digest: str
    used: int
    """Rows that the job uses."""
    rows: int
    """Rows in the file."""

    @property
    def is_hashed(self) -> bool:
        return _CONTENT_HASH.fullmatch(self.etag) is not None


def _by_name(files: FileList) -> dict[str, _File]:
    names = ("path", "size_bytes", "etag", "footer_digest", "num_rows", "file_rows")
    columns: list[list[Any]] = [files.table[name].to_pylist() for name in names]
    values = (_File(*row) for row in zip(*columns, strict=True))
    return dict(zip(files.table["relpath"].to_pylist(), values, strict=True))


def _cut(files: dict[str, _File]) -> bool:
    """Whether `prompts.limit` ends in the midst of a file, so that it leaves out those that follow."""
    return any(file.used < file.rows for file in files.values())


def _gone(limited: bool) -> str:
    return "is no longer used (prompts.limit)" if limited else "is no longer there"


def _come(limited: bool) -> str:
    return "is used now, and was not (prompts.limit)" if limited else "is new"


def _contents(was: _File, now: _File) -> str | None:
    """What of the rows is another; None: nothing that is known."""
    if was.rows != now.rows:
        return f"{_rows(now.rows)}, was {was.rows:,}"
    if was.size_bytes != now.size_bytes:
        return f"other contents, {now.size_bytes:,} bytes, was {was.size_bytes:,}"
    if was.digest != now.digest or (was.is_hashed and now.is_hashed and was.etag != now.etag):
        return f"other contents in the same {now.size_bytes:,} bytes"
    if was.used != now.used:
        return f"{now.used:,} of its {_rows(now.rows)} used, was {was.used:,} (prompts.limit)"
    return None


def _stamp(was: _File, now: _File) -> str | None:
    """What tells a version of the file that was written anew, perhaps with the same rows."""
    if was.etag == now.etag:
        return None
    if was.is_hashed != now.is_hashed:
        return (
            "perhaps the same; it is told by its time where it was told by its contents, or the other way "
            "round, for all input files together passed 256 MiB; give the job the files that it began with"
        )
    if is_url(now.path):
        return f"stored anew since the job began (ETag {now.etag}, was {was.etag})"
    return "written anew since the job began: its time of change is another"


def _first_moved(before: dict[str, _File], after: dict[str, _File]) -> str:
    was, now = next(pair for pair in zip(before, after, strict=True) if pair[0] != pair[1])
    return f"{now} comes where {was} came"


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"
