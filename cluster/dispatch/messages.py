"""What goes into a dispatcher and what comes out: its rules, its events and its actions. Decides nothing.

Rows are named by their row_id, workers and slots by the dispatcher's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from overtone.cluster.faults import Failure
from overtone.jobs.rows import Quarantined


@dataclass(frozen=True)
class Rules:
    """The numbers of a job's dispatch."""

    min_workers: int = 1
    """Workers kept until the end, even without work."""
    max_workers: int = 1
    """Workers asked for while there is work for them."""
    max_attempts: int = 3
    """Attempts of a shard that failed for a reason that is not a row's, after which it has failed."""
    row_deaths: int = 2
    """Deaths of a worker with a row alone in flight, after which the row is quarantined."""
    worker_failures: int = 3
    """Failures of a slot without a row made in between, after which it is retired."""
    max_reject_fraction: float = 0.5
    """Rejects over rows, in [0, 1], above which the job stops early."""
    silence_s: float | None = None
    """Seconds without an event from a running shard after which its worker is killed; None: never."""
    backoff_s: float = 1.0
    """Pause before the second attempt of what failed; doubles each time."""
    backoff_max_s: float = 60.0
    """Longest such pause."""
    max_squeezes: int = 10
    """Deaths for the memory that others hold, after which they are charged to the shard that meets them."""
    copies: bool = True
    """Idle workers at the end take a second copy of a shard that takes long; the first commit wins."""
    copy_after: float = 1.5
    """How long a shard runs before it may be copied, in mean shard durations."""
    idle_s: float = 20.0
    """Seconds without work after which a worker above `min_workers` is given back."""
    failed_streak: int = 3
    """Shards that failed in a row, with no commit in between, after which the job ends."""


# Events: what happens.


@dataclass(frozen=True)
class WorkerReady:
    """A worker has its model and waits; `node` is where it lives."""

    worker: int
    node: str


@dataclass(frozen=True)
class WorkerDied:
    """A worker's process is gone. `error_class` and `message` describe how, for a reject that may follow."""

    worker: int
    message: str
    error_class: str = "WorkerDied"
    preempted: bool = False
    """The machine was taken away, announced or not: nobody is to blame."""
    squeezed: bool = False
    """The machine ran low on memory, of which others held much: nobody here is to blame."""


@dataclass(frozen=True)
class WorkerFailed:
    """A worker could not start."""

    worker: int
    failure: Failure


@dataclass(frozen=True)
class WorkerDraining:
    """A worker's machine is about to be taken away."""

    worker: int


@dataclass(frozen=True)
class OfAttempt:
    """The attempt that an event belongs to."""

    worker: int
    shard: int
    attempt: int


@dataclass(frozen=True)
class ShardAlive(OfAttempt):
    """A running shard gives a sign of life, between two batches."""

    trouble: str = ""
    """What keeps it waiting, for people."""


@dataclass(frozen=True)
class RowsStarted(OfAttempt):
    """Rows are in flight on the device from now on."""

    rows: tuple[str, ...]


@dataclass(frozen=True)
class RowsDone(OfAttempt):
    """Rows in flight are made (or rejected by themselves)."""

    rows: tuple[str, ...]


@dataclass(frozen=True)
class ShardGenerated(OfAttempt):
    """All rows of a shard are made; its commit continues in the background and the worker is free."""


@dataclass(frozen=True)
class ShardCommitted(OfAttempt):
    """The shard's part exists under its final name, from this attempt or from another that was first."""

    rows: int
    rejects: int
    reasons: tuple[tuple[str, int], ...] = ()
    """Rejects by error class."""


@dataclass(frozen=True)
class ShardReturned(OfAttempt):
    """A worker gave a shard back unfinished because it was asked to."""


@dataclass(frozen=True)
class ShardFailed(OfAttempt):
    """An attempt ended with an exception."""

    failure: Failure


Event = (
    WorkerReady
    | WorkerDied
    | WorkerFailed
    | WorkerDraining
    | ShardAlive
    | RowsStarted
    | RowsDone
    | ShardGenerated
    | ShardCommitted
    | ShardReturned
    | ShardFailed
)


# Actions: what to do.


@dataclass(frozen=True)
class Assignment:
    """One attempt at one shard."""

    shard: int
    attempt: int
    """Counts the attempts at this shard in this run, from 1."""
    suspects: tuple[str, ...] = ()
    """Rows to run first, each alone."""
    isolate: bool = False
    """Run every row alone."""
    quarantined: tuple[Quarantined, ...] = ()
    """Rows to reject without running them."""
    read_ahead: int | None = None
    """The shard that this worker will most likely get next, whose reading may begin; None: none is known."""
    commit_first: bool = True
    """Whether the shard's commit must have ended before the attempt does. Otherwise it may continue beside
    the worker's next shard."""


@dataclass(frozen=True)
class StartWorker:
    """Start a worker, if possible not on the nodes in `avoid`."""

    worker: int
    slot: int
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True)
class StopWorker:
    """Let a worker go: kill its process at once, or let it leave by itself."""

    worker: int
    kill: bool
    reason: str


@dataclass(frozen=True)
class Assign:
    """Give a worker a shard."""

    worker: int
    assignment: Assignment


@dataclass(frozen=True)
class Cancel:
    """Ask a worker to give its running shard back: nobody needs it any more, or its machine goes."""

    worker: int
    shard: int
    attempt: int


@dataclass(frozen=True)
class Flush:
    """Wait for a worker's commits in the background; there is no further shard to carry them."""

    worker: int


@dataclass(frozen=True)
class Quarantine:
    """Keep this quarantine for later runs of the job."""

    row: Quarantined


@dataclass(frozen=True)
class RetireSlot:
    """For the record: a slot is given up; `node` is None if no process of it ever was ready."""

    slot: int
    node: str | None
    failures: int
    message: str


@dataclass(frozen=True)
class FailShard:
    """For the record: a shard is given up for this run."""

    shard: int
    message: str


@dataclass(frozen=True)
class Retry:
    """For the record: a shard will be tried again."""

    shard: int
    message: str


@dataclass(frozen=True)
class Done:
    """Every shard is done or has failed; `failed` names the latter with their last error."""

    failed: tuple[FailShard, ...] = ()


@dataclass(frozen=True)
class Abort:
    """Stop the job early. `kind` is "failure", "no_workers", "rejects" or "shards"."""

    kind: str
    message: str
    failure: Failure | None = None


Action = (
    StartWorker
    | StopWorker
    | Assign
    | Cancel
    | Flush
    | Quarantine
    | RetireSlot
    | FailShard
    | Retry
    | Done
    | Abort
)
