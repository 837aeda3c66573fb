"""A lab in a process of its own: what kills or hangs it costs one line, not the suite. Knows no budget.

    with LabProcess("cuda", "bfloat16", repeats=2) as lab:
        outcome = lab.measure(line, limit_s=120)

An error of the device leaves nothing to trust in a process, so after one, and after a crash, the next line
gets a new one; and what a line has left in memory goes with its process, whatever held it.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from overtone.progressive.bench.records import CUT
from overtone.progressive.bench.suite import Line, Stack

_REFUSALS = ("ValueError", "ImportError", "ModuleNotFoundError", "NotImplementedError", "Recompiled")
"""Errors that say what was wrong with the line, and leave the process as it was."""
CLOSING_S = 2.0
"""A process has so long to end by itself."""
_LONGEST = 300
"""Characters of a reason."""


@dataclass(frozen=True)
class Ready:
    """A process that has its device."""

    device: str
    """Its name."""
    about: dict[str, Any]
    """Versions and the rest that figures depend on."""


@dataclass(frozen=True)
class Outcome:
    """What became of a line."""

    seconds: float
    """Altogether, a process's start included."""
    start_s: float | None
    """What starting a process took of that; None where one was there."""
    figures: Any = None
    """`lab.Figures`; None where there are none."""
    failed: str = ""
    """Why."""


class LabProcess:
    """A process that measures one line after the other, started when it is needed."""

    def __init__(
        self,
        serve: Callable[..., None],
        *arguments: Any,
        context: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`serve(connection, *arguments)` is what runs in the process; it must pickle. `context`: of
        `multiprocessing`; None: `spawn`, which a GPU needs."""
        self._context = context or multiprocessing.get_context("spawn")
        self._serve, self._arguments, self._clock = serve, arguments, clock
        self._process: Any = None
        self._connection: Connection | None = None
        self.ready: Ready | None = None
        """Of the process, or of the last one."""
        self.resident: tuple[str, Stack] | None = None
        """The `Line.engine` that the process has built."""

    def __enter__(self) -> LabProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None and self._process is not None:
            self._connection.close()  # it ends by itself where it is not at anything
            self._process.join(CLOSING_S)
        self.kill()

    @property
    def started(self) -> bool:
        """Whether a process is there."""
        return self._process is not None

    def start(self, limit_s: float) -> Outcome | None:
        """Start a process, unless one is there; None: it has started, and `ready` says what it is on."""
        if self.started:
            return None
        begin = self._clock()
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=self._serve, args=(theirs, *self._arguments))
        self._process.start()
        theirs.close()
        ready = self._receive(begin, limit_s)
        if isinstance(ready, Outcome):
            return ready
        self.ready = ready
        return None

    def measure(self, line: Line, limit_s: float) -> Outcome:
        """Measure a line, in no more than `limit_s`, after which the process is killed."""
        begin, start_s = self._clock(), None
        if not self.started:
            failed = self.start(limit_s)
            if failed is not None:
                return failed
            start_s = self._clock() - begin
        assert self._connection is not None
        with suppress(OSError):  # it has ended meanwhile, which the answer tells
            self._connection.send(line)
        answer = self._receive(begin, limit_s)
        seconds = self._clock() - begin
        if isinstance(answer, Outcome):
            return Outcome(answer.seconds, start_s, failed=answer.failed)
        kind, value = answer
        if kind == "measured":
            self.resident = line.engine
            return Outcome(seconds, start_s, figures=value)
        self.resident = None
        if kind == "broken":
            self.kill()
        return Outcome(seconds, start_s, failed=value)

    def _receive(self, begin: float, limit_s: float) -> Any:
        """The process's next answer; an Outcome where there is none."""
        assert self._connection is not None
        try:
            if self._connection.poll(max(0.0, limit_s - (self._clock() - begin))):
                return self._connection.recv()
            failed = f"{CUT} after {self._clock() - begin:.0f} s"
        except (EOFError, ConnectionError):
            self._process.join()
            failed = _death(self._process.exitcode)
        self.kill()
        return Outcome(self._clock() - begin, None, failed=failed)

    def kill(self) -> None:
        """End the process at once, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = self.resident = None


def serve(connection: Connection, device: str, dtype: str, repeats: int) -> None:
    """In the process: a `Lab`, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    import diffusers
    import torch  # and all that takes its time
    import transformers

    from overtone.progressive.bench.lab import Lab
    from overtone.progressive.bench.tables import measured_on

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    lab = Lab(torch.device(device), getattr(torch, dtype), repeats=repeats)
    about = measured_on(torch.device(device), dtype)
    name = about.pop("device")
    answer(connection, Ready(name, about | {"repeats": repeats}), lab.measure)


def answer(connection: Connection, ready: Ready, measure: Callable[[Line], Any]) -> None:
    """Say what this process is, then measure line after line."""
    connection.send(ready)
    while True:
        try:
            line = connection.recv()
        except EOFError:
            return
        try:
            said = ("measured", measure(line))
        except Exception as error:  # noqa: BLE001 - the line's boundary: it becomes data
            said = _reason(error)
        connection.send(said)


def _reason(error: Exception) -> tuple[str, str]:
    name = type(error).__name__
    first = next(iter(str(error).strip().splitlines()), "")
    text = first[: _LONGEST - 1] + "…" if len(first) > _LONGEST else first
    if "out of memory" in str(error).lower():
        return "failed", "out of memory"
    return "failed" if name in _REFUSALS else "broken", f"{name}: {text}"


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = "; the machine's memory may have run out" if -code == signal.SIGKILL else ""
        return f"its process was ended by {name}{memory}"
    return f"its process ended with exit code {code}"
