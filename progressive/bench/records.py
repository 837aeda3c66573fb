"""What was measured of a suite so far, in a file: a JSON object a line, each written when it is known, and
all as a table beside it. Measures nothing.

    records = Records(Path("h100.jsonl"))
    records.add(record)                     # in the file, and in h100.md
    records.latest("NVIDIA H100 80GB HBM3") # by line, the last of each

A sitting that is cut off in the middle of a write leaves half a line, which the next one takes away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from overtone.progressive.bench.tables import markdown

CUT = "cut off"
"""How the reason of a line begins that did not come to its end within a sitting's time: it is not done."""


@dataclass(frozen=True)
class Record:
    """One line of a suite, measured or not, on one device."""

    line: str
    """Its name."""
    case: str
    stack: str
    rows: int
    split: str
    """Steps @ latent grid of each stage."""
    cost: float
    """Of a row, in full-size steps of the same model."""
    ideal: float
    """Cost of as many steps at full size over this one."""
    device: str
    sitting: str
    """When the sitting began that it was measured in, UTC: its ratios are to what that one measured."""
    total_s: float
    """What it took altogether: to start a process and to build a model where that was needed, to compile, to
    warm up and to be timed."""
    seconds: float | None = None
    """Of the denoising loop of all rows together, the median of the repeats; None where it was not measured,
    for the reason in `failed`."""
    spread_s: float | None = None
    """Slowest minus fastest of the repeats."""
    over_plain: float | None = None
    """Rows a second over those of the plain pipeline's own call with as many steps, a row at a time."""
    over_equal_cost: float | None = None
    """Rows a second over those of the plain pipeline's own call with fewer steps, as many as cost the same:
    between the two calls that the sitting timed, in proportion."""
    memory_gib: float | None = None
    """Most that the device held during the loop; on a CPU, the most that the process held so far."""
    load_s: float = 0.0
    """To build the model; 0 where the line before had left it there."""
    prepare_s: float = 0.0
    """To compile, to capture and to warm up."""
    graphs: int = 0
    """Compiled while it was prepared, or loaded from a cache."""
    replays: int = 0
    """Of captured calls of the transformer, from the warm-up on; 0 with `graphs` in its name: none could be
    captured, and the line was run without."""
    denoise_share: float | None = None
    """Of a job: the denoiser's share of its workers' time, in [0, 1]."""
    of_light: float | None = None
    """Of a job: rows a second over those of the same engine that does nothing but denoise."""
    failed: str = ""
    """Why there are no figures."""
    about: dict[str, Any] = field(default_factory=dict)
    """Dtype, repeats and versions."""

    @property
    def done(self) -> bool:
        """Measured, or not to be measured on this device."""
        return not self.failed.startswith(CUT)


class Records:
    """The file and the table of one suite, on any devices."""

    def __init__(self, path: Path, table: Callable[[Iterable[Record]], str] | None = None) -> None:
        """Reads what is there. ValueError for a file that is none of these. `table`: how lines are shown;
        None: as `denoising_table` does."""
        self._path, self._table = path, table or denoising_table
        self.all: list[Record] = []
        if path.exists():
            self._read()

    def _read(self) -> None:
        text = self._path.read_text()
        whole = text[: text.rfind("\n") + 1]
        known = {one.name for one in fields(Record)}
        try:
            for one in map(json.loads, whole.splitlines()):
                self.all.append(Record(**{key: value for key, value in one.items() if key in known}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._path} holds no lines of a suite: {error}") from error
        if whole != text:
            self._path.write_text(whole)

    def latest(self, device: str) -> dict[str, Record]:
        """The last of each line on a device."""
        return {one.line: one for one in self.all if one.device == device}

    def add(self, record: Record) -> None:
        """Write it at once."""
        self.all.append(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        self._path.with_suffix(".md").write_text(self.tables() + "\n")

    def tables(self) -> str:
        """A table in Markdown for each device."""
        devices = dict.fromkeys(one.device for one in self.all)
        return "\n\n".join(f"{device}:\n\n{self._table(self.latest(device).values())}" for device in devices)


def denoising_table(records: Iterable[Record]) -> str:
    """Markdown, its columns padded so that a terminal shows it well too."""
    head = ["line", "steps @ grid", "full-size steps", "seconds", "ms a full-size step", "rows an hour"]
    head += ["over plain", "over plain of equal cost", "ready in", "GiB"]
    return markdown([head, *map(_cells, records)])


def _cells(one: Record) -> list[str]:
    named = [one.line, one.split, f"{one.cost:.1f}"]
    if one.seconds is None:
        return [*named, f"not measured: {one.failed}", *[""] * 6]
    a_row = one.seconds / one.rows
    return [
        *named,
        f"{one.seconds:.2f} ± {(one.spread_s or 0) / 2:.2f}",
        f"{1000 * a_row / one.cost:.0f}",
        f"{3600 / a_row:,.0f}",
        ratio(one.over_plain),
        ratio(one.over_equal_cost),
        f"{one.load_s + one.prepare_s:.0f} s",
        f"{one.memory_gib or 0:.1f}",
    ]


def ratio(value: float | None) -> str:
    """For a table."""
    return "" if value is None else f"{value:.2f}x"


def over_own_calls(record: Record, bases: Sequence[Record | None]) -> Record:
    """A line beside the pipeline's own call with as many steps, and with fewer."""
    plain, fewer = bases
    if plain is None or plain.seconds is None or record.seconds is None:
        return record
    a_row = record.seconds / record.rows
    record = replace(record, over_plain=plain.seconds / a_row)
    if fewer is None or fewer.seconds is None or fewer.cost == plain.cost:
        return record
    a_step = (plain.seconds - fewer.seconds) / (plain.cost - fewer.cost)
    return replace(record, over_equal_cost=(fewer.seconds + a_step * (record.cost - fewer.cost)) / a_row)
