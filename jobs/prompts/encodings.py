"""Whether a text file is UTF-8, and what is said of one that is not. Reads no file, and none is read by a
guess: by a wrong encoding its texts would be others.

    check = Utf8Check("a.csv")
    check.first(line), check.add(1, line), check.add(2, line), ...     # each line as bytes
    check.end()
"""

from __future__ import annotations

from overtone.jobs.errors import PromptsError
from overtone.jobs.words import counted

_MARKS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
"""What files of these encodings begin with, the longer ones first."""
_SHOWN = 20
"""Characters on each side of the first one that is not ASCII."""


class Utf8Check:
    """Looks at the lines of a file. It is not UTF-8 where most lines that could show it are not: of a file
    that is, a few lines may be damaged, and their rows are rejects."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._num_utf8 = self._num_others = 0
        self._first_other = (0, b"")

    def first(self, line: bytes) -> None:
        """PromptsError where the first line shows an encoding of two or four bytes a character."""
        name = next((name for mark, name in _MARKS.items() if line.startswith(mark)), None)
        if name is None and line[:1] > b"\0" and line[1:4:2] == b"\0\0":
            name = "utf-16-le"
        if name is None and line[1:2] > b"\0" and line[0:3:2] == b"\0\0":
            name = "utf-16-be"
        if name is not None:
            raise PromptsError(
                f"{self._path} is not UTF-8 but {name}, by its first bytes; say so under `prompts`, as in "
                f"`encoding: {name}`, or convert the file"
            )

    def add(self, number: int, line: bytes) -> None:
        """Look at a line."""
        if line.isascii():
            return
        try:
            line.decode()
            self._num_utf8 += 1
        except UnicodeDecodeError:
            self._num_others += 1
            if self._num_others == 1:
                self._first_other = (number, line)

    def end(self) -> None:
        """PromptsError where the lines so far are not UTF-8."""
        if self._num_others <= self._num_utf8:
            return
        number, line = self._first_other
        lines = counted(self._num_utf8 + self._num_others, "line")
        raise PromptsError(
            f"{self._path}:{number}: the file is not UTF-8 ({self._num_others:,} of {lines} beyond ASCII); "
            f"say under `prompts` what it is, as in `encoding: cp1252` if this line has {_western(line)!r}, "
            "or convert it; with `encoding: utf-8` such rows become rejects"
        )


def _western(line: bytes) -> str:
    """A piece of the line by the most common encoding, so that people see whether it is the one."""
    place = next(place for place, byte in enumerate(line) if byte > 127)
    return line[max(0, place - _SHOWN) : place + _SHOWN].decode("cp1252", "replace").strip()
