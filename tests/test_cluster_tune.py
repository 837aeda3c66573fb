"""The sweep on a real pipeline with random weights, and what is chosen from given figures."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
import tiny_pipes
import yaml
from PIL import Image
from small_jobs import prompt_table, small_job

from overtone.cluster.measure import tune
from overtone.cluster.measure.prompts import sample_rows, tiny_judge
from overtone.cluster.measure.settings import FULLRES, named_like, sweep
from overtone.cluster.measure.tuning import Outcome, mark_pareto
from overtone.jobs.errors import PromptsError, UserError
from overtone.jobs.spec import JobSpec
from overtone.progressive.engine import Engine
from overtone.progressive.settings import Sampling


def job(tmp_path, rows: int = 3, *, num_steps: int = 4, **columns: Any) -> JobSpec:
    prompts = [tiny_pipes.PROMPTS[i % 2] for i in range(rows)]
    spec, _ = small_job(tmp_path, prompt_table(rows, **({"prompt": prompts} | columns)))
    sampling = {"height": 64, "width": 64, "num_steps": num_steps}
    return JobSpec.model_validate(spec.model_dump() | {"sampling": sampling})


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_pipes.flux1())


@pytest.fixture(scope="module")
def tuned(engine, tmp_path_factory):
    spec = job(tmp_path_factory.mktemp("tune"))
    judged: list[str] = []

    def judge(picture, prompt):
        assert picture.size == (64, 64)
        judged.append(prompt)
        return 1, 2

    chosen = [s for s in sweep(spec.sampling, deltas=(0.2,)) if "auto" not in s.name]
    tuning = tune(spec, engine, rows=3, batch_size=2, settings=chosen, judge=judge)
    assert len(judged) == 3 * len(chosen)
    return tuning


def test_fullres_is_as_close_to_itself_as_can_be(tuned):
    full, *others = tuned.outcomes
    assert (full.name, full.saving, full.loss) == (FULLRES, 1.0, 0.0)
    assert full.psnr_db == pytest.approx(100)
    assert full.ssim == pytest.approx(1, abs=1e-4)
    assert full.high_frequency_ratio == pytest.approx(1, abs=1e-4)
    for one in others:
        assert one.psnr_db < 100
        assert one.predicted_saving > 1
        assert one.judge_percent == 50
        assert " + " in one.split


def test_the_choice_is_the_fastest_of_those_that_lose_nothing(tuned):
    assert tuned.choice.saving == max(o.saving for o in tuned.outcomes)
    assert yaml.safe_load(tuned.fragment())["sampling"] == tuned.choice.sampling
    assert Sampling.model_validate(tuned.choice.sampling)


def test_the_report_stands_alone(tuned):
    page = tuned.html()
    assert "<svg" in page
    assert page.count("data:image/jpeg;base64,") == 3 * len(tuned.outcomes)
    assert 'src="http' not in page
    assert "href=" not in page.replace("xlink:href=", "")  # within the plot only
    for outcome in tuned.outcomes:
        assert outcome.name in page
    data = json.loads(json.dumps(tuned.as_dict()))
    assert [o["name"] for o in data["outcomes"]] == [o.name for o in tuned.outcomes]
    assert tuned.choice.name in tuned.text()
    assert len(tuned.markdown().splitlines()) == 2 + len(tuned.outcomes)


def test_the_sheet_shows_each_prompt_at_each_setting_asked_for(tuned):
    names = [outcome.name for outcome in tuned.outcomes]
    two, all_of_them = (Image.open(io.BytesIO(tuned.sheet(some))) for some in (names[:2], names))
    assert all_of_them.format == "PNG"
    assert all_of_them.width == two.width
    assert all_of_them.height > 1.5 * two.height
    assert Image.open(io.BytesIO(tuned.sheet())).width == two.width
    with pytest.raises(KeyError):
        tuned.sheet(["another"])


def test_without_a_judge_the_loss_is_the_perceptual_distance(engine, tmp_path):
    sizes = pa.array([64, 96, 64])
    spec = job(tmp_path, height=sizes, width=sizes)
    tuning = tune(spec, engine, rows=3, max_drop=0.0, settings=sweep(spec.sampling, deltas=(0.2,))[:2])
    assert "objects right" not in tuning.markdown()
    assert "objects right" not in tuning.html()
    for outcome in tuning.outcomes:
        assert outcome.loss == pytest.approx(100 * outcome.perceptual_distance)
    assert [p.size for p in tuning.pictures[FULLRES]] == [
        (64, 64),
        (64, 64),
        (96, 96),
    ]
    assert tuning.choice.name == FULLRES


def test_a_judge_that_finds_little_right_at_fullres_decides_nothing(engine, tmp_path):
    spec = job(tmp_path)
    candidates = sweep(spec.sampling, deltas=(0.2,))[:2]
    tuning = tune(
        spec, engine, rows=2, max_drop=0.0, settings=candidates, judge=lambda picture, prompt: (0, 2)
    )
    assert tuning.choice.name == FULLRES
    assert "perceptual" in tuning.loss_metric
    for outcome in tuning.outcomes:
        assert outcome.judge_percent == 0
        assert outcome.loss == pytest.approx(100 * outcome.perceptual_distance)


def outcome(name: str, saving: float, loss: float) -> Outcome:
    return Outcome(name, name, {}, "", 1.0, saving, saving, 30.0, 1.0, 0.0, 1.0, None, loss)


def test_the_pareto_front():
    marked = mark_pareto(
        [
            outcome("fullres", 1.0, 0.0),
            outcome("good", 2.0, 1.0),
            outcome("slower", 1.5, 1.0),
            outcome("worse", 2.0, 3.0),
            outcome("fast", 3.0, 2.0),
            outcome("as fast", 3.0, 2.0),
        ]
    )
    assert [o.name for o in marked if o.pareto] == ["fullres", "good", "fast", "as fast"]


def test_the_sweep_has_every_ladder_delta_mode_and_noise_once():
    base = Sampling(
        num_steps=30, guidance_scale=2.5, scales=(0.5, 1.0), transition_sigmas=(0.7,), cache="taylorseer"
    )
    found = sweep(base)
    assert found[0].sampling.mode == "fullres"
    assert len({setting.name for setting in found}) == len(found) == 29
    caches = [(s.sampling.cache, s.sampling.cache_threshold or s.sampling.cache_interval) for s in found[25:]]
    assert caches == [("first_block", 0.05), ("first_block", 0.1), ("taylorseer", 3), ("taylorseer", 2)]
    assert {s.sampling.cache for s in found[:25]} == {"none"}
    assert {(s.sampling.mode, s.sampling.noise) for s in found[1:]} == {
        ("dct_rewind", "coupled"),
        ("dct_matched", "coupled"),
        ("dct_rewind", "fresh"),
    }
    for setting in found:
        assert (setting.sampling.num_steps, setting.sampling.guidance_scale) == (30, 2.5)
        assert setting.sampling.transition_sigmas is None


def test_settings_are_picked_by_name():
    settings = sweep(Sampling(), deltas=(0.05, 0.1))
    assert named_like(settings, ()) == settings
    names = [setting.name for setting in named_like(settings, ("one level, delta *[05]", "* 0.1, fresh*"))]
    assert names == [
        FULLRES,
        "one level, delta 0.05",
        "one level, delta 0.1, fresh noise",
        "auto ladder, delta 0.1, fresh noise",
    ]
    with pytest.raises(UserError, match=r"named like 'two\*'; there are: fullres; one level, delta 0.05;"):
        named_like(settings, ("one*", "two*"))


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (4, 4), (16, 16), (50, 40)])
def test_rows_are_spread_over_the_table(tmp_path, asked, given):
    rows = sample_rows(job(tmp_path, 40), asked)
    assert len(rows) == given
    assert len({row.row_id for row in rows}) == given
    if asked == 4:
        assert rows[-1].source >= 20


def test_a_table_without_a_usable_row_is_an_error(tmp_path):
    with pytest.raises(PromptsError, match="none of the prompt table's rows"):
        sample_rows(job(tmp_path, 4, prompt=[None] * 4), 4)


def test_the_judge_is_for_captions_of_the_picture_world_alone(tmp_path):
    from overtone.progressive.tiny import world

    captions = [world.caption(world.scene(seed)) for seed in range(3)]
    spec = job(tmp_path / "captions", prompt=captions)
    rows = sample_rows(spec, 3)
    assert tiny_judge(spec, rows) is None  # 64 px
    usual = spec.model_copy(update={"sampling": Sampling()})
    assert tiny_judge(usual, rows) is not None
    assert tiny_judge(usual, [replace(rows[0], prompt="a cat")]) is None
    other = usual.model_copy(update={"model": usual.model.model_copy(update={"id": "a/b"})})
    assert tiny_judge(other, rows) is None
