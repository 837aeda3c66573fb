"""The workers of a job on Ray: started, given work, listened to, stopped. Knows no shards' state.

    fleet = Fleet(Connection(spec), spec, job_plan, store)
    fleet.start(0)                             # it loads its model
    fleet.take_up(epoch=3)                     # once some worker has: fleet.loaded
    for event in fleet.poll(1.0): ...          # events of overtone.cluster.dispatch, from all workers
    fleet.assign(0, assignment)
    fleet.close()

Every way in which Ray reports a dead process becomes one `WorkerDied`, which blames nobody where the machine
itself went away.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
)

from overtone.cluster.connection import Connection
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
from overtone.jobs.plan import JobPlan
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store

NODES_EVERY_S = 2.0
"""How often the cluster is asked which of its machines are about to go."""

MOST = 0.7
"""Share of a node's memory in use above which a process that is killed for it has only itself to blame."""

_EXIT = re.compile(
    r"Worker exit type: (\S+) Worker exit detail: (.*?)(?: The worker may have exceeded.*)?$", re.S
)


@dataclass
class _Call:
    """One call of an actor that is not answered yet."""

    kind: str  # place, load, begin, attempt, flush or recall
    waitable: Any  # an ObjectRef, or a generator of them
    assignment: Assignment | None = None


@dataclass
class _Member:
    id: int
    actor: Any
    calls: list[_Call] = field(default_factory=list)
    node: str | None = None  # once it has its model
    draining: bool = False
    pid: int | None = None  # once it has a place
    asked_at: float = field(default_factory=time.monotonic)


class Fleet:
    """The actors of one driver, on the Ray of a `connection`, which `close` closes too. `worker_class` is for
    benchmarks.

    Workers load their models at once, and are reported ready only after `take_up`: a driver whose workers
    cannot load is none, and takes no job from another one.
    """

    def __init__(
        self,
        connection: Connection,
        spec: JobSpec,
        job_plan: JobPlan,
        store: Store,
        *,
        engine_factory: EngineFactory | None = None,
        retry_plan: RetryPlan | None = None,
        worker_class: type[Worker] = Worker,
    ) -> None:
        self.connection = connection
        self._worker_class = worker_class
        self._epoch: int | None = None
        self._members: dict[int, _Member] = {}
        self._draining: set[str] = set()
        self._nodes_at = time.monotonic()
        self._load = ray.put(Load(spec, job_plan, store, engine_factory or load_engine, retry_plan))

    @property
    def loaded(self) -> bool:
        """Whether some worker has its model."""
        return any(member.node is not None for member in self._members.values())

    @property
    def unplaced_s(self) -> float:
        """How long the worker that waits longest has waited for a place on some node."""
        now = time.monotonic()
        return max(
            (now - member.asked_at for member in self._members.values() if member.pid is None), default=0.0
        )

    def take_up(self, epoch: int) -> None:
        """From now on this is the job's driver of that number, and workers with their models are ready."""
        self._epoch = epoch
        for member in self._members.values():
            if member.node is not None:
                self._begin(member, epoch)

    def start(self, worker: int, avoid: frozenset[str] = frozenset()) -> None:
        """Start a worker; it loads its model and then reports WorkerReady or WorkerFailed."""
        options: dict[str, Any] = {
            "num_cpus": self.connection.cpus,
            "num_gpus": self.connection.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        if avoid and self.connection.alive() - avoid:  # else it would wait for ever
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
        actor: Any = ray.remote(self._worker_class).options(**options).remote(worker)
        member = self._members[worker] = _Member(worker, actor)
        member.calls += [_Call("place", actor.place.remote()), _Call("load", actor.load.remote(self._load))]

    def _begin(self, member: _Member, epoch: int) -> None:
        member.calls.append(_Call("begin", member.actor.begin.remote(epoch)))

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
        self.connection.close()

    def poll(self, timeout_s: float) -> list[Event]:
        """What happened, as soon as anything did; an empty list after `timeout_s`, and while the cluster's
        head does not answer: what is heard meanwhile may be wrong."""
        if not self.connection.answers(at_most_s_ago=1.0):
            time.sleep(timeout_s)
            return []
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
            ref = next(call.waitable) if call.kind in ("attempt", "flush") else call.waitable
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
            return [self._died(member, error)] if self.connection.answers() else []
        if call.kind in ("place", "load", "begin"):
            member.calls.remove(call)
            if call.kind == "place":
                member.pid = answer
            if isinstance(answer, Failure):
                self.stop(member.id, kill=True)
                return [WorkerFailed(member.id, answer)]
            if isinstance(answer, Ready):
                member.node = answer.node
                if self._epoch is not None:
                    self._begin(member, self._epoch)
            return [WorkerReady(member.id, str(member.node))] if call.kind == "begin" else []
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
            or (member.node is not None and member.node not in self.connection.alive())
        )
        name = "WorkerDied" if isinstance(error, RayActorError) else type(error).__name__
        squeezed = isinstance(error, OutOfMemoryError) and not held_most(str(error), member.pid)
        return WorkerDied(member.id, _reason(error), name, preempted=bool(gone), squeezed=squeezed)

    def _leaving(self) -> list[Event]:
        """The workers whose machines are about to go; Ray is asked now and then."""
        now = time.monotonic()
        if now - self._nodes_at < NODES_EVERY_S or not self.connection.answers():
            return []
        self._nodes_at = now
        self._draining |= self.connection.draining()
        leaving = [m for m in self._members.values() if m.node in self._draining and not m.draining]
        for member in leaving:
            member.draining = True
        return [WorkerDraining(member.id) for member in leaving]


def held_most(text: str, pid: int | None) -> bool:
    """Whether a process that Ray killed for its memory held most of what was in use on its node, as Ray's
    text has it; also where that does not say."""
    of_node = re.search(r"was ([\d.]+)GB used", text)
    own = re.search(rf"pid={pid}, actual memory used=([\d.]+)GB", text)
    return of_node is None or own is None or float(own[1]) > MOST * float(of_node[1])


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
