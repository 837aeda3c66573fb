"""Batch scripts for Slurm: shellcheck has nothing to say, and one runs a job on this machine, with stand-ins
for `srun` and `scontrol`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from foreground import interruptible
from small_jobs import prompt_table

from overtone.cluster.cli import main
from overtone.cluster.kubernetes import Options, shape_of
from overtone.cluster.slurm import slurm_script
from overtone.jobs.errors import UserError
from overtone.jobs.spec import JobSpec
from overtone.jobs.verify import verify

SRUN = """#!/bin/bash
# One machine: the step that names the head runs here, with what Slurm would give it.
echo "$@" >> "$STAND_IN/srun"
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$STAND_IN/scontrol"
if [ "$1" = show ]; then echo 127.0.0.1; fi
"""


def job(folder: Path, **changes) -> JobSpec:
    given = {"model": "black-forest-labs/FLUX.1-dev", "prompts": "/data/p.parquet", "output": "s3://b/c"}
    return JobSpec.model_validate({"name": "flux"} | given | changes)


def script(spec: JobSpec, *, gpus_per_node: int = 1, **options) -> str:
    shape = shape_of(spec, Options(gpus_per_pod=gpus_per_node))
    return slurm_script(spec, "job.yaml", ("sampling.delta=0.1", "name=a b"), shape=shape, **options)


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, flags=re.M))


def test_a_node_holds_as_many_workers_as_its_gpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = directives(script(job(tmp_path, workers={"min": 8, "max": 20}), gpus_per_node=8, time="2:00:00"))
    assert (asked["nodes"], asked["gpus-per-node"], asked["ntasks-per-node"]) == ("1-3", "8", "1")
    assert (asked["chdir"], asked["time"], asked["open-mode"]) == (str(tmp_path), "2:00:00", "append")
    assert "partition" not in asked
    on_cpus = directives(script(job(tmp_path, model="tiny", workers=3), partition="short", account="lab"))
    assert (on_cpus["nodes"], on_cpus["partition"], on_cpus["account"]) == ("3", "short", "lab")
    assert "gpus-per-node" not in on_cpus


@pytest.mark.parametrize("workers", [1, {"min": 2, "max": 9}])
def test_shellcheck_has_nothing_to_say(tmp_path, workers):
    text = script(job(tmp_path, workers=workers), gpus_per_node=2)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "-"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert "--set 'name=a b'" in text
    assert f"overtone run {Path.cwd() / 'job.yaml'} --set" in text


def test_what_would_not_work_is_refused(tmp_path):
    with pytest.raises(UserError, match="each node has a /tmp of its own"):
        script(job(tmp_path, output="/tmp/out", workers=2))
    script(job(tmp_path, output="/tmp/out", workers=1))
    with pytest.raises(UserError, match=r"--partition would be 'a\\nb'"):
        script(job(tmp_path), partition="a\nb")
    (tmp_path / "job.yaml").write_text("model: tiny\nprompts: p.csv\noutput: s3://a/b\n")
    for option in (("--for", "slurm", "--namespace", "x"), ("--time", "1:00")):
        done = CliRunner().invoke(main, ["manifest", str(tmp_path / "job.yaml"), *option])
        assert done.exit_code == 2
        assert " alone; leave it out, or give --for " in done.output


@pytest.mark.ray
def test_the_script_runs_the_job_and_asks_for_another_turn_before_its_time_is_up(tmp_path):
    tools, output = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    pq.write_table(prompt_table(12), tmp_path / "prompts.parquet")
    spec = tmp_path / "job.yaml"
    spec.write_text(
        "model: tiny\nprompts: prompts.parquet\nshards: 1\nworkers: 1\n"
        f"sampling: {{height: 64, width: 64, num_steps: 2}}\noutput: {output}\n"
    )
    shown = CliRunner().invoke(main, ["manifest", str(spec), "--for", "slurm"])
    assert shown.exit_code == 0, shown.output
    environ = os.environ | {
        "STAND_IN": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node-[1]",
        "SLURM_JOB_NUM_NODES": directives(shown.output)["nodes"],
        "SLURM_CPUS_PER_TASK": directives(shown.output)["cpus-per-task"],
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    environ.pop("RAY_ADDRESS", None)

    def turn(log: Path) -> subprocess.Popen[bytes]:
        # As `sbatch` starts it, with the environment that the script finds after its own first lines.
        text = shown.output.replace("export PATH=", f"export PATH={tools}:", 1)
        return subprocess.Popen(
            ["bash", "-c", text],
            env=environ,
            start_new_session=True,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            preexec_fn=interruptible,
        )

    first_log, second_log = tmp_path / "first.log", tmp_path / "second.log"
    first = turn(first_log)
    try:
        wait_for(lambda: any((output / "data").glob("*.parquet")), first, first_log)
        first.send_signal(signal.SIGUSR1)
        wait_for(lambda: "requeue" in (tmp_path / "scontrol").read_text(), first, first_log)
    finally:
        end(first)
    assert (tmp_path / "scontrol").read_text().splitlines() == [
        "show hostnames node-[1]",
        f"requeue {os.getpid()}",
    ]
    second = turn(second_log)
    try:
        wait_for(lambda: second.poll() is not None, second, second_log)
    finally:
        end(second)
    assert second.returncode == 0, second_log.read_text()
    wait_for(lambda: not ray_of(os.getpid()), second, second_log)  # the script ends what it started
    assert verify(str(output)).ok
    [head] = (tmp_path / "srun").read_text().splitlines()[1:]
    assert "--nodelist=127.0.0.1 ray start" in head
    assert "--head" in head


def ray_of(job: int) -> list[psutil.Process]:
    """Ray's processes of that Slurm job."""
    return [
        p for p in psutil.process_iter(["cmdline"]) if f"/tmp/ray-{job}/" in " ".join(p.info["cmdline"] or [])
    ]


def end(turn: subprocess.Popen[bytes]) -> None:
    """All processes of it, as Slurm ends a job."""
    left = psutil.Process(turn.pid).children(recursive=True) if turn.poll() is None else []
    for process in [*left, *([turn] if turn.poll() is None else [])]:
        process.kill()
    turn.wait()


def wait_for(done: Callable[[], bool], turn: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 200
    while not done():
        assert turn.poll() in (None, 0), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
