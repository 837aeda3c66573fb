"""TODO: cluster/dispatch/board.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from overtone.jobs.rows import Quarantined


@dataclass(frozen=True)
class Death:
    """Something that went wrong with a shard, and where. `rows`: what was in flight; () charges the shard."""

    slot: int
    node: str | None
    rows: tuple[str, ...]
    error_class: str
    message: str
    died: bool = False
    """The process is gone, whatever it was at."""


@dataclass(slots=True, eq=False)
class Run:
    shard: int
    attempt: int
    worker: int
    started: float
    heard: float
    isolated: bool
    rows: tuple[str, ...] = ()  # in flight
    cancelled: bool = False


@dataclass(slots=True)
class Shard:
    index: int
    attempts: int = 0
    runs: list[Run] = field(default_factory=list)  # at most two: the second is a copy
    reserved_by: int | None = None
    deaths: list[Death] = field(default_factory=list)
    suspects: dict[str, None] = field(default_factory=dict)
    losses: int = 0  # commits lost with a worker that died on another shard
    quarantined: dict[str, Quarantined] = field(default_factory=dict)
    unproved: dict[str, set[int]] = field(default_factory=dict)  # quarantined row -> slots that witnessed it
    failed: bool = False

    @property
    def isolate(self) -> bool:
        if not self.deaths:
            return False
        # What dies at once takes the word of what it was at with it: then one row at a time, slowly.
        unnamed = any(death.died and not death.rows for death in self.deaths)
        return unnamed or sum(len(death.rows) > 1 for death in self.deaths) >= 2

    @property
    def charged(self) -> int:
        return sum(not death.rows for death in self.deaths)

    def deaths_of(self, row: str) -> list[Death]:
        return [death for death in self.deaths if death.rows == (row,)]


@dataclass(slots=True)
class Worker:
    id: int
    slot: int
    idle_since: float
    node: str | None = None  # None: still starting
    run: Run | None = None
    reserved: int | None = None
    committing: dict[int, Run] = field(default_factory=dict)
    flushing: bool = False
    draining: bool = False


@dataclass(slots=True)
class Slot:
    id: int
    worker: int | None = None
    node: str | None = None
    not_before: float = 0.0
    proved: bool = False  # some process of it made a row
    failures: list[frozenset[str]] = field(default_factory=list)  # rows in flight, since the last row made
    refunded: bool = False
    retired: bool = False
