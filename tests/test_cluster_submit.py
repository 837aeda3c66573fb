"""Submitting: what a job is called, what is packed, and a real Ray head with a token that runs it."""

from __future__ import annotations

import asyncio
import http.server
import io
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray_head import free_port, plain_environ, ray_head

from overtone.cluster.kubernetes.pods import drain_command
from overtone.cluster.submit import follow, logs, packed_spec, stop, submit, use_token
from overtone.cluster.submit.client import connect, find_submission, find_token
from overtone.cluster.submit.following import _follow
from overtone.cluster.submit.package import is_secret, notes_on_paths, package, tree_files, withheld
from overtone.cluster.submit.start import entrypoint, latest_epoch, submission_prefix
from overtone.jobs.errors import UserError
from overtone.jobs.spec import JobSpec, load_spec
from overtone.jobs.spec.sections import Lora, Model

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
TOKEN = "0123456789abcdef0123456789abcdef"


def make_spec(tmp_path: Path, name: str = "quick", **keys) -> JobSpec:
    prompts = tmp_path / "prompts.parquet"
    if not prompts.exists():
        pq.write_table(pa.table({"prompt": ["a red circle", "a blue square"]}), prompts)
    path = tmp_path / f"{name}.yaml"
    document = {
        "name": name,
        "model": "tiny",
        "prompts": "prompts.parquet",
        "output": str(tmp_path / "out" / name),
        **keys,
    }
    path.write_text(yaml.safe_dump(document))
    return load_spec(path, [])


# Names.


def test_the_same_job_has_the_same_name_and_another_job_another(tmp_path):
    spec = make_spec(tmp_path)
    prefix = submission_prefix(spec)
    assert prefix.startswith("overtone-quick-")
    assert submission_prefix(make_spec(tmp_path)) == prefix
    assert submission_prefix(make_spec(tmp_path, workers=7)) == prefix  # how it is computed does not matter
    changed = [{"seed": 1}, {"sampling": {"delta": 0.2}}, {"output": str(tmp_path / "elsewhere")}]
    changed += [{"prompts": {"path": "prompts.parquet", "limit": 1}}, {"shards": 7}]
    names = {submission_prefix(make_spec(tmp_path, **keys)) for keys in changed}
    assert len(names) == len(changed)
    assert prefix not in names


def test_a_name_is_cut_to_what_a_url_can_hold(tmp_path):
    prefix = submission_prefix(make_spec(tmp_path, "My_Job.v2" + "x" * 50))
    assert prefix.startswith("overtone-my-job-v2x")
    assert len(prefix) < 60
    assert set(prefix) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_the_epoch_is_the_highest_number_after_the_prefix():
    ids = dict.fromkeys(
        ["overtone-a-01-e2", "overtone-a-01-e10", "overtone-a-01-ex", "overtone-a-02-e99"], ""
    )
    assert latest_epoch("overtone-a-01-e", ids) == 10
    assert latest_epoch("overtone-b-01-e", ids) == 0


# Tokens.


def test_a_token_is_looked_for_where_ray_looks(tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
    (tmp_path / "named").write_text("from-file\n")
    environ = {"RAY_AUTH_TOKEN": "from-env", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}
    assert find_token(environ, tmp_path).value == "from-env"
    del environ["RAY_AUTH_TOKEN"]
    assert find_token(environ, tmp_path).value == "from-file"
    del environ["RAY_AUTH_TOKEN_PATH"]
    assert find_token(environ, tmp_path).value == "from-home"
    assert find_token({"RAY_AUTH_MODE": "disabled"}, tmp_path) is None
    assert find_token({}, tmp_path / "nobody") is None
    for text in ("", None):
        if text is None:
            (tmp_path / "named").unlink()
        else:
            (tmp_path / "named").write_text(text)
        with pytest.raises(UserError, match=r"RAY_AUTH_TOKEN_PATH names .*named"):
            find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}, tmp_path)


def test_the_mode_is_set_with_a_token_and_only_then(tmp_path):
    environ = {"RAY_AUTH_TOKEN": "x"}
    token = use_token(environ, tmp_path)
    assert environ["RAY_AUTH_MODE"] == "token"
    assert "x" not in repr(token).removeprefix("Token(from the environment variable RAY_AUTH_TOKEN")
    environ = {}
    assert use_token(environ, tmp_path) is None
    assert environ == {}


def test_importing_it_imports_no_ray():
    code = "import overtone.cluster.submit, sys; print('ray' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "False"


# What is packed.


def test_only_the_spec_is_packed_and_reads_back_the_same(tmp_path):
    spec = make_spec(
        tmp_path, sampling={"delta": 0.2, "scales": [0.5, 0.75, 1.0]}, workers={"min": 1, "max": 3}
    )
    archive = zipfile.ZipFile(io.BytesIO(package(spec)))
    assert archive.namelist() == ["overtone-spec.yaml"]
    elsewhere = tmp_path / "on" / "the" / "cluster"
    elsewhere.mkdir(parents=True)
    archive.extractall(elsewhere)
    assert load_spec(elsewhere / "overtone-spec.yaml", []) == spec
    assert package(spec) == package(spec)


SECRET_FILES = [
    ".env",
    ".env.local",
    "deploy/prod.env",
    "deploy/server.PEM",
    "id_rsa",
    ".aws/config",
    "infra/.kube/config",
    "aws-credentials.csv",
    "gcp-service-account-7.json",
    "client_secret.json",
    ".s3cfg",
    ".boto",
    ".pgpass",
    "config/rclone.conf",
    ".huggingface/token",
    "kaggle.json",
    "infra/state.tfstate.backup",
    "infra/prod.auto.tfvars",
    "keys/putty.ppk",
    ".bash_history",
    ".netrc.bak",
    ".env~",
    "hf/token.txt",
    ".dbt/profiles.yml",
    ".databrickscfg",
    "group_vars/vault.yml",
]
PLAIN_FILES = ["jobs/cli.py", "environment.yml", "keys.py", "notes/tokens.md"]


@pytest.mark.parametrize("git", [True, False])
def test_a_packed_tree_holds_no_credentials(tmp_path, git):
    tree = tmp_path / "tree"
    for name in [*SECRET_FILES, *PLAIN_FILES, "__pycache__/x.pyc", "out/big.bin"]:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tree / "outside").symlink_to("/etc/passwd")
    (tree / ".gitignore").write_text("out/\n__pycache__/\n")
    if git:
        subprocess.run(["git", "init", "-q", str(tree)], check=True)
        subprocess.run(["git", "-C", str(tree), "add", "-f", ".env", "jobs/cli.py"], check=True)
    expected = {*PLAIN_FILES, ".gitignore"} | (set() if git else {"out/big.bin"})
    assert set(tree_files(tree)) == expected
    packed = set(zipfile.ZipFile(io.BytesIO(package(make_spec(tmp_path), tree))).namelist())
    assert packed == {*expected, "overtone-spec.yaml"}


def test_a_checkout_is_packed_as_the_package_that_it_installs(tmp_path):
    tree = tmp_path / "tree"
    for name in [*CHECKOUT, "jobs/templates/page.html", "manifests/kind.yaml", "jobs.py"]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    with zipfile.ZipFile(io.BytesIO(package(make_spec(tmp_path), tree))) as archive:
        packed = {name: archive.read(name).decode() for name in archive.namelist()}
    assert packed.pop("overtone-spec.yaml")
    packages = [*CHECKOUT, "jobs/templates/page.html"]
    assert packed == {f"overtone/{name}": name for name in packages} | {
        "manifests/kind.yaml": "manifests/kind.yaml",
        "jobs.py": "jobs.py",
    }
    (tree / "progressive" / "__init__.py").unlink()  # now a tree of somebody else's, as it lies
    with zipfile.ZipFile(io.BytesIO(package(make_spec(tmp_path), tree))) as archive:
        assert "jobs/__init__.py" in archive.namelist()


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        '{"type": "service_account", "private_key": "x"}',
        "login('hf_" + "a" * 34 + "')",
        "token: ghp_" + "b" * 36,
        "key = AKIA" + "C" * 16,
        "aws_secret_access_key = " + "d" * 40,
    ],
)
def test_a_file_that_holds_a_key_or_a_token_is_not_sent_whatever_its_name(tmp_path, text):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "notes.txt").write_text(f"first line\n{text}\n")
    (tree / "code.py").write_text("token = os.environ['HF_TOKEN']  # hf_... is never written here\n")
    (tree / "weights.bin").write_bytes(text.encode() + bytes(300_000))  # large: data, not looked into
    assert set(tree_files(tree)) == {"code.py", "weights.bin"}
    assert withheld(tree) == ["notes.txt"]
    packed = zipfile.ZipFile(io.BytesIO(package(make_spec(tmp_path), tree))).namelist()
    assert "notes.txt" not in packed


def test_a_job_without_a_name_keeps_that_of_its_file(tmp_path):
    spec = make_spec(tmp_path).model_copy(update={"name": "job"})
    with zipfile.ZipFile(io.BytesIO(package(spec))) as archive:
        archive.extract("overtone-spec.yaml", tmp_path)
    assert load_spec(tmp_path / "overtone-spec.yaml").name == "job"


@pytest.mark.parametrize("name", SECRET_FILES)
def test_credentials_are_known_by_name(name):
    assert is_secret(name)


def test_paths_that_the_cluster_must_see_are_named(tmp_path):
    notes = notes_on_paths(make_spec(tmp_path))
    assert len(notes) == 2
    assert str(tmp_path / "prompts.parquet") in notes[0]
    far = make_spec(tmp_path, prompts="s3://bucket/prompts/", output="s3://bucket/out")
    assert notes_on_paths(far) == ()
    adapter = tmp_path / "lora.safetensors"
    (note,) = notes_on_paths(
        far.model_copy(update={"model": Model(id="tiny", loras=(Lora(id=str(adapter)),))})
    )
    assert note.startswith(f"model.loras: {adapter} is a path on the cluster's machines")


# Following.


class CutLogs:
    """A job server whose log streams break after so many characters; each begins with the first one again."""

    def __init__(self, log: str, cuts: list[int | Exception]) -> None:
        self.log, self.cuts = log, cuts

    async def tail_job_logs(self, key):
        cut = self.cuts.pop(0) if self.cuts else len(self.log)
        if isinstance(cut, Exception):
            raise cut
        for start in range(0, cut, 3):
            yield self.log[start : min(start + 3, cut)]

    def get_job_status(self, key):
        return SimpleNamespace(value="RUNNING" if self.cuts else "SUCCEEDED")

    def get_job_logs(self, key):
        return self.log


@pytest.mark.parametrize("cuts", [[], [4, 17], [0, 9, 9], [11, OSError("reset"), 12]])
def test_a_log_stream_that_is_cut_goes_on_where_it_was(cuts):
    lines: list[str] = []
    log = "row 1\nrow 2\n\nrow 3, without an end"
    asyncio.run(_follow(CutLogs(log, list(cuts)), "job", lines.append, pause_s=0.01, lag_s=0.0))
    assert lines == log.split("\n")


def test_a_log_that_cannot_be_read_is_given_up():
    server = CutLogs("x", [OSError("gone")] * 99)
    with pytest.raises(UserError, match="the log of job cannot be read any more: gone"):
        asyncio.run(_follow(server, "job", print, pause_s=0.01, lag_s=0.0))
    assert len(server.cuts) > 90


# A real head.

FAKE = """
import json, os, pathlib, sys, time
import yaml
spec = yaml.safe_load(pathlib.Path(sys.argv[2]).read_text())
print("argv", json.dumps(sys.argv[1:]))
print("files", json.dumps(sorted(os.listdir("."))), flush=True)
if spec["name"] == "slow":
    for i in range(6000):  # until it is stopped
        print("row", i, flush=True)
        time.sleep(0.1)
print("last line without an end", end="")
"""


CHECKOUT = {
    "cluster/__init__.py": "",
    "cluster/cli/__init__.py": "",
    "cluster/cli/__main__.py": """
import os, sys, ray
from overtone.jobs import WHOSE
print(WHOSE, sys.argv[1:], sorted(os.listdir(".")), flush=True)
@ray.remote
def whose():
    from overtone.jobs import WHOSE
    return WHOSE
ray.init("auto", log_to_driver=False, logging_level="ERROR")
print(ray.get(whose.remote()), "in a worker", flush=True)
sys.exit(3)
""",
    "jobs/__init__.py": "WHOSE = 'mine'\n",
    "progressive/__init__.py": "",
}
"""A stand-in for a checkout of Overtone whose code is not the installed one's."""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with head_of_ours(tmp_path_factory.mktemp("head")) as running:
        yield running


def head_of_ours(folder: Path) -> AbstractContextManager[SimpleNamespace]:
    """A head with a token. Its `overtone` is a small script of ours."""
    (folder / "fake.py").write_text(FAKE)
    program = folder / "overtone"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/fake.py "$@"\n')
    program.chmod(0o755)
    return ray_head(folder, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, TOKEN)


@pytest.fixture
def token(monkeypatch, tmp_path):
    """No token but what a test sets; everything is put back."""
    for name in (
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return lambda value: monkeypatch.setenv("RAY_AUTH_TOKEN", value)


def test_a_job_runs_detached_and_its_log_is_followed_to_the_end(head, token, tmp_path):
    token(TOKEN)
    spec = make_spec(tmp_path)
    made = submit(spec, address=head.url)
    assert made.id == submission_prefix(spec) + "1"
    assert not made.attached
    assert f"overtone logs {made.id} --follow --address {head.url}" in made.text()
    lines: list[str] = []
    ended = follow(made.id, lines.append, address=head.url)
    assert (ended.state, ended.ok, ended.interrupted) == ("SUCCEEDED", True, False)
    assert lines[-3:] == [
        'argv ["run", "overtone-spec.yaml", "--address", "auto"]',
        'files ["overtone-spec.yaml"]',
        "last line without an end",
    ]
    assert logs(made.id, address=head.url).splitlines()[-3:] == lines[-3:]
    assert find_submission(connect(head.url), made.id[:-4]) == made.id
    with pytest.raises(UserError, match=f"no Overtone job is called nonsense .*{made.id}"):
        find_submission(connect(head.url), "nonsense")


def test_a_running_job_is_attached_to_survives_ctrl_c_and_is_stopped(head, token, tmp_path):
    token(TOKEN)
    spec = make_spec(tmp_path, "slow")
    first = submit(spec, address=head.url)
    code = (
        "import functools, signal, sys; from overtone.cluster.submit import follow\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job's shell turns it off
        "ended = follow(sys.argv[1], functools.partial(print, flush=True), address=sys.argv[2])\n"
        "print(ended.text()); sys.exit(0 if ended.ok else 1)"
    )
    # A terminal of its own: the token comes from the file, and Ray is imported after the mode is set.
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    environ = plain_environ() | {"HOME": str(home)}
    terminal = subprocess.Popen(
        [sys.executable, "-c", code, first.id, head.url],
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
        cwd=ROOT,
    )
    for line in terminal.stdout:
        if line.startswith("row "):
            break
    terminal.send_signal(signal.SIGINT)
    rest = terminal.stdout.read()
    assert terminal.wait(20) == 0
    assert rest.splitlines()[-1].startswith(f"{first.id} goes on without this terminal")

    second = submit(spec.model_copy(update={"name": "slow"}), address=head.url)
    assert (second.id, second.attached) == (first.id, True)
    assert "attached to" in second.text()
    assert stop(first.id, address=head.url) == "STOPPED"
    third = submit(spec, address=head.url)
    assert (third.id, third.attached) == (submission_prefix(spec) + "2", False)
    assert find_submission(connect(head.url), first.id[:-1]) == third.id  # the newest epoch
    assert stop(third.id, address=head.url) == "STOPPED"


def test_a_working_tree_is_packed_only_when_asked_and_a_job_that_fails_says_so(head, token, tmp_path):
    token(TOKEN)
    tree = tmp_path / "tree"
    for name, code in CHECKOUT.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(code)
    (tree / ".env").write_text("PASSWORD=1")
    lines: list[str] = []
    made = submit(make_spec(tmp_path, "tree"), address=head.url, working_dir=tree)
    ended = follow(made.id, lines.append, address=head.url)
    assert lines[-2:] == [
        "mine ['run', 'overtone-spec.yaml', '--address', 'auto'] ['overtone', 'overtone-spec.yaml']",
        "mine in a worker",
    ]
    assert entrypoint(tree=True).startswith("python -m overtone.cluster.cli run ")
    assert (ended.state, ended.ok) == ("FAILED", False)
    assert "exit code 3" in ended.text()
    with pytest.raises(UserError, match="not a folder"):
        submit(make_spec(tmp_path), address=head.url, working_dir=tmp_path / "none")


def test_a_missing_or_wrong_token_is_a_sentence(head, token, tmp_path):
    with pytest.raises(UserError, match=r"wants a token and none was found here\. Set RAY_AUTH_TOKEN"):
        connect(head.url)
    (tmp_path / "token").write_text("f" * 32)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "token")
    with pytest.raises(UserError, match=r"refused the token from the file .*token \(RAY_AUTH_TOKEN_PATH\)"):
        connect(head.url)
    token("e" * 32)
    with pytest.raises(
        UserError, match="refused the token from the environment variable RAY_AUTH_TOKEN"
    ) as caught:
        connect(head.url)
    assert "e" * 32 not in str(caught.value)


def test_an_address_in_the_environment_does_not_replace_the_one_given(head, token):
    token(TOKEN)
    os.environ["RAY_ADDRESS"] = "http://127.0.0.1:1"
    try:
        assert connect(head.url.removeprefix("http://")).get_address() == head.url
        assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    finally:
        del os.environ["RAY_ADDRESS"]


def test_the_health_checks_of_the_manifests_need_no_token(head):
    """Kubernetes probes these with plain HTTP."""
    for url in (f"{head.url}/api/gcs_healthz", f"{head.agent}/api/local_raylet_healthz"):
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert (answer.status, answer.read()) == (200, b"success")


@pytest.mark.chaos
def test_a_pod_that_is_stopped_tells_ray_that_its_node_is_about_to_go(tmp_path):
    """The first half of the manifests' preStop hook; the rest would stop every Ray on this machine. An actor
    keeps the node: an idle one that is drained goes at once."""
    driver = (
        "import subprocess, sys, ray; from ray._private.state import state\n"
        "ray.init(log_to_driver=False)\n"
        "@ray.remote(num_cpus=1)\n"
        "class Worker:\n"
        "    def ready(self): return True\n"
        "worker = Worker.remote(); ray.get(worker.ready.remote())\n"
        "print(len(state.get_draining_nodes()))\n"
        "subprocess.run(['sh', '-c', sys.argv[1]], check=True)\n"
        "print(len(state.get_draining_nodes()), ray.get(worker.ready.remote()))\n"
    )
    with head_of_ours(tmp_path) as head:
        command = [sys.executable, "-c", driver, drain_command(30).split(";")[0]]
        environ = head.environ | {"RAY_ADDRESS": head.gcs}
        shown = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.splitlines()[-2:] == ["0", "1 True"]


def test_an_address_without_a_job_server_is_a_sentence(token):
    with pytest.raises(UserError, match=r"nothing answers at http://127\.0\.0\.1:\d+ .*port-forward"):
        connect(f"127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="is not the job server's; it looks like http://127"):
        connect("ray://head:10001")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match="answers, but not as Ray's job server"):
            connect(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_the_packed_spec_names_what_was_set_and_no_defaults(tmp_path):
    document = yaml.safe_load(packed_spec(make_spec(tmp_path)))
    assert set(document) == {"name", "model", "prompts", "output"}
