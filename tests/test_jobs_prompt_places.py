"""Prompt tables where people keep them: a data set on the Hugging Face Hub, any web server, in any format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from file_server import REPO, FileServer

from overtone.jobs.errors import PromptsError
from overtone.jobs.plan import make_plan
from overtone.jobs.prompts import read_shard
from overtone.jobs.spec import JobSpec

CAPTIONS = [f"a picture of {k}, and more" for k in range(20)]


def captions(format: str) -> bytes:
    """The same table as parquet, csv or jsonl."""
    table = {"id": [f"r{k:02}" for k in range(20)], "caption": CAPTIONS, "source": ["web"] * 20}
    if format == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(table), sink, row_group_size=5)
        return sink.getvalue().to_pybytes()
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    if format == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    lines = [",".join(f'"{value}"' for value in row.values()) for row in rows]
    return "\n".join(["id,caption,source", *lines]).encode()


def job(path: str | list[str]) -> JobSpec:
    prompts = {"path": path, "columns": {"prompt": "caption"}}
    return JobSpec.model_validate({"model": "tiny", "prompts": prompts, "shards": 5, "output": "out"})


def rows(spec: JobSpec) -> list[tuple[str, str, str]]:
    """(row_id, prompt, source) of all rows, shard by shard."""
    plan = make_plan(spec)
    found = []
    for shard in plan.shards():
        read = read_shard(spec, plan.files[shard.file], shard.first_row, shard.num_rows)
        sources = read.passthrough["source"].to_pylist()
        found += [(row.row_id, row.prompt, source) for row, source in zip(read.rows, sources, strict=True)]
    return found


WANTED = [(f"r{k:02}", CAPTIONS[k], "web") for k in range(20)]


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_a_web_server(format):
    with FileServer({f"in/captions.{format}": captions(format)}) as server:
        spec = job(f"{server.url}/in/captions.{format}")
        assert rows(spec) == WANTED
        plan = make_plan(spec)
        server.files[f"in/captions.{format}"] = captions(format).replace(b"a picture", b"A picture")
        assert make_plan(spec).fingerprint != plan.fingerprint
        with pytest.raises(PromptsError, match="there is no file"):
            make_plan(job(f"{server.url}/in/other.{format}"))


ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_jobs_prompt_places import job, make_plan, rows
from overtone.jobs.errors import PromptsError
for path in sys.argv[2:]:
    try:
        spec = job(path)
        print(json.dumps([rows(spec), [file.etag for file in make_plan(spec).files]]))
    except PromptsError as error:
        print(json.dumps(str(error)))
"""


def on_the_hub(server: FileServer, home: Path, *paths: str) -> list:
    """What a process that takes the server for the Hub reads: the Hub's address is fixed at import."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(Path(__file__).parent), *(f"hf://datasets/{path}" for path in paths)],
        env={name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_data_set_on_the_hub(tmp_path):
    files = {f"{format}/captions.{format}": captions(format) for format in ("parquet", "csv", "jsonl")}
    with FileServer(files) as server:
        one, folder, glob, csv, jsonl, nothing = on_the_hub(
            server,
            tmp_path,
            f"{REPO}/parquet/captions.parquet",
            f"{REPO}/parquet",
            f"{REPO}/p*/*.parquet",
            f"{REPO}/csv/captions.csv",
            f"{REPO}/jsonl/captions.jsonl",
            f"{REPO}/parquet/gone.parquet",
        )
        wanted = [list(row) for row in WANTED]
        for found in (one, folder, glob, csv, jsonl):
            assert found[0] == wanted
            assert all(found[1])  # the blobs' names, by which a change is noticed
        assert "there is no file" in nothing
        assert len({found[1][0] for found in (one, csv, jsonl)}) == 3
        assert all(asked for _, asked in server.ranges)  # ranges, never whole files


@pytest.mark.parametrize(
    ("prompts", "output", "fine"),
    [
        ("in", "in", False),
        ("in", "in/out", False),
        ("in/", "in/out", False),
        ("in/**/*.parquet", "in/a/out", False),
        ("in/*/*/*.parquet", "in/out", False),
        ("in/*.parquet", "in/out", True),
        ("in/prompts.parquet", "in", True),
        ("in", "in-out", True),
        ("in", "out", True),
        ("in", "in/_out", True),  # such folders are no part of a data set
    ],
)
def test_a_job_does_not_write_among_its_own_prompts(tmp_path, prompts, output, fine):
    """Its first part would be a prompt table to the driver that resumes it."""
    (tmp_path / "in" / "a" / "b").mkdir(parents=True)
    for place in ("in", "in/a/b"):
        (tmp_path / place / "prompts.parquet").write_bytes(captions("parquet"))
    spec = job(f"{tmp_path}/{prompts}")
    spec = spec.model_copy(update={"output": spec.output.model_copy(update={"path": str(tmp_path / output)})})
    if fine:
        assert make_plan(spec).num_rows
    else:
        with pytest.raises(PromptsError, match="would be read as prompts"):
            make_plan(spec)


def test_an_output_below_csv_prompts_holds_none_of_them(tmp_path):
    (tmp_path / "prompts.csv").write_bytes(captions("csv"))
    prompts = {"path": str(tmp_path), "format": "csv", "columns": {"prompt": "caption"}}
    spec = {"model": "tiny", "prompts": prompts, "output": str(tmp_path / "out")}
    assert make_plan(JobSpec.model_validate(spec)).num_rows == 20
