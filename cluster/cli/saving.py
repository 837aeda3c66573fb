"""Files that a command writes: that each can be written is checked before the work, and what could not be
saved after it is shown. Knows no command.

    @click.option("--to", "page", default="tune.html", type=OutFile(), ...)
    save([(page, html), (fragment, yaml)])
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from overtone.jobs.errors import UserError


class OutFile(click.Path):
    """The path of a file to write. UserError, before the command begins, where that cannot work."""

    name = "file"

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value).expanduser()
        problem = _problem(path)
        if problem is not None:
            option = max(param.opts, key=len) if param is not None else "path"
            raise UserError(f"{option}: {problem}")
        return path


def _problem(path: Path) -> str | None:
    """Why a file cannot be written there, and what to do; None: it can."""
    folder = path.parent
    if path.is_dir():
        return f"{path} is a folder; name a file in it"
    if not folder.exists():
        return f"there is no folder {folder}; make it (mkdir -p {folder}), or choose another place"
    if not folder.is_dir():
        return f"{folder} is a file, not a folder; choose another place for {path.name}"
    if not os.access(path if path.exists() else folder, os.W_OK):
        return f"{path} cannot be written by this user; choose another place"
    return None


def save(files: Iterable[tuple[Path, str | bytes]]) -> None:
    """Write each file. What could not be written is named in one UserError once all were tried; a text that
    could not is printed, so that it is not lost with the work that made it."""
    failed = []
    for path, content in files:
        try:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            failed.append(f"{path} ({error.strerror})")
            if isinstance(content, str):
                click.echo(content, nl=not content.endswith("\n"))
    if failed:
        raise UserError(f"not saved: {', '.join(failed)}")
