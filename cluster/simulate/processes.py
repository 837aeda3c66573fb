"""The simulated worker processes and the machines they live on. Knows no dispatcher and no time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from overtone.cluster.dispatch import Assignment
from overtone.cluster.simulate.world import ROWS


@dataclass(slots=True, eq=False)
class Process:
    """One worker process, which does one thing at a time."""

    id: int
    slot: int
    node: str
    due: int = 0  # number of its entry in the agenda
    work: Assignment | None = None
    batches: list[tuple[str, ...]] = field(default_factory=list)  # that are not begun
    rows: tuple[str, ...] = ()  # in flight
    batch_s: float = 0.0
    dies: bool = False
    fails: bool = False
    cancelled: bool = False
    draining: bool = False
    background: Assignment | None = None  # its commit is through, and nobody has heard of it yet
    background_fails: bool = False

    def take(self, work: Assignment, seconds: float) -> None:
        """Take a shard in hand for `seconds`: suspects first and alone, the rest together or each alone."""
        self.work, self.cancelled = work, False
        names = [f"{work.shard}:{k}" for k in range(ROWS)]
        if work.suspects or work.isolate or work.quarantined:
            skip = {row.row_id for row in work.quarantined}
            rest = [row for row in names if row not in skip and row not in work.suspects]
            self.batches = [(row,) for row in work.suspects]
            self.batches += [(row,) for row in rest] if work.isolate else [tuple(rest)] if rest else []
        else:
            self.batches = [tuple(names)]
        self.batch_s = seconds / max(1, len(self.batches))


class Machines:
    """The places of machines: each has one machine after another, and the same slots on all of them."""

    def __init__(self, workers: int, workers_per_node: int) -> None:
        self.places = -(-workers // workers_per_node)
        self._slots = workers_per_node
        self._generation: Counter[int] = Counter()  # machines that a place has lost
        self._on_slot: dict[int, Process] = {}

    def node(self, place: int) -> str:
        """The name of the machine that is at this place now."""
        return f"n{place}.{self._generation[place]}"

    def start(self, worker: int, slot: int) -> Process:
        """A new process in a slot, on the machine that is there now."""
        process = self._on_slot[slot] = Process(worker, slot, self.node(slot // self._slots))
        return process

    def end(self, process: Process) -> None:
        """A process is gone; its slot may have another already."""
        if self._on_slot[process.slot] is process:
            del self._on_slot[process.slot]

    def at(self, place: int) -> list[Process]:
        """The processes at this place, on whichever machine of it."""
        slots = range(place * self._slots, (place + 1) * self._slots)
        return [self._on_slot[slot] for slot in slots if slot in self._on_slot]

    def replace(self, place: int) -> list[Process]:
        """The machine at this place is gone and another takes its place: the processes that lived on it."""
        node = self.node(place)
        self._generation[place] += 1
        return [process for process in self.at(place) if process.node == node]
