"""The workers' places: which are vacant, closed or retired. Knows no shard and no rule.

A slot is a place for one worker at a time: the processes that succeed each other there. It is *open* until it
is *closed* (its worker was given back; it opens again when work returns) or *retired* (its processes failed
too often). An open slot without a worker is *vacant*.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


@dataclass(slots=True)
class Slot:
    """A worker's place."""

    id: int
    worker: int | None = None
    node: str | None = None
    """Where its last process that was ready lived."""
    not_before: float = 0.0
    """When its next process may start."""
    proved: bool = False
    """Some process of it made a row."""
    failures: list[frozenset[str]] = field(default_factory=list)
    """The rows in flight at each failure since the last row made."""
    squeezed: int = 0
    """Processes that died for the memory that others held, since the last row made."""
    refunded: bool = False
    """A row explained failures of it since the last row made."""
    closed: bool = False
    """Its worker was given back, and it gets another only when work returns."""
    retired: bool = False
    """It gets no worker any more."""


class Slots(list[Slot]):
    """All slots by their id, with the five values that derive from them."""

    def __init__(self) -> None:
        super().__init__()
        self.open = 0
        self.vacant: set[int] = set()
        self.vacancies: list[tuple[float, int]] = []  # heap of (not before, vacant slot), some outdated
        self.closed: list[int] = []  # the last one closed at the end
        self.avoid: frozenset[str] = frozenset()  # nodes of retired slots

    def add(self) -> None:
        """Open one more slot."""
        self.append(Slot(len(self)))
        self.open += 1
        self.vacate(self[-1])

    def take_vacancy(self, now: float) -> Slot | None:
        """The vacant slot whose pause ended first, if one has; its worker is the caller's to add."""
        while self.vacancies and self.vacancies[0][0] <= now:
            not_before, number = heapq.heappop(self.vacancies)
            slot = self[number]
            if number in self.vacant and slot.not_before == not_before:
                self.vacant.remove(number)
                return slot
            # It was taken meanwhile, or has to wait longer.
        return None

    def vacate(self, slot: Slot) -> None:
        """An open slot has no worker."""
        self.vacant.add(slot.id)
        heapq.heappush(self.vacancies, (slot.not_before, slot.id))

    def pause(self, slot: Slot, not_before: float) -> None:
        """A slot's next process starts no earlier than `not_before`."""
        slot.not_before = not_before
        if slot.id in self.vacant:
            heapq.heappush(self.vacancies, (not_before, slot.id))

    def close(self, slot: Slot) -> None:
        """A vacant slot gets no worker until work returns."""
        slot.closed = True
        self.vacant.remove(slot.id)
        self.closed.append(slot.id)
        self.open -= 1

    def reopen(self) -> None:
        """The slot that was closed last is open again."""
        slot = self[self.closed.pop()]
        slot.closed = False
        self.open += 1
        self.vacate(slot)

    def retire(self, slot: Slot) -> None:
        """An open slot gets no worker any more, and its node is avoided."""
        slot.retired = True
        self.vacant.discard(slot.id)
        self.open -= 1
        if slot.node is not None:
            self.avoid |= {slot.node}
