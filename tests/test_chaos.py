"""Everything breaks for a while: workers, drivers and machines are killed while several drivers run at once.

In the suite a short form; `pytest -m chaos` runs the long one, with machines that go away. The seed is told.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.spec import JobSpec
from jobs.verify import verify

HERE = Path(__file__).parent
ROWS = 120


class Chaos:
    """A job, the drivers that were started for it, and what kills them."""

    def __init__(self, folder: Path, address: str, seed: int) -> None:
        self.folder, self.address, self.chance = folder, address, random.Random(seed)
        self.pids = folder / "pids"
        self.pids.mkdir()
        prompts = [f"prompt {k}" for k in range(ROWS)]
        prompts[7], prompts[64] = "!raise", "!nan"
        table = pa.table({"row_id": [f"r{k:03}" for k in range(ROWS)], "prompt": prompts})
        pq.write_table(table, folder / "prompts.parquet")
        self.spec = JobSpec.model_validate(
            {
                "model": "tests/fake",
                "prompts": str(folder / "prompts.parquet"),
                "sampling": {"height": 64, "width": 64, "num_steps": 4},
                "shards": 5,
                "output": str(folder / "out"),
                "workers": {"count": 2, "num_cpus": 0.25, "batch_size": 2},
                # The deaths here are nobody's fault, so that nobody may be blamed for them.
                "faults": {"max_attempts": 1000, "row_deaths": 100, "worker_failures": 1000},
            }
        )
        (folder / "spec.json").write_text(self.spec.to_json())
        self.drivers: list[subprocess.Popen] = []
        self.kills: Counter[str] = Counter()

    def drive(self) -> None:
        command = [sys.executable, str(HERE / "fake_driver.py"), str(self.folder / "spec.json"), self.address]
        log = (self.folder / f"driver-{len(self.drivers)}.log").open("w")
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        self.drivers.append(
            subprocess.Popen(
                [*command, "0.1", str(self.pids)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )

    @property
    def alive(self) -> list[subprocess.Popen]:
        return [driver for driver in self.drivers if driver.poll() is None]

    def kill_worker(self) -> None:
        workers = [int(path.name) for path in self.pids.iterdir() if Path("/proc", path.name).exists()]
        if workers:
            os.kill(self.chance.choice(workers), self.chance.choice([signal.SIGKILL, signal.SIGTERM]))
            self.kills["worker"] += 1

    def kill_driver(self) -> None:
        if self.alive:
            os.killpg(self.chance.choice(self.alive).pid, signal.SIGKILL)
            self.kills["driver"] += 1

    def look(self) -> None:
        """What a reader sees at any moment: whole parts with rows that are there once."""
        seen: Counter[str] = Counter()
        for path in (self.folder / "out" / "data").glob("*.parquet"):
            seen.update(pq.read_table(path, columns=["row_id"])["row_id"].to_pylist())
        assert all(count == 1 for count in seen.values())

    def end(self) -> None:
        """Let it finish in peace."""
        deadline = time.monotonic() + 120
        while not any(driver.poll() == 0 for driver in self.drivers):
            assert time.monotonic() < deadline, "does not end"
            if not self.alive:
                self.drive()
            time.sleep(0.2)
        for driver in self.alive:
            driver.wait(60)

    def check(self) -> None:
        report = verify(str(self.folder / "out"))
        assert report.ok, report.text()
        assert (report.rows, report.rejects) == (ROWS - 2, 2)


def test_workers_and_drivers_are_killed_while_two_drivers_run(tmp_path):
    import ray

    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        chaos = Chaos(tmp_path, ray.get_runtime_context().gcs_address, seed)
        chaos.drive()
        chaos.drive()  # by mistake
        deadline = time.monotonic() + 12
        while time.monotonic() < deadline:
            time.sleep(chaos.chance.uniform(0.3, 1.2))
            chaos.kill_worker()
            if chaos.chance.random() < 0.1:
                chaos.kill_driver()
            if not chaos.alive:
                chaos.drive()
            chaos.look()
        chaos.end()
        chaos.check()
    finally:
        for driver in chaos.alive:
            driver.kill()
        ray.shutdown()


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_machines_go_away_too(tmp_path):
    from ray.cluster_utils import Cluster

    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        chaos = Chaos(tmp_path, cluster.address, seed)
        chaos.drive()
        chaos.drive()
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            time.sleep(chaos.chance.uniform(0.5, 2.0))
            what = chaos.chance.random()
            if what < 0.5:
                chaos.kill_worker()
            elif what < 0.65:
                chaos.kill_driver()
            elif what < 0.75:
                gone = nodes.pop(chaos.chance.randrange(len(nodes)))
                cluster.remove_node(gone, allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=1))
                chaos.kills["node"] += 1
            if len(chaos.alive) < 2:
                chaos.drive()
            chaos.look()
        chaos.end()
        chaos.check()
    finally:
        for driver in chaos.alive:
            driver.kill()
        cluster.shutdown()
