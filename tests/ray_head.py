"""A real Ray head for tests, as `ray start --head` starts it, beside whatever else runs on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import ray

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plain_environ() -> dict[str, str]:
    """This process's environment without what is about Ray, but for the share of the CPU that workers get."""
    kept = "RAY_worker_niceness"
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_") or key == kept}


@contextmanager
def ray_head(
    folder: Path, environ: Mapping[str, str], token: str, start_timeout_s: float = 240
) -> Iterator[SimpleNamespace]:
    """A head with dashboard. `environ` comes on top of this process's, and lets Ray find `token`. Jobs run
    the `overtone` of this checkout, unless one lies in `folder`.

    Its files lie in a folder of its own, with a short path for its sockets: in the usual one it would become
    the cluster that everybody else on this machine finds by `auto`. Where it ends while it starts it is
    started again: Ray gives its own processes half a minute, which a busy machine may not have for them.
    """
    whole = plain_environ()
    whole |= {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{whole['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(int(start_timeout_s)),
        **environ,
    }
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    ip = ray.util.get_node_ip_address()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--temp-dir={ray_folder}", "--disable-usage-stats", "--no-monitor"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    command += ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=100000000"]
    deadline = time.monotonic() + start_timeout_s
    process = None
    with (folder / "head.log").open("w") as log:
        try:
            while True:
                port, gcs, agent, client = free_port(), free_port(), free_port(), free_port()
                ports = [f"--dashboard-port={port}", f"--port={gcs}", f"--ray-client-server-port={client}"]
                ports += [f"--dashboard-agent-listen-port={agent}"]
                process = subprocess.Popen([*command, *ports], env=whole, stdout=log, stderr=log, cwd=folder)
                pages = (
                    f"http://127.0.0.1:{port}/api/version",
                    f"http://{ip}:{agent}/api/local_raylet_healthz",
                )
                while process.poll() is None and not all(_ready(page, token) for page in pages):
                    assert time.monotonic() < deadline, (folder / "head.log").read_text()
                    time.sleep(0.2)
                if process.poll() is None:
                    break
                assert time.monotonic() < deadline, (folder / "head.log").read_text()
            yield SimpleNamespace(
                url=f"http://127.0.0.1:{port}",
                agent=f"http://{ip}:{agent}",
                gcs=f"{ip}:{gcs}",
                environ=whole,
            )
        finally:
            if process is not None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            shutil.rmtree(ray_folder, ignore_errors=True)


def _ready(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
