"""From an empty machine to a report, as a user of cluster/README.md types it: each command a process."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from foreground import interruptible
from ray_head import ROOT, plain_environ, ray_head

pytestmark = pytest.mark.ray

ROWS = 12
SMALLER = {"prompts.limit": ROWS, "shards": 4, "workers": 1, "sampling.num_steps": 8}


class Terminal:
    """Types commands; what they find in the environment is what a user's shell has."""

    def __init__(self, home: Path, output: Path) -> None:
        self.home, self.output = home, output
        self.environ = plain_environ() | {"HOME": str(home), "PYTHONPATH": str(ROOT)}

    def start(self, line: str, **environ: str) -> subprocess.Popen[str]:
        """`out/quickstart` is another folder, and its job a smaller one."""
        program, *words = shlex.split(line.replace("out/quickstart", str(self.output)))
        module = {"overtone": "overtone.cluster.cli", "ray": "ray.scripts.scripts"}[program]
        if words[0] == "submit":
            words += ["--set", f"output.path={self.output}"]
            words += [word for key, value in SMALLER.items() for word in ("--set", f"{key}={value}")]
        return subprocess.Popen(
            [sys.executable, "-m", module, *words],
            env=self.environ | environ,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=interruptible,
        )

    def type(self, line: str, code: int = 0, **environ: str) -> str:
        """What a command printed, once it ended with this code."""
        process = self.start(line, **environ)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == code, out
        return out


def commands() -> Iterator[str]:
    section = (ROOT / "cluster" / "README.md").read_text().partition("### On a cluster\n")[2]
    [block] = re.findall(r"```\n(.*?)```", section.partition("\n### ")[0], re.S)
    return (line.partition("#")[0].strip() for line in block.splitlines())


@pytest.mark.timeout(900)
def test_from_an_empty_machine_to_a_report(tmp_path):
    home, output = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    terminal, lines = Terminal(home, output), commands()

    token = terminal.type(next(lines)).split()[-1]
    assert (home / ".ray" / "auth_token").read_text().strip() == token
    assert next(lines) == "ray start --head"
    with ray_head(tmp_path, {"HOME": str(home)}, token) as head:
        terminal.environ["RAY_API_SERVER_ADDRESS"] = head.url
        submit = next(lines)

        # Without the token, and with a wrong one: a sentence, and nothing was submitted.
        nobody = {"HOME": str(tmp_path / "nobody")}
        refused = terminal.type(submit, 2, **nobody)
        assert "wants a token and none was found here. Set RAY_AUTH_TOKEN" in refused
        refused = terminal.type(submit, 2, RAY_AUTH_TOKEN="f" * 32)
        assert "refused the token from the environment variable RAY_AUTH_TOKEN" in refused
        assert "f" * 32 not in refused

        # Submit, look on, and leave with Ctrl-C: the job stays.
        follower = terminal.start(submit)
        shown: list[str] = []
        for line in follower.stdout:
            shown.append(line)
            if f"of {ROWS} rows" in line:
                follower.send_signal(signal.SIGINT)
                break
        rest = follower.stdout.read()
        assert follower.wait(60) == 0, "".join(shown) + rest
        job = re.search(r"submitted (overtone-quickstart-\w+-e1)\n", "".join(shown))[1]
        assert rest.splitlines()[-1].startswith(f"{job} goes on without this terminal")

        assert f"{ROWS} rows" in terminal.type(next(lines))
        assert f"attached to {job}, which is running" in terminal.type(next(lines))
        logged = terminal.type(next(lines))
        assert f"of {ROWS} rows" in logged
        assert f"quickstart: {ROWS} rows in" in logged
        assert logged.splitlines()[-1] == f"{job}: succeeded"

        report = tmp_path / "report.html"
        terminal.type(f"{next(lines)} --to {report}")
        page = report.read_text()
        assert page.lower().startswith("<!doctype html>")
        assert "data:image" in page
        terminal.type(next(lines))
        assert json.loads(terminal.type("overtone status out/quickstart --json"))["rows_done"] == ROWS

        # Another job, which is stopped: its own id, and the first keeps what it has.
        terminal.output = tmp_path / "other"
        other = re.search(
            r"submitted (overtone-quickstart-\w+-e1)\n", terminal.type(submit.split(" --f")[0])
        )[1]
        assert other != job
        stop = next(lines).replace("overtone-quickstart", other)
        assert terminal.type(stop) == f"{other}: stopped\n"
        assert terminal.type(f"overtone logs {job}") in logged
    assert list(lines) == ["ray stop"]  # which would stop every Ray on this machine
