"""Specs to begin with: each is one that `plan` takes."""

from __future__ import annotations

import csv

import pytest
import tiny_pipes
from click.testing import CliRunner

from overtone.cluster.cli import main
from overtone.jobs.errors import SpecError
from overtone.jobs.preview import preview
from overtone.jobs.sampling import checkpoint_of
from overtone.jobs.spec import load_spec
from overtone.jobs.starter import example_prompts, starter
from overtone.progressive.checkpoints.published import PUBLISHED
from overtone.progressive.families import FAMILIES


def init(*arguments):
    return CliRunner().invoke(main, ["init", *map(str, arguments)])


@pytest.mark.parametrize("model", ["tiny", *PUBLISHED])
def test_the_spec_of_any_known_model_can_be_planned(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = init(model, "--example-prompts", "--to", "mine.yaml")
    assert (done.exit_code, done.stdout) == (0, ""), done.output
    spec = load_spec("mine.yaml")
    shown = preview(spec)
    assert (shown.job.num_rows, spec.name, spec.output.path) == (8, "mine", str(tmp_path / "out" / "mine"))
    assert shown.sampling is not None
    checkpoint = checkpoint_of(spec)
    plain = (checkpoint.default_steps or 50) < 10
    assert (spec.sampling.mode == "fullres") == plain == (len(shown.sampling.stages) == 1)
    video = FAMILIES[checkpoint.family].default_frames is not None
    text = (tmp_path / "mine.yaml").read_text()
    assert ("video:" in text, "codec:" in text) == (video, not video)
    assert all(len(line) <= 120 for line in text.splitlines())


def test_each_preset_by_name_and_a_column_of_another_name(tmp_path):
    for name in ("faithful", "balanced", "fast"):
        path = tmp_path / f"{name}.yaml"
        text = starter(
            "tiny", name=name, prompts="a b: c.csv", output="out", preset=name, column="Caption: #1"
        )
        path.write_text(text)
        spec = load_spec(path)
        assert spec.sampling.num_steps is not None
        assert spec.prompts.path == (str(tmp_path / "a b: c.csv"),)
        assert spec.prompts.columns == {"prompt": "Caption: #1"}


def test_a_folder_and_a_model_that_nothing_here_describes(tmp_path):
    folder = tmp_path / "model"
    tiny_pipes.flux1().save_pretrained(folder)
    path = tmp_path / "job.yaml"
    for model, known in ((str(folder), True), ("somebody/new-model", False)):
        path.write_text(starter(model, name="job", prompts="p.csv", output="out"))
        assert load_spec(path).model.id == model
        assert ("not known here" in path.read_text()) != known
    with pytest.raises(SpecError, match=r"^flux: 'flux' is no checkpoint known offline"):
        starter("flux", name="job", prompts="p.csv", output="out")
    with pytest.raises(SpecError, match="nowhere"):
        starter("./nowhere", name="job", prompts="p.csv", output="out")


def test_nothing_is_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.csv").write_text("mine")
    done = init("tiny", "--example-prompts")
    assert done.exit_code == 2
    assert "prompts.csv is there already" in done.output
    assert not (tmp_path / "job.yaml").exists()
    assert init("tiny").exit_code == 0
    done = init("tiny")
    assert (done.exit_code, (tmp_path / "prompts.csv").read_text()) == (2, "mine")
    assert "job.yaml is there already, and is left alone; name another spec with --to" in done.output
    done = init("tiny", "--example-prompts", "--prompts", "other.csv", "--to", "b.yaml")
    assert (done.exit_code, (tmp_path / "b.yaml").exists()) == (2, False)


def test_example_prompts_are_ones_that_the_model_can_draw():
    from overtone.progressive.tiny import world

    rows = list(csv.DictReader(example_prompts("tiny").splitlines()))
    assert [row["row_id"] for row in rows] == [f"row-{k}" for k in range(8)]
    for row in rows:
        world.parse(row["prompt"])
    other = list(csv.DictReader(example_prompts("black-forest-labs/FLUX.1-dev").splitlines()))
    assert len({row["prompt"] for row in other}) == 8
