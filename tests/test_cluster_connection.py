"""Whoever cannot begin learns so at once, and in one line: addresses where nothing is, folders that Ray
cannot use. No test here starts Ray."""

from __future__ import annotations

import os
import socket
import tempfile
import time

import pytest

from overtone.cluster.connection import Connection
from overtone.jobs.errors import UserError
from overtone.jobs.spec import JobSpec


@pytest.fixture
def spec(tmp_path) -> JobSpec:
    return JobSpec.model_validate({"model": "tiny", "prompts": "x.parquet", "output": str(tmp_path / "out")})


@pytest.fixture
def dead() -> str:
    """An address where a cluster was."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


def refusal(spec: JobSpec, address: str | None, within_s: float = 5.0) -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        Connection(spec, address)
    assert time.monotonic() - began < within_s
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cluster_that_is_gone_is_noticed_at_once(spec, dead):
    assert f"no Ray cluster answers at {dead} (" in refusal(spec, dead)
    assert f"no Ray cluster answers at ray://{dead} (" in refusal(spec, f"ray://{dead}")
    assert "no Ray cluster answers at head:x" in refusal(spec, "head:x")


def test_an_address_of_the_environment_is_named_as_such(spec, dead, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", dead)
    assert f"at {dead}, which the environment's RAY_ADDRESS names" in refusal(spec, "auto")


def test_something_that_takes_the_connection_and_is_no_cluster(spec):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match="it takes the connection and says nothing"):
            Connection(spec, address, within_s=0.5)


def test_a_folder_that_ray_cannot_use_is_named(spec, monkeypatch):
    """No folder can be made there, not even by root. Where its path is longer, Ray gets another folder."""
    with tempfile.NamedTemporaryFile(dir="/tmp") as file:
        monkeypatch.setenv("RAY_TMPDIR", file.name)
        said = refusal(spec, None, 60.0)
        assert said.startswith(f"Ray cannot start on this machine with its files in {file.name}: ")
        assert "RAY_TMPDIR" in said
        assert os.environ["RAY_TMPDIR"] == file.name


def test_a_full_disk_under_rays_folder_is_named_at_once(spec, monkeypatch):
    """That of the kernel's own files has never any room."""
    monkeypatch.setenv("RAY_TMPDIR", "/proc")
    with pytest.raises(UserError) as caught:
        Connection(spec)
    assert str(caught.value).startswith(
        "Ray cannot start on this machine with its files in /proc: its disk is full, 0 bytes are free; free "
    )
    assert caught.value.exit_code == 2
