"""Every block of code in the READMEs runs as it is written, in the order of its page."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import click
import duckdb
import pytest
import yaml

from overtone.cluster.cli import main
from overtone.cluster.measure.settings import named_like, space
from overtone.jobs.spec import JobSpec
from overtone.progressive.settings import Sampling

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "jobs/README.md",
    "cluster/README.md",
    "progressive/README.md",
    "progressive/tiny/README.md",
)
ELSEWHERE = {
    "make run ": "the Makefile's; tests/test_quickstart.py runs the same command",
    ". .venv/bin/activate": "tests/test_installed.py installs into a clean environment",
    "pip install ": "in the development environment already",
    "ray get-auth-token": "tests/test_user_sequence.py types it, line by line",
    "import ray\n": "tests/test_cluster_generator.py runs it",
    "overtone tune manifests/held-out.yaml": "takes an hour; its words are checked below",
}
"""How the blocks begin that this file does not run, and why."""


class Block(NamedTuple):
    page: str
    language: str
    code: str

    @property
    def elsewhere(self) -> bool:
        return any(self.code.startswith(begin) for begin in ELSEWHERE)


def blocks(*pages: str, language: str | None = None) -> list[Block]:
    """Those that can be run, in order."""
    found = []
    for page in pages:
        for kind, code in re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S):
            if kind not in ("text", "mermaid") and language in (None, kind):
                found.append(Block(page, kind, code))
    return found


class Desk:
    """A folder like a fresh checkout, where `overtone` and `python` are this environment's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "manifests").symlink_to(ROOT / "manifests")
        tools = folder / "bin"
        tools.mkdir()
        (tools / "overtone").write_text(f'#!/bin/sh\nexec {sys.executable} -m overtone.cluster.cli "$@"\n')
        (tools / "overtone").chmod(0o755)
        path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environ = {**os.environ, "PATH": path}
        self.environ.pop("RAY_ADDRESS", None)

    def type(self, code: str) -> str:
        """What a shell printed; it ends at the first command that fails."""
        return self._run(["bash", "-e", "-c", code])

    def python(self, code: str) -> str:
        return self._run([sys.executable, "-c", code])

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.environ, capture_output=True, text=True)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.mark.chaos  # as long as the tune, estimate and run of the first page take
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_blocks_of_jobs_and_of_the_first_page(tmp_path):
    desk = Desk(tmp_path)
    for block in blocks("README.md"):
        if block.language == "yaml":
            name = block.code.splitlines()[0].removeprefix("# ")
            (tmp_path / name).write_text(block.code)
        elif not block.elsewhere:
            shown = desk.type(block.code)
    for part in (
        "every input row was read: 40 rows",
        "rows an hour",
        "CPU-hours",
        "40 of 40 rows",
        "report in report.html",
    ):
        assert part in shown
    assert {"tune.html", "tune.yaml", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert not [*tmp_path.glob("*.partial*")]

    desk.type("overtone run manifests/quickstart.yaml --set sampling.num_steps=4")  # `make run`, but shorter
    for block in blocks("jobs/README.md"):
        if block.language == "python":
            desk.python(block.code)
        elif block.language == "sql":
            rows = duckdb.sql(block.code.replace("'out/", f"'{tmp_path}/out/")).fetchall()
            assert {stage for _, _, stage, _ in rows} >= {"denoise", "vae_decode"}
        elif not block.elsewhere and block.language != "yaml":
            desk.type(block.code)
    assert (tmp_path / "contact-sheet.png").exists()


def test_the_pieces_of_specs_are_of_a_spec():
    pieces = [yaml.safe_load(block.code) for block in blocks("jobs/README.md", language="yaml")]
    for piece in pieces:
        JobSpec.model_validate({"model": "tiny", "prompts": "p.parquet", "output": "out"} | piece)
    assert len(pieces) == 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("page", "compiles"),
    [
        ("progressive/README.md", False),
        pytest.param("progressive/README.md", True, marks=pytest.mark.chaos),  # which takes a minute more
        ("progressive/tiny/README.md", False),
    ],
)
def test_the_blocks_of_the_library(page, compiles, tmp_path):
    """In one process, as they build on each other."""
    found = [block.code for block in blocks(page, language="python")]
    code = "\n".join(one for one in found if compiles or "CompiledEngine" not in one)
    assert "import" in code
    desk = Desk(tmp_path)
    desk.python(code)
    if page == "progressive/README.md":
        assert (tmp_path / "circle.png").exists()


def test_no_block_is_run_by_nobody():
    run_here = {"yaml", "", "python", "sql"}
    begun = dict.fromkeys(ELSEWHERE, 0)
    for block in blocks(*PAGES):
        assert block.language in run_here, block
        if block.elsewhere:
            begun[next(begin for begin in ELSEWHERE if block.code.startswith(begin))] += 1
        else:
            assert block.page != "cluster/README.md", f"nothing runs {block}"
            assert block.language != "" or not block.page.startswith("progressive"), f"nothing runs {block}"
    assert all(begun.values()), begun


def test_the_blocks_need_only_what_is_installed_or_what_they_install():
    """A clean installation has the dependencies of pyproject.toml; a page names what else it takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {re.match(r"[\w-]+", one)[0] for one in project["dependencies"]} | {"overtone"}
    for page in PAGES:
        own = set(installed)
        for block in blocks(page):
            for line in re.findall(r"^pip install (.*?)(?:  +#|$)", block.code, flags=re.M):
                own |= {word.strip("'") for word in line.split()}
            for node in ast.walk(ast.parse(block.code)) if block.language == "python" else ():
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                unknown = [
                    name for name in names if name.split(".")[0] not in own | set(sys.stdlib_module_names)
                ]
                assert not unknown, f"{page}: {unknown}"
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "ray.data":
                    assert own & {"ray[data]", "pandas"}, f"{page}: Ray Data needs pandas"


def test_the_long_sweep_of_the_library_s_page_can_be_typed():
    [block] = [b for b in blocks("progressive/README.md", language="") if b.code.startswith("overtone tune")]
    words = subprocess.run(
        ["bash", "-c", f"set -f; printf '%s\\0' {block.code}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    command = main.commands["tune"]
    options, _, _ = command.make_parser(click.Context(command)).parse_args(words[2:])
    steps, deltas = map(int, options["steps"]), map(float, options["deltas"])
    settings = space(Sampling(), 9, steps=[*steps], deltas=[*deltas])
    assert len(named_like(settings, options["only"])) > 10
    assert set(options["show"]) <= {setting.name for setting in settings}
    assert (ROOT / "manifests" / "held-out.yaml").is_file()
