"""Estimates of a whole job from a few rows: on a clock that the engine itself moves, and on the real one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_engine import FakeEngine
from small_jobs import prompt_table, small_job

from overtone.cluster.measure import Profile, estimate
from overtone.cluster.measure.prompts import job_sizes
from overtone.cluster.measure.timing import time_rows
from overtone.jobs.errors import JobError, UserError
from overtone.jobs.plan import make_plan
from overtone.jobs.prompts import read_shard
from overtone.jobs.spec import JobSpec

PROMPT_S, TOKEN_STEP_S, DECODE_S = 0.05, 2e-5, 0.1


@dataclass
class ClockedEngine(FakeEngine):
    """Its work takes time on its own clock: by the token-step, `jitter` more or less from batch to batch."""

    jitter: float = 0.05
    now: float = 0.0
    rows_made: int = 0
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def clock(self) -> float:
        return self.now

    def _pass(self, seconds: float) -> None:
        self.now += seconds * (1 + self.jitter * self.random.standard_normal())

    def encode(self, prompts: Sequence[str], negatives: Sequence[str | None], sampling: Any) -> list[str]:
        self._pass(PROMPT_S * len(prompts))
        return super().encode(prompts, negatives, sampling)

    def denoise(self, plan: Any, encoded: Any, seeds: Any, sampling: Any) -> Any:
        self._pass(TOKEN_STEP_S * plan.token_steps * len(seeds))
        self.rows_made += len(seeds)
        return super().denoise(plan, encoded, seeds, sampling)

    def decode(self, plan: Any, latents: Any) -> list[Any]:
        self._pass(DECODE_S * len(latents))
        return super().decode(plan, latents)


def job(tmp_path, rows: int = 96, **changes: Any) -> JobSpec:
    """Pictures of 256 x 256 px, 8 rows a shard, in batches of 4."""
    columns = changes.pop("columns", {})
    spec, _ = small_job(tmp_path, prompt_table(rows, **columns), shard_rows=8)
    sampling = {"num_steps": 20, "levels": 1, "delta": 0.05} | changes.pop("sampling", {})
    workers = {"batch_size": 4} | changes.pop("workers", {})
    plain = spec.model_dump() | {"sampling": sampling, "workers": workers} | changes
    return JobSpec.model_validate(plain)


def whole_job(spec: JobSpec, engine: ClockedEngine, sampling: Any) -> float:
    """Seconds on the engine's clock to make every row of the job, batch by batch, as a worker does."""
    plan = make_plan(spec)
    begin = engine.now
    for shard in plan.shards():
        rows = read_shard(spec, plan.files[shard.file], shard.first_row, shard.num_rows).rows
        for size in dict.fromkeys((row.height, row.width) for row in rows):
            own = [row for row in rows if (row.height, row.width) == size]
            stages = engine.plan(sampling, height_px=size[0], width_px=size[1])
            for k in range(0, len(own), 4):
                batch = own[k : k + 4]
                encoded = engine.encode([row.prompt for row in batch], [None] * len(batch), sampling)
                latents, _ = engine.denoise(stages, encoded, [row.seed for row in batch], sampling)
                engine.decode(stages, latents)
    return engine.now - begin


def test_eight_rows_foretell_the_whole_job_within_its_uncertainty(tmp_path):
    spec, engine = job(tmp_path), ClockedEngine()
    foretold = estimate(spec, engine, clock=engine.clock)
    full = spec.sampling.model_copy(update={"mode": "fullres", "levels": None})
    for line, sampling in ((foretold.chosen, spec.sampling), (foretold.fullres, full)):
        took = whole_job(spec, engine, sampling)
        assert line.eta_s == pytest.approx(took, rel=0.15)
        assert line.eta_s == pytest.approx(took, rel=line.uncertainty)
    assert foretold.timed_rows == 16  # 8 rows twice: two batches alone do not tell how much they vary
    assert foretold.saving > 1.05
    assert foretold.predicted_saving > foretold.saving  # decoding does not get faster


def test_a_job_of_several_sizes(tmp_path):
    sizes = [(256, 128, 192)[i % 3] for i in range(96)]
    columns = {"height": pa.array(sizes), "width": pa.array(sizes)}
    spec, engine = job(tmp_path, columns=columns), ClockedEngine(jitter=0.01)
    foretold = estimate(spec, engine, rows=12, clock=engine.clock)
    assert foretold.chosen.eta_s == pytest.approx(whole_job(spec, engine, spec.sampling), rel=0.05)
    # Two sizes of three timed: the third by its pixels.
    fewer = estimate(spec, engine, rows=8, clock=engine.clock)
    assert fewer.chosen.eta_s == pytest.approx(whole_job(spec, engine, spec.sampling), rel=0.15)


def test_rows_that_ask_for_several_images_count_as_often(tmp_path):
    columns = {"num_images": pa.array([1, 3] * 20)}
    spec = job(tmp_path, rows=40, columns=columns)
    sizes = job_sizes(spec, make_plan(spec))
    assert sizes.num_samples == 80
    assert sizes.exact


def test_a_large_job_is_only_looked_into(tmp_path):
    spec = job(tmp_path, rows=400)
    sizes = job_sizes(spec, make_plan(spec))
    assert not sizes.exact
    assert (len(sizes.rows), sizes.num_samples) == (128, 400)


def test_uncertainty_grows_with_the_jitter(tmp_path):
    spec = job(tmp_path)
    steady, shaky = (
        estimate(spec, engine, rows=16, clock=engine.clock).chosen.uncertainty
        for engine in (ClockedEngine(jitter=0.0), ClockedEngine(jitter=0.3))
    )
    assert steady == pytest.approx(0.02)
    assert shaky > 0.1


def test_workers_price_and_loading(tmp_path):
    spec, engine = job(tmp_path, workers={"num_gpus": 0.5}), ClockedEngine(jitter=0.0)
    profile = time_rows(spec, engine, clock=engine.clock, start_s=60.0)
    one = estimate(spec, profile=profile, workers=1, price=2.0)
    seconds = one.chosen.seconds_per_row * 96
    assert one.chosen.eta_s == pytest.approx(60 + seconds)
    assert one.chosen.worker_hours == pytest.approx((60 + seconds) / 3600)
    assert one.chosen.cost == pytest.approx(2.0 * 0.5 * one.chosen.worker_hours)
    five = estimate(spec, profile=profile, workers=5)  # 12 shards: the last round has two
    assert five.chosen.eta_s == pytest.approx(60 + 3 * seconds / 12)
    assert five.chosen.cost is None
    many = estimate(spec, profile=profile, workers=100)
    assert many.chosen.eta_s == pytest.approx(60 + seconds / 12)
    assert many.chosen.worker_hours == pytest.approx((12 * 60 + seconds) / 3600)


def test_a_saved_profile_gives_the_same_estimate_without_an_engine(tmp_path):
    spec, engine = job(tmp_path), ClockedEngine()
    profile = time_rows(spec, engine, clock=engine.clock)
    profile.save(tmp_path / "profile.json")
    kept = Profile.load(tmp_path / "profile.json")
    assert kept == profile
    made = engine.rows_made
    assert estimate(spec, profile=kept) == estimate(spec, profile=profile)
    assert engine.rows_made == made


@pytest.mark.parametrize(
    "change", [{"sampling": {"delta": 0.1}}, {"model": {"id": "tiny", "dtype": "float32"}}]
)
def test_a_profile_of_another_setting_is_refused(tmp_path, change):
    engine = ClockedEngine()
    profile = time_rows(job(tmp_path), engine, clock=engine.clock)
    with pytest.raises(UserError, match=r"another (sampling|dtype)"):
        estimate(job(tmp_path, **change), profile=profile)


def test_what_is_no_profile_is_refused(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"timed": [{"rows": 3}]}))
    with pytest.raises(UserError, match="not a profile"):
        Profile.load(path)


def test_the_text_shows_both_settings_side_by_side(tmp_path):
    spec, engine = job(tmp_path), ClockedEngine()
    foretold = estimate(spec, engine, price=3.0, clock=engine.clock)
    text = foretold.text()
    for shown in (
        "fullres",
        "this job",
        "rows an hour",
        "CPU-hours",
        "done in",
        "cost",
        "96 rows",
        "as fast as fullres",
    ):
        assert shown in text
    data = json.loads(json.dumps(foretold.as_dict()))
    assert data["saving"] == pytest.approx(foretold.saving)
    assert data["fullres"]["cost"] > data["chosen"]["cost"]
    assert "cost" not in replace(foretold, price=None).text()


def profile_of(spec: JobSpec, **seconds: tuple[float, ...]) -> Profile:
    """Of four rows a batch, at both settings."""
    profile = time_rows(spec, ClockedEngine(), clock=lambda: 0.0)
    timed = tuple(
        replace(timed, rows=(4,) * len(given), seconds=given)
        for timed, given in zip(profile.timed, (seconds["fullres"], seconds["chosen"]), strict=True)
    )
    return replace(profile, timed=timed)


@pytest.mark.parametrize("times", [(1.0, 400.0), (9.0,), (1.0, 1.1, 60.0)])
def test_no_interval_reaches_zero(tmp_path, times):
    spec = job(tmp_path)
    foretold = estimate(spec, profile=profile_of(spec, fullres=times, chosen=times), price=1.0)
    for value in (foretold.chosen.eta_s, foretold.chosen.cost, foretold.chosen.rows_per_hour):
        low, high = foretold.chosen.interval(value)
        assert 0 < low < value < high
        assert low * high == pytest.approx(value**2)  # as far below as above, in proportion
    assert "-" not in "".join(line for line in foretold.text().splitlines() if line.startswith("done in"))


def test_a_cpu_is_counted_in_cpu_hours(tmp_path):
    spec = job(tmp_path, workers={"num_cpus": 4})
    profile = profile_of(spec, fullres=(40.0, 40.0), chosen=(30.0, 30.0))
    line = estimate(spec, profile=profile, price=2.0).chosen
    assert (line.gpu_hours, line.cpu_hours) == (0, pytest.approx(4 * line.worker_hours))
    assert line.cost == pytest.approx(2 * line.cpu_hours)
    on_a_gpu = estimate(spec, profile=replace(profile, device="NVIDIA H200"), price=2.0)
    assert on_a_gpu.chosen.gpu_hours == pytest.approx(line.worker_hours)
    assert "GPU-hours" in on_a_gpu.text()


@dataclass
class Impatient(ClockedEngine):
    """Whoever waits for it types Ctrl-C once it has made so many rows."""

    patience: int = 0

    def denoise(self, plan: Any, encoded: Any, seeds: Any, sampling: Any) -> Any:
        if self.rows_made >= self.patience:
            raise KeyboardInterrupt
        return super().denoise(plan, encoded, seeds, sampling)


def test_an_interrupted_estimate_tells_what_it_knows_and_goes_on_from_there(tmp_path):
    spec, shown = job(tmp_path), []
    whole = ClockedEngine(jitter=0.0)
    expected = time_rows(spec, whole, clock=whole.clock, on_progress=shown.append)
    assert [one.done for one in shown] == [*range(8)]
    assert shown[0].left_s is None
    assert shown[1].left_s > shown[-1].left_s > 0
    assert shown[2].text().startswith("3 of 8: 4 rows, chosen, 256x256 px; about ")

    with pytest.raises(JobError, match="before both settings were timed; the same command goes on"):
        time_rows(spec, Impatient(patience=8, jitter=0.0), keep=tmp_path)
    engine = Impatient(patience=20, jitter=0.0)
    part = time_rows(spec, engine, clock=engine.clock, keep=tmp_path)
    assert part.interrupted
    assert not expected.interrupted
    assert 0 < sum(len(timed.seconds) for timed in part.timed) < 8
    assert estimate(spec, profile=part).chosen.eta_s > 0
    engine = ClockedEngine(jitter=0.0)
    rest = time_rows(spec, engine, clock=engine.clock, keep=tmp_path)
    assert not rest.interrupted
    assert engine.rows_made < whole.rows_made
    assert [timed.rows for timed in rest.timed] == [timed.rows for timed in expected.timed]
    assert not [*tmp_path.glob("*.partial*")]


def test_a_profile_of_an_older_version_counts_image_tokens_alone(tmp_path):
    spec = job(tmp_path)
    profile = time_rows(spec, ClockedEngine(), 8, clock=lambda: 1.0)
    path = tmp_path / "older.json"
    data = json.loads(profile.to_json())
    for timed in data["timed"]:
        timed["token_steps"] = round(timed.pop("cost") * 1024)
    path.write_text(json.dumps(data))
    costs = [timed.cost for timed in Profile.load(path).timed]
    assert costs[0] / costs[1] == pytest.approx(profile.timed[0].cost / profile.timed[1].cost, rel=1e-3)
