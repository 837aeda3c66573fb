"""Which prompt files a path, a folder or a glob names, wherever they lie. Knows no formats.

    for found in expand("s3://bucket/prompts/*.parquet", endpoint_url=None, region=None).files: ...

One kind of glob serves all places: `*`, `?` and `[...]` stand for characters within a name, and `**` as a
whole name stands for any number of folders. A name that begins with `.` or `_` is found only where the
pattern spells that out.
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


def expand(path: str, *, endpoint_url: str | None = None, region: str | None = None) -> Expanded:
    """The files that a path, folder or glob names. PromptsError where it names none, or cannot be read."""
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    if not is_url(path):
        path = os.path.abspath(path)
    place = place_of(path, endpoint_url=endpoint_url, region=region)
    try:
        return _expand(place, path.rstrip("/") if not path.endswith("://") else path)
    except StoreError as error:
        raise PromptsError(f"prompts.path: {error}") from error
    except OSError as error:
        raise PromptsError(
            f"prompts.path: {error.filename or path} cannot be read: {error.strerror}"
        ) from error


def _expand(place: Place, path: str) -> Expanded:
    head, magic, pattern = _split_glob(path)
    found = place.stat(path)  # also where it has magic characters: a file may be named a[1].parquet
    if found is not None:
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
    cut = len(head.rstrip("/")) + 1
    chosen = sorted((file for file in files if matches(file.path[cut:])), key=lambda file: file.path)
    if not chosen:
        raise PromptsError(f"prompts.path: {path} matches no file")
    return Expanded(head, chosen, is_folder=not magic)


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
            return 0 < plain == len(names)
        return any(_matches(rest, names[folders:]) for folders in range(plain + 1))
    if not names or (_MAGIC.match(first) and names[0].startswith((".", "_"))):
        return False
    return fnmatchcase(names[0], first) and _matches(rest, names[1:])


def _is_plain(name: str) -> bool:
    """Whether `**` may stand for this name."""
    return bool(name) and not name.startswith((".", "_"))


def relative_names(bases: list[str], paths: list[str]) -> list[str]:
    """Each path relative to the deepest folder that holds all the bases; with "/" whatever the place."""
    first, last = min(map(_parts, bases)), max(map(_parts, bases))
    common = 0
    while common < min(len(first), len(last)) and first[common] == last[common]:
        common += 1
    return ["/".join(_parts(path)[common:]) for path in paths]


def _parts(path: str) -> tuple[str, ...]:
    scheme, _, rest = path.partition("://") if is_url(path) else ("file", "", path)
    return (scheme, *(part for part in rest.split("/") if part))
