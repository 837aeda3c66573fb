"""A store whose process dies at its k-th operation, before or after it is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from overtone.jobs.store import ObjectInfo, Store


class Crash(BaseException):
    """The process is gone: nothing in it may go on, so nothing may catch this by accident."""


class CrashingStore(Store):
    """Passes everything on to `inner` until operation `at` (from 0); None: only counts. Stays dead."""

    def __init__(
        self, inner: Store, at: int | None = None, when: Literal["before", "after"] = "before"
    ) -> None:
        super().__init__(inner.config)
        self.inner, self._at, self._when = inner, at, when
        self.operations: list[str] = []

    def _do(self, name: str, key: str, operation):
        if self._at is not None and len(self.operations) > self._at:
            raise Crash("used after its death")
        dies = len(self.operations) == self._at
        self.operations.append(f"{name} {key}")
        if dies and self._when == "before":
            raise Crash(f"before {name} {key}")
        result = operation()
        if dies:
            raise Crash(f"after {name} {key}")
        return result

    def read(self, key: str, start: int | None = None, length: int | None = None) -> bytes:
        return self._do("read", key, lambda: self.inner.read(key, start, length))

    def open(self, key: str) -> BinaryIO:
        return self._do("open", key, lambda: self.inner.open(key))

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        return iter(self._do("list", prefix, lambda: [*self.inner.list(prefix, after=after)]))

    def head(self, key: str) -> ObjectInfo | None:
        return self._do("head", key, lambda: self.inner.head(key))

    def create(self, key: str, data: bytes | Path, *, attempt: str, content_type: str | None = None) -> bool:
        return self._do(
            "create", key, lambda: self.inner.create(key, data, attempt=attempt, content_type=content_type)
        )

    def put(
        self, key: str, data: bytes | Path, *, content_type: str | None = None, durable: bool = True
    ) -> None:
        self._do("put", key, lambda: self.inner.put(key, data, content_type=content_type, durable=durable))

    def delete(self, key: str) -> None:
        self._do("delete", key, lambda: self.inner.delete(key))

    def sweep(self, *, older_than_s: float | None = None) -> int:
        return self._do("sweep", "", lambda: self.inner.sweep(older_than_s=older_than_s))

    def probe_limits(self) -> tuple[bool, int]:
        return self.inner.probe_limits()
