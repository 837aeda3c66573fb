"""What a job's folder holds for each shard, by names and by small tables, look after look. Knows no sums.

names, tables = Names(store, "data/", ...), Tables(store, ...)
names.look(), tables.look()             # later looks ask only for what is new
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa

from overtone.jobs.store import NoSuchObject, ObjectInfo, Store
from overtone.jobs.tables import read_all, stride_of, table_of

_MAX_TABLES = 2000
"""At most this many timings are read, and as many rejects. Where there are more, every n-th stands for
all."""
NEWEST = 5
"""How many of the tables that were written last are read in any case."""


class Names:
    """The objects of shards under a prefix, by shard. Names sort like shards, and none goes away."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        index_of: Callable[[str], int | None],
        name_of: Callable[[int], str],
    ) -> None:
        self._store, self._prefix, self._index_of, self._name_of = store, prefix, index_of, name_of
        self.found: dict[int, ObjectInfo] = {}
        self.first_missing = 0

    def look(self, first: int | None = None) -> dict[int, ObjectInfo | None]:
        """Ask for the shards from `first` on; None: from the first one that was missing.

        Returns those that are new or were written again, with what was known of each before; None: nothing.
        Where the listing breaks off, nothing counts as seen.
        """
        first = self.first_missing if first is None else first
        after = self._name_of(first - 1) if first else ""
        listed = {}
        for info in self._store.list(self._prefix, after=after):
            index = self._index_of(info.key)
            if index is not None and info != self.found.get(index):
                listed[index] = info
        changed = {index: self.found.get(index) for index in listed}
        self.found |= listed
        while self.first_missing in self.found:
            self.first_missing += 1
        return changed


class Tables:
    """What small tables of shards hold. Each is read once, and kept as `digest` makes it."""

    def __init__(
        self,
        store: Store,
        names: Names,
        digest: Callable[[pa.Table], Any],
        columns: list[str],
        optional: Mapping[str, pa.DataType] | None = None,
    ) -> None:
        self._store, self.names, self._digest = store, names, digest
        self._columns, self._optional = columns, optional
        self._settled = 0
        self._kept: dict[int, tuple[str, Any]] = {}  # with the etag of what was read
        self.chosen: list[int] = []
        """The shards whose tables stand for all, in order."""
        self.newest: list[int] = []
        """The shards whose tables were written last, the last one first."""

    @property
    def weight(self) -> float:
        """How many tables each of the chosen ones stands for."""
        return len(self.names.found) / max(1, len(self.chosen))

    def digests(self, shards: Iterable[int]) -> list[Any]:
        """The digests of these shards, as far as they are among the chosen and the newest."""
        return [self._kept[shard][1] for shard in shards if shard in self._kept]

    def look(self, settled: int | None = None) -> None:
        """Read what is new. Below the shard `settled`, the caller knows, no table will be written any
        more."""
        changed = self.names.look(None if settled is None else min(self._settled, settled))
        self._settled = settled or 0
        found = self.names.found
        stride = stride_of(len(found), _MAX_TABLES)
        self.chosen = sorted({shard for shard in (*self.chosen, *changed) if shard % stride == 0})
        newest = dict.fromkeys((*self.newest, *changed))
        self.newest = sorted(newest, key=lambda shard: -(found[shard].modified_s or 0))[:NEWEST]
        wanted = {*self.chosen, *self.newest}
        self._kept = {
            shard: kept
            for shard, kept in self._kept.items()
            if shard in wanted and kept[0] == found[shard].etag
        }
        missing = sorted(wanted - self._kept.keys())
        for shard, digest in zip(missing, read_all(self._read, missing), strict=True):
            if digest is not None:
                self._kept[shard] = (found[shard].etag, digest)

    def _read(self, shard: int) -> Any:
        info = self.names.found[shard]
        if not info.size_bytes:  # lost with a machine's power, and made again at the job's end
            return None
        try:
            data = self._store.read(info.key)
        except NoSuchObject:  # replaced or removed while we looked
            return None
        return self._digest(table_of(data, self._columns, self._optional))
