"""Those who read the output: each with its own tools, straight from the folder."""

from __future__ import annotations

import io

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from small_jobs import SIDE_PX, finish, prompt_table, small_job

from jobs.folder import JobFolder
from jobs.media import encode_media
from jobs.parts import Made, build_part, commit_part
from jobs.prompts import read_shard
from jobs.store import open_store

ROWS = [i for i in range(10) if i != 7]


def job_in(folder, **settings):
    spec, plan = small_job(folder, prompt_table(10), **settings)
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan, bad=["../row/7"])
    return store.url


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> str:
    """A finished job of three parts and one reject."""
    return job_in(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        import datasets

        yield datasets


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_gives_pictures(datasets, output, tmp_path, streaming):
    loaded = datasets.load_dataset(output, streaming=streaming, cache_dir=str(tmp_path))
    assert list(loaded) == ["train"]
    rows = list(loaded["train"])
    assert [row["row_id"] for row in rows] == [f"../row/{i}" for i in ROWS]
    assert {row["image"].size for row in rows} == {(SIDE_PX, SIDE_PX)}
    assert isinstance(rows[0]["image"], Image.Image)
    assert rows[0]["stages"][1]["tokens"] == 4
    assert rows[4]["tag"] is None
    assert loaded["train"].features["image"] == datasets.Image()
    assert loaded["train"].features["score"] == datasets.Value("float32")


def test_datasets_keeps_its_own_features_of_columns_that_pass_through(datasets, tmp_path):
    mine = datasets.Dataset.from_dict(
        {"prompt": ["a", "b"], "kind": [1, 0], "reference": [Image.new("RGB", (4, 4))] * 2}
    )
    mine = mine.cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    mine = mine.cast_column("reference", datasets.Image())
    mine.to_parquet(str(tmp_path / "mine.parquet"))
    spec, plan = small_job(tmp_path, pq.read_table(tmp_path / "mine.parquet"))
    store = open_store(spec.output.path)
    finish(store, spec, plan)
    loaded = datasets.load_dataset(store.url, cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded[0]["reference"].size == (4, 4)
    assert [row["kind"] for row in loaded] == [1, 0]


def test_datasets_gives_videos(datasets, tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(2))
    read = read_shard(spec, plan.files[0], 0, 2)
    frames = np.zeros((5, SIDE_PX, SIDE_PX, 3), np.uint8)  # [T, H, W, 3]
    data = encode_media(frames, spec.output)
    made = [Made(row, data, SIDE_PX, SIDE_PX, 10, (), 0.0) for row in read.rows]
    part = build_part(
        spec, plan, plan.shard(0), attempt="a", made=made, rejects=[], passthrough=read.passthrough,
        first_row=0, timings=[], worker="w", device="cpu", kind="video",
    )  # fmt: skip
    store = open_store(spec.output.path)
    assert commit_part(store, part)
    loaded = datasets.load_dataset(store.url, cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded.features["video"] == datasets.Video()
    video = loaded.cast_column("video", datasets.Video(decode=False))[0]["video"]
    assert video["bytes"] == data
    assert video["path"].endswith(".mp4")


def test_duckdb_joins_data_and_timings(output):
    found = duckdb.sql(
        f"""
        WITH spent AS (
            SELECT unnest(row_ids) AS row_id, stage, seconds / rows AS seconds
            FROM '{output}/timings/*.parquet' WHERE batch IS NOT NULL
        )
        SELECT data.row_id, data.tag, sum(spent.seconds) AS seconds
        FROM '{output}/data/*.parquet' AS data JOIN spent USING (row_id)
        WHERE spent.stage = 'denoise' GROUP BY ALL ORDER BY data.row_id
        """
    ).fetchall()
    assert [row[0] for row in found] == [f"../row/{i}" for i in ROWS]
    assert found[0][2] == pytest.approx(0.25)
    rejects = duckdb.sql(f"SELECT row_id, error_class FROM '{output}/rejects/*.parquet'").fetchall()
    assert rejects == [("../row/7", "RowError")]


def test_stages_are_a_query(output):
    found = duckdb.sql(
        f"""
        SELECT stage.height, sum(stage.steps), sum(stage.seconds)
        FROM (SELECT unnest(stages) AS stage FROM '{output}/data/*.parquet') GROUP BY 1 ORDER BY 1
        """
    ).fetchall()
    assert found == [(1, 45, pytest.approx(9 * 0.125)), (2, 45, pytest.approx(9 * 0.125))]


def test_pyarrow_projects_without_touching_pictures(output):
    table = pa.dataset.dataset(f"{output}/data").to_table(
        columns=["row_id", "denoise_seconds"], filter=pa.dataset.field("score") > 0.5
    )
    assert table["row_id"].to_pylist() == [f"../row/{i}" for i in ROWS if i > 4]


def test_column_projection_reads_few_bytes(tmp_path):
    class Counting(io.FileIO):
        read_bytes = 0

        def read(self, size: int = -1) -> bytes:
            data = super().read(size)
            Counting.read_bytes += len(data)
            return data

    spec, plan = small_job(tmp_path, prompt_table(400), shard_rows=400)
    store = open_store(spec.output.path)
    finish(store, spec, plan)
    path = next((tmp_path / "out/data").iterdir())
    with Counting(path) as file:
        pq.read_table(file, columns=["row_id", "stages", "denoise_seconds"])
    assert Counting.read_bytes < path.stat().st_size / 4


def test_pandas_reads_a_folder(output):
    frame = pd.read_parquet(f"{output}/timings")
    assert set(frame["stage"]) == {"read", "text_encode", "denoise", "expand", "part_write", "upload"}
    batches = frame.dropna(subset="batch").groupby(["shard", "batch"])["seconds"].sum()
    assert (batches == 1.0).all()
    assert str(frame["start"].dtype).startswith("datetime64[us, UTC")
    data = pd.read_parquet(f"{output}/data", columns=["row_id", "tag", "score"])
    assert len(data) == len(ROWS)


def test_webdataset_iterates_tars(tmp_path):
    url = job_in(tmp_path, format="webdataset")
    shards = [f"{url}/data/train-{i:05d}-of-00003.tar" for i in range(3)]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [sample["json"]["row_id"] for sample in samples] == [f"../row/{i}" for i in ROWS]
    assert samples[0]["__key__"] == "000000"
    assert samples[0]["png"].size == (SIDE_PX, SIDE_PX)
    assert samples[0]["txt"] == samples[0]["json"]["prompt"] == "a picture of number 0"
