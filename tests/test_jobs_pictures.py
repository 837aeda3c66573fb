"""Pictures from wherever people keep them, and `overtone calibrate`, which measures them."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from overtone.cluster.cli import main
from overtone.jobs.errors import UserError
from overtone.jobs.media import encode_media
from overtone.jobs.pictures import pictures
from overtone.jobs.spec import Output
from overtone.progressive.tiny import world


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def arrays():
    return [np.full((16, 24, 3), 40 * k, np.uint8) for k in range(4)]


def test_folders_files_and_tables_give_the_same_pictures(tmp_path, arrays):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "notes.txt").write_text("no picture")
    for k, array in enumerate(arrays):
        (folder / "deep" / f"{k}.png").write_bytes(png(array))
    structs = [{"bytes": png(array), "path": None} for array in arrays] + [None, {"bytes": None, "path": "x"}]
    pq.write_table(pa.table({"image": structs}), tmp_path / "structs.parquet")
    pq.write_table(pa.table({"image": [png(array) for array in arrays]}), tmp_path / "plain.parquet")
    files = sorted((folder / "deep").iterdir())
    for places in ([folder], files, [tmp_path / "structs.parquet"], [tmp_path / "plain.parquet"]):
        found = [np.asarray(picture) for picture in pictures(places)]
        assert len(found) == 4
        assert all(np.array_equal(a, b) for a, b in zip(found, arrays, strict=True))


def test_videos_are_their_frames(tmp_path):
    video = np.zeros((5, 32, 48, 3), np.uint8)
    (tmp_path / "a.mp4").write_bytes(encode_media(video, Output(path="out")))
    (found,) = pictures([tmp_path])
    assert found.shape == video.shape


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"no picture", "cannot be decoded as an image"),
        ("a.mp4", b"no video", "cannot be decoded as a video"),
        ("a.parquet", b"no table", "cannot be read"),
        ("a.txt", b"text", "is no image, video or Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        list(pictures([tmp_path / name]))
    assert name in str(caught.value)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.png"):
        list(pictures([tmp_path / "missing.png"]))


def test_calibrate_writes_a_profile_that_a_spec_can_name(tmp_path):
    rendered = [world.render(world.scene(seed)) for seed in world.held_out(8)]
    images = [png(np.asarray(picture)) for picture in rendered]
    pq.write_table(pa.table({"image": images}), tmp_path / "set.parquet")
    profile, plot = tmp_path / "mine.json", tmp_path / "mine.png"
    options = ["--model", "tiny", "--data", str(tmp_path / "set.parquet"), "--to", str(profile)]
    result = CliRunner().invoke(main, ["calibrate", *options, "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    assert "from 8 pictures" in result.output
    assert Image.open(plot).width > 100
    found = json.loads(profile.read_text())
    assert found["beta"] > 1  # natural pictures: power falls with frequency
    pq.write_table(pa.table({"prompt": ["a red circle"]}), tmp_path / "prompts.parquet")
    (tmp_path / "job.yaml").write_text(
        "model: tiny\nprompts: prompts.parquet\noutput: out\nsampling: {spectrum: mine.json}\n"
    )
    planned = CliRunner().invoke(main, ["plan", str(tmp_path / "job.yaml"), "--json"])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.output)["sampling"]["spectrum"]["beta"] == pytest.approx(found["beta"])


def test_calibrate_refuses_in_one_line(tmp_path):
    result = CliRunner().invoke(main, ["calibrate", "--model", "tiny", "--data", str(tmp_path)])
    assert result.exit_code == 2
    assert "images is empty" in result.output


def test_calibrate_measures_consistency_that_a_spec_can_name(tmp_path):
    """On a table of pictures with their texts; the plan says what it changes, and the fingerprint has it."""
    scenes = [world.scene(seed) for seed in world.held_out(2)]
    images = [png(np.asarray(world.render(scene))) for scene in scenes]
    table = {"image": images, "prompt": [world.caption(scene) for scene in scenes]}
    pq.write_table(pa.table(table), tmp_path / "set.parquet")
    found, plot = tmp_path / "c.json", tmp_path / "c.png"
    options = [
        "--model",
        "tiny",
        "--consistency",
        "--data",
        str(tmp_path / "set.parquet"),
        "--to",
        str(found),
    ]
    few = ["--scale", "0.5", "--sigma", "0.9", "--sigma", "0.4", "--guidance", "1"]
    result = CliRunner().invoke(main, ["calibrate", *options, *few, "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    assert "2 of at most 16 rows measured" in result.output
    assert "autoencoder" in result.output
    assert Image.open(plot).width > 100
    measured = json.loads(found.read_text())
    assert (measured["rows"], measured["source"], measured["true_cfg_scale"]) == (2, "pictures", 1.0)
    assert 0.03 < measured["predictions"][1]["error"] < measured["predictions"][0]["error"] < 0.4

    pq.write_table(pa.table({"prompt": ["a red circle"]}), tmp_path / "prompts.parquet")
    (tmp_path / "job.yaml").write_text(
        "model: tiny\nprompts: prompts.parquet\noutput: out\n"
        "sampling: {num_steps: 9, delta: 0.01, levels: 1, consistency: c.json}\n"
    )
    plans = [
        json.loads(CliRunner().invoke(main, ["plan", str(tmp_path / "job.yaml"), "--json", *more]).output)
        for more in ([], ["--set", "sampling.consistency=null"])
    ]
    assert plans[0]["fingerprint"] != plans[1]["fingerprint"]
    assert plans[0]["split_by_spectrum_alone"] == "2 @ 16x16 + 7 @ 32x32"
    assert plans[1]["split_by_spectrum_alone"] is None
    shown = CliRunner().invoke(main, ["plan", str(tmp_path / "job.yaml")]).output
    assert "consistency measured at scales 0.5; by the spectrum alone: " in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data is missing"),
        (["--data", ".", "--prompts", "p.parquet"], "--prompts is for --consistency alone"),
        (["--data", ".", "--scale", "0.5"], "--scale is for --consistency alone"),
        (["--consistency"], "--consistency takes either --data"),
        (["--consistency", "--data", ".", "--prompts", "p.parquet"], "--consistency takes either --data"),
        (["--consistency", "--prompts", "missing.parquet"], "missing.parquet"),
    ],
)
def test_calibrate_refuses_options_that_do_not_go_together(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["calibrate", "--model", "tiny", *options])
    assert result.exit_code == 2
    assert message in result.output


def test_a_consistency_that_is_none_is_refused_with_its_place(tmp_path):
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "job.yaml").write_text(
        "model: tiny\nprompts: p.parquet\noutput: out\nsampling:\n  consistency: c.json\n"
    )
    result = CliRunner().invoke(main, ["plan", str(tmp_path / "job.yaml")])
    assert result.exit_code == 2
    assert "sampling.consistency" in result.output
    assert "c.json is not a measurement of `calibrate --consistency`" in result.output
