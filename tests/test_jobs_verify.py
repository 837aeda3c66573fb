"""Verify believes nothing: each way in which an output can be wrong is found, named, and told apart."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_jobs import SIDE_PX, commit_part, finish, picture, prompt_table, small_job, small_part

from overtone.jobs.columns import FOOTER_KEY
from overtone.jobs.errors import UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.media import encode_media, look_at
from overtone.jobs.parts import AttemptFacts, Made, build_part, part_name, read_rows
from overtone.jobs.parts.build import Part
from overtone.jobs.plan import make_plan
from overtone.jobs.prompts import read_shard
from overtone.jobs.rows import Reject
from overtone.jobs.spec.sections import Output
from overtone.jobs.store import open_store
from overtone.jobs.verify import verify
from overtone.jobs.verify.check import verify_job


@pytest.fixture(params=["parquet", "webdataset"])
def job(request, tmp_path):
    """A finished job of three shards, with a row rejected by the reader and one by a worker."""
    prompts = [f"a picture of {i}" for i in range(10)]
    prompts[6] = None
    spec, plan = small_job(
        tmp_path,
        prompt_table(10, prompt=prompts, num_images=[2] + [1] * 9),
        format=request.param,
    )
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan, bad=["../row/9"])
    return spec, plan, store


def kinds(report) -> dict[str, int]:
    return dict(report.num_problems)


def test_a_finished_job_is_proven(job):
    _, _, store = job
    seen = []
    report = verify(store.url, on_part=lambda done, of: seen.append((done, of)))
    assert report.ok, report.text()
    assert (report.rows_expected, report.rows, report.rejects) == (11, 9, 2)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert "every row is there exactly once; checksums agree; every picture decodes" in report.text()
    assert report.as_dict()["ok"] is True
    assert "were not decoded" in verify(store.url, decode=False).text()


def test_missing_parts(job):
    spec, plan, store = job
    key = part_name(plan, 1, spec.output.format)
    for name in (key, "timings/part-00001.parquet", "rejects/part-00001.parquet"):
        store.delete(name)
    report = verify(store.url)
    assert kinds(report) == {"missing_part": 1}
    assert f"{key}: the part is missing" in report.text()
    assert "Run the job again" in report.text()


def test_foreign_files(job):
    spec, plan, store = job
    other = "webdataset" if spec.output.format == "parquet" else "parquet"
    foreign = [
        "data/extra.parquet",
        part_name(plan, 0, other),
        part_name(99, 0),
        "timings/part-00077.parquet",
    ]
    for key in foreign:
        store.put(key, b"")
    report = verify(store.url)
    assert kinds(report) == {"foreign_file": 4}
    assert {problem.where for problem in report.problems} == {*foreign}


def test_rows_that_a_worker_forgot_or_made_twice(job):
    spec, plan, store = job
    part = small_part(spec, plan, 2, bad=["../row/9"], forgotten=["../row/8"])
    store.put(part.key, part.data)
    report = verify(store.url)
    assert kinds(report) == {"wrong_rows": 1, "wrong_derived": 2}
    assert f"{part.key}: 1 row missing: '../row/8'" in report.text()
    part = small_part(spec, plan, 2, bad=["../row/9"], repeated=["../row/8"])
    store.put(part.key, part.data)
    report = verify(store.url, repair=True)
    assert kinds(report) == {"wrong_rows": 1, "duplicate_rows": 1}
    assert f"{part.key}: 1 row too many: '../row/8'" in report.text()


def rewritten(part: Part, change) -> bytes:
    """A Parquet part with changed rows and its old footer."""
    file = pq.ParquetFile(io.BytesIO(part.data))
    table = change(file.read())
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({FOOTER_KEY: file.metadata.metadata[FOOTER_KEY]})
    return sink.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(1), "it has 3 rows, its footer says 4"),
        (lambda table: table.take([0, 1, 3, 2]), "checksums differ"),
        (lambda table: table.drop_columns(["score"]), "columns are not those of this job"),
        (
            lambda table: table.set_column(0, "row_id", pa.array(["a", "b", "c", "d"])),
            "checksums differ",
        ),
    ],
)
def test_parts_that_were_changed(tmp_path, change, message):
    spec, plan = small_job(tmp_path, prompt_table(8))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan)
    part = small_part(spec, plan, 1)
    store.put(part.key, rewritten(part, change))
    report = verify(store.url)
    assert kinds(report) == {"broken_part": 1}
    assert message in report.text()


def test_broken_parts(job):
    spec, plan, store = job
    key = part_name(plan, 1, spec.output.format)
    data = store.read(key)
    middle = data.index(b"IDAT") + 20
    for damaged in (data[: len(data) // 2], b"", data[:middle] + b"\0\0\0\0" + data[middle + 4 :]):
        store.put(key, damaged)
        report = verify(store.url)
        assert set(kinds(report)) <= {"broken_part", "broken_media"}
        assert kinds(report)["broken_part"] == 1
        assert "Delete a broken part and run the job again" in report.text()


def test_parts_of_another_job_or_shard(job, tmp_path):
    spec, plan, store = job
    store.put(part_name(plan, 1, spec.output.format), small_part(spec, plan, 0).data)
    other_spec, other_plan = small_job(
        tmp_path / "other", prompt_table(10, prompt=["x"] * 10), format=spec.output.format
    )
    store.put(part_name(plan, 2, spec.output.format), small_part(other_spec, other_plan, 2).data)
    report = verify(store.url)
    assert kinds(report) == {"broken_part": 2}
    assert "it is the part of shard 0 of 3" in report.text()
    assert "its fingerprint differs" in report.text()


def test_pictures_that_do_not_decode(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(4), image={"codec": "jpeg"})
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    read = read_shard(spec, plan.files[0], 0, 4)
    good = pq.read_table(io.BytesIO(small_part(spec, plan, 0).data))["image"].to_pylist()
    data = [image["bytes"] for image in good]
    data[1], data[2] = data[1][:100], b""
    sizes = [16, 16, 16, 17]
    made = [
        Made(row, one, size, 16, 10, (), 0.0) for row, one, size in zip(read.rows, data, sizes, strict=True)
    ]
    part = build_part(
        spec, plan, plan.shard(0), attempt=AttemptFacts("a", "w", "cpu"), made=made, rejects=[],
        passthrough=read.passthrough, first_row=0, timings=[],
    )  # fmt: skip
    assert commit_part(store, part)
    report = verify(store.url)
    assert kinds(report) == {"broken_media": 3}
    assert "'../row/1': not a whole picture" in report.text()
    assert "'../row/3': 16x16 pixels instead of 17x16" in report.text()
    assert verify(store.url, decode=False).ok


def test_rows_that_are_there_twice(tmp_path):
    names = ["a", "b", "c", "d", "e", "b", "g", "a"]
    spec, plan = small_job(tmp_path, prompt_table(8, row_id=names))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan)
    report = verify(store.url)
    assert kinds(report) == {"duplicate_rows": 2}
    first, second = part_name(plan, 0), part_name(plan, 1)
    assert f"{first}: row 'b' is there again in {second}" in report.text()


def test_missing_and_wrong_timings_and_rejects_are_repaired(job):
    _, _, store = job
    whole = pq.read_table(io.BytesIO(store.read("timings/part-00000.parquet")))
    rejects = store.read("rejects/part-00001.parquet")
    store.delete("timings/part-00000.parquet")
    store.delete("rejects/part-00001.parquet")
    store.put("timings/part-00002.parquet", b"rubbish")
    store.put("rejects/part-00000.parquet", rejects)
    report = verify(store.url)
    assert kinds(report) == {"missing_derived": 2, "wrong_derived": 2}
    assert "--repair" in report.text()
    before = {info.key: info.etag for info in store.list("data/")}
    report = verify(store.url, repair=True)
    assert report.ok, report.text()
    assert report.repaired == 3
    assert {info.key: info.etag for info in store.list("data/")} == before
    assert verify(store.url).ok
    again = pq.read_table(io.BytesIO(store.read("timings/part-00000.parquet")))
    assert again.equals(whole.slice(0, whole.num_rows - 1))  # all but the upload
    assert store.read("rejects/part-00001.parquet") == rejects


def test_input_that_is_gone_leaves_the_rest_checked(job, tmp_path):
    _, _, store = job
    (tmp_path / "prompts.parquet").unlink()
    report = verify(store.url)
    assert kinds(report) == {"unreadable_input": 1}
    assert (report.rows, report.rejects) == (9, 2)


def test_input_files_that_came_or_changed_after_the_plan_are_named(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        pq.write_table(prompt_table(2, row_id=None), folder / f"{name}.parquet")
    spec, _ = small_job(tmp_path, prompt_table(1))
    spec = spec.model_copy(update={"prompts": spec.prompts.model_copy(update={"path": (str(folder),)})})
    plan, store = make_plan(spec), open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan)
    assert verify(store.url).ok
    pq.write_table(prompt_table(3, row_id=None), folder / "b.parquet")
    pq.write_table(prompt_table(1, row_id=None), folder / "c.parquet")
    report = verify(store.url)
    assert kinds(report) == {"changed_input": 2}
    assert "input file c.parquet is new" in report.text()
    assert "b.parquet: 3 rows, was 2" in report.text()
    (folder / "c.parquet").write_bytes(b"no table")
    assert kinds(verify(store.url)) == {"unreadable_input": 1}


def with_pictures(folder, colours):
    """A finished job; a row without a colour has a picture of noise."""
    spec, plan = small_job(folder, prompt_table(len(colours)), shard_rows=len(colours))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    read = read_shard(spec, plan.files[0], 0, len(colours))
    made = [
        Made(row, encode_media(Image.new("RGB", (SIDE_PX, SIDE_PX), colour) if colour else picture(row),
                               spec.output), SIDE_PX, SIDE_PX, 10, (), 0.0)
        for row, colour in zip(read.rows, colours, strict=True)
    ]  # fmt: skip
    part = build_part(
        spec, plan, plan.shard(0), attempt=AttemptFacts("a", "w", "cpu"), made=made, rejects=[],
        passthrough=read.passthrough, first_row=0, timings=[],
    )  # fmt: skip
    assert commit_part(store, part)
    return store


def test_a_blank_picture_among_others_is_a_problem(tmp_path):
    store = with_pictures(tmp_path, [None, None, "black", None])
    report = verify(store.url)
    assert (kinds(report), report.blank) == ({"blank_media": 1}, 1)
    assert "row '../row/2': all of it is one colour, unlike 3 others" in report.text()
    assert "--allow-blank" in report.text()
    allowed = verify(store.url, allow_blank=True)
    assert allowed.ok
    assert "1 of 4 pictures are of one colour, as you allow: '../row/2'" in allowed.text()
    assert verify(store.url, decode=False).ok


@pytest.mark.parametrize("colours", [["red", "white", "black", "#123456"], ["red", None, None], ["red"]])
def test_a_job_of_flat_pictures_passes_with_a_remark(tmp_path, colours):
    report = verify(with_pictures(tmp_path, colours).url)
    assert report.ok
    assert f"{report.blank} of {len(colours)} pictures are of one colour, which may be" in report.text()
    assert report.as_dict()["remarks"] == report.remarks


def test_a_spread_of_pixels_is_of_the_frame_that_has_most():
    black, noise = (np.zeros((3, 16, 16, 3), np.uint8) for _ in range(2))
    noise[2] = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    settings = Output(path="out")
    assert look_at(encode_media(black, settings)).blank
    assert not look_at(encode_media(noise, settings)).blank
    nearly = Image.fromarray(np.random.default_rng(0).integers(99, 102, (64, 64, 3), np.uint8))
    assert look_at(encode_media(nearly, settings)).blank
    assert look_at(encode_media(Image.new("L", (8, 8), 7), settings)).spread == 0


def test_no_job_no_proof(tmp_path):
    with pytest.raises(UserError, match="holds no job"):
        verify(str(tmp_path))


def test_memory_does_not_grow_with_the_part(tmp_path):
    media = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    group = pa.table(
        {
            "row_id": [str(i) for i in range(16)],
            "prompt": ["p"] * 16,
            "height": [1] * 16,
            "width": [1] * 16,
            "image": pa.array([{"bytes": bytes(128 * 1024)}] * 16, media),
        }
    )
    with pq.ParquetWriter(tmp_path / "part", group.schema, compression="none", use_dictionary=False) as out:
        for _ in range(16):
            out.write_table(group)
    usual = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(counting)
    try:
        with (tmp_path / "part").open("rb") as file:
            assert sum(len(row.data) for row in read_rows(file, "image")) == 32 * 1024**2
    finally:
        pa.set_memory_pool(usual)
    assert 2 * 1024**2 < counting.max_memory() < 8 * 1024**2


def test_memory_is_a_few_bytes_a_row(tmp_path):
    """Row_ids are so long that whoever kept them would need 1,000 bytes a row."""

    def name(row: int) -> str:
        return f"{row:07}{'x' * 950}"

    def peak_bytes(shards: int) -> int:
        spec, plan = small_job(tmp_path / str(shards), prompt_table(50 * shards, row_id=None), shard_rows=50)
        store = open_store(spec.output.path)
        for index in range(shards):
            shard = plan.shard(index)
            rows = range(shard.first_row, shard.first_row + shard.num_rows)
            rejects = [Reject(name(row), "RowError", "", "denoise", 1, row, None) for row in rows]
            part = build_part(
                spec, plan, shard, attempt=AttemptFacts(f"a{index}", "w", "cpu"), made=[], rejects=rejects,
                passthrough=plan.passthrough.empty_table(), first_row=shard.first_row, timings=[],
            )  # fmt: skip
            assert commit_part(store, part)
        expected = ((index, [name(50 * index + k) for k in range(50)]) for index in range(shards))
        tracemalloc.start()
        report = verify_job(store, spec, plan, expected)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert report.ok, report.text()
        assert report.rejects == 50 * shards
        return peak

    peak_bytes(1)  # what is loaded and cached at the first time
    assert (peak_bytes(120) - peak_bytes(40)) / (80 * 50) < 100
