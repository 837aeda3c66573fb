"""The workers of a job on Ray: started, given work, listened to, stopped. Knows no shards' state.

    fleet = Fleet(spec, job_plan, store, epoch=3)
    fleet.start(0, avoid=frozenset()); fleet.assign(0, assignment)
    for event in fleet.poll(1.0): ...          # events of overtone.cluster.dispatch, from all workers
    fleet.close()

Every way in which Ray reports a dead process becomes one `WorkerDied`, which blames nobody where the machine
itself went away.
"""

from __future__ import annotations

import math
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError, TaskCancelledError

from overtone.cluster.dispatch import (
    Assignment,
    Event,
    ShardFailed,
    ShardReturned,
    WorkerDied,
    WorkerDraining,
    WorkerFailed,
    WorkerReady,
)
from overtone.cluster.faults import Failure, Verdict, first_line
from overtone.cluster.worker import EngineFactory, Load, Ready, Worker, load_engine
from overtone.jobs.errors import UserError
from overtone.jobs.plan import JobPlan
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store

NODES_EVERY_S = 2.0
"""How often the cluster is asked which of its machines are about to go."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local Ray: only the plan passes through it."""

_EXIT = re.compile(
    r"Worker exit type: (\S+) Worker exit detail: (.*?)(?: The worker may have exceeded.*)?$", re.S
)


@dataclass
class _Call:
    """One call of an actor that is not answered yet."""

    kind: str  # load, attempt, flush or recall
    waitable: Any  # an ObjectRef, or a generator of them
    assignment: Assignment | None = None


@dataclass
class _Member:
    id: int
    actor: Any
    calls: list[_Call] = field(default_factory=list)
    node: str | None = None
    draining: bool = False


class Fleet:
    """The actors of one driver.

    Starts a Ray of its own on this machine without an `address`, unless this process is connected to one
    already; `close` ends only what was started here. `worker_class` is for benchmarks. UserError where
    nothing answers at the address, or where this machine can never hold a worker.
    """

    def __init__(
        self,
        spec: JobSpec,
        job_plan: JobPlan,
        store: Store,
        *,
        epoch: int,
        address: str | None = None,
        engine_factory: EngineFactory | None = None,
        retry_plan: RetryPlan | None = None,
        worker_class: type[Worker] = Worker,
    ) -> None:
        self._spec, self._epoch, self._worker_class = spec, epoch, worker_class
        self._members: dict[int, _Member] = {}
        self._draining: set[str] = set()
        self._nodes_at = time.monotonic()
        self._owns = not ray.is_initialized()
        if self._owns:
            _connect(spec, address)
        workers = spec.workers
        gpus = workers.num_gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
        self._cpus, self._gpus = workers.num_cpus, gpus
        if self._owns and address is None and self.capacity() == 0:
            has = ray.cluster_resources()
            ray.shutdown()
            raise UserError(
                f"a worker wants {self._cpus:g} CPUs and {self._gpus:g} GPUs (`workers`), and this machine "
                f"has {has.get('CPU', 0):g} and {has.get('GPU', 0):g}"
            )
        self._load = ray.put(Load(spec, job_plan, store, engine_factory or load_engine, retry_plan))

    def capacity(self) -> int:
        """Workers that the cluster has room for, as it is now, nothing else running on it."""
        room = 0
        for node in ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                fits = [math.floor(has.get("CPU", 0) / self._cpus + 1e-9)]
                if self._gpus:
                    fits.append(math.floor(has.get("GPU", 0) / self._gpus + 1e-9))
                room += min(fits)
        return room

    def start(self, worker: int, avoid: frozenset[str] = frozenset()) -> None:
        """Start a worker; it loads its model and then reports WorkerReady or WorkerFailed."""
        options: dict[str, Any] = {
            "num_cpus": self._cpus,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        if avoid:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
        actor: Any = ray.remote(self._worker_class).options(**options).remote(worker, self._epoch)
        member = self._members[worker] = _Member(worker, actor)
        member.calls.append(_Call("load", actor.load.remote(self._load)))

    def assign(self, worker: int, assignment: Assignment) -> None:
        """Give a worker a shard."""
        member = self._members[worker]
        events = member.actor.attempt.options(num_returns="streaming").remote(assignment)
        member.calls.append(_Call("attempt", events, assignment))

    def cancel(self, worker: int, shard: int) -> None:
        """Ask a worker to give a shard back after the batch in its hands."""
        for call in self._members[worker].calls:
            if call.assignment is not None and call.assignment.shard == shard:
                ray.cancel(call.waitable)

    def flush(self, worker: int) -> None:
        """Ask a worker to finish its commits."""
        member = self._members[worker]
        member.calls.append(_Call("flush", member.actor.flush.options(num_returns="streaming").remote()))

    def stop(self, worker: int, *, kill: bool) -> None:
        """Let a worker go. Nothing more of it is reported."""
        member = self._members.pop(worker)
        if kill:
            ray.kill(member.actor)
        else:
            member.actor.__ray_terminate__.remote()

    def close(self) -> None:
        """Kill all workers, and the Ray that was started here."""
        for worker in list(self._members):
            self.stop(worker, kill=True)
        if self._owns:
            ray.shutdown()

    def poll(self, timeout_s: float) -> list[Event]:
        """What happened, as soon as anything did; an empty list after `timeout_s`."""
        events = self._leaving()
        calls = {
            id(call.waitable): (member, call) for member in self._members.values() for call in member.calls
        }
        waitables = [call.waitable for _, call in calls.values()]
        if not waitables:
            if not events:
                time.sleep(min(timeout_s, 0.1))
            return events
        ready, rest = ray.wait(waitables, timeout=0 if events else timeout_s)
        if ready and rest:
            more, _ = ray.wait(rest, num_returns=len(rest), timeout=0)
            ready += more
        for waitable in ready:
            member, call = calls[id(waitable)]
            if call in member.calls and self._members.get(member.id) is member:  # not gone meanwhile
                events += self._answer(member, call)
        return events

    def _answer(self, member: _Member, call: _Call) -> list[Event]:
        try:
            ref = call.waitable if call.kind in ("load", "recall") else next(call.waitable)
            answer = ray.get(ref)
        except StopIteration:
            member.calls.remove(call)
            return []
        except TaskCancelledError:
            member.calls.remove(call)
            recall = _Call("recall", member.actor.recall.remote(), call.assignment)
            member.calls.append(recall)
            return []
        except RayTaskError as error:  # a bug: what a worker meets comes as data
            member.calls.remove(call)
            failure = Failure(
                Verdict.FAIL_JOB, type(error).__name__, first_line(error), call.kind, str(error)
            )
            if call.assignment is None:
                return [WorkerFailed(member.id, failure)]
            return [ShardFailed(member.id, call.assignment.shard, call.assignment.attempt, failure)]
        except RayError as error:
            return [self._died(member, error)]
        if call.kind == "load":
            member.calls.remove(call)
            if isinstance(answer, Ready):
                member.node = answer.node
                return [WorkerReady(member.id, answer.node)]
            self.stop(member.id, kill=True)
            return [WorkerFailed(member.id, answer)]
        if call.kind == "recall":
            member.calls.remove(call)
            assert call.assignment is not None
            return [*answer, ShardReturned(member.id, call.assignment.shard, call.assignment.attempt)]
        member.draining |= any(isinstance(event, WorkerDraining) for event in answer)
        return answer

    def _died(self, member: _Member, error: RayError) -> WorkerDied:
        self._members.pop(member.id)
        ray.kill(member.actor)  # one that is only unavailable may still be running
        gone = (
            getattr(error, "preempted", False)
            or isinstance(error, ActorUnavailableError)
            or member.draining
            or (member.node is not None and member.node not in _alive())
        )
        name = "WorkerDied" if isinstance(error, RayActorError) else type(error).__name__
        return WorkerDied(member.id, _reason(error), name, preempted=bool(gone))

    def _leaving(self) -> list[Event]:
        """The workers whose machines are about to go; Ray is asked now and then."""
        now = time.monotonic()
        if now - self._nodes_at < NODES_EVERY_S:
            return []
        self._nodes_at = now
        self._draining |= _draining_nodes()
        leaving = [m for m in self._members.values() if m.node in self._draining and not m.draining]
        for member in leaving:
            member.draining = True
        return [WorkerDraining(member.id) for member in leaving]


def _connect(spec: JobSpec, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"no Ray cluster answers at {address}: {first_line(error)}") from error
        return
    workers = spec.workers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A number of workers that the user wrote down is taken at its word, whatever the machine has.
    cpus = None if workers.max is None else math.ceil(workers.max * workers.num_cpus)
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        **quiet,
    )


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _draining_nodes() -> set[str]:
    """The machines that Ray drains. Ray offers this only inside itself; without it, a worker still reports
    the SIGTERM that it gets."""
    with suppress(ImportError, AttributeError):
        from ray._private.state import state

        return set(state.get_draining_nodes())
    return set()


def _reason(error: RayError) -> str:
    """How a process ended, in one line."""
    if "references to the actor were removed" in str(error):  # not ours: the cluster took us for dead
        return (
            "the cluster dropped the worker before it began, for it cannot call this driver back: a firewall "
            "is in between, or the cluster does without the token that this side has (RAY_AUTH_MODE=disabled)"
        )
    found = _EXIT.search(str(error))
    if found is None:
        return first_line(error)
    return f"the worker's process died ({found[1]}): {' '.join(found[2].split())}"[:1000]
