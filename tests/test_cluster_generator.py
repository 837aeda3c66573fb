"""Overtone in a Ray Data pipeline: what goes in, what comes out, and that a job would have made the same."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import uuid
from pathlib import Path

import fake_engine
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.cloudpickle
from fake_engine import FakeEngine, Fakes
from PIL import Image

from overtone import cluster
from overtone.cluster.driver import run_job
from overtone.cluster.ray_data import ProgressiveGenerator
from overtone.jobs.spec import JobSpec
from overtone.jobs.verify import verify

pytestmark = pytest.mark.ray

README = Path(__file__).parents[1] / "cluster" / "README.md"
SAMPLING = {"height": 64, "width": 64, "num_steps": 4}


def generator(**more) -> ProgressiveGenerator:
    return ProgressiveGenerator("tests/fake", SAMPLING, engine_factory=Fakes(), **more)


def pictures(table: pa.Table) -> dict[str, bytes | None]:
    return {row["row_id"]: row["image"] and row["image"]["bytes"] for row in table.to_pylist()}


def table(prompts: list[str | None], **columns) -> pa.Table:
    return pa.table({"row_id": [f"r{k}" for k in range(len(prompts))], "prompt": prompts, **columns})


def test_it_is_the_package_s_public_name_and_costs_nothing_until_asked_for():
    assert cluster.ProgressiveGenerator is ProgressiveGenerator
    assert cluster.__all__ == ["ProgressiveGenerator"]
    with pytest.raises(AttributeError, match="no attribute 'Generator'"):
        cluster.Generator  # noqa: B018
    code = "import cluster, sys; print([m for m in ('torch', 'ray', 'pyarrow') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_batch_gives_the_columns_of_a_job_s_output_those_of_the_input_and_error():
    asked = table(["a", "b"], seed=pa.array([None, 2**62 + 1]), negative_prompt=["x", None], score=[0.5, 1.5])
    made = generator()(asked)
    assert made.column_names == [
        *("row_id", "prompt", "prompt_truncated", "seed", "height", "width", "image", "mode", "delta"),
        *("num_steps", "guidance_scale", "true_cfg_scale", "model", "stages", "denoise_seconds"),
        *("negative_prompt", "score", "error"),
    ]
    rows = made.to_pylist()
    assert [row["row_id"] for row in rows] == ["r0", "r1"]
    assert rows[1]["seed"] == 2**62 + 1
    assert [row["score"] for row in rows] == [0.5, 1.5]
    assert [row["error"] for row in rows] == [None, None]
    assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).size == (64, 64)
    assert [stage["height"] for stage in rows[0]["stages"]] == [4, 8]
    assert b"huggingface" in made.schema.metadata


def test_rows_start_from_pictures_where_there_is_a_strength():
    file = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(file, "PNG")
    asked = table(
        ["a", "b", "c"],
        image=[{"bytes": file.getvalue(), "path": "x.png"}, {"bytes": b"<html>", "path": None}, None],
        mask=[None, None, None],
    )
    made = ProgressiveGenerator("tests/fake", {"num_steps": 4, "strength": 0.5}, engine_factory=Fakes())(
        asked
    ).to_pylist()
    assert (made[0]["width"], made[0]["height"]) == (64, 64)  # the nearest in steps of 64 px
    assert made[0]["source_image"] == {"bytes": file.getvalue(), "path": "x.png"}
    assert [row["error"] and row["error"].split(";")[0] for row in made] == [
        None,
        "InvalidRow in read: image is of no known format of pictures",
        "InvalidRow in read: image is null, and rows start from pictures",
    ]
    with pytest.raises(ValueError, match="columns image have the names of output columns"):
        generator()(asked)


def test_a_row_s_pixels_are_its_own_whatever_the_batch_the_format_and_the_order():
    asked = table(["a", "b", "c", "d"])
    once = pictures(generator()(asked))
    assert len(set(once.values())) == 4
    assert pictures(generator(workers={"batch_size": 3})(asked)) == once
    assert pictures(generator()(asked.take([2, 0]))) == {key: once[key] for key in ("r2", "r0")}
    arrays = {name: np.array(asked[name].to_pylist(), object) for name in asked.column_names}
    assert pictures(generator()(arrays)) == once
    assert pictures(generator()(pd.DataFrame(arrays))) == once
    assert pictures(generator(seed=1)(asked)) != once


def test_rows_that_cannot_be_made_come_back_with_their_reason_in_their_place():
    asked = table(
        ["a", "!raise", None, "!oom", "b", "!nan", "c"],
        height=pa.array([None, None, None, None, 63, None, None], pa.int64()),
        tag=list("tuvwxyz"),
    )
    rows = generator(workers={"batch_size": 4})(asked).to_pylist()
    assert [row["tag"] for row in rows] == list("tuvwxyz")
    assert [row["image"] is None for row in rows] == [False, True, True, False, True, True, False]
    assert [row["image"] is None for row in rows] == [row["error"] is not None for row in rows]
    assert rows[1]["error"] == "RuntimeError in denoise: this prompt raises"
    assert rows[2]["error"] == "InvalidRow in read: prompt is null"
    assert rows[4]["error"].startswith("SizeError in plan: ")
    assert "NotFinite" in rows[5]["error"]
    assert (rows[1]["prompt"], rows[1]["stages"], rows[2]["prompt"]) == ("!raise", None, None)


def test_nan_is_nothing_as_in_a_job_and_views_and_uuids_are_what_they_stand_for():
    nan, ids = float("nan"), [uuid.UUID(int=1), uuid.UUID(int=2)]
    asked = pa.table(
        {
            "row_id": pa.array([one.bytes for one in ids], pa.uuid()),
            "prompt": pa.array(["a", "b"], pa.string_view()),
            "height": [nan, 64.0],
            "num_images": [nan, 1.0],
            "tags": pa.array([["x"], None], pa.list_(pa.string_view())),
        }
    )
    made = generator()(asked)
    assert made["error"].to_pylist() == [None, None]
    assert made["row_id"].to_pylist() == [str(one) for one in ids]
    assert made["tags"].to_pylist() == [["x"], None]
    assert made.schema.field("tags").type == pa.list_(pa.string())
    unnamed = asked.drop_columns(["row_id"])
    nulls = unnamed.set_column(1, "height", pa.array([None, 64.0])).set_column(2, "num_images", [[None, 1.0]])
    assert pictures(generator()(nulls)) == pictures(generator()(unnamed))


def test_a_row_may_ask_for_several_pictures():
    made = generator()(
        pa.table({"row_id": ["a", "b"], "prompt": ["x", None], "num_images": [2, 2]})
    ).to_pylist()
    assert [(row["row_id"], row["error"] is None) for row in made] == [
        ("a#0", True),
        ("a#1", True),
        ("b#0", False),
        ("b#1", False),
    ]


def test_rows_without_a_name_are_named_after_their_content():
    made = generator()(pa.table({"prompt": ["a", "b", "a"]})).to_pylist()
    assert made[0]["row_id"] == made[2]["row_id"] != made[1]["row_id"]
    assert made[0]["image"]["bytes"] == made[2]["image"]["bytes"] != made[1]["image"]["bytes"]


def test_a_seed_that_a_fraction_cannot_hold_is_refused_and_small_ones_are_taken():
    """As numpy batches have them where a row has no seed."""
    batch = {
        "row_id": np.array(["a", "b", "c"], object),
        "prompt": np.array(["x", "x", "x"], object),
        "seed": np.array([5.0, np.nan, 2.0**60]),
    }
    rows = generator()(batch).to_pylist()
    assert rows[0]["seed"] == 5
    assert rows[1]["error"] is None
    assert "use batch_format='pyarrow'" in rows[2]["error"]


def test_what_is_wrong_with_every_row_is_an_exception():
    with pytest.raises(ValueError, match=r"there is no column `prompt`; there are: caption"):
        generator()(pa.table({"caption": ["a"]}))
    with pytest.raises(ValueError, match="columns model, error have the names of output columns"):
        generator()(table(["a"], model=["x"], error=["y"]))
    with pytest.raises(ValueError, match="sampling"):
        ProgressiveGenerator("tests/fake", {"detla": 0.1}, engine_factory=Fakes())
    with pytest.raises(ValueError, match="96x64"):
        ProgressiveGenerator("tests/fake", SAMPLING | {"height": 100}, engine_factory=Fakes())
    with pytest.raises(TypeError, match="no such argument"):
        generator()(table(["!bug"]))


def test_videos_and_latents_as_a_job_makes_them():
    made = generator(output={"latents": True, "image": {"codec": "webp", "lossless": True}})(table(["a"]))
    [row] = made.to_pylist()
    assert row["latents"]["shape"] == [4, 8, 8]
    assert row["image"]["path"] == "r0.webp"
    assert Image.open(io.BytesIO(row["image"]["bytes"])).format == "WEBP"


def test_an_empty_batch_gives_an_empty_table_of_the_same_columns():
    asked = table(["a"])
    assert generator()(asked.slice(0, 0)).schema.equals(generator()(asked).schema)


def test_memory_that_runs_out_is_remembered_from_batch_to_batch():
    engine = FakeEngine(fits={8: 2})
    made = ProgressiveGenerator(
        "tests/fake", SAMPLING, workers={"batch_size": 8}, engine_factory=lambda spec: engine
    )
    assert made(table(list("abcdefgh")))["error"].null_count == 8
    before = len(engine.batches)
    assert made(table(list("abcd")))["error"].null_count == 4
    assert [len(batch) for batch in engine.batches[before:]] == [2, 2]


# In Ray Data.


@pytest.fixture(scope="module")
def started():
    ray.init(
        include_dashboard=False,
        num_cpus=3,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200 * 2**20,
    )
    ray.cloudpickle.register_pickle_by_value(fake_engine)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    yield
    ray.cloudpickle.unregister_pickle_by_value(fake_engine)
    ray.shutdown()


def test_a_pipeline_makes_the_pixels_that_a_job_makes(started, tmp_path):
    prompts = table([*[f"prompt {k}" for k in range(10)], "!raise"], score=[k / 8 for k in range(11)])
    pq.write_table(prompts, tmp_path / "prompts.parquet")
    spec = JobSpec.model_validate(
        {
            "model": "tests/fake",
            "prompts": str(tmp_path / "prompts.parquet"),
            "sampling": SAMPLING,
            "shards": 4,
            "seed": 9,
            "output": str(tmp_path / "out"),
            "workers": {"count": 1, "batch_size": 4},
        }
    )
    assert run_job(spec, engine_factory=Fakes()).exit_code == 0
    assert verify(spec.output.path).ok
    parts = [pq.read_table(path) for path in sorted(Path(tmp_path, "out", "data").glob("*.parquet"))]
    job = pa.concat_tables(parts)

    asked = ray.data.read_parquet(str(tmp_path / "prompts.parquet")).repartition(3)
    made = asked.map_batches(
        ProgressiveGenerator,
        fn_constructor_kwargs={
            "model": "tests/fake",
            "sampling": SAMPLING,
            "seed": 9,
            "engine_factory": Fakes(),
        },
        batch_format="pyarrow",
        batch_size=3,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=0.5,
    )
    made.write_parquet(str(tmp_path / "made"))
    ours = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "made").glob("*.parquet"))])
    good = ours.filter(pa.compute.is_null(ours["error"])).sort_by("row_id")
    assert pictures(good) == pictures(job)
    timed = ["stages", "denoise_seconds"]
    names = [name for name in job.column_names if name not in timed]
    assert good.select(names).equals(job.select(names).sort_by("row_id"))
    [bad] = ours.filter(pa.compute.is_valid(ours["error"])).to_pylist()
    assert (bad["row_id"], bad["image"], bad["error"]) == (
        "r10",
        None,
        "RuntimeError in denoise: this prompt raises",
    )


def test_the_readme_s_example_runs(started, tmp_path, monkeypatch):
    """As it is written, but for a smaller table and smaller pictures."""
    section = README.read_text().partition("### In a Ray Data pipeline")[2]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    pq.write_table(pa.table({"prompt": ["a red circle", "a blue square"]}), tmp_path / "captions.parquet")
    for old, new in {
        "manifests/quickstart.parquet": str(tmp_path / "captions.parquet"),
        "out/pictures": str(tmp_path / "pictures"),
        '"num_steps": 9, ': '"num_steps": 4, "height": 128, "width": 128, ',
    }.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    exec(compile(code, "README.md", "exec"), {})
    rows = [
        row for path in (tmp_path / "pictures").glob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    assert sorted(row["prompt"] for row in rows) == ["a blue square", "a red circle"]
    for row in rows:
        assert row["error"] is None
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (128, 128)
