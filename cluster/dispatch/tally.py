"""What a job has seen so far, as eight statistics, and when they end it early. Knows no shard's state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from overtone.cluster.dispatch.messages import Abort, FailShard, RetireSlot, Rules, ShardCommitted
from overtone.jobs.words import counted


@dataclass(slots=True)
class Tally:
    """The statistics of one run of a job.

    Args:
        num_rows: rows of the plan; None: not known, since input rows ask for several.
        rows_of: rows of a shard, because every row of a failed shard counts as a reject.
    """

    num_rows: int | None
    rows_of: Callable[[int], int]
    rows_seen: int = 0
    """Rows of the shards that this run committed or gave up."""
    rejects: int = 0
    """The rejects among them."""
    failed: list[FailShard] = field(default_factory=list)
    """The shards given up."""
    streak: int = 0
    """Shards given up since the last commit."""
    timed: int = 0
    """Commits of attempts with a usual duration."""
    timed_s: float = 0.0
    """The sum of these durations."""
    retirements: list[RetireSlot] = field(default_factory=list)
    """The slots given up."""
    quiet_since: float = -math.inf
    """Every worker that is left gave a sign of life at that time or later."""

    def add_committed(self, event: ShardCommitted, usual_s: float | None) -> None:
        """A shard was committed for the first time. `usual_s`: how long it took, if that says something."""
        self.streak = 0
        self.rows_seen += event.rows
        self.rejects += event.rejects
        if usual_s is not None:
            self.timed += 1
            self.timed_s += usual_s

    def add_failed(self, failed: FailShard) -> None:
        """A shard was given up."""
        self.failed.append(failed)
        self.streak += 1
        self.rows_seen += self.rows_of(failed.shard)
        self.rejects += self.rows_of(failed.shard)

    def limit(self, rules: Rules, *, left: int, condemned: int) -> Abort | None:
        """Why the job ends early, if it does. `condemned`: rejects to come of the shards still `left`."""
        if self.streak >= rules.failed_streak and left:
            last = self.failed[-1].message
            return Abort(
                "shards", f"{counted(self.streak, 'shard')} in a row failed, the last one with: {last}"
            )
        rejects = self.rejects + condemned
        # A fraction of a few rows says little: at least 100, or all there are.
        few = 100 if self.num_rows is None else min(100, self.num_rows)
        seen = max(self.rows_seen + condemned, few)
        if rejects > rules.max_reject_fraction * seen:
            return Abort("rejects", f"{rejects} of the first {counted(seen, 'row')} cannot be made")
        return None
