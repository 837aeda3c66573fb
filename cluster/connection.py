"""The way to Ray: to a cluster at an address, or to a Ray of this run's own on this machine. Knows machines
and what they have, no workers.

    connection = Connection(spec, "auto")      # looks at the port before Ray would wait for minutes
    connection.name, connection.capacity()             # which cluster it is, and how many workers fit on it
    connection.answers()                               # whether its head is still there
    connection.close()

Whoever cannot begin learns so here, in one line, before anything is written.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray

from overtone.cluster.faults import first_line
from overtone.jobs.errors import JobError, UserError
from overtone.jobs.spec import JobSpec

OBJECT_STORE_BYTES = 256 * 2**20
"""Of a local Ray: only the plan passes through it."""
REACH_WITHIN_S = 10.0
"""How long a cluster may take to answer at first."""
_ANSWER_WITHIN_S = 2.0
_LONGEST_FOLDER = 40
"""Bytes of the folder that Ray's sockets can lie under: their names are long, and 107 bytes are all that a
socket's path may have."""
_LEAST_FREE_BYTES = 2**20
"""Of the disk with that folder: its logs alone soon have more."""
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""How a client of HTTP/2, on which gRPC runs, begins; a server answers at once."""


class Connection:
    """Ray, as one driver reaches it. Starts a Ray of its own on this machine without an `address`, unless
    this process is connected to one already; `close` ends only what was started here.

    UserError where nothing answers at the address, where a Ray of its own cannot be started, or where that
    could never hold a worker.
    """

    def __init__(
        self, spec: JobSpec, address: str | None = None, *, within_s: float = REACH_WITHIN_S
    ) -> None:
        self._folder: str | None = None  # of a Ray of its own, where the usual one cannot be
        self._owns = not ray.is_initialized()
        self.name = ""
        """Which cluster it is, for people; "" where it was started here."""
        if self._owns and address is not None:
            self.name = _join(address, within_s)
        elif self._owns:
            self._start(spec)
        self._head = ray.get_runtime_context().gcs_address
        self._asked_at = self._answered_at = time.monotonic()
        workers = spec.workers
        gpus = workers.num_gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
        self.cpus, self.gpus = workers.num_cpus, gpus
        """What a worker wants."""
        if self._owns and address is None and self.capacity() == 0:
            has = ray.cluster_resources()
            self.close()
            raise UserError(
                f"a worker wants {self.cpus:g} CPUs and {self.gpus:g} GPUs (`workers`), and this machine "
                f"has {has.get('CPU', 0):g} and {has.get('GPU', 0):g}"
            )

    def _start(self, spec: JobSpec) -> None:
        workers = spec.workers
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        try:
            if len(os.fsencode(os.path.join(usual, "ray"))) > _LONGEST_FOLDER:
                usual = "/tmp"
                self._folder = tempfile.mkdtemp(prefix="ray-", dir=usual)
            if (free := _free_bytes(usual)) < _LEAST_FREE_BYTES:  # Ray would find out in half a minute
                raise OSError(f"its disk is full, {free:,} bytes are free")
            ray.init(
                address="local",
                # A number of workers that the user wrote down is taken at its word, whatever the machine has.
                num_cpus=None if workers.max is None else math.ceil(workers.max * workers.num_cpus),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=self._folder,
                **_QUIET,
            )
        except (OSError, RuntimeError, ValueError) as error:
            self.close()
            raise UserError(
                f"Ray cannot start on this machine with its files in {usual}: {first_line(error)}; free some "
                "space there, or set RAY_TMPDIR to a folder that can be written"
            ) from error
        except Exception as error:  # Ray raises nothing more exact where its processes take too long
            self.close()
            raise JobError(f"Ray did not start on this machine: {first_line(error)}") from error

    def close(self) -> None:
        """End the Ray that was started here, or leave the cluster."""
        if self._owns:
            ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def capacity(self) -> int:
        """Workers that the cluster has room for, as it is now, nothing else running on it."""
        room = 0
        for cpus, gpus in self._machines():
            fits = [math.floor(cpus / self.cpus + 1e-9)]
            if self.gpus:
                fits.append(math.floor(gpus / self.gpus + 1e-9))
            room += min(fits)
        return room

    def room(self) -> str:
        """What a worker wants, and what there is, for whoever waits for a place."""
        machines = Counter(self._machines())
        has = ", ".join(
            f"{count} x ({cpus:g} CPUs, {gpus:g} GPUs)" for (cpus, gpus), count in machines.most_common(8)
        )
        free = ray.available_resources()
        return (
            f"a worker wants {self.cpus:g} CPUs and {self.gpus:g} GPUs (`workers`), the cluster's nodes have "
            f"{has or 'nothing'}, and free are {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"
        )

    def _machines(self) -> list[tuple[float, float]]:
        """CPUs and GPUs of each node."""
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in alive]

    def answers(self, *, at_most_s_ago: float = 0.0) -> bool:
        """Whether the cluster's head can be reached. To be asked right before anything is asked of the head,
        since Ray waits a minute for one that is gone, and then ends this process."""
        if time.monotonic() - self._asked_at > at_most_s_ago:
            self._asked_at = time.monotonic()
            with suppress(OSError):
                _dial(self._head, _ANSWER_WITHIN_S).close()
                self._answered_at = self._asked_at
        return self._answered_at == self._asked_at

    @property
    def silent_s(self) -> float:
        """How long the head has not answered."""
        return self._asked_at - self._answered_at

    def alive(self) -> set[str]:
        """The ids of the nodes that are there."""
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def draining(self) -> set[str]:
        """The nodes that Ray drains. Ray offers this only inside itself; without it, a worker still reports
        the SIGTERM that it gets."""
        with suppress(ImportError, AttributeError):
            from ray._private.state import state

            return set(state.get_draining_nodes())
        return set()


def _free_bytes(folder: str) -> int:
    """Of the disk of a folder, which need not be there yet."""
    there = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _join(address: str, within_s: float) -> str:
    """Connect to the cluster at an address; which one it was."""
    named = f"at {address}"
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        named = f"at {os.environ['RAY_ADDRESS']}, which the environment's RAY_ADDRESS names"
        address = os.environ["RAY_ADDRESS"]
    found = _found_by_auto() if address == "auto" else address
    if address == "auto":
        named = f"at {found}, which `auto` found"
    _see_that_it_answers(found, named, within_s)
    try:
        ray.init(address=address, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster answers {named}: {first_line(error)}") from error
    return f"the Ray cluster {named}"


def _found_by_auto() -> str:
    """The address of this machine's cluster, as Ray finds it. Ray offers this only inside itself."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address("auto") or "auto"
    except ConnectionError as error:
        raise UserError(
            "no Ray cluster runs on this machine for `--address auto` to find; start one with `ray start "
            "--head`, give the address of another, or leave --address out to run on this machine alone"
        ) from error


def _see_that_it_answers(address: str, named: str, within_s: float) -> None:
    """UserError where nothing is at an address, or something that says nothing."""
    reached = False
    try:
        with _dial(address, within_s) as line:
            reached = True
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                line.sendall(_HELLO)
                if not line.recv(1):
                    raise ConnectionError("what is there hangs up")
    except TimeoutError:
        problem = "it takes the connection and says nothing" if reached else "it cannot be reached"
    except (OSError, ValueError) as error:
        problem = str(error)
    else:
        return
    raise UserError(
        f"no Ray cluster answers {named} ({problem}); `ray start --head` prints the address of the cluster "
        "that it starts, a host and a port such as 10.0.0.1:6379"
    )


def _dial(address: str, timeout_s: float) -> socket.socket:
    """A connection to `host:port` or `ray://host:port`; ValueError where it is neither."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    if not parts.hostname:
        raise ValueError("it is no host and port")
    port = parts.port or (10001 if "://" in address else 6379)
    return socket.create_connection((parts.hostname, port), timeout=timeout_s)
