"""TODO: jobs/prompts/globs.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
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
    matches: Callable[[str], Any] = _visible
    if magic:
        depth = None if "**" in pattern.split("/") else pattern.count("/") + 1
        files = list(place.walk(head, _MAGIC.split(pattern, maxsplit=1)[0], depth))
        matches = re.compile(glob_regex(pattern)).fullmatch
    else:
        files = list(place.walk(path, "", None))
        if not files:
            raise PromptsError(f"prompts.path: there is no file {path}, and none in a folder of that name")
    cut = len(head.rstrip("/")) + 1
    chosen = sorted((f for f in files if matches(f.path[cut:])), key=lambda f: f.path)
    if not chosen:
        raise PromptsError(f"prompts.path: {path} matches no file")
    return Expanded(head, chosen, is_folder=not magic)


def _visible(name: str) -> bool:
    return not any(part[:1] in "._" for part in name.split("/"))


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


def glob_regex(pattern: str) -> str:
    """A regular expression for a glob over names with "/"; `**` as a whole name stands for any folders."""
    out, parts = [], pattern.split("/")
    hidden = r"(?![._])"
    for n, part in enumerate(parts):
        last = n == len(parts) - 1
        if part == "**":
            out.append(f"{hidden}[^/]+(?:/{hidden}[^/]+)*" if last else f"(?:{hidden}[^/]+/)*")
            continue
        if _MAGIC.match(part):
            out.append(hidden)
        out.append(_name_regex(part) + ("" if last else "/"))
    return "".join(out)


def _name_regex(part: str) -> str:
    out, i = [], 0
    while i < len(part):
        char, i = part[i], i + 1
        end = part.find("]", i + 1 + (part[i : i + 1] == "!")) if char == "[" else -1
        if char == "*":
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif end > 0:
            chars, i = part[i:end], end + 1
            negated = chars.startswith("!")
            chars = re.sub(r"([\\\[\]^&~|])", r"\\\1", chars[negated:])
            out.append(f"(?!/)[{'^' if negated else ''}{chars}]")
        else:
            out.append(re.escape(char))
    return "".join(out)


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
