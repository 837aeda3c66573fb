"""How settings are searched: what is drawn and what is not, and what a setting is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from PIL import Image
from small_jobs import prompt_table, small_job

from overtone.cluster.measure import tune
from overtone.cluster.measure.candidates import candidates
from overtone.cluster.measure.race import Entrant, Race
from overtone.cluster.measure.scorers import scorer_for
from overtone.cluster.measure.search import rungs
from overtone.cluster.measure.settings import DELTAS, FULLRES, named_like, space, step_numbers
from overtone.cluster.measure.worth import gain_at_equal_quality
from overtone.jobs.errors import UserError
from overtone.jobs.spec import JobSpec
from overtone.progressive.settings import Sampling

ROWS = 48


def quality(plan: Any, rows: int = ROWS) -> np.ndarray:
    """Points of each row at a plan, float64 [rows]: a step on half of the sides is worth a little more than
    half of a full one, and costs a quarter; the worse a plan, the more its pictures differ."""
    full, coarse = (
        plan.stages[-1].steps,
        sum(0.6 * stage.steps * (stage.height / 32) ** 0.5 for stage in plan.stages[:-1]),
    )
    lost = 60 * np.exp(-(full + coarse - 1.2) / 1.1) + (np.exp(-full / 2) if coarse else 0.0)
    rng = np.random.default_rng([round(1000 * lost), *(stage.steps for stage in plan.stages)])
    return 99 - lost - rng.normal(0, 1 + 0.3 * lost, rows)


@dataclass
class Known(FakeEngine):
    """Draws pictures of a quality that follows from the plan and the row: the first two channels of a pixel
    hold it, for `Points` to read."""

    drawn: list[tuple[str, int]] = field(default_factory=list)
    """(split, row) of each picture."""
    sampling: Any = None

    def decode(self, plan, latents):
        rows = [round(float(latent[0, 0, 0])) for latent in latents]
        self.drawn += [(plan.split, row) for row in rows]
        return [_picture(quality(plan)[row]) for row in rows]

    def begin(self, plan, encoded, seeds, sampling):
        group = super().begin(plan, encoded, seeds, sampling)
        group.latents = lambda rows: np.array([seeds[row] for row in rows], float).reshape(-1, 1, 1, 1)
        return group


def _picture(points: float) -> Image.Image:
    high, low = divmod(round(points * 500), 256)
    return Image.new("RGB", (16, 16), (high, low, 0))


@dataclass
class Points:
    """Reads what `Known` wrote."""

    name: str = "points"
    units: str = "points of 100"
    needs_prompt: bool = False

    def check(self, prompts: Sequence[str], sizes_px: Sequence[tuple[int, int]]) -> None:
        pass

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return [(one.getpixel((0, 0))[0] * 256 + one.getpixel((0, 0))[1]) / 500 for one in pictures]


def job(tmp_path, rows: int = ROWS, **sampling: Any) -> JobSpec:
    spec, _ = small_job(tmp_path, prompt_table(rows, seed=list(range(rows))), shard_rows=8)
    given = {"height": 256, "width": 256, "num_steps": 20, "min_scale": 0.5} | sampling
    return JobSpec.model_validate(spec.model_dump() | {"sampling": given})


def test_the_search_finds_the_best_of_the_exhaustive_grid_for_a_fraction_of_it(tmp_path):
    spec, engine = job(tmp_path), Known()
    settings = named_like(space(spec.sampling, 20, steps=range(4, 21)), ())
    assert len(settings) > 17 * 2 * len(DELTAS)
    tuning = tune(spec, engine, rows=ROWS, batch_size=8, settings=settings, scorer=Points())

    grid = candidates(engine, settings, {(None, None): ROWS})
    plans = [one.plans[None, None] for one in grid]
    means = [np.round(quality(plan) * 500).mean() / 500 for plan in plans]
    for answer in tuning.answers:
        best = min(
            (one.entrant.cost, -mean, one.name)
            for one, mean in zip(grid, means, strict=True)
            if mean >= means[0] - answer.drop
        )
        assert answer.choice.cost <= 1.02 * best[0]
        assert answer.choice.loss <= answer.drop
        assert answer.choice.rows == ROWS
    assert tuning.choice is tuning.answers[0].choice
    assert tuning.choice.cost < tuning.answers[0].plain.cost  # a ladder is worth it for this engine

    assert tuning.settings == len(grid)
    assert tuning.drawn == len(engine.drawn) == len(set(engine.drawn))  # nothing twice
    assert tuning.drawn <= tuning.settings * ROWS / 4
    assert tuning.drawn_cost == pytest.approx(sum(o.rows * o.cost for o in tuning.outcomes))
    data = tuning.as_dict()
    assert (data["drawn"], data["exhaustive"]) == (tuning.drawn, len(grid) * ROWS)

    for one in tuning.outcomes:  # each that was left out says why, and few rows are not called all of them
        assert (one.left_out == "") == (one.rows == ROWS)
    assert {o.rows for o in tuning.outcomes} == {8, 24, ROWS}
    gain = tuning.choice.gain
    assert gain.low <= gain.value <= gain.high
    assert 1 < gain.value <= tuning.answers[0].plain.cost / tuning.choice.cost * 1.3


def test_where_coarse_steps_are_worth_nothing_full_resolution_with_fewer_steps_is_chosen(tmp_path):
    class Plain(Known):
        def decode(self, plan, latents):
            spoilt = 30 if len(plan.stages) > 1 else 0
            rows = [round(float(latent[0, 0, 0])) for latent in latents]
            return [_picture(quality(plan)[row] - spoilt) for row in rows]

    spec = job(tmp_path, 24)
    settings = named_like(space(spec.sampling, 20, deltas=(0.1, 0.5)), ())
    tuning = tune(spec, Plain(), rows=24, batch_size=8, settings=settings, scorer=Points(), max_drop=2)
    assert tuning.choice.name.startswith("fullres, ")
    assert tuning.choice.cost == tuning.choice.num_steps < 10
    assert "full resolution with fewer steps" in tuning.text()
    assert Sampling.model_validate(tuning.choice.sampling).mode == "fullres"


def test_an_interrupted_search_comes_to_the_same_end_and_draws_nothing_twice(tmp_path):
    class Impatient(Known):
        def decode(self, plan, latents):
            if len(self.drawn) >= 200:
                raise KeyboardInterrupt
            return super().decode(plan, latents)

    spec = job(tmp_path, 24)
    settings = named_like(space(spec.sampling, 20, deltas=(0.1, 0.5, 0.9)), ())
    given = {"rows": 24, "batch_size": 8, "settings": settings, "scorer": Points(), "max_drop": 1}
    straight = tune(spec, Known(), **given)
    impatient, patient = Impatient(), Known()
    part = tune(spec, impatient, **given, keep=tmp_path)
    assert (part.complete, part.drawn) == (False, len(impatient.drawn))
    whole = tune(spec, patient, **given, keep=tmp_path)
    assert whole.choice.name == straight.choice.name
    assert [(o.name, o.rows, o.loss) for o in whole.outcomes] == [
        (o.name, o.rows, o.loss) for o in straight.outcomes
    ]
    assert len(impatient.drawn) + len(patient.drawn) == whole.drawn == straight.drawn
    assert not set(impatient.drawn) & set(patient.drawn)


def raced(scores: list[np.ndarray], entrants: list[Entrant], drops: Sequence[float] = (1.0,)) -> Race:
    race = Race(entrants, rungs=(8, 24, len(scores[0])), drops=drops)
    while wave := race.wanted():
        for index, rows in wave:
            assert rows > len(race.scores.get(index, ()))
            race.tell(index, scores[index][:rows])
    return race


def test_few_rows_that_happen_to_be_alike_rule_nothing_out():
    """Three of 72 rows are spoilt at the reference's rival, none of the first 24: it gets all rows."""
    rng = np.random.default_rng(0)
    full = 90 + rng.normal(0, 1, 72)
    late = full.copy()
    late[[30, 50, 70]] -= 60
    bad = full - 20 - rng.normal(0, 5, 72)
    race = raced(
        [full, late, bad],
        [Entrant(9.0, "full", True), Entrant(3.0, "a", False), Entrant(2.0, "b", False)],
    )
    assert race.winner(1.0) == 0  # 2.5 points are lost, which 24 rows did not show
    assert len(race.scores[1]) == 72
    assert (len(race.scores[2]), race.fate(2)) == (8, "surely worse, after 8 rows")


def test_what_costs_more_than_the_answer_is_not_tried_and_neither_is_what_is_below_a_bad_one():
    rng = np.random.default_rng(1)
    full = 90 + rng.normal(0, 1, 72)
    entrants = [Entrant(20.0, "full", True), *(Entrant(float(n), "full", True) for n in range(3, 15))]
    entrants += [Entrant(cost, "bad", False) for cost in (1.0, 1.5, 1.8, 1.9)]
    entrants += [Entrant(2.5, "good", False)]
    lost = [0.0, 9, 4, 1.5, *[0.3] * 9, 30, 25, 24, 22, 0.4]
    scores = [full - loss + rng.normal(0, 0.2, 72) for loss in lost]
    race = raced(scores, entrants)
    assert race.winner(1.0) == len(entrants) - 1
    assert race.winner(1.0, plain=True) == 4  # six steps
    drawn = {index: len(own) for index, own in race.scores.items()}
    assert {index for index, rows in drawn.items() if rows == 72} >= {0, 3, 4, 17}  # on both sides of it
    dear = [index for index in range(7, 13) if index not in drawn]
    assert len(dear) >= 5
    assert {race.fate(index) for index in dear} == {"not tried: it costs more than the choice"}
    assert race.fate(13) == "not tried: its line was worse"


def test_gain_is_the_cost_of_full_resolution_that_is_as_good_over_the_setting_s():
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 0.1, 50)
    plain = [99 + noise, 90 + noise, 98 + noise, 98.5 + noise]  # the reference first
    costs = [8.0, 4.0, 5.0, 6.0]

    def gain(mean: float, cost: float) -> Any:
        return gain_at_equal_quality(mean + noise + rng.normal(0, 0.3, 50), cost, plain, costs)

    found = gain(94.0, 3.0)  # half way between four and five steps
    assert found.value == pytest.approx(4.5 / 3, abs=0.02)
    assert 0 < found.high - found.low < 0.1
    assert gain(98.75, 2.0).value == pytest.approx(7 / 2, abs=0.3)
    assert (gain(99.5, 2.0).bound, gain(99.5, 2.0).value) == ("at least", 4.0)
    lucky = gain_at_equal_quality(100 + noise, 2.0, [*plain, 99.2 + noise], [*costs, 20.0])
    assert (lucky.bound, lucky.value) == ("at least", 4.0)  # 20 steps happen to score more than the reference
    assert (gain(80.0, 2.0).bound, gain(80.0, 2.0).value) == ("at most", 2.0)
    assert gain_at_equal_quality(plain[2], 5.0, plain, costs).text == "1.00x"
    tolerant = gain_at_equal_quality(98 + noise, 2.0, plain, costs, tolerance=2.0)
    assert tolerant.value == pytest.approx(4.75 / 2)  # the cost of 96 points
    # Between four and eight steps nothing but six was drawn: a line from six to eight would flatter.
    gap = gain_at_equal_quality(98.75 + noise, 2.0, plain, costs, [7.0])
    assert (gap.bound, gap.value) == ("at most", 4.0)
    assert gain_at_equal_quality(94.0 + noise, 2.0, plain, costs, [7.0]).bound == ""


# The settings


def test_the_space_has_every_number_of_steps_ladder_and_delta_by_one_name():
    base = Sampling(num_steps=30, guidance_scale=2.5, scales=(0.5, 1.0), transition_sigmas=(0.7,))
    assert step_numbers(30) == (*range(3, 21), 22, 24, 26, 29, 30)
    assert step_numbers(4) == (1, 2, 3, 4)
    found = space(base, 30)
    names = [setting.name for setting in found]
    assert len(set(names)) == len(names)
    assert names[0] == FULLRES
    assert {"fullres, 3 steps", "one level, delta 0.9, 4 steps", "auto ladder, delta 0.05"} <= set(names)
    searched = named_like(found, ())
    assert {s.sampling.noise for s in searched} == {"coupled"}
    assert {s.sampling.cache for s in searched} == {"none", "taylorseer"}
    for setting in found:
        assert setting.sampling.num_steps == setting.steps <= 30
        assert setting.sampling.guidance_scale == 2.5
        assert setting.sampling.transition_sigmas is None
    matched = named_like(space(Sampling(mode="dct_matched"), 30), ())
    assert {s.sampling.mode for s in matched} == {"fullres", "dct_matched"}


def test_what_a_user_names_restricts_the_space():
    found = space(Sampling(), 9, steps=(6, 9), deltas=(0.05, 0.1))
    names = [setting.name for setting in named_like(found, ("one level, delta *[05]", "* 0.1, fresh*"))]
    assert names == [
        *("fullres", "fullres, 6 steps", "one level, delta 0.05"),
        *("one level, delta 0.1, fresh noise", "one level, delta 0.1, fresh noise, 6 steps"),
        *("auto ladder, delta 0.1, fresh noise", "auto ladder, delta 0.1, fresh noise, 6 steps"),
    ]
    there = r"named like 'two\*'; there are, .*: fullres; fullres, guidance above 0.4; one level, delta 0.05;"
    with pytest.raises(UserError, match=there):
        named_like(found, ("one*", "two*"))
    with pytest.raises(UserError, match="--steps: 12 is above the spec's own number, 9"):
        space(Sampling(), 9, steps=(12,))


def test_settings_of_equal_plans_are_one_candidate():
    settings = named_like(space(Sampling(min_scale=0.5), 6, steps=(4, 6)), ())
    # This engine has neither step caches nor a second pass.
    own = [s for s in settings if s.sampling.cache == "none" and s.sampling.guidance_interval is None]
    found = candidates(FakeEngine(), own, {(None, None): 3})
    settings = own
    assert len({one.split for one in found}) == len(found) < len(settings)
    named = [name for one in found for name in (one.name, *one.also)]
    assert sorted(named) == sorted(setting.name for setting in settings)
    full, fewer = found[:2]
    assert (full.entrant.cost, fewer.entrant.cost) == (6.0, 4.0)
    for one in found[2:]:
        assert 0 < one.entrant.cost < one.cost_at_full


def test_guidance_in_an_interval_is_searched_where_rows_are_guided_with_full_resolution_too():
    def found(base: Sampling, *patterns: str) -> dict[str, Any]:
        settings = named_like(space(base, 8, steps=(4, 8), deltas=(0.5,)), patterns)
        return {one.name: one for one in candidates(FakeEngine(), settings, {(None, None): 1})}

    guided = found(Sampling(min_scale=0.5, true_cfg_scale=3.0))
    interval = [name for name in guided if "guidance above 0.4" in name]
    assert {"fullres, guidance above 0.4", "one level, delta 0.5, guidance above 0.4"} <= set(interval)
    for name in interval:
        always = guided[name.replace(", guidance above 0.4", "")]
        assert guided[name].entrant.cost < always.entrant.cost
        assert guided[name].entrant.plain == always.entrant.plain == name.startswith(FULLRES)
    # Eight steps from levels 1, 7/8, ..., 1/8, of which three are below 0.4: half of each is left out.
    assert guided["fullres, guidance above 0.4"].entrant.cost == 8 - 3 / 2
    assert not any("above" in name for name in found(Sampling(min_scale=0.5)))  # no second pass
    own = found(Sampling(min_scale=0.5, true_cfg_scale=3.0, guidance_interval=(0.2, 0.9)))
    assert not any("above" in name for name in own)
    assert {one.setting.sampling.guidance_interval for one in own.values()} == {(0.2, 0.9)}
    # What is compared with full resolution is compared with it as it is guided itself.
    named = found(Sampling(min_scale=0.5, true_cfg_scale=3.0), "one level*above 0.4")
    assert [name for name in named if named[name].entrant.plain] == [
        *("fullres", "fullres, 4 steps"),
        *("fullres, guidance above 0.4", "fullres, guidance above 0.4, 4 steps"),
    ]


def test_a_cost_over_several_sizes_is_that_of_all_rows():
    settings = named_like(space(Sampling(min_scale=0.5), 6, steps=(6,), deltas=(0.5,)), ("one*",))
    small, large, both = (
        candidates(FakeEngine(), settings, dict.fromkeys(sizes, 2))[1].entrant.cost
        for sizes in ([(64, 64)], [(256, 256)], [(64, 64), (256, 256)])
    )
    assert both == pytest.approx((small + 16 * large) / 17)  # 16 times as many tokens
    assert small != large


def test_rungs_end_with_a_batch_and_the_last_is_all_rows():
    assert rungs([4] * 50) == [8, 24, 72, 200]
    assert rungs([4] * 4) == [8, 16]
    assert rungs([4, 4, 2]) == [10]
    assert rungs([3]) == [3]
    assert rungs([50, 50]) == [50, 100]


def test_a_scorer_that_cannot_be_had_is_a_sentence():
    assert scorer_for("fidelity") is None
    assert scorer_for("judge").name == "judge"
    for name, said in (
        ("spectrum", "a distance between two sets"),
        ("no", "no scorer is named 'no'.*fidelity needs none"),
        ("nowhere:it", "no module 'nowhere'"),
    ):
        with pytest.raises(UserError, match=f"--scorer: .*{said}"):
            scorer_for(name)


def test_a_scorer_that_fails_names_the_row(tmp_path):
    class Failing(Points):
        def score(self, pictures, prompts):
            raise RuntimeError("cannot read it")

    with pytest.raises(UserError, match=r"scorer 'points', row .*row/0.*cannot read it"):
        tune(job(tmp_path, 2), Known(), rows=2, scorer=Failing(), settings=space(Sampling(), 20)[:2])


def test_a_judge_that_gives_the_reference_little_decides_nothing(tmp_path):
    spec = job(tmp_path, 8)
    settings = space(spec.sampling, 20)[:3]
    for trusted_from, metric in ((50.0, "points, points of 100"), (100.0, "fidelity")):
        tuning = tune(
            spec, Known(), rows=8, settings=settings, scorer=Points(), trusted_from=trusted_from, max_drop=0.5
        )
        assert metric in tuning.loss_metric
