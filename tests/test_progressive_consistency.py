"""How far coarse predictions are from full ones: on the embedded model, on random ones, and in a plan.

That the oracle has none is in test_progressive_oracle.py."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import tiny_pipes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from overtone.progressive import layouts
from overtone.progressive.checkpoints import describe
from overtone.progressive.consistency import measure_consistency
from overtone.progressive.engine import Engine
from overtone.progressive.families import FAMILIES
from overtone.progressive.formulas import rewind
from overtone.progressive.pipelines import load
from overtone.progressive.schedule import consistency_profile, plan_sampling
from overtone.progressive.schedule.drift import Drift
from overtone.progressive.settings import Sampling
from overtone.progressive.spectral import corner
from overtone.progressive.tiny import world

SIZES = {"flux1": {"height": 128, "width": 96}, "wan2.1": {"height": 64, "width": 96, "num_frames": 5}}


@cache
def engine_of(family):
    return Engine(tiny_pipes.BUILDERS[family]())


def picture(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("family", SIZES)
def test_a_prediction_is_the_transformers_own(family):
    """The embedded arithmetic once more, by the pipeline's transformer called by hand at guidance off."""
    engine, sampling = engine_of(family), Sampling(num_steps=4, guidance_scale=1.0, **SIZES[family])
    seen = []
    handle = engine.call.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True
    )
    found = measure_consistency(
        engine, prompts=["a red circle"], scales=(0.5,), sigmas=(0.8,), sampling=sampling
    )
    handle.remove()
    (full_in, full_out), (coarse_in, coarse_out) = seen[-2:]
    full = engine.plan(sampling.model_copy(update={"mode": "fullres"})).stages[-1]
    grid = found.predictions[0].height, found.predictions[0].width
    level = found.predictions[0].sigma_coarse
    assert rewind(level, 2)[1] == pytest.approx(0.8)

    def cells(tokens, grid):
        return layouts.unpack(engine.family, tokens, *grid).float()

    def predicted(given, out, grid, sigma):
        return cells(given["hidden_states"], grid) - sigma * cells(out[0], grid)

    coarse, whole = (
        predicted(coarse_in, coarse_out, grid, level),
        predicted(full_in, full_out, full.grid, 0.8),
    )
    low = corner(whole, *grid)
    assert found.predictions[0].error == pytest.approx(
        float((2 * coarse - low).norm() / low.norm()), rel=1e-3
    )
    # Both saw the same noise: the coarse latent is the full one's low band at the level with its ratio.
    given_low = corner(cells(full_in["hidden_states"], full.grid), *grid)
    kappa = rewind(level, 2)[0]
    assert torch.allclose(kappa * cells(coarse_in["hidden_states"], grid), given_low, atol=1e-4)


@pytest.mark.parametrize("family", [*SIZES, "qwen-image"])
def test_pictures_go_through_the_models_own_vae(family):
    wanted = SIZES.get(family, SIZES["flux1"])
    engine, sampling = engine_of(family), Sampling(num_steps=4, **wanted)
    size = wanted["height"], wanted["width"]
    pictures = [(picture(*size), "a red circle"), (picture(*size), "")]
    if family == "wan2.1":
        pictures.append((picture(5, *size), "a ring"))
    seen = []
    found = measure_consistency(
        engine,
        pictures=pictures,
        scales=(0.5,),
        sigmas=(0.9, 0.3),
        sampling=sampling,
        batch_size=2,
        on_progress=seen.append,
    )
    assert seen == ([2, 3] if family == "wan2.1" else [2])
    assert (found.source, found.rows) == ("pictures", len(pictures))
    assert [f.sigma for f in found.predictions] == [0.9, 0.3]
    assert all(np.isfinite(f.error) and f.error > 0 for f in (*found.predictions, *found.autoencoder))
    assert [(f.scale, f.height, f.width) for f in found.autoencoder] == [
        (0.5, found.predictions[0].height, found.predictions[0].width)
    ]


def test_rows_count_once_whatever_the_batch():
    engine, sampling = engine_of("flux1"), Sampling(num_steps=4, **SIZES["flux1"])
    one, many = (
        measure_consistency(
            engine,
            prompts=["a", "a red circle"],
            scales=(0.5,),
            sigmas=(0.5,),
            sampling=sampling,
            batch_size=n,
        )
        for n in (1, 2)
    )
    assert one.predictions[0].error == pytest.approx(many.predictions[0].error, rel=1e-4)
    assert one.rows == many.rows == 2


def test_octaves_add_up_to_the_whole():
    engine, sampling = engine_of("flux1"), Sampling(num_steps=4, **SIZES["flux1"])
    (found,) = measure_consistency(
        engine, prompts=["a"], scales=(0.5,), sigmas=(0.5,), sampling=sampling
    ).predictions
    assert [(band.low, band.high) for band in found.bands] == [(0, 1), (1, 2), (2, 4)]
    assert min(b.error for b in found.bands) <= found.error <= max(b.error for b in found.bands)


def test_the_embedded_model(capsys):
    """On pictures of its world with their texts; progressive/README.md has the figures of more of them."""
    scenes = [world.scene(seed) for seed in world.held_out(4)]
    found = measure_consistency(
        Engine(load("tiny")),
        pictures=[(world.render(scene), world.caption(scene)) for scene in scenes],
        scales=(0.5,),
        sigmas=(0.8, 0.7, 0.4),
        sampling=Sampling(true_cfg_scale=1.0),
    )
    with capsys.disabled():
        print(f"\nconsistency of the embedded model, 4 pictures\n{found.text()}")
    assert [f.error for f in found.predictions] == pytest.approx([0.15, 0.12, 0.075], abs=0.02)
    assert found.autoencoder[0].error == pytest.approx(0.45, abs=0.08)


def test_a_picture_that_is_left_out_takes_its_text_along():
    small, one, two = (picture(16, 16), "small"), (picture(128, 96), "a ring"), (picture(128, 96), "a star")

    def error(*pictures):
        found = measure_consistency(
            engine_of("flux1"),
            pictures=pictures,
            scales=(0.5,),
            sigmas=(0.5,),
            sampling=Sampling(num_steps=4, **SIZES["flux1"]),
        )
        return found.predictions[0].error

    assert error(small, one, two) == error(one, two) != error((one[0], "small"), (two[0], "a ring"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "nothing to measure on"),
        ({"pictures": [(picture(16, 16), "")]}, "nothing to measure on"),
        ({"prompts": ["a"], "scales": (1.0,)}, r"scales is \[1.0\]; give values above 0 and below 1"),
        ({"prompts": ["a"], "sigmas": (0.0,)}, r"sigmas is \[0.0\]; give values above 0 and below 1"),
        ({"prompts": ["a"], "scales": (0.99,)}, "scale 0.99 is a grid of 16x12 cells of 16x12 for flux1"),
    ],
)
def test_what_cannot_be_measured(options, message):
    with pytest.raises(ValueError, match=message):
        measure_consistency(engine_of("flux1"), sampling=Sampling(num_steps=4, **SIZES["flux1"]), **options)


def test_pictures_of_a_model_whose_latents_are_not_known():
    engine = Engine(tiny_pipes.BUILDERS["flux1"]())
    engine.call.family = engine.family = replace(engine.family, channels_per_latent=2)
    with pytest.raises(
        ValueError, match=r"FluxPipeline encodes pictures to latents .* its own samples instead"
    ):
        measure_consistency(
            engine, pictures=[(picture(128, 96), "")], sampling=Sampling(num_steps=4, **SIZES["flux1"])
        )


# ------------------------------------------------------------------------------------------------ its file


def test_the_file_the_plan_reads_and_the_picture(tmp_path):
    engine, sampling = engine_of("flux1"), Sampling(num_steps=4, **SIZES["flux1"])
    found = measure_consistency(engine, prompts=["a"], scales=(0.5,), sigmas=(0.8, 0.4), sampling=sampling)
    path = tmp_path / "consistency.json"
    found.save(path)
    assert consistency_profile(path) == tuple((f.scale, f.sigma, f.error) for f in found.predictions)
    assert json.loads(path.read_text())["predictions"][0]["bands"][0].keys() == {"low", "high", "error"}
    drawn = BytesIO()
    found.plot(drawn)
    with Image.open(drawn) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"predictions": []}',
        '{"amplitude": 1, "beta": 2}',
        '{"predictions": [{"scale": 0.5, "sigma": 2, "error": 1}]}',
        '{"predictions": [{"scale": 0.5, "sigma": 0.5, "error": 1}, '
        '{"scale": 0.25, "sigma": 0.4, "error": 1}]}',
    ],
)
def test_a_file_that_is_none(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"c\.json is not a measurement of `calibrate --consistency`"):
        consistency_profile(path)


# --------------------------------------------------------------------------------------------- in a plan


SIGMAS = describe("black-forest-labs/FLUX.1-dev").sigmas(50, 1024, 1024)


def profile(half, quarter=None):
    rows = [(0.5, sigma, half) for sigma in (0.9, 0.4)]
    return tuple(rows + [(0.25, sigma, half if quarter is None else quarter) for sigma in (0.9, 0.4)])


def planned(**sampling):
    return plan_sampling(Sampling(**sampling), FAMILIES["flux1"], SIGMAS)


@pytest.mark.parametrize("mode", ["dct", "dct_rewind", "dct_matched"])
@pytest.mark.parametrize("scales", ["auto", (0.5, 1.0)])
def test_a_consistent_model_has_the_same_plan(mode, scales):
    with_it, without = (
        planned(mode=mode, scales=scales, delta=0.05, min_scale=0.3, consistency=consistency)
        for consistency in (profile(0.0), None)
    )
    assert with_it == without


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.floats(0, 1), st.floats(0, 1)), st.sampled_from(["dct_rewind", "dct_matched"]))
def test_a_worse_model_never_gets_more_coarse_steps(errors, mode):
    better, worse = (
        planned(mode=mode, levels=1, delta=0.05, consistency=profile(error)) for error in sorted(errors)
    )
    coarse = [made.stages[0].steps if len(made.stages) > 1 else 0 for made in (worse, better)]
    assert coarse[0] <= coarse[1] <= 28


def test_the_automatic_ladder_leaves_a_grid_that_the_model_is_bad_at():
    good = planned(scales="auto", delta=0.05, consistency=profile(0.02))
    bad = planned(scales="auto", delta=0.05, consistency=profile(0.02, quarter=0.9))
    assert min(good.scales) < min(bad.scales)
    assert good.saving > bad.saving
    # Nothing is known of grids below the smallest that was measured, so none of them is chosen.
    assert min(planned(scales="auto", min_scale=0.1, delta=0.05, consistency=profile(0.0)).scales) >= 0.25
    with pytest.raises(ValueError, match=r"scale 0.125 is smaller than the smallest .* measured at, 0.25"):
        planned(levels=3, consistency=profile(0.1))


def test_drift_is_the_sum_of_what_the_steps_displace():
    drift = Drift(((0.5, 0.8, 0.2), (0.5, 0.4, 0.1)))
    assert drift.error(0.5, 0.6) == pytest.approx(0.15)
    assert drift.error(0.75, 0.6) == pytest.approx(0.075)
    assert drift.error(0.5, 0.95) == 0.2
    assert drift.along(0.5, [1.0, 0.8, 0.4]) == pytest.approx([0.0, 0.2 * 0.2, 0.04 + 0.5 * 0.2])


def test_by_hand_and_by_measurement_at_once_is_refused():
    with pytest.raises(ValueError, match="consistency decides where stages end, and transition_sigmas"):
        Sampling(levels=1, transition_sigmas=(0.5,), consistency=profile(0.1))
    with pytest.raises(ValueError, match="only a job spec's file may name a saved measurement"):
        Sampling(consistency="c.json")
