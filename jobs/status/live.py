"""A job seen live, from its folder alone: a view on a terminal, plain lines in a log. Knows no driver."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from overtone.jobs.errors import StoreError
from overtone.jobs.status.reader import StatusReader
from overtone.jobs.status.state import RejectSeen, Status
from overtone.jobs.store import Store
from overtone.jobs.words import counted

_SHOWN_WORKERS = 8
_CHARACTERS = 200
_NAP_S = 0.5


def watch(
    store: Store,
    *,
    console: Console,
    every_s: float = 5.0,
    pause: Callable[[float], None] | None = None,
) -> Status:
    """Show the job in `store` until its last shard is committed, and return its last state.

    UserError where there is no job. Where the store cannot be reached later on, that is shown, and the store
    is asked again.
    """
    reader = StatusReader(store)
    show = _View(console) if console.is_terminal else _Lines(console)
    status, trouble = reader.read(), ""
    with show:
        while True:
            show(status, trouble)
            if status.finished:
                return status
            (pause or _pause)(every_s)
            try:
                status, trouble = reader.read(), ""
            except StoreError as error:
                trouble = str(error)


def _pause(seconds: float) -> None:
    """In short naps: Ctrl-C at the moment before a sleep begins is seen only when it ends."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _NAP_S))


class _View:
    """One screen that is redrawn in place; its last state stays."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=2)

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, status: Status, trouble: str) -> None:
        self._live.update(view(status, trouble), refresh=True)


class _Lines:
    """A line whenever rows were made, or the job's state became better or worse; and a line for each new
    reject."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: tuple[object, ...] = ()
        self._rejects: set[str] = set()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, status: Status, trouble: str) -> None:
        seen = (status.rows_left, status.rejected, status.eta_s is None, trouble)
        if seen == self._seen:
            return
        self._seen = seen
        for reject in reversed(status.newest_rejects):
            if reject.row_id not in self._rejects:
                self._print(f"rejected {_plain(reject.row_id)}: {_reason(reject)}")
        self._rejects = {reject.row_id for reject in status.newest_rejects}
        self._print(trouble or status.line())

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def view(status: Status, trouble: str = "") -> RenderableType:
    """A screen: rows, pace, where the time went, who works, what was rejected last."""
    done = status.rows_total - status.rows_left
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=max(1, status.rows_total), completed=done, width=40),
        f"{done:,}/{counted(status.rows_total, status.unit)} ({status.percent}%)",
    )
    counts = f"{status.counts()}; {status.shards_done:,} of {counted(status.shards_total, 'shard')}"
    parts: list[RenderableType] = [
        Text(
            f"{status.name}  {status.model}, {status.mode}  {status.url}", style="bold", overflow="ellipsis"
        ),
        bar,
        Text(counts),
        Text(status.pace()),
    ]
    if trouble:
        parts.append(Text(trouble, style="red"))
    if status.seconds_by_stage:
        parts += ["", _stages(status)]
    if status.workers:
        parts += ["", _workers(status)]
    if status.newest_rejects:
        parts += ["", _rejects(status)]
    return Group(*parts)


def _stages(status: Status) -> Table:
    total = sum(status.seconds_by_stage.values())
    table = Table("stage", box=None, pad_edge=False)
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    table.add_column("(estimated from some parts)" if status.sampled else "")
    for stage, seconds in sorted(status.seconds_by_stage.items(), key=lambda item: -item[1]):
        share = seconds / max(total, 1e-9)
        table.add_row(
            stage, f"{seconds:,.1f}", f"{share:.1%}", ProgressBar(total=1, completed=share, width=20)
        )
    return table


def _workers(status: Status) -> Table:
    table = Table("worker", "device", "node", box=None, pad_edge=False)
    table.add_column("parts", justify="right")
    table.add_column("rows", justify="right")
    for worker in status.workers[:_SHOWN_WORKERS]:
        table.add_row(
            Text(worker.worker),
            Text(worker.device),
            Text(worker.node[:12]),
            f"{worker.parts:,}",
            f"{worker.rows:,}",
        )
    if len(status.workers) > _SHOWN_WORKERS:
        table.add_row(f"and {len(status.workers) - _SHOWN_WORKERS:,} more")
    return table


def _rejects(status: Status) -> Table:
    table = Table("newest rejects", "reason", box=None, pad_edge=False)
    for reject in status.newest_rejects:
        row_id = Text(_plain(reject.row_id)[:40], no_wrap=True)
        table.add_row(row_id, Text(_reason(reject), no_wrap=True, overflow="ellipsis"))
    return table


def _reason(reject: RejectSeen) -> str:
    return _plain(f"{reject.error_class}: {reject.message}")


def _plain(text: str) -> str:
    """A text of foreign origin, without anything that a terminal would obey, and cut to a line or two."""
    return "".join(c if c.isprintable() else " " for c in text[:_CHARACTERS])
