"""What timings are summed up to: batches, workers, grids, savings, and working time. Knows no tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

DENOISER = ("denoise", "expand")
"""The stages that a worker exists for."""
GENERATION = ("text_encode", *DENOISER, "vae_decode")
"""The stages that use a worker's device, beside the denoiser or before and after it."""
Grid = tuple[int, int]
"""Height and width in latent cells."""
What = tuple[str, Grid | None]
"""A stage, and its grid where the stage is denoising."""


@dataclass(frozen=True)
class Batches:
    """Every batch that was made, as arrays of one length."""

    attempt: np.ndarray
    worker: np.ndarray
    """Index in `Timings.names`."""
    rows: np.ndarray
    """The rows that reached the largest grid."""
    begin: np.ndarray
    """When its first stage of `GENERATION` began, in seconds since 1970."""
    end: np.ndarray
    height: np.ndarray
    """Latent cells of its largest grid."""
    width: np.ndarray
    tokens: np.ndarray
    """Of one row on that grid."""
    row_steps: np.ndarray
    """Steps on all grids, summed over rows."""
    row_cost: np.ndarray
    """Cost of all steps, summed over rows."""
    seconds: np.ndarray
    """Of the denoiser."""
    full_step_s: np.ndarray
    """Seconds for a step of one row on the largest grid."""
    first: np.ndarray
    """Whether it is its worker's first batch of its size, which also warms the worker up."""

    @cached_property
    def counted(self) -> np.ndarray:
        """Whether a batch counts for the job's speed. The first batches do not, unless a size has no
        others."""
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
    """Seconds in each stage. Stages overlap."""
    exposed: dict[What, float]
    """Seconds in each stage of `GENERATION`, without the time that ran beside the denoiser."""

    def of(self, stage: str) -> float:
        """Seconds in a stage, on all grids."""
        return sum(seconds for (name, _), seconds in self.seconds.items() if name == stage)

    @property
    def denoise_s(self) -> float:
        """Seconds of the denoiser."""
        return sum(map(self.of, DENOISER))

    @property
    def waiting_s(self) -> float:
        """Seconds in no stage of `GENERATION`, in which the worker waited for a shard, its rows or its
        commit."""
        return max(0.0, self.wall_s - sum(self.exposed.values()))


@dataclass(frozen=True)
class GridTime:
    """The denoising on one grid, in medians over chunks."""

    height: int
    width: int
    tokens: int
    batches: int
    """Chunks: where a batch was denoised in several, each counts."""
    batch_rows: float
    steps: float
    step_s: float
    """Seconds for a step of all rows of a chunk."""
    step_row_s: float
    """`step_s`, divided by the rows of the chunk."""
    row_s: float
    """Seconds for all steps of a row."""
    share: float
    """Share of all denoising, in [0, 1]."""
    points: np.ndarray
    """The `step_row_s` of each chunk."""


@dataclass(frozen=True)
class Saving:
    """Denoising, with its expansions, compared with the same steps all on the full grid."""

    ideal: float
    """Ratio of costs: the saving if time followed what is counted, FLOPs or image tokens."""
    measured: float
    """Ratio of seconds of the median batch, if all its steps took as long as its own on the full grid."""
    row_s: dict[What, float]
    """Seconds for a row as it was made, on average."""
    warming: bool
    """Whether it counts batches that also warmed a worker up, because there were no others."""


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
    """Counts the timeline's batches. None: the bar is of a whole shard, or of a batch that is not the
    timeline's."""


@dataclass(frozen=True)
class Timeline:
    """A few batches of one worker, and all that ran beside them."""

    worker: str
    seconds: float
    bars: tuple[Bar, ...]

    @property
    def batches(self) -> int:
        return len({bar.batch for bar in self.bars if bar.batch is not None})

    @property
    def denoise_share(self) -> float:
        """The denoiser's share of the timeline, in [0, 1]."""
        return sum(bar.seconds for bar in self.bars if bar.what[0] in DENOISER) / self.seconds


class Clock:
    """Working time. `at` maps seconds since 1970 to it. Gaps of up to `bridge_s` between the spans count as
    work."""

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
    """(begins, ends) of the time that spans cover together, gaps of up to `bridge_s` included."""
    order = np.argsort(begin, kind="stable")
    begin, reached = begin[order], np.maximum.accumulate(end[order])
    breaks = np.flatnonzero(begin[1:] > reached[:-1] + bridge_s)
    return begin[np.r_[0, breaks + 1]], reached[np.r_[breaks, len(reached) - 1]]


def groups(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the first line of each group, the group of each line). The lines of a group are equal in all
    columns."""
    code = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, inverse = np.unique(column, return_inverse=True)
        code = code * max(1, len(values)) + inverse
    _, first, group = np.unique(code, return_index=True, return_inverse=True)
    return first, group


def until(edges: np.ndarray, begin: np.ndarray, end: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """How much was done until each edge, where each amount is done evenly from its `begin` to its `end`."""
    took = np.maximum(end - begin, 1e-9)
    return np.array([(amount * np.clip((edge - begin) / took, 0, 1)).sum() for edge in edges])
