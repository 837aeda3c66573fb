"""What stands on the board: shards, the attempts at them, and workers. Each record knows only itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from overtone.jobs.rows import Quarantined


@dataclass(frozen=True)
class Death:
    """A failure that a shard met, and where. `rows` were in flight; () charges the shard itself."""

    slot: int
    node: str | None
    rows: tuple[str, ...]
    error_class: str
    message: str
    died: bool = False
    """The process is gone, whatever it did at that time."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt at a shard, in the hands of a worker, from its assignment until it ends."""

    shard: int
    number: int
    """Counts the attempts at this shard, from 1."""
    worker: int
    started: float
    heard: float
    """When its last event came."""
    isolated: bool
    """Its suspects or all its rows run alone, so its duration says nothing about others."""
    rows: tuple[str, ...] = ()
    """The rows in flight."""
    cancelled: bool = False


@dataclass(slots=True)
class Shard:
    """A shard that is neither fresh nor done."""

    index: int
    num_attempts: int = 0
    """Attempts begun so far."""
    attempts: list[Attempt] = field(default_factory=list)
    """Attempts that run or commit: at most two, of which the second is a copy."""
    reserved_by: int | None = None
    not_before: float = 0.0
    """When its wait for another attempt ends, while it waits."""
    deaths: list[Death] = field(default_factory=list)
    suspects: dict[str, None] = field(default_factory=dict)
    """Rows to run alone next, because a worker died with them in flight."""
    squeezed: int = 0
    """Deaths on it for the memory that others held."""
    losses: int = 0
    """Commits lost with a worker that died on another shard."""
    quarantined: dict[str, Quarantined] = field(default_factory=dict)
    unproved: dict[str, set[int]] = field(default_factory=dict)
    """Quarantined rows that are not announced yet, with the slots that witnessed them."""
    failed: bool = False

    @property
    def isolate(self) -> bool:
        """Whether every row runs alone."""
        if not self.deaths:
            return False
        # A worker that dies at once cannot report its rows in flight: only single rows can find the cause.
        unnamed = any(death.died and not death.rows for death in self.deaths)
        return unnamed or sum(len(death.rows) > 1 for death in self.deaths) >= 2

    @property
    def charged(self) -> int:
        """Failures charged to the shard itself."""
        return sum(not death.rows for death in self.deaths)

    def deaths_of(self, row: str) -> list[Death]:
        """Deaths with this row alone in flight."""
        return [death for death in self.deaths if death.rows == (row,)]


@dataclass(slots=True)
class Worker:
    """One worker process, asked for or ready."""

    id: int
    slot: int
    idle_since: float
    node: str | None = None
    """Where it lives; None: it still starts."""
    attempt: Attempt | None = None
    """The attempt that it runs."""
    reserved: int | None = None
    """The shard that it reads ahead."""
    committing: dict[int, Attempt] = field(default_factory=dict)
    """Attempts whose commits go on in the background, by shard."""
    flushing: bool = False
    """It was asked to wait for these commits."""
    draining: bool = False
    """Its machine is about to be taken away: it takes no more shards."""

    @property
    def able(self) -> bool:
        """Whether it takes shards, now or when it is free."""
        return self.node is not None and not self.draining

    @property
    def unsettled(self) -> bool:
        """Whether it runs no shard and has yet to be asked for its commits, or to be let go."""
        if self.attempt is not None:
            return False
        return not self.flushing if self.committing else self.draining

    def attempt_at(self, shard: int, number: int) -> Attempt | None:
        """Its attempt of that number at that shard, if it runs or commits one."""
        for attempt in (self.attempt, self.committing.get(shard)):
            if attempt is not None and attempt.shard == shard and attempt.number == number:
                return attempt
        return None
