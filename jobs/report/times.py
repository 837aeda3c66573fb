"""TODO: jobs/report/times.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

DENOISER = ("denoise", "expand")
"""The stages that a worker is there for."""
GENERATION = ("text_encode", *DENOISER, "vae_decode")
"""Those that its device is used in: beside the denoiser, or before and after it."""
Grid = tuple[int, int]
"""Height and width in latent cells."""
What = tuple[str, Grid | None]
"""A stage; with its grid where it is denoising."""


@dataclass(frozen=True)
class Batches:
    """Every batch that was made: arrays of one length."""

    attempt: np.ndarray
    worker: np.ndarray
    """Index in `Timings.names`."""
    rows: np.ndarray
    """Those that came as far as the largest grid."""
    begin: np.ndarray
    """Seconds since 1970, of its first stage of `GENERATION`."""
    end: np.ndarray
    height: np.ndarray
    """Latent cells of its largest grid."""
    width: np.ndarray
    tokens: np.ndarray
    """Of one row on that grid."""
    row_steps: np.ndarray
    """Steps on all grids, summed over rows."""
    row_token_steps: np.ndarray
    """Tokens times steps, summed over rows."""
    seconds: np.ndarray
    """Of the denoiser."""
    full_step_s: np.ndarray
    """Seconds a row and step on the largest grid."""
    first: np.ndarray
    """Whether it is its worker's first of its size, which also warms up."""

    @cached_property
    def counted(self) -> np.ndarray:
        """Those that speak for the job's speed: not the first ones, but where a size has no others, those."""
        _, size = groups(self.height, self.width)
        others = np.bincount(size, ~self.first) > 0
        return ~self.first | ~others[size]


@dataclass(frozen=True)
class WorkerTime:
    """Where a worker's time went."""

    worker: str
    device: str
    node: str
    rows: float
    """Samples."""
    wall_s: float
    """Working time from its first attempt's beginning to its last one's end."""
    seconds: dict[What, float]
    """In each stage. They overlap."""
    exposed: dict[What, float]
    """Of `GENERATION`, without what went on beside the denoiser."""

    def of(self, stage: str) -> float:
        """Seconds in a stage, on all grids."""
        return sum(seconds for (name, _), seconds in self.seconds.items() if name == stage)

    @property
    def denoise_s(self) -> float:
        """Seconds of the denoiser."""
        return sum(map(self.of, DENOISER))

    @property
    def waiting_s(self) -> float:
        """What was spent in no stage of `GENERATION`: waiting for a shard, its rows or its commit."""
        return max(0.0, self.wall_s - sum(self.exposed.values()))


@dataclass(frozen=True)
class GridTime:
    """The denoising on one grid; medians over batches."""

    height: int
    width: int
    tokens: int
    batches: int
    """Goes: where a batch was denoised in several, each counts."""
    batch_rows: float
    steps: float
    step_s: float
    """A step of all rows of a go."""
    step_row_s: float
    """The same over its rows."""
    row_s: float
    """All steps of a row."""
    share: float
    """Of all denoising."""
    points: np.ndarray
    """Each go's `step_row_s`."""


@dataclass(frozen=True)
class Saving:
    """Denoising, with its expansions, against the same steps all on the full grid."""

    ideal: float
    """Ratio of token-steps: the saving if every token cost the same."""
    measured: float
    """Ratio of seconds of the median batch, where all its steps take as long as its own full-grid ones."""
    row_s: dict[What, float]
    """Seconds a row as it was made, on average."""
    warming: bool
    """Batches that also warmed a worker up are in it, for there were no others."""


@dataclass(frozen=True)
class Throughput:
    """A job over its working time, in intervals of one length."""

    edges_s: np.ndarray
    """[intervals + 1]"""
    rows_per_minute: np.ndarray
    """[intervals]"""
    workers: np.ndarray
    """[intervals] workers with an attempt in hand, on average."""
    pauses: tuple[tuple[float, float], ...]
    """(working time, length in seconds) of each."""


@dataclass(frozen=True)
class Bar:
    """One stage of one batch or shard."""

    what: What
    begin_s: float
    """From the timeline's beginning."""
    seconds: float
    batch: int | None
    """Counts the timeline's batches; None: of a whole shard, or of a batch that is not the timeline's."""


@dataclass(frozen=True)
class Timeline:
    """A few batches of one worker, and all that went on beside them."""

    worker: str
    seconds: float
    bars: tuple[Bar, ...]

    @property
    def batches(self) -> int:
        return len({bar.batch for bar in self.bars if bar.batch is not None})

    @property
    def denoise_share(self) -> float:
        """Of the timeline, in [0, 1]."""
        return sum(bar.seconds for bar in self.bars if bar.what[0] in DENOISER) / self.seconds


class Clock:
    """Working time: `at` maps seconds since 1970 to it. Gaps of up to `bridge_s` between the spans count."""

    def __init__(self, begin: np.ndarray, end: np.ndarray, bridge_s: float) -> None:
        begins, ends = merged(begin, end, bridge_s)
        done = np.cumsum(ends - begins)
        self._times = np.stack([begins, ends], axis=1).ravel()
        self._worked = np.stack([done - (ends - begins), done], axis=1).ravel()
        self.total_s = float(done[-1])
        self.pauses = tuple(zip(done[:-1].tolist(), (begins[1:] - ends[:-1]).tolist(), strict=True))

    def at(self, times: np.ndarray) -> np.ndarray:
        return np.interp(times, self._times, self._worked)


def merged(begin: np.ndarray, end: np.ndarray, bridge_s: float) -> tuple[np.ndarray, np.ndarray]:
    """(begins, ends) of what spans cover together, gaps of up to `bridge_s` included."""
    order = np.argsort(begin, kind="stable")
    begin, reached = begin[order], np.maximum.accumulate(end[order])
    breaks = np.flatnonzero(begin[1:] > reached[:-1] + bridge_s)
    return begin[np.r_[0, breaks + 1]], reached[np.r_[breaks, len(reached) - 1]]


def groups(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the first line of each group, the group of each line): lines that are equal in all
    columns."""
    code = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, inverse = np.unique(column, return_inverse=True)
        code = code * max(1, len(values)) + inverse
    _, first, group = np.unique(code, return_index=True, return_inverse=True)
    return first, group


def until(edges: np.ndarray, begin: np.ndarray, end: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """How much was done until each edge, of amounts that are done evenly from `begin` to `end`."""
    took = np.maximum(end - begin, 1e-9)
    return np.array([(amount * np.clip((edge - begin) / took, 0, 1)).sum() for edge in edges])
