"""Those who read the output: each with its own tools, straight from the folder."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import webdataset
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from small_jobs import SIDE_PX, commit_part, finish, prompt_table, small_job

from overtone.jobs.folder import JobFolder
from overtone.jobs.media import encode_media
from overtone.jobs.parts import AttemptFacts, Made, build_part
from overtone.jobs.prompts import read_shard
from overtone.jobs.report import Timings
from overtone.jobs.report.timings import COLUMNS
from overtone.jobs.store import open_store

pytestmark = pytest.mark.ray

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
        spec, plan, plan.shard(0), attempt=AttemptFacts("a", "w", "cpu"), made=made, rejects=[],
        passthrough=read.passthrough, first_row=0, timings=[], kind="video",
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


class RangesFileSystem(LocalFileSystem):
    """The disk, which keeps what was read: (name, begin, end)."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[str, int, int]] = []

    def _open(self, path, mode="rb", **settings):
        ranges = self.ranges

        class File(io.FileIO):
            def readinto(self, buffer) -> int:
                begin = self.tell()
                count = super().readinto(buffer)
                ranges.append((os.path.basename(path), begin, begin + count))
                return count

            def read(self, size: int = -1) -> bytes:
                begin = self.tell()
                data = super().read(size)
                ranges.append((os.path.basename(path), begin, begin + len(data)))
                return data

        return File(path)


def image_ranges(path) -> list[tuple[int, int]]:
    """Where a part has the bytes of its pictures."""
    about = pq.read_metadata(path)
    groups = map(about.row_group, range(about.num_row_groups))
    chunks = [group.column(j) for group in groups for j in range(group.num_columns)]
    return [
        (chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size)
        for chunk in chunks
        if chunk.path_in_schema == "image.bytes"
    ]


def test_pyarrow_projects_columns_without_touching_pictures(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(400), shard_rows=400)
    finish(open_store(spec.output.path), spec, plan)
    folder = tmp_path / "out" / "data"
    (path,) = folder.iterdir()
    pictures = image_ranges(path)
    assert sum(end - begin for begin, end in pictures) > 0.8 * path.stat().st_size

    def touched(**look) -> list[tuple[int, int]]:
        """What was read of pictures; the footer is looked for in the last 64 KiB, whatever lies there."""
        files = RangesFileSystem()
        table = pa.dataset.dataset(str(folder), filesystem=files).to_table(**look)
        assert table.num_rows
        read = [(begin, end) for _, begin, end in files.ranges if end < path.stat().st_size]
        assert read
        return [r for r in read for p in pictures if r[0] < p[1] and p[0] < r[1]]

    few = ["row_id", "stages", "denoise_seconds", "score"]
    assert touched(columns=few, filter=pa.dataset.field("score") > 0.5) == []
    assert touched()


@pytest.fixture(scope="module")
def ray():
    with pytest.MonkeyPatch.context() as patch:
        # Its newer reader starts 32 processes for the footers of any folder, its older one none.
        patch.setenv("RAY_DATA_USE_DATASOURCE_V2", "0")
        patch.setenv("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
        import ray
        import ray.data

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


def test_ray_data_reads_a_folder(ray, output):
    rows = ray.data.read_parquet(f"{output}/data", columns=["row_id", "image", "stages"]).take_all()
    assert sorted(row["row_id"] for row in rows) == [f"../row/{i}" for i in ROWS]
    assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).size == (SIDE_PX, SIDE_PX)
    assert rows[0]["stages"][1]["tokens"] == 4


def test_what_the_readme_tells_to_type_works(ray, datasets, output, tmp_path):
    tars = job_in(tmp_path, format="webdataset", shard_rows=2)
    readme = (Path(__file__).parents[1] / "jobs" / "README.md").read_text()
    section = readme.partition("### Reading the output")[2].partition("\n## ")[0]
    section = section.replace("out/quickstart", output).replace("out/tars", tars).replace(".show()", "")
    (query,) = re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
    figures = {row[:3]: row[3] for row in duckdb.sql(query).fetchall()}
    # A row is denoised on two grids, which is two lines; the one reject was never in any batch.
    assert figures == pytest.approx(
        {(SIDE_PX, SIDE_PX, stage): spent for stage, spent in (("text_encode", 0.125), ("expand", 0.125))}
        | {(SIDE_PX, SIDE_PX, "denoise"): 0.25},
        rel=0.2,  # the last batch of a shard has one row
    )
    lines = pa.dataset.dataset(f"{output}/timings").to_table(columns=list(COLUMNS))
    timings = Timings(lines)
    spent = sum(worker.of("denoise") for worker in timings.workers()) / timings.rows
    assert figures[SIDE_PX, SIDE_PX, "denoise"] == pytest.approx(spent)  # what the report says
    found = {}
    for snippet in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        *imports, body = re.split(r"\n\n", snippet.strip())
        exec("\n".join(imports), found)
        found |= {line.partition("(")[0]: eval(line, found) for line in body.splitlines()}
    assert found["load_dataset"] == (SIDE_PX, SIDE_PX)
    assert found["ds.dataset"].column_names == ["row_id", "stages"]
    assert set(found["ray.data.read_parquet"].columns()) == {"row_id", "image"}
    assert len(list(found["webdataset.WebDataset"])) == len(ROWS)
    assert len(found["pd.read_parquet"])


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
