"""A worker's model: what is said about one that cannot be loaded, and which commit of the hub was loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from overtone.progressive import tiny

COMMIT = "0123456789abcdef" * 2 + "01234567"
LOAD = """
import json, sys
from huggingface_hub import constants
from overtone.cluster.worker import load_engine, loaded_commit
from overtone.jobs.errors import ModelError
from overtone.jobs.spec import JobSpec

for model in sys.argv[1:]:
    # As HF_HUB_OFFLINE=1 would; a hub that is away is tried for half a minute by its client.
    constants.HF_HUB_OFFLINE = model.startswith("away/")
    spec = JobSpec.model_validate({"model": model, "prompts": "a.parquet", "output": "/out"})
    try:
        engine = load_engine(spec)
    except ModelError as error:
        told = {"told": str(error), "exit_code": error.exit_code}
    else:
        told = {"family": engine.family.name}
    print(json.dumps(told | {"commit": loaded_commit(spec)}))
"""
"""In a process of its own, for the hub's client reads its settings once."""


class Hub(BaseHTTPRequestHandler):
    """Has one model, which needs a licence."""

    asked: Counter[str]

    def do_GET(self) -> None:
        gated = "org/gated" in self.path
        self.asked["org/gated" if gated else "others"] += 1
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - the server looks for that name

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> dict[str, dict]:
    """What came of each model, by its name."""
    home = tmp_path_factory.mktemp("hf")
    cached = home / "hub" / "models--away--cached"
    snapshot = cached / "snapshots" / COMMIT
    for path in tiny.FOLDER.rglob("*.*"):
        there = snapshot / path.relative_to(tiny.FOLDER)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(path)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    Hub.asked = Counter()
    models = ("org/typo", "org/gated", "away/unseen", "away/cached", "tiny")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        out = subprocess.run(
            [sys.executable, "-c", LOAD, *models],
            env={**os.environ, **environ, "HF_HUB_OFFLINE": "0"},
            stdout=subprocess.PIPE,
            check=True,
            timeout=240,
        ).stdout
        server.shutdown()
    return dict(zip(models, map(json.loads, out.splitlines()), strict=True))


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ("org/typo", "see its name and revision; a private one needs HF_TOKEN where the workers run"),
        (
            "org/gated",
            "accept its licence at https://huggingface.co/org/gated, and give the workers HF_TOKEN",
        ),
        ("away/unseen", "whether they reach https://huggingface.co or hold it in their cache"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_one_sentence_and_a_mistake(loaded, model, advice):
    told = loaded[model]
    assert told["exit_code"] == 2
    assert told["told"].startswith(f"the model {model} cannot be loaded: ")
    assert advice in told["told"]
    assert "\n" not in told["told"]
    assert len(told["told"]) < 600
    assert told["commit"] == ""


def test_the_hub_is_asked_once_for_a_model_that_it_does_not_give(loaded):
    assert 1 <= Hub.asked["org/gated"] <= 2  # the file, and what went wrong with it


def test_the_commit_that_was_loaded_is_known(loaded):
    """From the cache alone."""
    assert loaded["away/cached"]["commit"] == COMMIT
    assert loaded["tiny"]["commit"] == ""
