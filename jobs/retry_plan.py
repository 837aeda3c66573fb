"""Which shards of a finished job are tried again, as a file of the job's folder. Knows no rows and no store.

    retry_plan = RetryPlan(1, table)                      # `jobs.retry.find_rejects` makes the table
    RetryPlan.from_bytes(retry_plan.to_bytes())
    retry_plan.has(42), retry_plan.rows_of(42), retry_plan.before(42)

To a driver it is `jobs.plan.Work`, like the plan of the job itself.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.errors import VerifyError
from overtone.jobs.tables import table_of


@dataclass(frozen=True, eq=False)
class RetryPlan:
    """Which shards of a finished job have rejects that a follow-up run tries again. Immutable, like a plan.

    It is small, for the parts alone record which rows these are.
    """

    number: int
    """Counts the retries of a job from 1; the number in its parts' names."""
    table: pa.Table
    """Its shards in order: `shard`, `before`, the retry (0: the job itself) that made the part whose rejects
    are tried again, and `rows`, of how many input rows these are."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            pa.field("shard", pa.int64(), nullable=False),
            pa.field("before", pa.int64(), nullable=False),
            pa.field("rows", pa.int64(), nullable=False),
        ]
    )

    @cached_property
    def shards(self) -> np.ndarray:
        """[shards] int64, in order."""
        return self.table["shard"].to_numpy()

    @property
    def num_shards(self) -> int:
        return self.table.num_rows

    @cached_property
    def num_rows(self) -> int:
        """Input rows to try again, with those that the reader refused and will refuse again."""
        return int(self.table["rows"].to_numpy().sum())

    def has(self, index: int) -> bool:
        """Whether it tries any row of this shard."""
        at = int(np.searchsorted(self.shards, index))
        return at < len(self.shards) and int(self.shards[at]) == index

    def rows_of(self, index: int) -> int:
        """Input rows of a shard to try again. KeyError where the retry has none of it."""
        return self._value("rows", index)

    def left_out(self, num_shards: int) -> Iterable[int]:
        """The shards of a job of so many of which it tries no row."""
        return np.setdiff1d(np.arange(num_shards), self.shards).tolist()

    def before(self, index: int) -> int:
        """The retry whose part of this shard has the rejects; 0: the job itself. KeyError as above."""
        return self._value("before", index)

    def _value(self, column: str, index: int) -> int:
        if not self.has(index):
            raise KeyError(f"retry {self.number} has no shard {index}")
        return self.table[column][int(np.searchsorted(self.shards, index))].as_py()

    def to_bytes(self) -> bytes:
        """Parquet."""
        sink = io.BytesIO()
        pq.write_table(self.table.replace_schema_metadata({"retry": str(self.number)}), sink)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> RetryPlan:
        """The plan of `to_bytes`. VerifyError where the bytes are not one."""
        try:
            table = table_of(data)
            number = int(table.schema.metadata[b"retry"])
            plan = cls(number, table.replace_schema_metadata().cast(cls.SCHEMA))
            if (np.diff(plan.shards) <= 0).any():
                raise ValueError("its shards are not in order")
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise VerifyError(f"the plan of a retry is damaged: {error}") from error
        return plan
