"""What a worker's CPUs can take: every picture of the run is in a part, and the figures are of them."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from overtone.cluster.bench import rate
from overtone.cluster.bench.paced import PacedEngine, paced_job, smooth_noise
from overtone.jobs.media import encode_media
from overtone.jobs.plan import make_plan
from overtone.jobs.spec import Output
from overtone.jobs.store import open_store

SMALL = ["--rate", "500", "--rows", "6", "--shard-rows", "3", "--side", "64", "--num-pictures", "2"]


def test_the_command_says_what_binds(tmp_path, capsys):
    path = tmp_path / "rate.json"
    rate.main([*SMALL, "--json", str(path), "--output", str(tmp_path / "out")])
    figures = json.loads(path.read_text())
    assert [one["what"] for one in figures["costs"]] == [f"PNG, {name}" for name in rate.PNG] + [
        "part",
        "create",
    ]
    assert all(one["wall_ms"] > 0 and one["mib"] > 0 for one in figures["costs"])
    ran = figures["run"]
    assert ran["rate"] == 500
    assert 0 < ran["reached"] < 500
    assert 0 < ran["waited"] < 1
    assert ran["cores_needed"] == pytest.approx(500 * ran["cpu_ms"] / 1000)
    parts = sorted((tmp_path / "out" / "data").glob("*.parquet"))
    assert [pq.read_metadata(part).num_rows for part in parts] == [3, 3, 3]  # the last one was made alone
    assert "the first to bind is" in capsys.readouterr().out


def test_a_place_with_parts_is_refused(tmp_path):
    arguments = [*SMALL, "--output", str(tmp_path / "out")]
    rate.main(arguments)
    with pytest.raises(RuntimeError, match="name an empty folder or prefix"):
        rate.main(arguments)


def test_pictures_of_a_folder_take_the_place_of_noise(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "mine" / "a.png")
    rate.main([*SMALL, "--pictures", str(tmp_path / "mine"), "--json", str(tmp_path / "rate.json")])
    costs = json.loads((tmp_path / "rate.json").read_text())["costs"]
    assert costs[0]["mib"] < 0.001


def test_an_engine_at_a_pace_has_its_pictures_in_turn(tmp_path):
    pictures = [smooth_noise(seed, 32) for seed in range(2)]
    spec = paced_job(tmp_path, rows=4, shard_rows=2, side_px=32, output=None, endpoint_url=None)
    job_plan, engine = make_plan(spec), PacedEngine(pictures, 400)
    ran = rate.run(spec, job_plan, open_store(spec.output.path), engine, 400)
    assert engine.made_s == pytest.approx(4 / 400)
    assert ran.waited == pytest.approx(1 - engine.made_s * ran.reached / 4)
    table = pq.read_table(tmp_path / "out" / "data")
    stored = [np.asarray(Image.open(io.BytesIO(one["bytes"]))) for one in table["image"].to_pylist()]
    assert all(np.array_equal(one, np.asarray(pictures[k % 2])) for k, one in enumerate(stored))


def test_the_usual_png_is_no_larger_than_one_that_was_searched():
    """Of a picture as models make them; every way to compress keeps the pixels."""
    picture, out = smooth_noise(1, 256), io.BytesIO()
    data = encode_media(picture, Output(path="out"))
    picture.save(out, "png", compress_level=6)
    assert len(data) < 1.02 * len(out.getvalue())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture))
