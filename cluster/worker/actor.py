"""The Ray actor: one process, one resident engine, one runner. Knows nothing of other workers.

A plain actor: all calls run on its main thread, one after the other, so thread-local state of torch holds,
and SIGTERM (a machine that is about to go) is noticed between two chunks.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from overtone.cluster import logs
from overtone.cluster.dispatch import Assignment, Event, RowsStarted, ShardAlive
from overtone.cluster.faults import Failure
from overtone.cluster.metrics import WorkerMetrics
from overtone.cluster.worker.attempt import ALIVE_S
from overtone.cluster.worker.model import check_edition, usual_plan
from overtone.cluster.worker.protocol import Engine
from overtone.cluster.worker.runner import Runner
from overtone.jobs.errors import StoreError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import JobPlan
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store

CAREFUL_S = 0.05
"""Pause before a row that is under suspicion, for its name to be on its way before it kills the process."""

EngineFactory = Callable[[JobSpec], Engine]
"""Makes a worker's engine, in the worker. Must pickle."""


@dataclass(frozen=True)
class Load:
    """What a worker needs before its first attempt: the same for all workers of a job."""

    spec: JobSpec
    job_plan: JobPlan
    store: Store
    engine_factory: EngineFactory
    retry_plan: RetryPlan | None = None
    """Whose rows to make, instead of all rows of a shard."""


@dataclass(frozen=True)
class Ready:
    """A worker that has its engine."""

    node: str
    """Ray's id of the machine."""
    device: str
    pid: int


def in_lists(events: Iterator[Event]) -> Iterator[list[Event]]:
    """Events in order, several at a time, since a message costs more than a small shard. None is held back
    while anything is waited for or made: before that, a runner reports which rows it starts, or that it
    continues, and this ends a list. That it continues is left out within `ALIVE_S` of any other list."""
    waiting: list[Event] = []
    sent = -math.inf
    for event in events:
        if (
            isinstance(event, ShardAlive)
            and not (waiting or event.trouble)
            and time.monotonic() - sent < ALIVE_S
        ):
            continue
        waiting.append(event)
        if isinstance(event, RowsStarted | ShardAlive):
            yield waiting
            waiting, sent = [], time.monotonic()
    if waiting:
        yield waiting


class Worker:
    """What runs in an actor's process. Made by `cluster.fleet` alone."""

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._node = ray.get_runtime_context().get_node_id()
        self._load: Load | None = None
        self._runner: Runner | None = None
        self._draining = False
        signal.signal(signal.SIGTERM, self._terminate)

    def place(self) -> int:
        """The process's number; the answer says that it has a place."""
        return os.getpid()

    def load(self, load: Load) -> Ready | Failure:
        """Load the model, where this machine sees the job's folder; a failure comes back as data."""
        spec = load.spec
        logs.write_to(sys.stderr, job=spec.name, worker=self._worker)
        unseen = self._unseen(load)
        if unseen is not None:
            return unseen
        try:
            engine = load.engine_factory(spec)
            check_edition(engine, spec, load.job_plan)
            usual = usual_plan(engine, spec)
            runner = Runner(
                spec,
                load.job_plan,
                load.store,
                engine,
                worker=self._worker,
                node=self._node,
                retry_plan=load.retry_plan,
                on_timings=WorkerMetrics(spec.name, self._worker, str(engine.device)),
            )
            for _ in runner.warm_up(usual):
                pass
        except Exception as error:  # noqa: BLE001 - it becomes data: the dispatcher decides
            return Failure.of(error, "start", starting=True)
        self._load, self._runner = load, runner
        self._runner.draining = self._draining
        return Ready(self._node, str(engine.device), os.getpid())

    def begin(self, epoch: int) -> Failure | None:
        """From now on the driver has this number; a failure where this machine's folder does not know it."""
        assert self._load is not None
        assert self._runner is not None
        self._runner.epoch = epoch
        return self._unseen(self._load, epoch)

    def _unseen(self, load: Load, epoch: int = 0) -> Failure | None:
        """Why what is written here would be lost to the job, if it would."""
        try:
            JobFolder(load.store).wait_until_seen(load.job_plan, epoch)
        except StoreError as error:
            unseen = StoreError(
                f"node {self._node[:12]} ({socket.gethostname()}) does not see the output folder "
                f"{load.store.url}: {error}; every node must find the same folder there, as on a shared "
                "disk or in a bucket"
            )
            return Failure.of(unseen, "start", starting=True)
        return None

    def attempt(self, assignment: Assignment) -> Iterator[list[Event]]:
        """`Runner.attempt`, until the driver cancels the call; see `in_lists`."""
        assert self._runner is not None
        careful = assignment.isolate or bool(assignment.suspects)
        for events in in_lists(self._runner.attempt(assignment, ray.get_runtime_context().is_canceled)):
            yield events
            if careful and isinstance(events[-1], RowsStarted):
                time.sleep(CAREFUL_S)

    def flush(self) -> Iterator[list[Event]]:
        """`Runner.flush`."""
        assert self._runner is not None
        yield from in_lists(self._runner.flush())

    def recall(self) -> list[Event]:
        """`Runner.recall`."""
        assert self._runner is not None
        return self._runner.recall()

    def __ray_shutdown__(self) -> None:
        if self._runner is not None:
            self._runner.close()

    def _terminate(self, *_: Any) -> None:
        self._draining = True
        if self._runner is not None:
            self._runner.draining = True
