"""Pictures that rows start from, as the prompt table gives them: kinds of columns, bad pictures, and what is
read of them when."""

from __future__ import annotations

import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_jobs import SIDE_PX, prompt_table

from overtone.jobs.errors import PromptsError
from overtone.jobs.parts import Made, StageTime, part_schema
from overtone.jobs.parts.table import rows_table
from overtone.jobs.plan import make_plan
from overtone.jobs.preview import preview
from overtone.jobs.prompts import GivenPictures, ShardRows, list_files, read_shard
from overtone.jobs.prompts.given import MAX_PIXELS, Spool
from overtone.jobs.prompts.web import WebError
from overtone.jobs.row_check import check_rows
from overtone.jobs.rows import Row
from overtone.jobs.sampling import checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec


def picture(seed: int = 0, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def spec_of(path: Path, **more: Any) -> JobSpec:
    base = {"model": "tiny", "prompts": str(path), "output": str(path.parent / "out")}
    return JobSpec.model_validate(base | {"sampling": {"strength": 0.8}} | more)


def read(folder: Path, table: pa.Table, **more: Any) -> ShardRows:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "prompts.parquet")
    spec = spec_of(folder / "prompts.parquet", **more)
    (file,) = list_files(spec)
    return read_shard(spec, file, 0, table.num_rows)


# --------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("kind", ["struct", "binary", "path", "struct of paths", "dictionary"])
def test_a_picture_comes_as_bytes_as_a_path_or_as_datasets_writes_it(tmp_path, kind):
    files = [file_of(picture(seed)) for seed in range(3)]
    (tmp_path / "pictures").mkdir()
    paths = [f"pictures/{i}.png" for i in range(3)]
    for path, data in zip(paths, files, strict=True):
        (tmp_path / path).write_bytes(data)
    columns = {
        "struct": [{"bytes": data, "path": "a/b.png"} for data in files],
        "binary": pa.array(files, pa.binary()),
        "path": paths,
        "struct of paths": pa.array(
            [{"bytes": None, "path": path} for path in paths],
            pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]),
        ),
        "dictionary": pa.array(paths).dictionary_encode(),
    }
    found = read(tmp_path, prompt_table(3, image=columns[kind]))
    assert not found.rejects
    assert [row.image.read() for row in found.rows] == files
    assert [(row.image.height_px, row.image.width_px) for row in found.rows] == [(16, 24)] * 3
    names = {"struct": ["b.png"] * 3, "binary": [None] * 3}.get(kind, ["0.png", "1.png", "2.png"])
    assert [row.image.name for row in found.rows] == names
    assert found.passthrough.column_names == ["tag", "score"]


def test_masks_and_names_of_columns(tmp_path):
    table = prompt_table(
        3,
        photo=pa.array([file_of(picture(1)), file_of(picture(1)), None], pa.binary()),
        hole=pa.array([file_of(picture(2, mode="L")), None, None], pa.binary()),
    )
    found = read(
        tmp_path,
        table,
        prompts={"path": str(tmp_path / "prompts.parquet"), "columns": {"image": "photo", "mask": "hole"}},
    )
    first, second = found.rows
    assert first.mask.sha256 != first.image.sha256 == second.image.sha256
    assert second.mask is None
    assert [reject.message for reject in found.rejects] == ["image is null, and rows start from pictures"]
    alone = read(
        tmp_path,
        table,
        prompts={"path": str(tmp_path / "prompts.parquet"), "columns": {"image": "photo", "mask": "hole"}},
        sampling={},
    )
    assert [row.row_id for row in alone.rows] == ["../row/0"]
    assert "mask is null, and sampling.strength is unset" in alone.rejects[0].message


def test_csv_and_several_images_of_one_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(file_of(picture()))
    (tmp_path / "p.csv").write_text("prompt,image,num_images\nx,a.png,2\ny,b.png,1\n")
    spec = spec_of(tmp_path / "p.csv")
    (file,) = list_files(spec)
    found = read_shard(spec, file, 0, 2)
    assert [row.image.name for row in found.rows] == ["a.png", "a.png"]
    assert [reject.message for reject in found.rejects] == ["image 'b.png' is not there"]


# ----------------------------------------------------------------------------------------------- bad pictures


def header_of(width: int, height: int) -> bytes:
    """A PNG that says so, and has no pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BAD = {
    "huge header": (header_of(60_000, 60_000), "image has more than 64,000,000 pixels"),
    "large header": (
        header_of(MAX_PIXELS // 8000 + 1, 8000),
        "image has 8001x8000 pixels; at most 64,000,000",
    ),
    "empty": (b"", "image is empty"),
    "html": (
        b"<!DOCTYPE html><html>",
        "image is of no known format of pictures; it begins with b'<!DOCTYPE html><'",
    ),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image is of no known format"),
    "half a header": (file_of(picture())[:20], "image cannot be opened: 'Truncated File Read'"),
}
GOOD = {
    "cmyk": (file_of(picture(mode="CMYK"), "JPEG"), (16, 24)),
    "16 bits": (file_of(Image.fromarray(np.full((16, 24), 999, np.uint16))), (16, 24)),
    "webp": (file_of(picture(), "WEBP"), (16, 24)),
    "tiff": (file_of(picture(), "TIFF"), (16, 24)),
    "animated": (file_of(picture(), "GIF", save_all=True, append_images=[picture(1)]), (16, 24)),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_a_reject_with_its_reason(tmp_path, kind):
    data, reason = BAD[kind]
    found = read(tmp_path, prompt_table(2, image=pa.array([data, file_of(picture())], pa.binary())))
    assert [row.row_id for row in found.rows] == ["../row/1"]
    (reject,) = found.rejects
    assert reject.message.startswith(reason)
    assert (reject.error_class, reject.stage, reject.row_id) == ("InvalidRow", "read", "../row/0")


@pytest.mark.parametrize("kind", GOOD)
def test_an_odd_picture_is_none_the_worse(tmp_path, kind):
    data, size = GOOD[kind]
    (row,) = read(tmp_path, prompt_table(1, image=pa.array([data], pa.binary()))).rows
    assert (row.image.height_px, row.image.width_px) == size


def test_a_picture_that_its_exif_turns_has_the_turned_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(picture(), "JPEG", exif=exif)
    (row,) = read(tmp_path, prompt_table(1, image=pa.array([data], pa.binary()))).rows
    assert (row.image.height_px, row.image.width_px) == (24, 16)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "image '../secret.png' leads out of the folder of the table"),
        ("{above}/secret.png", "leads out of the folder of the table"),
        ("link/secret.png", "image 'link/secret.png' leads out of the folder of the table"),
        ("none.png", "image 'none.png' is not there"),
        ("sub", "image 'sub' is not there"),
        ("http://169.254.169.254/key?token=s3cret", "image is a URL, and `prompts.urls` is not set"),
        ("", "image is no path: ''"),
        ("a" * 300, "can be no file's: File name too long"),
    ],
)
def test_a_path_never_leaves_the_tables_folder(tmp_path, path, reason):
    (tmp_path / "secret.png").write_bytes(file_of(picture()))
    inner = tmp_path / "in"
    (inner / "sub").mkdir(parents=True)
    os.symlink(tmp_path, inner / "link")
    found = read(inner, prompt_table(1, image=[path.format(above=tmp_path)]))
    assert not found.rows
    assert reason in found.rejects[0].message
    assert "s3cret" not in found.rejects[0].message


def test_urls_are_fetched_together_and_named_without_what_may_be_secret(tmp_path):
    asked, both = [], Barrier(2, timeout=30)

    def fetch(url: str, most_bytes: int) -> bytes:
        asked.append(url)
        both.wait()  # one waits for the other, which is asked for meanwhile
        if "none" in url:
            raise WebError("https://example.org/none answers 404")
        return file_of(picture())

    spec = spec_of(tmp_path / "p", prompts={"path": str(tmp_path / "p"), "urls": True})
    urls = ["https://me:pw@example.org/a/b.png?token=s3cret", "https://example.org/none"]
    good, bad = GivenPictures(spec, str(tmp_path / "p"), fetch).of_all([{"image": url} for url in urls])
    assert sorted(asked) == sorted(urls)
    assert good[0].name == "b.png"
    assert bad == (None, None, "image https://example.org/none answers 404")
    other = GivenPictures(spec, str(tmp_path / "p"), fetch).of({"image": "ftp://example.org/a.png"})
    assert other[2] == "image is a URL that is neither http nor https; give bytes, or a path"


def test_an_absolute_path_in_the_folder_is_fine(tmp_path):
    (tmp_path / "a.png").write_bytes(file_of(picture()))
    assert len(read(tmp_path, prompt_table(1, image=[str(tmp_path / "a.png")])).rows) == 1


# ------------------------------------------------------------------------------------ what is read, and when


def test_plan_and_checks_read_no_picture(tmp_path):
    """Paths to nothing and bytes of nothing are no matter before a worker reads its shard."""
    table = prompt_table(4, image=["a.png", "b.png", "../c.png", None])
    pq.write_table(table, tmp_path / "prompts.parquet")
    spec = spec_of(tmp_path / "prompts.parquet")
    job_plan = make_plan(spec)
    told = preview(spec, check=True).text()
    assert "start       each row from its picture, at step 6 of 30 (noise level 0.8" in told
    assert "(by FLOPs, 20 tokens of text included)" in told
    assert "disk        about 419 kB as png" in told  # at the job's own size
    found = check_rows(spec, job_plan, checkpoint_of(spec))
    assert (found.samples, found.rejects, found.unplanned) == (4, 0, 4)
    assert "4  whose size and stages are known once their pictures are read" in "\n".join(found.lines())
    sized = spec.model_copy(
        update={"sampling": spec.sampling.model_copy(update={"height": 256, "width": 256})}
    )
    assert check_rows(sized, job_plan, checkpoint_of(spec)).unplanned == 0


def test_a_file_is_kept_once_and_read_from_any_thread():
    spool = Spool()
    files = [os.urandom(1000), os.urandom(3000)]
    digests = [spool.add(data) for data in files * 3]
    assert digests[:2] * 3 == digests
    assert spool.size_bytes == 4000
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(spool.read, digests * 50)) == files * 150


# -------------------------------------------------------------------------------------------------- the spec


def test_tables_with_such_columns_are_what_they_were_in_other_jobs(tmp_path):
    """`mask` passes through, `image` is refused or left out, and no fingerprint changes."""
    table = prompt_table(1, mask=["m"], image=[b"?"])
    pq.write_table(table, tmp_path / "prompts.parquet")
    plain = spec_of(tmp_path / "prompts.parquet", sampling={})
    with pytest.raises(PromptsError, match="'image' would pass through"):
        list_files(plain)
    kept = spec_of(
        tmp_path / "x", sampling={}, prompts={"path": str(tmp_path / "prompts.parquet"), "keep": ["mask"]}
    )
    (file,) = list_files(kept)
    assert file.passthrough.names == ["mask"]
    assert "image" not in dict(file.columns)
    assert read_shard(kept, file, 0, 1).rows[0].image is None
    assert "sources" not in plain.samples()
    assert "sources" not in plain.to_json()
    assert not {"strength", "fit"} & set(plain.samples()["sampling"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sampling": {"fit": "pad"}}, "sampling.fit is for rows that start from pictures"),
        (
            {"sampling": {}, "output": {"path": "o", "sources": "digest"}},
            "output.sources is for rows that start",
        ),
        (
            {"sampling": {}, "prompts": {"path": "p", "columns": {"image": "photo"}}},
            "names an image that would change nothing",
        ),
        ({"prompts": {"path": "p", "columns": {"image": None}}}, "leaves none"),
        ({"output": {"path": "o", "format": "webdataset"}}, "webdataset has no place"),
        ({"sampling": {}, "prompts": {"path": "p", "urls": True}}, "prompts.urls is for rows that start"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        spec_of(tmp_path / "p.parquet", **more)


def test_a_table_without_pictures_is_refused_where_rows_start_from_them(tmp_path):
    pq.write_table(prompt_table(1, photo=["a.png"]), tmp_path / "prompts.parquet")
    with pytest.raises(PromptsError, match="has no column 'image', whose pictures the rows start from"):
        list_files(spec_of(tmp_path / "prompts.parquet"))
    pq.write_table(prompt_table(1, image=[3]), tmp_path / "prompts.parquet")
    with pytest.raises(PromptsError, match="column image has type int64, but must hold pictures as"):
        list_files(spec_of(tmp_path / "prompts.parquet"))
    pq.write_table(prompt_table(1, image=["a"], source_sha256=["b"]), tmp_path / "prompts.parquet")
    with pytest.raises(PromptsError, match="'source_sha256' would pass through"):
        list_files(spec_of(tmp_path / "prompts.parquet"))


def test_a_model_that_makes_videos_is_refused_when_planned(tmp_path):
    spec = spec_of(tmp_path / "p.parquet", model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    with pytest.raises(ValueError, match=r"wan2\.1 cannot start from a picture: it makes videos"):
        sampling_plan(spec, checkpoint_of(spec))


# ------------------------------------------------------------------------------------------------ the output


def made(row: Row) -> Made:
    stage = StageTime(height=2, width=2, tokens=1, steps=1, seconds=0.1)
    return Made(row, file_of(picture()), SIDE_PX, SIDE_PX, 1, (stage,), 0.1)


@pytest.mark.parametrize("sources", [None, "digest"])
def test_a_row_of_the_output_is_a_pair(tmp_path, sources):
    files = [file_of(picture(seed)) for seed in range(2)]
    hole = file_of(picture(5, mode="L"))
    table = prompt_table(
        2,
        image=[{"bytes": data, "path": "x/a.png"} for data in files],
        mask=pa.array([hole, None], pa.binary()),
    )
    output = {"path": str(tmp_path / "out")} | ({"sources": sources} if sources else {})
    pq.write_table(table, tmp_path / "prompts.parquet")
    spec = spec_of(tmp_path / "prompts.parquet", output=output)
    (file,) = list_files(spec)
    found = read_shard(spec, file, 0, 2)
    schema = part_schema(spec, found.passthrough.schema)
    rows = rows_table(
        spec, schema, [made(row) for row in found.rows], found.passthrough, 0, "image"
    ).to_pylist()
    digests = [row.image.sha256 for row in found.rows]
    assert [row["source_sha256"] for row in rows] == digests
    assert [row["source_mask_sha256"] for row in rows] == [found.rows[0].mask.sha256, None]
    if sources == "digest":
        assert "source_image" not in rows[0]
        assert spec.samples()["sources"] == "digest"
    else:
        assert [row["source_image"] for row in rows] == [{"bytes": data, "path": "a.png"} for data in files]
        assert [row["source_mask"] for row in rows] == [{"bytes": hole, "path": None}, None]
        assert b'"source_image": {"_type": "Image"}' in schema.metadata[b"huggingface"]
