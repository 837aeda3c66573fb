"""Which prompt files a path, a folder or a glob names, wherever they lie. Knows no formats.

    for found in expand("s3://bucket/prompts/*.parquet", endpoint_url=None, region=None).files: ...

One kind of glob serves all places: `*`, `?` and `[...]` stand for characters within a name, and `**` as a
whole name stands for any number of folders. A name that begins with `.` or `_` is found only where the
pattern spells that out. S3 knows folders without a name, as in `in//x.parquet`: they are folders like others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from urllib.parse import unquote, urlsplit

from overtone.jobs.errors import PromptsError, StoreError
from overtone.jobs.prompts.places import Disk, Found, Place, place_of
from overtone.jobs.spec import is_url

_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Expanded:
    """What one of the spec's paths names."""

    base: str
    """The folder that holds it all, without a trailing "/"."""
    files: list[Found]
    """In order of their paths; for a folder all files in it, of whatever kind."""
    is_folder: bool
    takes: Callable[[str], bool] = lambda path: False
    """Whether a path, as those of `files`, is one that would be listed if there were such a file."""


def expand(path: str, *, endpoint_url: str | None = None, region: str | None = None) -> Expanded:
    """The files that a path, folder or glob names. PromptsError where it names none, or cannot be read."""
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    if not is_url(path):
        path = os.path.abspath(path)
    place = place_of(path, endpoint_url=endpoint_url, region=region)
    try:
        return _expand(place, _without_slash(path), is_folder=path.endswith("/"))
    except StoreError as error:
        raise PromptsError(f"prompts.path: {error}") from error
    except OSError as error:
        raise PromptsError(
            f"prompts.path: {error.filename or path} cannot be read: {error.strerror}"
        ) from error


def _expand(place: Place, path: str, *, is_folder: bool) -> Expanded:
    head, magic, pattern = _split_glob(path)
    found = place.stat(path)  # also where it has magic characters: a file may be named a[1].parquet
    # On S3 there may be both an object and a folder of one name; an empty one is what marks the folder.
    if found is not None and not ((is_folder or not found.size_bytes) and _holds_files(place, path)):
        return Expanded(path.rpartition("/")[0] or "/", [found], is_folder=False)
    if isinstance(place, Disk) and not os.path.isdir(head):
        raise PromptsError(
            f"prompts.path: there is no folder {head}, so {path} matches nothing"
            if magic
            else f"prompts.path: there is no file or folder {path}"
        )
    if magic:
        depth = None if "**" in pattern.split("/") else pattern.count("/") + 1
        files = list(place.walk(head, _MAGIC.split(pattern, maxsplit=1)[0], depth))
        matches = glob_matcher(pattern)
    else:
        files = list(place.walk(path, "", None))
        if not files:
            raise PromptsError(f"prompts.path: there is no file {path}, and none in a folder of that name")
        matches = glob_matcher("**")
    cut = len(head if head.startswith("s3://") else head.rstrip("/")) + 1
    marks = _folder_marks(files)
    chosen = sorted(
        (file for file in files if matches(file.path[cut:]) and file.path not in marks),
        key=lambda file: file.path,
    )
    if not chosen:
        raise PromptsError(f"prompts.path: {path} matches no file")
    folder = head if len(head) == cut else f"{head}/"
    takes = lambda path: path.startswith(folder) and matches(path[cut:])  # noqa: E731
    return Expanded(head, chosen, is_folder=not magic, takes=takes)


def _without_slash(path: str) -> str:
    if path.endswith("://"):
        return path
    # On S3 one alone: the folder in//, whose last segment is empty, is another than in/.
    return path.removesuffix("/") if path.startswith("s3://") else path.rstrip("/")


def _holds_files(place: Place, path: str) -> bool:
    """Whether an object's name is a folder's too, as only S3 has it."""
    return path.startswith("s3://") and any(
        file.path.startswith(f"{path}/") for file in place.walk(path, "", None)
    )


def _folder_marks(files: Sequence[Found]) -> set[str]:
    """The empty objects by which tools mark folders on S3: they have a folder's name."""
    empty = {file.path for file in files if not file.size_bytes}
    if not empty:
        return empty
    folders = set()
    for file in files:
        folder = file.path.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    return {path for path in empty if path in folders or path.endswith("_$folder$")}


def _split_glob(path: str) -> tuple[str, bool, str]:
    """("a/b", True, "c*/d") for "a/b/c*/d"; without magic characters the path itself."""
    scheme, separator, rest = path.partition("://") if is_url(path) else ("", "", path)
    parts = rest.split("/")
    for i, part in enumerate(parts):
        if _MAGIC.search(part):
            if separator and i == 0:
                raise PromptsError(f"prompts.path: {path} needs a bucket or server name before its pattern")
            return f"{scheme}{separator}{'/'.join(parts[:i])}" or "/", True, "/".join(parts[i:])
    return path, False, ""


def glob_matcher(pattern: str) -> Callable[[str], bool]:
    """A function that reports whether a path, relative to where the pattern begins, matches the pattern."""
    patterns = pattern.split("/")
    return lambda path: _matches(patterns, path.split("/"))


def _matches(patterns: Sequence[str], names: Sequence[str]) -> bool:
    if not patterns:
        return not names
    first, rest = patterns[0], patterns[1:]
    if first == "**":
        plain = sum(1 for _ in takewhile(_is_plain, names))
        if not rest:
            return plain == len(names) and bool(names and names[-1])
        return any(_matches(rest, names[folders:]) for folders in range(plain + 1))
    if not names or (_MAGIC.match(first) and names[0].startswith((".", "_"))):
        return False
    return fnmatchcase(names[0], first) and _matches(rest, names[1:])


def _is_plain(name: str) -> bool:
    """Whether `**` may stand for this name."""
    return not name.startswith((".", "_"))


def relative_names(bases: list[str], paths: list[str]) -> list[str]:
    """Each path relative to the deepest folder that holds all the bases; with "/" whatever the place. No two
    have one name, for empty segments, which S3 tells apart, stay."""
    first, last = min(map(_parts, bases)), max(map(_parts, bases))
    common = 0
    while common < min(len(first), len(last)) and first[common] == last[common]:
        common += 1
    return ["/".join(_parts(path)[common:]) for path in paths]


def _parts(path: str) -> tuple[str, ...]:
    scheme, _, rest = path.partition("://") if is_url(path) else ("file", "", path)
    return (scheme, *(part for part in rest.split("/") if part or scheme == "s3"))
