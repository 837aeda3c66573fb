"""What is simulated, and the figures of how it went. Knows no dispatcher."""

from __future__ import annotations

import math
import random
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

ROWS = 4
"""Rows a shard, all in one batch; more would cost simulated workers more events, and teach nothing."""
LATENCY_S = 0.01
"""From an assignment to its first row."""
GRACE_S = 120.0
"""From a machine's notice to its end."""


@dataclass(frozen=True)
class World:
    """The job, its machines, and what goes wrong. Chances are those of one attempt."""

    shards: int = 5000
    workers: int = 200
    workers_per_node: int = 8
    shard_s: float = 60.0
    """Median time of an attempt."""
    spread: float = 0.25
    """Standard deviation of the logarithm of an attempt's time."""
    straggler_chance: float = 0.001
    straggler_factor: float = 10.0
    """How many times as long a straggler takes."""
    start_s: float = 60.0
    """From asking for a worker to its being ready; half to twice as much."""
    commit_s: float = 1.0
    death_chance: float = 1e-4
    """Of a process, at any time of the attempt, by no row's fault."""
    failure_chance: float = 1e-4
    """Of a commit."""
    poison_share: float = 1e-5
    """Shards with a row that kills every process that touches it."""
    node_hours: float = 200.0
    """Mean time after which a machine is taken away; another takes its place."""
    broken_nodes: int = 1
    """Machines on which every row dies."""
    tick_s: float = 1.0
    seed: int = 0

    def attempt_s(self, draw: random.Random) -> float:
        """The time of one attempt, at random."""
        seconds = draw.lognormvariate(0.0, self.spread) * self.shard_s
        return seconds * self.straggler_factor if draw.random() < self.straggler_chance else seconds

    @property
    def mean_s(self) -> float:
        """Mean time of an attempt."""
        slow = 1 + self.straggler_chance * (self.straggler_factor - 1)
        return self.shard_s * math.exp(self.spread**2 / 2) * slow

    @property
    def ideal_s(self) -> float:
        """Makespan if nothing failed and work could be divided at will."""
        return self.start_s + self.shards * self.mean_s / self.workers


@dataclass
class Result:
    """How the job went. `_s` is in simulated seconds, `cpu_` in real ones of this process."""

    makespan_s: float = 0.0
    ideal_s: float = 0.0
    events: int = 0
    attempts: int = 0
    most_attempts: int = 0
    """Of one shard."""
    copies: int = 0
    """Attempts at a shard that another worker ran at that time."""
    lost_races: int = 0
    """Attempts that were made whole and found another's part there."""
    deaths: int = 0
    preemptions: int = 0
    """Workers whose machine was taken away."""
    store_failures: int = 0
    rejects: int = 0
    """Rows."""
    poison: int = 0
    """Rows that had to be rejected."""
    retired: int = 0
    """Workers' places given up."""
    most_tracked: int = 0
    """Shards that had an object in the dispatcher, at most."""
    cpu_s: float = 0.0
    """Of the whole simulation, of which the dispatcher is a part."""
    event_us: float = 0.0
    """What the dispatcher takes for an event: the mean of a sample of them without its slowest hundredth, in
    which the machine did something else."""
    tick_us: float = 0.0
    """The same of a tick."""
    peak_mib: float = 0.0
    grown_mib: float = 0.0
    """What the process's memory grew by, simulated workers and store included."""
    checks: list[str] = field(default_factory=list)
    """What is wrong with the outcome; empty: nothing."""

    def check(self, *, missing: int) -> None:
        """Note what is wrong with the outcome. `missing`: shards that have no part."""
        if missing:
            self.checks.append(f"{missing:,} shards have no part")
        if self.rejects != self.poison:
            self.checks.append(f"{self.rejects} rejects where {self.poison} rows are poison")

    @property
    def efficiency(self) -> float:
        """Ideal over makespan."""
        return self.ideal_s / self.makespan_s if self.makespan_s else 1.0

    @property
    def driver_load(self) -> float:
        """Share of one core that the dispatcher needs at the job's pace, with a tick a second."""
        return (self.events * self.event_us / max(1.0, self.makespan_s) + self.tick_us) / 1e6


def mean_us(seconds: Sequence[float]) -> float:
    """The mean of these times in microseconds, without their slowest hundredth; 0 of none."""
    usual = sorted(seconds)[: math.ceil(0.99 * len(seconds))]
    return 1e6 * statistics.fmean(usual) if usual else 0.0


def peak_mib() -> float:
    """The most memory that this process has used so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
