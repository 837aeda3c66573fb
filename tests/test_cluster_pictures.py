"""Jobs whose rows start from pictures: what reaches the engine, what a bad picture ends, and the embedded
model's own variations of what it has made."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine
from PIL import Image
from test_cluster_runner import Bench
from test_jobs_given import file_of, picture

from overtone.cluster.dispatch import Assignment
from overtone.cluster.worker import Runner, encode_rows, load_engine, remake
from overtone.jobs.errors import PictureError, PromptsError
from overtone.jobs.plan import make_plan
from overtone.jobs.prompts import read_shard
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store
from overtone.progressive.tiny import world
from overtone.progressive.tiny.judge import judge

SAMPLING = {"strength": 0.5, "num_steps": 4}


def whole(seed: int, size: tuple[int, int] = (192, 128)) -> dict[str, Any]:
    return {"bytes": file_of(picture(seed, size), "JPEG"), "path": f"{seed}.jpg"}


def test_each_row_starts_from_its_picture_at_the_size_that_follows_from_it(tmp_path):
    images = [whole(1), whole(2, (100, 300)), whole(3, (4000, 4000)), whole(1)]
    bench = Bench(tmp_path, ["a", "b", "c", "d"], columns={"image": images}, sampling=SAMPLING)
    bench.attempt(commit_first=True)
    bench.runner.close()
    sizes = {row["row_id"]: (row["width"], row["height"]) for row in bench.rows}
    assert sizes == {"r0": (192, 128), "r1": (128, 320), "r2": (256, 256), "r3": (192, 128)}
    given = bench.engine.pictures
    assert [one.image.size for one in given] == [(192, 128), (192, 128), (128, 320), (256, 256)]
    assert given[0] is given[1]  # one file at one size, decoded once
    assert {row["row_id"]: row["source_image"] for row in bench.rows} == {
        f"r{k}": image for k, image in enumerate(images)
    }


def test_a_tar_of_pairs_is_passed_over_by_the_check_that_makes_rows_again(tmp_path):
    output = {"path": str(tmp_path / "out"), "format": "webdataset", "sources": "digest"}
    bench = Bench(tmp_path, ["a"], columns={"image": [whole(1)]}, sampling=SAMPLING, output=output)
    bench.attempt(commit_first=True)
    bench.runner.close()
    found = remake(bench.store, 1, lambda spec: bench.engine)
    assert found.skipped == ["rows that start from pictures, which this check has no place for"]


def test_a_size_that_is_given_comes_first(tmp_path):
    columns = {"image": [whole(1), whole(2)], "height": [64, None], "width": [64, None]}
    bench = Bench(tmp_path, ["a", "b"], columns=columns, sampling=SAMPLING | {"height": 96, "width": 128})
    bench.attempt(commit_first=True)
    bench.runner.close()
    assert sorted((row["width"], row["height"]) for row in bench.rows) == [(64, 64), (128, 96)]


def test_a_truncated_picture_is_a_reject_and_the_others_of_its_batch_are_made(tmp_path):
    images = [whole(1), {"bytes": whole(2)["bytes"][:-4000], "path": "half.jpg"}, whole(3)]
    masks = [None, None, {"bytes": file_of(picture(4, (10, 30), "L")), "path": None}]
    bench = Bench(tmp_path, ["a", "b", "c"], columns={"image": images, "mask": masks}, sampling=SAMPLING)
    bench.attempt(commit_first=True)
    bench.runner.close()
    assert [row["row_id"] for row in bench.rows] == ["r0"]
    by_row = {reject["row_id"]: reject for reject in bench.rejects}
    assert by_row["r1"]["error_class"] == by_row["r2"]["error_class"] == PictureError.__name__
    assert by_row["r1"]["stage"] == "image_read"
    assert by_row["r1"]["message"].startswith("its picture: it cannot be decoded: ")
    assert "sides must be in the same ratio" in by_row["r2"]["message"]


def test_several_images_of_one_row_share_its_picture_and_have_noise_of_their_own(tmp_path):
    bench = Bench(tmp_path, ["a"], columns={"image": [whole(1)], "num_images": [3]}, sampling=SAMPLING)
    bench.attempt(commit_first=True)
    bench.runner.close()
    assert len({id(one) for one in bench.engine.pictures}) == 1
    assert len({row["seed"] for row in bench.rows}) == 3
    assert len({row["source_sha256"] for row in bench.rows}) == 1


def test_without_pictures_the_engine_is_asked_as_ever(tmp_path):
    bench = Bench(tmp_path, ["a"])
    (file,) = bench.plan.files
    rows = read_shard(bench.spec, file, 0, 1).rows

    class Old(FakeEngine):
        def encode(self, prompts, negatives, sampling):
            return list(prompts)

    assert encode_rows(Old(), rows, bench.spec.sampling) == ["a"]
    bench.runner.close()


# ------------------------------------------------------------------- one job's output as the next's table


def chained(folder: Path, table: Path, engine: Any, **more: Any) -> list[dict[str, Any]]:
    """The rows that a job makes of another job's part."""
    prompts = {"path": str(table), "text": "in watercolour"} | more
    _, part = made(folder, {"prompts": prompts, "sampling": SAMPLING}, engine)
    return pq.read_table(part).to_pylist()


def test_an_output_is_the_next_jobs_table_as_it_is_and_row_id_joins_all(tmp_path):
    """What made a picture comes along, what was measured does not, and noise and prompt are new."""
    columns = {"tag": ["x", "y"], "seed": [11, 12], "num_images": [1, 2]}
    bench = Bench(tmp_path / "first", ["a red ring", "a blue star"], columns=columns)
    bench.attempt(commit_first=True)
    bench.runner.close()
    (first,) = (tmp_path / "first" / "out" / "data").glob("*.parquet")
    before = {row["row_id"]: row for row in bench.rows}
    assert sorted(before) == ["r0", "r1#0", "r1#1"]
    second = chained(tmp_path / "second", first, FakeEngine())
    for row in second:
        source = before[row["row_id"]]
        assert row["source_image"] == source["image"]
        assert (row["source_prompt"], row["source_seed"]) == (source["prompt"], source["seed"])
        assert (row["source_model"], row["tag"], row["prompt"]) == ("tiny", source["tag"], "in watercolour")
        assert row["seed"] != source["seed"]
        assert (row["height"], row["width"]) == (source["height"], source["width"])
    (part,) = (tmp_path / "second" / "data").glob("*.parquet")
    third = chained(tmp_path / "third", part, FakeEngine(), text="by night", keep=["tag"])
    assert {row["row_id"] for row in third} == set(before)
    assert {row["tag"] for row in third} == {"x", "y"}
    assert {row["prompt"] for row in third} == {"by night"}
    assert "source_prompt" not in third[0]
    again = chained(tmp_path / "fourth", part, FakeEngine())
    assert {row["source_prompt"] for row in again} == {"in watercolour"}
    joined = duckdb.sql(
        f"select count(*) from '{first}' a join '{part}' b using (row_id) "
        "where sha256(a.image.bytes) = b.source_sha256"
    ).fetchall()
    assert joined == [(3,)]


def test_what_is_to_be_made_of_an_output_is_said_anew(tmp_path):
    bench = Bench(tmp_path, ["a red ring"])
    bench.attempt(commit_first=True)
    bench.runner.close()
    (first,) = (tmp_path / "out" / "data").glob("*.parquet")
    base = {"model": "tiny", "output": str(tmp_path / "next"), "sampling": SAMPLING}

    def rows(**prompts: Any) -> list[Any]:
        spec = JobSpec.model_validate(base | {"prompts": {"path": str(first)} | prompts})
        (file,) = make_plan(spec).files
        return read_shard(spec, file, 0, 1).rows

    with pytest.raises(PromptsError, match="is a job's output, whose prompts tell of the pictures"):
        rows()
    (same,) = rows(columns={"prompt": "prompt", "seed": "seed"})
    assert (same.prompt, same.seed) == ("a red ring", bench.rows[0]["seed"])
    with pytest.raises(ValueError, match="give `text`, or a column of prompts"):
        rows(text="x", columns={"prompt": "prompt"})


# ------------------------------------------------------------------------------------- the embedded model


def made(folder: Path, spec: dict[str, Any], engine: Any) -> tuple[JobSpec, Path]:
    """A job of one shard, made here; its part."""
    job = JobSpec.model_validate({"model": "tiny", "output": str(folder), "seed": 3} | spec)
    runner = Runner(job, make_plan(job), open_store(str(folder)), engine)
    try:
        *_, last = runner.attempt(Assignment(0, 1, commit_first=True))
        assert type(last).__name__ == "ShardCommitted"
    finally:
        runner.close()
    (part,) = (folder / "data").glob("*.parquet")
    return job, part


@pytest.fixture(scope="module")
def engine() -> Any:
    return load_engine(JobSpec.model_validate({"model": "tiny", "prompts": "-", "output": "-"}))


def test_a_variation_of_what_a_job_has_made_changes_one_things_colour(tmp_path, engine):
    """Two jobs, joined by `row_id`; the second starts from the first one's pictures, coarse grid first, and
    is judged by what it was told, background and all."""
    scenes = [world.scene(seed) for seed in world.held_out(3)]
    captions = [world.caption(scene) for scene in scenes]
    changed = []
    for caption in captions:
        kinds = world.parse(caption).kinds
        other = next(c for c in ("green", "purple", "orange") if c not in {kind.colour for kind in kinds})
        old, new = f" {kinds[0].colour} {kinds[0].shape}", f" {other} {kinds[0].shape}"
        changed.append(caption.replace(old, new, 1))
    pq.write_table(pa.table({"row_id": ["x", "y", "z"], "prompt": captions}), tmp_path / "p.parquet")
    sampling = {"num_steps": 10, "true_cfg_scale": 3.0, "delta": 0.2}
    _, first = made(tmp_path / "one", {"prompts": str(tmp_path / "p.parquet"), "sampling": sampling}, engine)
    source = pq.read_table(first, columns=["row_id", "image"]).append_column("prompt", [changed])
    pq.write_table(source, tmp_path / "q.parquet")
    varied = {"prompts": str(tmp_path / "q.parquet"), "sampling": sampling | {"strength": 0.9}}
    spec, second = made(tmp_path / "two", varied, engine)
    pairs = duckdb.sql(
        "select a.row_id, a.image.bytes as before, b.source_image.bytes as source, b.image.bytes as after, "
        f"b.prompt, len(b.stages) as stages, b.num_steps from '{first}' a join '{second}' b using (row_id) "
        "order by row_id"
    ).fetchall()
    assert [pair[0] for pair in pairs] == ["x", "y", "z"]
    right, things = 0, 0
    for _, before, source_image, after, prompt, stages, num_steps in pairs:
        assert before == source_image != after
        assert (stages, num_steps) == (2, 10)
        found = judge(_opened(after), prompt)
        right, things = right + found[0], things + found[1]
    assert spec.pictured
    assert right >= things - 1  # of five or six


def _opened(data: bytes) -> Any:
    return Image.open(io.BytesIO(data)).convert("RGB")
