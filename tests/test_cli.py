"""The `overtone` command: what it prints, how it exits, and what it does not load."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from fake_engine import FakeEngine
from foreground import interruptible
from s3_server import KEYS

from overtone.cluster.cli import main
from overtone.cluster.cli.saving import save
from overtone.cluster.dispatch import Assignment
from overtone.cluster.worker import Runner
from overtone.jobs.errors import UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import make_plan
from overtone.jobs.spec import load_spec
from overtone.jobs.store import open_store

MODEL = "black-forest-labs/FLUX.1-dev"  # its settings are known offline; no command here loads it


@pytest.fixture
def spec_path(tmp_path) -> Path:
    pq.write_table(pa.table({"prompt": [f"prompt {k}" for k in range(10)]}), tmp_path / "prompts.parquet")
    spec = {
        "model": MODEL,
        "prompts": "prompts.parquet",
        "sampling": {"height": 1024, "width": 1024, "num_steps": 20, "levels": 1},
        "shards": 4,
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture
def output(spec_path) -> str:
    """The folder of a job that is half done: 2 of 3 shards, by an engine without a model."""
    spec = load_spec(spec_path, ["sampling.height=64", "sampling.width=64"])
    plan, store = make_plan(spec), open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    runner = Runner(spec, plan, store, FakeEngine())
    for shard in (0, 1):
        list(runner.attempt(Assignment(shard, 1)))
    runner.close()
    return spec.output.path


def overtone(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_plan_shows_shards_stages_and_the_saving(spec_path):
    shown = overtone("plan", spec_path)
    assert shown.exit_code == 0
    assert "10 rows in 3 shards from 1 file" in shown.output
    assert "64x64" in shown.output
    assert "128x128" in shown.output
    assert "predicted speed-up" in shown.output


def test_plan_gives_the_same_as_data(spec_path):
    shown = json.loads(overtone("plan", spec_path, "--json").output)
    assert (shown["rows"], shown["shards"], shown["family"]) == (10, 3, "flux1")
    stages = shown["sampling"]["stages"]
    assert [(stage["height"], stage["width"]) for stage in stages] == [(64, 64), (128, 128)]
    assert sum(stage["steps"] for stage in stages) == 20
    assert shown["job_token_steps"] == 10 * sum(stage["tokens"] * stage["steps"] for stage in stages)


def test_set_overrides_one_key(spec_path):
    shown = json.loads(
        overtone("plan", spec_path, "--json", "--set", "sampling.num_steps=8", "--set", "shards=1").output
    )
    assert (shown["sampling"]["num_steps"], shown["shards"]) == (8, 10)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.height=1000", "992"),
        ("sampling.hight=1024", "hight"),
        ("model=tinny", "tinny"),
        ("prompts.columns={prompt: caption}", "caption"),
        ("prompts=gone.parquet", "gone.parquet"),
        ("sampling.levels=many", "levels"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_mistake_is_one_line_and_exit_code_2_and_nothing_is_written(spec_path, command, override, said):
    shown = overtone(command, spec_path, "--set", override)
    assert shown.exit_code == 2
    assert len(shown.output.strip().splitlines()) == 1
    assert shown.output.startswith("overtone: ")
    assert said in shown.output
    assert not (spec_path.parent / "out").exists()


def test_a_bad_spec_names_the_line(spec_path):
    spec_path.write_text(spec_path.read_text() + "workers:\n  cuont: 2\n")
    shown = overtone("plan", spec_path)
    assert shown.exit_code == 2
    assert "cuont" in shown.output
    line = spec_path.read_text().splitlines().index("  cuont: 2") + 1
    assert str(line) in shown.output


def test_a_file_that_is_no_parquet(spec_path):
    (spec_path.parent / "prompts.parquet").write_bytes(b"PAR1 not really")
    shown = overtone("plan", spec_path)
    assert shown.exit_code == 2
    assert "prompts.parquet" in shown.output


def test_status_and_verify_of_a_job_on_its_way(output):
    shown = overtone("status", output)
    assert shown.exit_code == 0
    assert "8 of 10 rows done" in shown.output
    data = json.loads(overtone("status", output, "--json").output)
    assert (data["shards_done"], data["rows_done"], data["finished"]) == (2, 8, False)
    checked = overtone("verify", output)
    assert checked.exit_code == 4
    assert "train-00002-of-00003" in checked.output
    assert json.loads(overtone("verify", output, "--json").output)["ok"] is False


def test_sheet_draws_the_first_pictures(output, tmp_path):
    shown = overtone("sheet", output, "--to", tmp_path / "sheet.png", "--rows", 5)
    assert shown.exit_code == 0
    assert "5 pictures" in shown.output
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["status", "verify", "sheet", "report"])
def test_a_folder_without_a_job(command, tmp_path):
    shown = overtone(command, tmp_path)
    assert shown.exit_code == 2
    assert str(tmp_path) in shown.output


def test_schema_is_json_schema_and_markdown():
    schema = json.loads(overtone("schema").output)
    assert {"model", "prompts", "sampling", "output"} <= set(schema["properties"])
    assert "batch_size" in overtone("schema", "--markdown").output


@pytest.mark.parametrize("command", ["plan", "status", "verify", "sheet", "report", "--help"])
def test_light_commands_load_neither_torch_nor_ray(command, spec_path, output):
    argument = {"plan": str(spec_path), "--help": ""}.get(command, output)
    arguments = [part for part in (command, argument) if part]
    if command in ("sheet", "report"):
        arguments += ["--to", str(spec_path.parent / "made")]
    code = (
        "import sys\n"
        "from overtone.cluster.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'ray', 'diffusers') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_what_libraries_lack_is_not_said_on_the_terminal():
    """On importing torchao, which nobody asked for, five lines; a worker's log has them."""
    code = (
        "import logging, sys\n"
        "from overtone.cluster.cli import main\n"
        "try: main(['schema'])\n"
        "except SystemExit: pass\n"
        "for name in ('torchao', 'torch.utils._pytree', 'diffusers.quantizers.torchao.torchao_quantizer'):\n"
        "    logging.getLogger(name).warning('noise')\n"
        "logging.getLogger('torch').warning('news')\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stderr == "news\n"


# Files to write


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["tune", "SPEC", "--to", "FILE"], "--to"),
        (["tune", "SPEC", "--fragment", "FILE"], "--fragment"),
        (["tune", "SPEC", "--sheet", "FILE"], "--sheet"),
        (["estimate", "SPEC", "--save", "FILE"], "--save"),
        (["calibrate", "--model", "tiny", "--data", ".", "--to", "FILE"], "--to"),
        (["calibrate", "--model", "tiny", "--data", ".", "--plot", "FILE"], "--plot"),
        (["sheet", "OUTPUT", "--to", "FILE"], "--to"),
        (["report", "OUTPUT", "--to", "FILE"], "--to"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(spec_path, tmp_path, arguments, option):
    (tmp_path / "a file").write_text("")
    for file, said in (
        (tmp_path / "gone" / "x", "there is no folder"),
        (tmp_path / "a file" / "x", "is a file, not a folder"),
        (tmp_path, "is a folder"),
    ):
        places = {"SPEC": spec_path, "OUTPUT": tmp_path / "no job", "FILE": file}
        shown = overtone(*(places.get(one, one) for one in arguments))
        assert shown.exit_code == 2
        [line] = shown.output.splitlines()  # and no model was loaded, for MODEL cannot be
        assert line.startswith(f"overtone: {option}: ")
        assert said in line


def test_what_cannot_be_saved_after_the_work_is_shown(tmp_path, capsys):
    with pytest.raises(UserError, match=r"^not saved: .*gone/a \(No such file .*\), .*gone/c"):
        save(
            [
                (tmp_path / "gone" / "a", "the result"),
                (tmp_path / "b", b"kept"),
                (tmp_path / "gone" / "c", b""),
            ]
        )
    assert capsys.readouterr().out == "the result\n"
    assert (tmp_path / "b").read_bytes() == b"kept"


# Help and completion


def test_the_commands_are_listed_in_the_order_of_work_with_a_whole_line_each():
    shown = overtone("--help").output
    commands = shown[shown.index("Commands:") : shown.index("Example:")].strip()
    lines = [line.strip() for line in commands.splitlines()[1:]]
    names = [line.split()[0] for line in lines]
    assert names == list(main.order)
    assert set(names) == set(main.commands)
    assert names.index("plan") < names.index("run") < names.index("verify") < names.index("report")
    assert all(line.endswith(".") and "..." not in line for line in lines)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_page_of_help_has_an_example_that_can_be_typed(name):
    shown = overtone(name, "--help").output
    examples = [line.strip() for line in shown[shown.index("Example:") :].splitlines()[1:]]
    assert examples
    command = main.commands[name]
    for example in examples:
        words = shlex.split(example.partition(" | ")[0].partition(" > ")[0])
        assert words[:2] == ["overtone", name]
        command.make_context(name, words[2:], resilient_parsing=True)
        context = click.Context(command)
        parser = command.make_parser(context)
        parser.parse_args(words[2:])  # an option that is not there raises


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("overtone pl", "plain,plan"),
        ("overtone plan --ch", "plain,--check"),
        ("overtone run job.yaml --set sampling.del", "plain,sampling.delta="),
        ("overtone run job.yaml --set se", "plain,seed="),
        ("overtone status ou", "dir,ou"),
        ("overtone run jo", "file,jo"),
        ("overtone tune job.yaml --to x", "file,x"),
    ],
)
def test_completion_as_the_help_says(typed, completed):
    environment = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    shown = CliRunner().invoke(
        main, env=environment | {"_OVERTONE_COMPLETE": "bash_complete"}, prog_name="overtone"
    )
    assert shown.output.split() == [completed]
    assert "_OVERTONE_COMPLETE=bash_source overtone" in overtone("--help").output


def test_a_shell_accepts_the_line_of_the_help(tmp_path):
    """In a shell of its own, where `overtone` is this interpreter's."""
    program = tmp_path / "overtone"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m overtone.cluster.cli "$@"\n')
    program.chmod(0o755)
    [line] = [line for line in overtone("--help").output.splitlines() if "bash_source" in line]
    script = f"PATH={tmp_path}:$PATH; {line.strip()}; complete -p overtone"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert shown.stdout.strip().endswith("-F _overtone_completion overtone"), shown.stderr


def test_ctrl_c_ends_a_command_that_only_looks_with_130():
    """While it waits for a store that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "overtone.cluster.cli",
                "status",
                "s3://bucket/x",
                "--endpoint-url",
                address,
            ],
            env={**os.environ, **KEYS},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=interruptible,
        )
        silent.settimeout(60)
        with silent.accept()[0]:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "overtone: interrupted\n")


def test_a_bad_output_path_is_a_mistake_and_no_early_end(spec_path, tmp_path):
    (tmp_path / "file").touch()
    shown = overtone("run", spec_path, "--quiet", "--set", f"output.path={tmp_path}/file/out")
    assert shown.exit_code == 2
    [line] = shown.stderr.splitlines()
    assert "a file stands where a folder is needed" in line
