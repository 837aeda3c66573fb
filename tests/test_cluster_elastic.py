"""A cluster that changes while a job runs: nodes that come and go, shared GPUs, workers given back."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fake_engine
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.cloudpickle
from fake_engine import FakeEngine
from ray.cluster_utils import Cluster

from overtone.cluster.driver import run_job
from overtone.cluster.driver.summary import Summary
from overtone.jobs.spec import JobSpec
from overtone.jobs.status import Snapshot
from overtone.jobs.verify import verify

pytestmark = pytest.mark.ray


@dataclass
class Paced(FakeEngine):
    """Takes its time until `folder/hurry` exists, and for the prompt `wait` until `folder/end` does."""

    folder: str = ""

    def encode(self, prompts, *more, **named):
        if "wait" in prompts:
            wait_for(Path(self.folder, "end").exists)
        elif not Path(self.folder, "hurry").exists():
            time.sleep(0.5)
        return super().encode(prompts, *more, **named)


@dataclass(frozen=True)
class PacedEngines:
    """An engine factory. Each engine leaves a file named after its process: the GPUs it was given."""

    folder: str

    def __call__(self, spec: JobSpec) -> Paced:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        Path(self.folder, f"gpus-{os.getpid()}").write_text(gpus)
        return Paced(folder=self.folder)


@pytest.fixture(scope="module")
def cluster():
    """A head with one CPU, that this process is connected to."""
    started = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 * 2**20},
    )
    ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
    modules = (fake_engine, sys.modules[__name__])
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    yield started
    for module in modules:
        ray.cloudpickle.unregister_pickle_by_value(module)
    ray.shutdown()
    started.shutdown()


class Job:
    """A job that runs in a thread of its own, and how it looked on its way."""

    def __init__(self, folder: Path, prompts: list[str], **workers) -> None:
        pq.write_table(pa.table({"prompt": prompts}), folder / "prompts.parquet")
        self.folder, self.output = folder, folder / "out"
        self.spec = JobSpec.model_validate(
            {
                "model": "tests/fake",
                "prompts": str(folder / "prompts.parquet"),
                "sampling": {"height": 64, "width": 64, "num_steps": 4},
                "shards": 2,
                "output": str(self.output),
                "workers": {"batch_size": 2, **workers},
            }
        )
        self.seen: list[Snapshot] = []
        self._ended: list[Summary] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        engines = PacedEngines(str(self.folder))
        self._ended.append(run_job(self.spec, engine_factory=engines, on_event=self.seen.append))

    @property
    def ready(self) -> int:
        return self.seen[-1].workers_ready if self.seen else 0

    def nodes(self) -> set[str]:
        """Where the shards so far were made."""
        tables = (self.output / "timings").glob("*.parquet")
        return {node for path in tables for node in pq.read_table(path, columns=["node"])["node"].to_pylist()}

    def num_parts(self) -> int:
        return len(list((self.output / "data").glob("*.parquet")))

    def end(self) -> Summary:
        self._thread.join(240)
        [summary] = self._ended
        return summary


def wait_for(condition: Callable[[], object], seconds: float = 180.0) -> float:
    """Until the condition holds; how long that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "took too long"
        time.sleep(0.05)
    return time.monotonic() - begin


def test_a_node_that_joins_is_used_and_one_that_is_lost_costs_no_row(cluster, tmp_path):
    """With nothing said about the number of workers: as many as there is room for, at any time."""
    job = Job(tmp_path, [f"prompt {k}" for k in range(240)])
    wait_for(job.nodes)
    [head] = job.nodes()
    assert (job.ready, job.seen[-1].workers_starting) == (1, 0)

    second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    took = wait_for(lambda: second.node_id in job.nodes())
    print(f"a shard of the second node was there {took:.1f} s after the node")
    assert job.nodes() == {head, second.node_id}
    assert job.ready == 2
    assert job.num_parts() < 120  # the job went on all the time

    cluster.remove_node(second, allow_graceful=False)
    wait_for(lambda: job.ready == 1)
    before = job.num_parts()
    wait_for(lambda: job.num_parts() >= before + 2)
    (tmp_path / "hurry").touch()
    summary = job.end()
    assert (summary.exit_code, summary.rows, summary.rejects) == (0, 240, 0)
    assert verify(str(job.output)).ok


def test_workers_share_gpus_and_those_without_work_are_given_back(cluster, tmp_path):
    """Three workers on two GPUs; at the end one makes the last row, one a copy of it, and one has nothing."""
    node = cluster.add_node(num_cpus=2, num_gpus=2, object_store_memory=100 * 2**20)
    try:
        prompts = ["wait", *[f"prompt {k}" for k in range(23)]]
        job = Job(tmp_path, prompts, min=1, max=3, num_gpus=0.5, num_cpus=0.5)
        wait_for(lambda: job.ready == 3)
        given = sorted(path.read_text() for path in tmp_path.glob("gpus-*"))
        assert given in (["0", "0", "1"], ["0", "1", "1"])
        (tmp_path / "hurry").touch()
        wait_for(lambda: job.num_parts() == 11)
        wait_for(lambda: job.ready == 2)
        wait_for(lambda: ray.available_resources().get("GPU", 0) == 1)  # for somebody else
        (tmp_path / "end").touch()
        summary = job.end()
        assert (summary.exit_code, summary.rows, summary.workers_lost) == (0, 24, 0)
        assert job.nodes() == {node.node_id}
        assert verify(str(job.output)).ok
    finally:
        cluster.remove_node(node)
