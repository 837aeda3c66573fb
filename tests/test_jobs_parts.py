"""A part holds its shard's rows in input order, tells all about itself, and is committed once."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_jobs import SIDE_PX, commit_part, picture, prompt_table, small_job, small_part

from overtone.jobs import parts
from overtone.jobs.errors import VerifyError
from overtone.jobs.media import encode_media, media_name
from overtone.jobs.parts import (
    AttemptFacts,
    Footer,
    part_index,
    part_name,
    part_schema,
    read_footer,
    rejects_name,
    timings_name,
)
from overtone.jobs.parts.build import Part
from overtone.jobs.parts.table import ROW_GROUP_BYTES, row_groups
from overtone.jobs.prompts import read_shard
from overtone.jobs.rows import row_seed
from overtone.jobs.store import open_store


def table_of(part: Part) -> pa.Table:
    return pq.read_table(io.BytesIO(part.data))


def test_columns_are_the_promised_ones_then_those_that_pass_through(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(6))
    table = table_of(small_part(spec, plan, 0))
    assert table.column_names == [
        *("row_id", "prompt", "negative_prompt", "prompt_truncated", "seed", "height", "width", "image"),
        *("mode", "delta", "num_steps", "guidance_scale", "true_cfg_scale", "model", "stages"),
        *("denoise_seconds", "tag", "score"),
    ]
    image = table.schema.field("image").type
    assert [(f.name, f.type, f.nullable) for f in image] == [
        ("bytes", pa.binary(), True),
        ("path", pa.string(), True),
    ]
    assert [f.name for f in table.schema.field("stages").type.value_type] == [
        *("height", "width", "tokens", "steps", "seconds"),
    ]
    assert table.schema.field("score").type == pa.float32()
    assert all(f.nullable for f in table.schema)


def test_rows_are_in_input_order_whatever_the_batches(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(6, num_images=[1, 3, 1, 1, 1, 1]))
    rows = table_of(small_part(spec, plan, 0, backwards=True)).to_pylist()
    ids = ["../row/0", "../row/1#0", "../row/1#1", "../row/1#2", "../row/2", "../row/3"]
    assert [row["row_id"] for row in rows] == ids
    assert [row["tag"] for row in rows] == ["tag 0", "tag 1", "tag 1", "tag 1", "tag 2", "tag 0"]
    assert [row["score"] for row in rows] == [0, 0.125, 0.125, 0.125, 0.25, 0.375]
    assert rows[0]["seed"] == row_seed(0, "../row/0")
    assert (rows[0]["height"], rows[0]["width"], rows[0]["num_steps"]) == (SIDE_PX, SIDE_PX, 10)
    assert (rows[0]["mode"], rows[0]["delta"], rows[0]["model"]) == ("dct_rewind", 0.05, "tiny")
    assert rows[0]["stages"][1] == {"height": 2, "width": 2, "tokens": 4, "steps": 5, "seconds": 0.125}


def test_pictures_and_their_names(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(6))
    shard = plan.shard(1)
    read = read_shard(spec, plan.files[0], shard.first_row, shard.num_rows)
    for row, made in zip(read.rows, table_of(small_part(spec, plan, 1)).to_pylist(), strict=True):
        back = Image.open(io.BytesIO(made["image"]["bytes"]))
        assert np.array_equal(np.asarray(back), np.asarray(picture(row)))
        assert made["image"]["path"] == media_name(row.row_id, "png")
        assert "/" not in made["image"]["path"]


def test_pass_through_columns_keep_types_and_values(tmp_path):
    now = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, datetime.UTC)
    columns = {
        "category": pa.array(["a", "b", None, "a"]).dictionary_encode(),
        "when": pa.array([now] * 4, pa.timestamp("us", tz="UTC")),
        "price": pa.array([decimal.Decimal("1.25")] * 4, pa.decimal128(10, 2)),
        "box": pa.array([{"x": 1, "tags": ["p", "q"]}] * 4),
        "pair": pa.array([[1.0, 2.0]] * 4, pa.list_(pa.float32(), 2)),
        "long": pa.array([[1], [], None, [2, 3]], pa.large_list(pa.int64())),
        "raw": pa.array([b"\x00\xff"] * 4, pa.large_binary()),
        "nothing": pa.nulls(4),
        "negative": pa.array([-1, 2, 3, 4], pa.int8()),
    }
    spec, plan = small_job(tmp_path, prompt_table(4, **columns))
    table = table_of(small_part(spec, plan, 0))
    kept = pq.read_table(tmp_path / "prompts.parquet")
    for name in columns:
        assert table.schema.field(name).type == kept.schema.field(name).type, name
        assert table[name].equals(kept[name]), name


def test_layout_serves_readers(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(250), shard_rows=250, latents=True)
    file = pq.ParquetFile(io.BytesIO(small_part(spec, plan, 0).data))
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [100, 100, 50]
    chunks = [groups[0].column(i) for i in range(groups[0].num_columns)]
    columns = {chunk.path_in_schema: chunk for chunk in chunks}
    assert columns["image.bytes"].compression == "UNCOMPRESSED"
    assert not columns["image.bytes"].is_stats_set
    others = [column for name, column in columns.items() if name != "image.bytes"]
    assert {column.compression for column in others} == {"ZSTD"}
    assert all(column.has_offset_index for column in columns.values())
    assert columns["prompt"].has_column_index
    assert file.read(["latents"])["latents"][7].as_py() == {"shape": [4, 2, 2], "values": [7.0] * 16}


def test_row_groups_are_cut_by_bytes():
    class Heavy:
        latents = None
        source_bytes = 0

        def __init__(self, size: int) -> None:
            self.data = bytes(size)

    limit = ROW_GROUP_BYTES
    sizes = [limit // 2, limit // 2, 1, 2 * limit, limit, 5, 5]
    groups = list(row_groups([Heavy(size) for size in sizes]))
    assert groups == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 7)]
    assert list(row_groups([])) == []


def test_the_footer_says_all(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(6))
    part = small_part(spec, plan, 1, attempt="mine", bad=["../row/5"], started=1000.0)
    footer = read_footer(io.BytesIO(part.data))
    assert footer == part.footer
    assert (footer.shard, footer.num_shards, footer.attempt) == (1, 2, "mine")
    assert footer.fingerprint == plan.fingerprint
    assert (footer.first_row, footer.input_rows, footer.rows) == (4, 2, 1)
    assert [reject.row_id for reject in footer.rejects] == ["../row/5"]
    assert [timing.stage for timing in footer.timings] == [
        *("read", "text_encode", "denoise", "expand", "denoise", "part_write"),
    ]
    assert footer.timings[-1].seconds > 0
    assert footer.versions["pyarrow"] == pa.__version__
    rows = table_of(part).to_pylist()
    assert footer.digests == {
        "row_id": parts.digest(row["row_id"].encode() for row in rows),
        "image": parts.digest(row["image"]["bytes"] for row in rows),
    }


def test_a_shard_of_rejects_alone_still_gets_a_part(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(6, prompt=[None] * 4 + ["a", "b"]))
    part = small_part(spec, plan, 0)
    table = table_of(part)
    assert table.num_rows == 0
    assert table.schema.equals(table_of(small_part(spec, plan, 1)).schema, check_metadata=True)
    assert len(read_footer(io.BytesIO(part.data)).rejects) == 4


def test_damaged_footers_are_named(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(2))
    data = small_part(spec, plan, 0).footer.to_bytes()
    newer = json.dumps({**json.loads(data), "version": 99}).encode()
    less = json.dumps({**json.loads(data), "num_rejects": 3}).encode()
    for damaged, message in (
        (data[:-9], "damaged"),
        (newer, "version 99"),
        (less, "damaged"),
        (b"[]", "damaged"),
    ):
        with pytest.raises(VerifyError, match=message):
            Footer.from_bytes(damaged)
    foreign = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), foreign)
    for bytes_, message in ((foreign.getvalue(), "not a part"), (b"PAR1 rubbish", "cannot be read")):
        with pytest.raises(VerifyError, match=message):
            read_footer(io.BytesIO(bytes_))


def test_names():
    assert part_name(128, 42) == "data/train-00042-of-00128.parquet"
    assert part_name(128, 42, "webdataset") == "data/train-00042-of-00128.tar"
    assert timings_name(128, 42) == "timings/part-00042.parquet"
    assert rejects_name(128, 42) == "rejects/part-00042.parquet"
    assert part_name(1_234_567, 42) == "data/train-0000042-of-1234567.parquet"
    for format in ("parquet", "webdataset"):
        assert part_index(128, part_name(128, 42, format)) == 42
    for foreign in (
        part_name(129, 42),
        "data/train-00128-of-00128.parquet",
        "data/train-000042-of-00128.parquet",
        "data/train-00042-of-00128.parquet.tmp",
        "data/x/train-00042-of-00128.parquet",
    ):
        assert part_index(128, foreign) is None


def test_a_commit_is_won_once_and_writes_what_is_derived(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(6))
    store = open_store(spec.output.path)
    first = small_part(spec, plan, 1, attempt="first", bad=["../row/5"], started=1000.0, worker="w7")
    assert commit_part(store, first)
    assert not commit_part(store, small_part(spec, plan, 1, attempt="second"))
    assert commit_part(store, first)
    assert [info.key for info in store.list()] == [
        "data/train-00001-of-00002.parquet",
        "rejects/part-00001.parquet",
        "timings/part-00001.parquet",
    ]
    assert store.read(first.key) == first.data

    timings = pq.read_table(io.BytesIO(store.read("timings/part-00001.parquet"))).to_pylist()
    assert [line["stage"] for line in timings[-2:]] == ["part_write", "upload"]
    denoise = timings[2]
    assert denoise["start"] == datetime.datetime.fromtimestamp(1000.26, datetime.UTC)
    assert {name: denoise[name] for name in denoise if name != "start"} == {
        **{
            "shard": 1,
            "attempt": "first",
            "batch": 0,
            "stage": "denoise",
            "rows": 1,
            "height": 1,
            "width": 1,
        },
        **{"tokens": 1, "steps": 5, "seconds": 0.25, "start_s": 0.26, "worker": "w7", "device": "cpu"},
        **{"node": "here", "row_ids": ["../row/4"], "truncated": None},
    }
    rejects = pq.read_table(io.BytesIO(store.read("rejects/part-00001.parquet"))).to_pylist()
    assert rejects == [
        {
            **{"row_id": "../row/5", "error_class": "RowError", "message": "was bad", "stage": "denoise"},
            **{"attempts": 1, "source": 5, "prompt": "a picture of number 5", "shard": 1, "attempt": "first"},
        }
    ]


class CountingFile(io.BytesIO):
    """Counts the bytes that are read."""

    num_bytes = 0

    def read(self, *size):
        data = super().read(*size)
        self.num_bytes += len(data)
        return data


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_of_the_first_rows_little_more_than_those_is_read(tmp_path, format):
    spec, plan = small_job(tmp_path, prompt_table(40), shard_rows=40, format=format)
    read = read_shard(spec, plan.files[0], 0, 40)
    rng = np.random.default_rng(0)
    made = [parts.Made(row, rng.bytes(300_000), 1, 1, 1, (), 0.0) for row in read.rows]
    part = parts.build_part(
        spec, plan, plan.shard(0), attempt=AttemptFacts("a", "w", "cpu"), made=made, rejects=[],
        passthrough=read.passthrough, first_row=0, timings=[], kind="image",
    )  # fmt: skip
    file = CountingFile(part.data)
    rows = list(parts.read_rows(file, "image", format, limit=3))
    assert [row.data for row in rows] == [one.data for one in made[:3]]
    assert file.num_bytes < 3_500_000 < len(part.data) / 3


def test_a_part_may_be_a_tar(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(6), format="webdataset")
    part = small_part(spec, plan, 0, attempt="mine")
    assert part.key == "data/train-00000-of-00002.tar"
    assert read_footer(io.BytesIO(part.data), "webdataset") == part.footer
    with tarfile.open(fileobj=io.BytesIO(part.data)) as tar:
        names = tar.getnames()
        about = json.load(tar.extractfile("000001.json"))
        text = tar.extractfile("000001.txt").read()
        size = Image.open(tar.extractfile("000001.png")).size
    assert names[:4] == ["__overtone__/footer", "000000.png", "000000.json", "000000.txt"]
    assert len(names) == 1 + 3 * 4
    assert (about["row_id"], about["score"], about["tag"]) == ("../row/1", 0.125, "tag 1")
    assert "image" not in about
    assert text == b"a picture of number 1"
    assert size == (SIDE_PX, SIDE_PX)


def test_a_tar_of_videos_with_latents(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(3), format="webdataset", latents=True, video={"fps": 8})
    read = read_shard(spec, plan.files[0], 0, 3)
    video = encode_media(np.zeros((5, 16, 16, 3), np.uint8), spec.output)
    latents = [np.full((4, 2, 2, 2), row.source, np.float16) for row in read.rows]  # [C, T, H, W]
    made = [
        parts.Made(row, video, 16, 16, 1, (), 0.0, own) for row, own in zip(read.rows, latents, strict=True)
    ]
    part = parts.build_part(
        spec, plan, plan.shard(0), attempt=AttemptFacts("a", "w", "cpu"), made=made, rejects=[],
        passthrough=read.passthrough, first_row=0, timings=[], kind="video",
    )  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(part.data)) as tar:
        assert tar.getnames()[1:5] == [f"000000.{end}" for end in ("mp4", "json", "txt", "latents.npy")]
        kept = np.load(io.BytesIO(tar.extractfile("000002.latents.npy").read()))
        about = json.load(tar.extractfile("000002.json"))
    assert (kept.dtype, kept.shape, kept.max()) == (np.float32, (4, 2, 2, 2), 2)
    assert "latents" not in about
    rows = list(parts.read_rows(io.BytesIO(part.data), "video", "webdataset"))
    assert [(row.row_id, row.data) for row in rows] == [(row.row_id, video) for row in read.rows]


def test_a_name_of_ours_cannot_pass_through(tmp_path):
    spec, _ = small_job(tmp_path, prompt_table(2))
    with pytest.raises(ValueError, match="stages"):
        part_schema(spec, pa.schema([pa.field("stages", pa.string())]))
