"""Everything breaks for a while: workers, drivers and machines are killed while two drivers run at once.

In the suite a short form; `pytest -m chaos` runs the long one. Each prints the seed from which it draws what
breaks when; `CHAOS_SEED=17 pytest -m chaos` draws it again.
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
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import alive

from overtone.jobs.folder import JobFolder
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store
from overtone.jobs.verify import verify

pytestmark = pytest.mark.ray

HERE = Path(__file__).parent
BREAKS = {"worker": 10, "second driver": 2, "driver": 2, "machine": 2}
"""What breaks, and how often in sixteen times."""


class Chaos:
    """A job, the drivers that were started for it, the machines it runs on, and what breaks them."""

    def __init__(self, folder: Path, cluster: Any, rows: int, seed: int) -> None:
        self.folder, self.cluster, self.rows, self.chance = folder, cluster, rows, random.Random(seed)
        self.machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
        self.pids = folder / "pids"
        self.pids.mkdir()
        prompts = [f"prompt {k}" for k in range(rows)]
        prompts[7], prompts[34] = "!raise", "!nan"
        table = pa.table({"row_id": [f"r{k:03}" for k in range(rows)], "prompt": prompts})
        pq.write_table(table, folder / "prompts.parquet")
        self.spec = JobSpec.model_validate(
            {
                "model": "tests/fake",
                "prompts": str(folder / "prompts.parquet"),
                "sampling": {"height": 64, "width": 64, "num_steps": 4},
                "shards": 5,
                "output": str(folder / "out"),
                "workers": {"count": 2, "num_cpus": 0.5, "batch_size": 2},
                # The deaths here are nobody's fault, so that nobody may be blamed for them.
                "faults": {"max_attempts": 1000, "row_deaths": 100, "worker_failures": 1000},
            }
        )
        (folder / "spec.json").write_text(self.spec.to_json())
        self.drivers: list[subprocess.Popen] = []
        self.broken: Counter[str] = Counter()

    def drive(self) -> None:
        log = self.folder / f"driver-{len(self.drivers)}.log"
        command = [sys.executable, str(HERE / "fake_driver.py"), str(self.folder / "spec.json")]
        with log.open("w") as file:
            driver = subprocess.Popen(
                [*command, self.cluster.address, "0.1", str(self.pids)],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
                    # As the cluster's, whatever an earlier Ray has left in the home folder.
                    "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
                },
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.drivers.append(driver)

    @property
    def driving(self) -> list[subprocess.Popen]:
        return [driver for driver in self.drivers if driver.poll() is None]

    @property
    def done(self) -> bool:
        return any(driver.poll() == 0 for driver in self.drivers)

    def workers(self) -> list[int]:
        return alive(self.pids)

    def rage(self, seconds: float) -> None:
        """Break one of each kind, then more at random, for some time."""
        self.drive()
        self.drive()  # by mistake
        began = time.monotonic()
        first = self.chance.sample([*BREAKS], len(BREAKS))
        while first or time.monotonic() - began < seconds:
            what = first.pop() if first else self.chance.choices([*BREAKS], [*BREAKS.values()])[0]
            deadline = time.monotonic() + 120
            while not self.break_one(what):
                assert not self.done, f"done before a {what} was broken, after {dict(self.broken)}"
                assert time.monotonic() < deadline, f"there is no {what} to break"
                self.keep_driving()
                time.sleep(0.1)
            self.broken[what] += 1
            time.sleep(self.chance.uniform(0.3, 1.5))
            self.keep_driving()
            self.look()

    def break_one(self, what: str) -> bool:
        """False where there is none just now."""
        match what:
            case "worker" if workers := self.workers():
                os.kill(self.chance.choice(workers), self.chance.choice([signal.SIGKILL, signal.SIGTERM]))
            case "second driver" if len(self.driving) == 1 and self.workers():
                self.drive()
            case "driver" if self.driving and self.workers():
                os.killpg(self.chance.choice(self.driving).pid, signal.SIGKILL)
            case "machine" if self.workers():
                gone = self.machines.pop(self.chance.randrange(len(self.machines)))
                self.cluster.remove_node(gone, allow_graceful=False)
                self.machines.append(self.cluster.add_node(num_cpus=1))
            case _:
                return False
        return True

    def keep_driving(self) -> None:
        if not self.driving:
            self.drive()

    def look(self) -> None:
        """What a reader sees at any moment: whole parts with rows that are there once."""
        seen: Counter[str] = Counter()
        for path in (self.folder / "out" / "data").glob("*.parquet"):
            seen.update(pq.read_table(path, columns=["row_id"])["row_id"].to_pylist())
        assert all(count == 1 for count in seen.values())

    def end(self, seconds: float) -> None:
        """Let it finish in peace."""
        deadline = time.monotonic() + seconds
        while not self.done:
            assert time.monotonic() < deadline, "does not end"
            self.keep_driving()
            time.sleep(0.2)
        for driver in self.driving:
            driver.wait(60)

    def check(self) -> None:
        store = open_store(str(self.folder / "out"))
        report = verify(store.url)
        assert report.ok, report.text()
        assert (report.rows, report.rejects) == (self.rows - 2, 2)
        assert JobFolder(store).newest_epoch() >= 2  # at least those two
        assert JobFolder(store).quarantined() == {}  # nobody's fault
        assert not [path for path in self.folder.glob("driver-*.log") if "Traceback" in path.read_text()]


def chaos(folder: Path, *, rows: int, rage_s: float, end_s: float) -> None:
    """A job whose parts are broken for `rage_s` and which then has `end_s` to end."""
    from ray.cluster_utils import Cluster

    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else workers wait for everything else on a busy machine
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        made = None
        try:
            made = Chaos(folder, cluster, rows, seed)
            made.rage(rage_s)
            made.end(end_s)
            made.check()
            print(f"broken: {dict(made.broken)}; {len(made.drivers)} drivers")
        finally:
            for driver in made.driving if made else ():
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
            cluster.shutdown()


@pytest.mark.timeout(600)
def test_workers_drivers_and_machines_are_killed_while_two_drivers_run(tmp_path):
    chaos(tmp_path, rows=160, rage_s=10, end_s=240)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_the_same_for_two_minutes(tmp_path):
    chaos(tmp_path, rows=1500, rage_s=120, end_s=900)
