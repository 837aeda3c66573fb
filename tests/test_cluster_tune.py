"""The search on a real pipeline with random weights, and what is shown of given figures. How it searches is
in test_cluster_search.py."""

from __future__ import annotations

import _thread
import io
import json
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny_pipes
import yaml
from browser import Browser, find_browser
from click.testing import CliRunner
from fake_engine import FakeEngine
from PIL import Image
from small_jobs import prompt_table, small_job

from overtone.cluster.cli import main
from overtone.cluster.measure import html, sheet, tune
from overtone.cluster.measure.kept import Kept
from overtone.cluster.measure.prompts import sample_rows, spread_out
from overtone.cluster.measure.scorers import tiny_judge
from overtone.cluster.measure.settings import FULLRES, Setting, named_like, space
from overtone.cluster.measure.trial import measure
from overtone.cluster.measure.tuning import Answer, Outcome, Tuning, mark_pareto
from overtone.cluster.measure.worth import Gain
from overtone.jobs.errors import JobError, PromptsError
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


def some(spec: JobSpec, *names: str) -> list[Setting]:
    """The reference and the settings of these names."""
    settings = space(spec.sampling, spec.sampling.num_steps, deltas=(0.05, 0.2))
    return [setting for setting in settings if setting.name in (FULLRES, *names)]


COARSE = ("one level, delta 0.2", "one level, delta 0.2, matched", "one level, delta 0.2, fresh noise")


@pytest.fixture(scope="module")
def tuned(engine, tmp_path_factory):
    spec = job(tmp_path_factory.mktemp("tune"))
    judged: list[str] = []

    def judge(picture, prompt):
        assert picture.size == (64, 64)
        judged.append(prompt)
        return 1, 2

    chosen = some(spec, "fullres, 3 steps", *COARSE)
    # Every loss is below this one: the cheapest is the choice, and `exhaustive` draws the others too.
    tuning = tune(
        spec, engine, rows=3, batch_size=2, settings=chosen, judge=judge, max_drop=100, exhaustive=True
    )
    assert len(judged) == 3 * len(chosen) == tuning.drawn
    return tuning


def test_fullres_is_as_close_to_itself_as_can_be(tuned):
    full, *others = tuned.outcomes
    assert (full.name, full.saving, full.loss) == (FULLRES, 1.0, 0.0)
    assert full.psnr_db == pytest.approx(100)
    assert full.ssim == pytest.approx(1, abs=1e-4)
    assert full.high_frequency_ratio == pytest.approx(1, abs=1e-4)
    for one in others:
        assert one.psnr_db < 100
        assert (one.predicted_saving > 1) == (" + " in one.split)
        assert one.judge_percent == 50
        assert one.cost < full.cost
        assert (" + " in one.split) == ("steps" not in one.name)


def test_the_choice_is_the_cheapest_of_those_that_lose_little_enough(tuned):
    assert tuned.choice.cost == min(o.cost for o in tuned.outcomes)
    assert yaml.safe_load(tuned.fragment())["sampling"] == tuned.choice.sampling
    assert Sampling.model_validate(tuned.choice.sampling)


def test_the_report_stands_alone(tuned):
    page = html(tuned)
    assert page.count("<svg") == 2
    assert page.count("data:image/jpeg;base64,") >= 3 * 3
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
    two, all_of_them = (Image.open(io.BytesIO(sheet(tuned, some))) for some in (names[:2], names))
    assert all_of_them.format == "PNG"
    assert all_of_them.width == two.width
    assert all_of_them.height > 1.5 * two.height
    assert Image.open(io.BytesIO(sheet(tuned))).width == two.width
    with pytest.raises(KeyError):
        sheet(tuned, ["another"])


def test_without_a_scorer_the_loss_is_the_perceptual_distance(engine, tmp_path):
    sizes = pa.array([64, 96, 64])
    spec = job(tmp_path, height=sizes, width=sizes)
    tuning = tune(spec, engine, rows=3, max_drop=0.0, settings=some(spec, COARSE[0]))
    assert "things right" not in tuning.markdown()
    assert "things right" not in html(tuning)
    assert "fidelity" in tuning.loss_metric
    for outcome in tuning.outcomes:
        assert outcome.loss == pytest.approx(100 * outcome.perceptual_distance, abs=1e-4)
        assert outcome.quality is None
    assert sorted(p.size for p in tuning.pictures[FULLRES]) == [(64, 64), (64, 64), (96, 96)]
    assert tuning.choice.name == FULLRES


def outcome(name: str, cost: float, loss: float, group: str = "one level", **more: Any) -> Outcome:
    given = {
        "name": name,
        "group": FULLRES if name.startswith(FULLRES) else group,
        "sampling": {},
        "split": "",
        "num_steps": 9,
        "plain": name.startswith(FULLRES),
        "rows": 4,
        "cost": cost,
        "seconds_per_row": 1.0,
        "saving": 9 / cost,
        "predicted_saving": 9 / cost,
        "psnr_db": 30.0,
        "ssim": 1.0,
        "perceptual_distance": 0.0,
        "high_frequency_ratio": 1.0,
        "judge_percent": None,
        "quality": None,
        "loss": loss,
        "gain": None,
    }
    return Outcome(**(given | more))


def test_the_pareto_front_is_of_settings_with_all_rows():
    marked = mark_pareto(
        [
            outcome("fullres", 9.0, 0.0),
            outcome("good", 4.0, 1.0),
            outcome("dearer", 5.0, 1.0),
            outcome("worse", 4.0, 3.0),
            outcome("cheap", 3.0, 2.0),
            outcome("as cheap", 3.0, 2.0),
            outcome("lucky", 1.0, 0.0, rows=1),
        ]
    )
    assert [o.name for o in marked if o.pareto] == ["fullres", "good", "cheap", "as cheap"]


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (4, 4), (16, 16), (50, 40)])
def test_rows_are_spread_over_the_table(tmp_path, asked, given):
    rows = sample_rows(job(tmp_path, 40), asked)
    spread = spread_out(rows)
    assert sorted(spread, key=lambda row: row.source) == rows
    if given > 4:  # so are the first few, on which most settings are drawn
        assert sorted(4 * rows.index(row) // given for row in spread[:4]) == [0, 1, 2, 3]
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


# Nothing under the limit, and Ctrl-C


def found(*outcomes: Outcome, max_drop: float = 1.0, **more: Any) -> Tuning:
    marked = tuple(mark_pareto(outcomes))
    settings = {
        "model": "tiny",
        "device": "CPU",
        "rows": 4,
        "num_steps": 9,
        "loss_metric": "100 x perceptual distance",
        "max_drop": max_drop,
        "outcomes": marked,
        "choice": marked[0],
    }
    return Tuning(**(settings | more))


@dataclass
class Rough(FakeEngine):
    """A coarse grid saves time and costs pixels: pictures are noise where it had a part in them."""

    def denoise(self, plan, encoded, seeds, sampling):
        latents, reports = super().denoise(plan, encoded, seeds, sampling)
        return latents, [replace(one, seconds=1e-6 * one.tokens * one.steps * one.rows) for one in reports]

    def decode(self, plan, latents):
        coarse = sum(stage.steps for stage in plan.stages[:-1])
        noise = np.random.default_rng(7).integers(0, 1 + 20 * coarse, (plan.height_px, plan.width_px, 3))
        return [Image.fromarray((100 + noise).astype(np.uint8)) for _ in latents]


def test_where_nothing_is_under_the_limit_the_trade_off_and_the_nearest_are_shown(tmp_path):
    spec = job(tmp_path)
    candidates = some(spec, "one level, delta 0.05", "one level, delta 0.2")
    tuning = tune(spec, Rough(), rows=3, settings=candidates)
    others = tuning.outcomes[1:]
    assert all(o.cost < tuning.outcomes[0].cost and o.loss > 1 for o in others)
    nearest = min(others, key=lambda o: o.loss)
    assert (tuning.choice.name, tuning.nearest.name) == (FULLRES, nearest.name)
    assert f"The nearest is {nearest.name}: {nearest.cost:.2f} full-size steps" in tuning.text()
    assert yaml.safe_load(tuning.fragment())["sampling"] == nearest.sampling
    assert tuning.fragment().startswith("# nothing cheaper than fullres loses at most 1")
    assert "sampling: {mode: fullres" in tuning.fragment()
    for o in tuning.trade_off:
        assert f"  {o.name}: " in tuning.text()
        assert f"<li><b>{o.name}</b>" in html(tuning)
    assert tuning.as_dict()["nearest"] == nearest.name


def test_the_trade_off_runs_from_good_to_cheap():
    tuning = found(
        outcome("fullres", 9.0, 0.0),
        outcome("far", 4.0, 9.0),
        outcome("near", 7.0, 2.0),
        outcome("dear", 10.0, 1.5),
    )
    assert [o.name for o in tuning.trade_off] == ["near", "far"]


def test_how_sure_a_figure_is_is_told():
    sure = outcome("a", 6.0, 2.0, saving=1.5, saving_error=0.1, loss_error=0.5, gain=Gain(1.4, 1.2, 1.6))
    assert (sure.saving_text, sure.loss_text) == ("1.50x (1.36 to 1.66)", "2.00 ± 0.50")
    assert sure.gain_text == "1.40x (1.20 to 1.60)"
    assert replace(sure, saving_error=None).saving_text == "1.50x (timed once)"
    assert replace(sure, gain=Gain(2.0, 2.0, 2.0, "at least")).gain_text == "at least 2.00x"
    page = html(found(outcome("fullres", 9.0, 0.0), sure))
    for part in ("(1.36 to 1.66)", "± 0.50", "(1.20 to 1.60)"):
        assert part in page


def test_full_resolution_with_fewer_steps_is_named_as_such_where_it_is_chosen():
    full, fewer = outcome("fullres", 9.0, 0.0), outcome("fullres, 5 steps", 5.0, 0.1, num_steps=5)
    far = outcome("one level", 2.0, 4.0, gain=Gain(1.5, 1.2, 1.8))
    answers = (Answer(1.0, fewer, fewer), Answer(5.0, far, fewer))
    said = found(full, fewer, far, choice=fewer, answers=answers).text()
    assert "chosen: fullres, 5 steps (full resolution with fewer steps: no ladder that is as good" in said
    assert "at a loss of at most 5: one level, 2.00 full-size steps, 1.50x (1.20 to 1.80) at equal" in said


@dataclass
class Impatient(FakeEngine):
    """Whoever waits for it types Ctrl-C before its n-th sample."""

    patience: int = 10**9
    made: int = 0

    def denoise(self, plan, encoded, seeds, sampling):
        if self.made >= self.patience:
            raise KeyboardInterrupt
        self.made += 1
        return super().denoise(plan, encoded, seeds, sampling)


def test_an_interrupted_search_tells_what_it_knows_and_goes_on_from_there(tmp_path):
    spec, told = job(tmp_path, rows=4, num_steps=9), []
    candidates = some(spec, "fullres, 3 steps", *COARSE[:2])
    settings = {
        "rows": 4,
        "batch_size": 2,
        "settings": candidates,
        "keep": tmp_path,
        "exhaustive": True,
        "on_progress": told.append,
    }
    with pytest.raises(JobError, match="before anything was measured"):
        tune(spec, Impatient(patience=1, step_s=0.001), **settings)
    part = tune(spec, Impatient(patience=5, step_s=0.001), **settings)  # two grids are warmed up first
    assert (part.measured, part.planned, part.complete) == (3, 8, False)
    assert {o.name for o in part.outcomes} == {s.name for s in candidates[:3]}
    assert "interrupted: 3 of 8 batches asked for so far, 2 prompts" in part.text()
    assert "Interrupted" in html(part)
    assert sheet(part, [FULLRES])
    assert part.fragment().startswith("# interrupted: 3 of 8")

    told.clear()
    engine = Impatient(step_s=0.001)
    whole = tune(spec, engine, **settings)
    assert [one.done for one in told] == [3, 4, 5, 6, 7]
    assert told[0].text().startswith(f"4 of 8: round 1, {candidates[3].name}, rows 1 to 2")
    assert told[1].left_s > told[-1].left_s > 0
    assert engine.made == 5 + 1  # nothing is drawn twice, but for the warm-up of both grids
    assert whole.complete
    assert (whole.rows, whole.drawn) == (4, 16)
    assert not [*tmp_path.glob("*.partial")]
    other = tune(spec, Impatient(patience=6, step_s=0.001), **settings | {"rows": 2})
    assert (other.kept is None) == other.complete


def test_a_budget_ends_a_search_as_ctrl_c_does(tmp_path):
    spec = job(tmp_path, rows=4)
    settings = {"rows": 4, "batch_size": 2, "settings": some(spec, *COARSE), "keep": tmp_path}
    part = tune(spec, FakeEngine(step_s=0.1), **settings, minutes=0.5 / 60, exhaustive=True)
    assert not part.complete
    assert 0 < part.measured < part.planned
    assert part.kept is not None
    assert tune(spec, FakeEngine(), **settings, exhaustive=True).complete


def test_what_was_kept_is_what_was_measured(tmp_path):
    setting = space(Sampling(), 30)[1]
    video = np.arange(2 * 64 * 64 * 3, dtype=np.uint8).reshape(2, 64, 64, 3)
    picture = Image.fromarray(video[0])
    row = sample_rows(job(tmp_path), 1)
    for media in ([picture], [video]):
        measured = measure(row, 2.5, media, media, judge=lambda made, prompt: (1, 2), shown=1)
        Kept(tmp_path, "a job").save(3, setting, measured, media)
        again, kept_media = Kept(tmp_path, "a job").load(3, setting)
        assert replace(again, stills=[]) == replace(measured, stills=[])
        assert np.array_equal(again.stills[0], measured.stills[0])
        assert np.array_equal(kept_media[0], media[0])
    assert Kept(tmp_path, "another job").load(3, setting) is None
    assert Kept(tmp_path, "a job").load(4, setting) is None
    [file] = tmp_path.glob("tune-*.partial/*.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert Kept(tmp_path, "a job").load(3, setting) is None


def test_ctrl_c_at_the_command_leaves_a_report_and_the_same_command_goes_on(tmp_path):
    job(tmp_path, rows=2)
    spec = tmp_path / "job.yaml"
    spec.write_text(f"model: tiny\nprompts: prompts.parquet\noutput: {tmp_path}/out\n")
    page, fragment = tmp_path / "page.html", tmp_path / "choice.yaml"
    arguments = ["tune", spec, "--rows", 2, "--batch-size", 1, "--delta", 0.05, "--only", "one level*"]
    arguments += ["--to", page, "--fragment", fragment, "--set", "sampling.num_steps=3", "--exhaustive"]
    arguments += ["--steps", 3]

    def type_ctrl_c() -> None:
        while not [*tmp_path.glob("tune-*.partial/0*.npz")]:
            time.sleep(0.01)
        _thread.interrupt_main()

    threading.Thread(target=type_ctrl_c, daemon=True).start()
    first = CliRunner().invoke(main, list(map(str, arguments)))
    assert first.exit_code == 3, first.output
    assert "the same command goes on from there" in first.stderr
    assert "Interrupted" in page.read_text()
    again = CliRunner().invoke(main, list(map(str, arguments)))
    assert again.exit_code == 0, again.output
    assert "1 of 8" not in again.stderr
    assert "8 of 8: round 1, one level, delta 0.05, fresh noise, rows 2 to 2; about " in again.stderr
    assert "Interrupted" not in page.read_text()
    assert Sampling.model_validate(yaml.safe_load(fragment.read_text())["sampling"])
    assert not [*tmp_path.glob("*.partial")]


@pytest.mark.skipif(find_browser() is None, reason="no Chromium here: `apt-get install chromium`")
def test_the_page_in_a_browser(tmp_path):
    """The columns that decide are in sight on a narrow screen too, and no prompt reaches into the next."""
    prompts = (*["a large blue star right of a large purple star, in fog, " * 3] * 5, "x" * 200)
    split = "3 @ 16x16 + 1 @ 20x20 + 1 @ 30x30 + 4 @ 32x32"
    sure = {"split": split, "saving_error": 0.05, "loss_error": 0.3, "gain": Gain(1.4, 1.2, 1.6, "at least")}
    outcomes = [outcome("fullres", 9.0, 0.0)]
    for k, setting in enumerate(named_like(space(Sampling(), 9, deltas=(0.05, 0.2)), ())[1:]):
        few = {"rows": 2, "left_out": "surely worse, after 2 rows"} if k % 3 == 2 else {}
        outcomes.append(outcome(setting.name, 8 * 0.97**k, 2 + k / 20, setting.group, **sure, **few))
    pictures = {o.name: [Image.new("RGB", (64, 64), (9 * k, 90, 60)) for k in range(6)] for o in outcomes}
    nearest = outcomes[1]
    page = tmp_path / "tune.html"
    page.write_text(html(found(*outcomes, nearest=nearest, pictures=pictures, prompts=prompts)))
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    ends = "[...document.querySelectorAll('.measured th')].map(e => e.getBoundingClientRect().right)"
    heads = "[...document.querySelectorAll('.measured th')].map(e => e.innerText)"
    spill = "[...document.querySelectorAll('.prompt')].map(e => e.scrollWidth - e.clientWidth)"
    ink = "getComputedStyle(document.querySelector('.measured td')).color"
    with Browser(find_browser()) as browser:
        inks = []
        for width_px, dark in ((1400, False), (500, False), (1400, True)):
            tab = browser.open(page.as_uri(), width_px=width_px, dark=dark)
            wide, seen = tab.evaluate(widths)
            assert wide <= seen == width_px  # nothing makes the page scroll sideways
            assert tab.evaluate(heads)[:4] == ["setting", "gain", "loss", "cost"]
            within = [end for end in tab.evaluate(ends) if end <= width_px]
            assert len(within) >= (10 if width_px == 1400 else 3)
            assert max(tab.evaluate(spill)) <= 0
            assert not tab.complaints
            inks.append(tab.evaluate(ink))
        assert inks[0] == inks[1] != inks[2]
