"""Small forms of text that many parts print: durations, one line of many, Markdown tables. A ground file: it
knows nothing of jobs, and imports nothing of ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """Seconds as people read them: 42s, 3m 05s, 2h 10m, 3d 4h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600}h"


def counted(count: int, thing: str, things: str | None = None) -> str:
    """`1 row`, `2 rows`, `1,000 rows`; `things` is the plural where it is not made by an s."""
    return f"{count:,} {thing if count == 1 else things or f'{thing}s'}"


def one_line(text: object, limit: int | None = None) -> str:
    """A text, or an error's message, with one space for every run of white space; cut after `limit`
    characters."""
    return " ".join(str(text).split())[:limit]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as GitHub's Markdown has it, without a line break at its end.

    The cells are Markdown already, on one line each, and the caller escapes a `|` in them. ValueError for a
    row that has not as many cells as the header.
    """
    lines = [_row(header), "|" + "---|" * len(header)]
    for cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} cells below {len(header)} of the header: {cells}")
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
