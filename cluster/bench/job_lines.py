"""The lines of the suite about whole jobs, and how they are compared. Measures nothing.

A job's line is compared with a plain loop of the library over the same prompts, and with its own engine that
does nothing but denoise: the rate that a job would have if everything else took no time, its speed of light.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from overtone.progressive.bench import AUTO, FULLRES, Line, Record, Stack, Work, markdown, ratio

Kind = Literal["job", "loop", "engine"]
_WHAT = {"job": "a job", "loop": "plain loop", "engine": "the engine alone"}


@dataclass(frozen=True)
class JobLine(Line):
    """So many pictures of one model, made by a job or by what it is compared with."""

    kind: Kind = "job"
    chunk: int = 1
    """Rows at a time, on the full grid; `rows` are all pictures together."""

    @cached_property
    def name(self) -> str:
        """As a line's, with what makes the pictures."""
        case, _, said = Line(self.case, self.setting, self.stack).name.partition(": ")
        said = said.rpartition("; ")[0]
        return f"{case}: {_WHAT[self.kind]}, {said}; {self.rows} pictures, {self.chunk} at a time"

    @property
    def engine(self) -> tuple[str, Stack]:
        """Its own: nothing is left on the device when a line ends, for a job needs all of it."""
        return self.name, self.stack

    @cached_property
    def work(self) -> Work:
        """Of the denoising alone. A worker gets ready for a chunk and for what may be left of one, of which a
        coarse grid has more."""
        one = Line(self.case, self.setting, rows=self.rows).work
        sizes = self.chunk.bit_length() + 2 * (one.grids > 1)
        return replace(one, grids=one.grids * sizes)


def bases(line: Line) -> Sequence[Line]:
    """The plain loop, one picture at a time, and the line's own engine alone."""
    assert isinstance(line, JobLine)
    loop = JobLine(line.case, FULLRES, rows=min(line.rows, PLAIN_ROWS), kind="loop")
    return loop, replace(line, kind="engine")


PLAIN_ROWS = 8
"""Pictures of the plain loop, whose rate depends on their number least of all."""


def job_suite(name: str) -> list[Line]:
    """The lines of a suite, the most telling first: `gpu` or `tiny`."""
    case, compile_, rows = ("flux1-dev", True, 16) if name == "gpu" else ("tiny", False, 16)
    return list(_lines(case, [Stack("blocks", graphs=True)] if compile_ else [], rows))


def _lines(case: str, stacks: Sequence[Stack], rows: int) -> Iterator[Line]:
    ladder: dict[str, Any] = AUTO if case != "tiny" else AUTO | {"min_scale": 0.5}  # as it was trained
    for stack in stacks:
        yield from (JobLine(case, setting, stack, rows) for setting in (ladder, FULLRES))
    yield from (JobLine(case, setting, rows=rows, chunk=4) for setting in (ladder, FULLRES))
    for stack in stacks:
        yield JobLine(case, ladder, replace(stack, quantize="fp8"), rows)
        yield JobLine(case, ladder, stack, rows, chunk=4)
    yield JobLine(case, FULLRES, rows=PLAIN_ROWS, kind="loop", chunk=4)


def over_loop_and_light(record: Record, those: Sequence[Record | None]) -> Record:
    """A line beside the plain loop, and beside its own engine alone."""
    loop, engine = those
    if record.seconds is None:
        return record
    rate = record.rows / record.seconds
    if loop is not None and loop.seconds:
        record = replace(record, over_plain=rate * loop.seconds / loop.rows)
    if engine is not None and engine.seconds and record.denoise_share is not None:
        record = replace(record, of_light=rate * engine.seconds / engine.rows)
    return record


def job_table(records: Iterable[Record]) -> str:
    """Markdown."""
    head = ["line", "steps @ grid", "full-size steps", "rows an hour", "over plain loop", "speed of light"]
    head += ["denoiser's share", "ready in"]
    return markdown([head, *map(_cells, records)])


def _cells(one: Record) -> list[str]:
    named = [one.line, one.split, f"{one.cost:.1f}"]
    if one.seconds is None:
        return [*named, f"not measured: {one.failed}", *[""] * 4]
    return [
        *named,
        f"{3600 * one.rows / one.seconds:,.0f}",
        ratio(one.over_plain),
        _percent(one.of_light),
        _percent(one.denoise_share),
        f"{one.load_s + one.prepare_s:.0f} s",
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
