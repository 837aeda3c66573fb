"""A set of shards that takes a byte for each shard of the plan: ten million take ten megabytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSet


class ShardSet(MutableSet[int]):
    """Some of the shards [0, num_shards), in order."""

    def __init__(self, num_shards: int, shards: Iterable[int] = ()) -> None:
        self._has = bytearray(num_shards)
        self._len = 0
        for shard in shards:
            self.add(shard)

    @property
    def num_shards(self) -> int:
        """Shards of the plan, in the set or not."""
        return len(self._has)

    @classmethod
    def _from_iterable(cls, it: Iterable[int]) -> set[int]:  # type: ignore[override]
        return set(it)  # what `&`, `|` and `-` make

    def __contains__(self, shard: object) -> bool:
        return isinstance(shard, int) and 0 <= shard < len(self._has) and self._has[shard] == 1

    def __iter__(self) -> Iterator[int]:
        at = self._has.find(1)
        while at >= 0:
            yield at
            at = self._has.find(1, at + 1)

    def __len__(self) -> int:
        return self._len

    def __repr__(self) -> str:
        return f"ShardSet({self._len} of {len(self._has)})"

    def add(self, value: int) -> None:
        """IndexError where the plan has no such shard."""
        if not 0 <= value < len(self._has):
            raise IndexError(f"shard {value} of {len(self._has)}")
        self._len += 1 - self._has[value]
        self._has[value] = 1

    def discard(self, value: int) -> None:
        """Does nothing where the shard is not in the set."""
        if value in self:
            self._has[value] = 0
            self._len -= 1
