"""What is installed: no folder of a user's stands in for it, a wheel is enough, it finishes older jobs."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image

from overtone.cluster.driver import run_job
from overtone.cluster.worker import load_engine, remake
from overtone.jobs.folder import JobFolder
from overtone.jobs.report import report
from overtone.jobs.spec import load_spec
from overtone.jobs.status import status
from overtone.jobs.store import open_store
from overtone.jobs.verify import verify

ROOT = Path(__file__).parents[1]
SPEC = """
name: installed
model: {id: tiny}
prompts: {path: prompts.parquet}
sampling: {height: 64, width: 64, num_steps: 2}
output: {path: out}
workers: {num_cpus: 1}
"""
OLDER = Path(__file__).parent / "older_job"
"""Written by version 0.1.0 at commit 3ac851b: shard 0 of 3 is done, one of its two rows a reject."""
SEEDS = {
    "r0": 7165525968843610134,
    "r2": 669263924319743559,
    "r3": 3313984233790871467,
    "r4": 4561653691349100522,
    "r5": 8964374011144200660,
}
"""What it drew its rows from when it went to its end."""


def job(folder: Path) -> Path:
    """A folder of a user's that has folders and modules called like ours."""
    folder.mkdir()
    for name in ("cluster", "progressive"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('the folder of a user')\n")
    (folder / "jobs.py").write_text("raise ImportError('the module of a user')\n")
    (folder / "job.yaml").write_text(SPEC)
    prompts = ["a small red circle on white", "a large blue square on grey"]
    pq.write_table(pa.table({"prompt": prompts}), folder / "prompts.parquet")
    return folder


def run(folder: Path, *program: str, **environment: str) -> str:
    """What `overtone run` of the folder's job printed, run from there."""
    ran = subprocess.run(
        [*program, "run", "job.yaml", "--quiet"],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert verify(str(folder / "out")).ok
    return ran.stdout


@pytest.mark.ray
def test_a_users_folders_may_be_called_like_ours(tmp_path):
    folder = job(tmp_path / "mine")
    assert "2 rows" in run(folder, str(Path(sys.executable).parent / "overtone"))
    shutil.rmtree(folder / "out")
    assert "2 rows" in run(folder, sys.executable, "-m", "overtone.cluster.cli")


@pytest.mark.ray
def test_a_wheel_in_another_environment_is_enough(tmp_path):
    """Built from the tree, with its data files, put beside the dependencies of this environment."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    assert setuptools
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "out", "dist", "*.egg-info", "tests")
    )
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(tmp_path), str(tree)], check=True
    )
    [wheel] = tmp_path.glob("overtone-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    assert {name.split("/")[0] for name in names} == {
        "overtone",
        f"{'-'.join(wheel.name.split('-')[:2])}.dist-info",
    }
    assert "overtone/progressive/tiny/model/transformer/diffusion_pytorch_model.safetensors" in names

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = next((environment / "lib").glob("python*")) / "site-packages"
    # The dependencies are there. The editable Overtone is not: .pth files of such a folder are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["install", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", f"--python={python}", *install, str(wheel)], check=True)
    shown = subprocess.run(
        [python, "-c", "import overtone.jobs.errors as ours; print(ours.__file__)"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith(str(site))
    assert "2 rows" in run(job(tmp_path / "mine"), str(environment / "bin" / "overtone"), PYTHONPATH="")


@pytest.mark.ray
def test_a_job_begun_by_an_older_version_is_finished(tmp_path, monkeypatch):
    folder = tmp_path / "job"
    shutil.copytree(OLDER, folder)
    moved(folder)
    monkeypatch.chdir(folder)
    output = str(folder / "out")
    before = {path: path.read_bytes() for path in sorted((folder / "out").rglob("*")) if path.is_file()}
    seen = status(output)
    assert (seen.shards_done, seen.shards_total, seen.rows_rejected) == (1, 3, 1)
    summary = run_job(load_spec(folder / "job.yaml"))
    assert (summary.exit_code, summary.shards_done, summary.rows) == (0, 3, 4)
    for path, data in before.items():
        assert path.read_bytes() == data, path
    table = ds.dataset(folder / "out" / "data").to_table().sort_by("row_id")
    assert dict(zip(table["row_id"].to_pylist(), table["seed"].to_pylist(), strict=True)) == SEEDS
    assert table["tag"].to_pylist() == ["a", "c", "d", "e", "f"]
    made = Image.open(io.BytesIO(table["image"][2].as_py()["bytes"]))
    then = Image.open(folder / "r3.png")
    assert np.abs(np.asarray(made, int) - np.asarray(then, int)).mean() < 2  # processors round differently
    assert verify(output).ok
    assert "begun-by-an-older-version" in report(output)
    assert verify(output, repair=True).ok
    # It keeps the columns that it began with, for readers that take their columns from the first file.
    for kind in ("data", "timings"):
        files = sorted((folder / "out" / kind).glob("*.parquet"))
        assert len({pq.read_schema(file).to_string(show_schema_metadata=False) for file in files}) == 1
        assert duckdb.sql(f"SELECT count(*) FROM '{output}/{kind}/*.parquet'").fetchall()[0][0] >= 5
    assert len(load_parquet(folder / "out", tmp_path / "cache", monkeypatch)) == 5
    assert status(output).rows_truncated is None
    # Of its rows, those of before are made again from the job's spec.
    store = open_store(output)
    found = remake(store, 5, load_engine, job=JobFolder(store).load()[0])
    assert (found.wrong, found.skipped) == ([], [])
    assert found.same + found.close == 5


def moved(folder: Path) -> None:
    """Let the older job know where its prompts are now: `verify` finds them where they were when it began."""
    spec, plan = (folder / "out" / "_job" / name for name in ("spec.json", "plan.parquet"))
    spec.write_text(spec.read_text().replace('"/tmp/job/', f'"{folder}/'))
    table = pq.read_table(plan)
    paths = pa.array([str(folder / "prompts.parquet")], table.schema.field("path").type)
    pq.write_table(
        table.set_column(table.column_names.index("path"), table.schema.field("path"), paths), plan
    )


def load_parquet(output: Path, cache: Path, monkeypatch):
    """The rows as Hugging Face `datasets` reads them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    return datasets.load_dataset(str(output), split="train", cache_dir=str(cache))
