"""Stage plans: the formulas, the ladders, the exact `auto`, and what is refused with which words."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from overtone.progressive.checkpoints import describe
from overtone.progressive.families import FAMILIES
from overtone.progressive.formulas import Spectrum, first_at_or_below, matched, rewind, side_ratio, t_w
from overtone.progressive.schedule import grid_for, latent_frames, plan_sampling
from overtone.progressive.schedule.ladders import Cost, Ends, carried, coarse_grid
from overtone.progressive.settings import Sampling

settings.register_profile("patient", deadline=None)  # a busy machine is not a failure
settings.load_profile("patient")

FLUX1 = FAMILIES["flux1"]
levels01 = st.floats(0.0, 1.0)
ratios = st.floats(1.0, 16.0)
deltas = st.floats(1e-4, 0.9)
spectra = st.builds(Spectrum, st.floats(0.5, 2000.0), st.floats(0.5, 3.5))


@st.composite
def schedules(draw, min_steps=1, max_steps=60):
    """A falling schedule: the uniform one under a timestep shift."""
    num_steps, shift = draw(st.integers(min_steps, max_steps)), draw(st.floats(0.5, 8.0))
    uniform = np.linspace(1, 1 / num_steps, num_steps)
    return [*(shift * uniform / (1 + (shift - 1) * uniform)).tolist(), 0.0]


@st.composite
def sizes(draw, least=2, most=64):
    """(height, width) in pixels that FLUX.1 can make."""
    side = st.integers(least, most)
    return 16 * draw(side), 16 * draw(side)


@st.composite
def ladders(draw):
    """Increasing scales that end at 1, far enough apart to differ on a side of 32 cells (512 px)."""
    eighths = draw(st.sets(st.integers(2, 7), min_size=1, max_size=4))
    return (*(n / 8 for n in sorted(eighths)), 1.0)


def plan(sigmas, size=(1024, 1024), family=FLUX1, **sampling):
    cost = sampling.pop("cost", None)
    return plan_sampling(Sampling(**sampling), family, sigmas, height_px=size[0], width_px=size[1], cost=cost)


# ------------------------------------------------------------------------------------------------ formulas


@given(levels01, ratios)
def test_rewind_balances_signal_and_noise(sigma, ratio):
    kappa, higher = rewind(sigma, ratio)
    assert kappa * (1 - sigma) == pytest.approx(ratio * (1 - higher), abs=1e-9)
    assert kappa * sigma == pytest.approx(higher)
    assert sigma - 1e-12 <= higher <= 1 + 1e-12


@given(levels01)
def test_rewind_by_ratio_one_is_nothing(sigma):
    assert rewind(sigma, 1.0) == (1.0, sigma)


@given(levels01, ratios)
def test_matched_levels_are_the_inverse_of_the_rewind(sigma, ratio):
    lower = matched(sigma, ratio)
    assert lower <= sigma + 1e-12
    assert rewind(lower, ratio)[1] == pytest.approx(sigma, abs=1e-9)


@given(levels01, st.floats(1.0, 4.0), st.floats(1.0, 4.0))
def test_two_small_rewinds_are_one_large_one(sigma, first, second):
    kappa, higher = rewind(sigma, first)
    kappa_2, highest = rewind(higher, second)
    at_once = rewind(sigma, first * second)
    assert (kappa * kappa_2, highest) == pytest.approx(at_once, abs=1e-9)


@given(st.floats(0.5, 200.0), spectra, deltas)
def test_t_w_balances_the_published_inequality(w, spectrum, delta):
    """At sigma = t_w the ratio (1 - sigma)^2 / sigma^2 is delta / (P (1 + P - delta))."""
    t = t_w(w, spectrum, delta)
    power = spectrum.power(w)
    assert 0 < t < 1
    assert ((1 - t) / t) ** 2 * power * (1 + power - delta) == pytest.approx(delta, rel=1e-6)


@given(st.floats(0.5, 200.0), spectra, deltas, st.floats(1.0, 2.0))
def test_t_w_falls_with_delta_and_with_frequency(w, spectrum, delta, factor):
    assume(delta * factor < 1)
    assert t_w(w, spectrum, delta * factor) <= t_w(w, spectrum, delta) + 1e-12
    assert t_w(w * factor, spectrum, delta) <= t_w(w, spectrum, delta) + 1e-12


@given(schedules(), levels01)
def test_first_at_or_below(sigmas, threshold):
    index = first_at_or_below(sigmas, threshold)
    assert 0 <= index <= len(sigmas) - 2
    assert all(sigma > threshold for sigma in sigmas[:index])
    assert sigmas[index] <= threshold or index == len(sigmas) - 2


def test_side_ratio_counts_cells():
    assert side_ratio((64, 64), (128, 128)) == 2
    assert side_ratio((30, 52), (60, 104)) == 2
    assert side_ratio((46, 80), (90, 160)) == pytest.approx(math.sqrt(90 / 46 * 2))


# ------------------------------------------------------------------------------------------------- grids


@given(sizes(most=200), st.floats(0.05, 1.0), st.integers(1, 4))
def test_coarse_grids_are_multiples_near_the_scale(size, scale, multiple):
    full = tuple(side // 16 * multiple for side in size)
    grid = coarse_grid(full, scale, multiple)
    for small, side in zip(grid, full, strict=True):
        assert small % multiple == 0
        assert multiple <= small <= side
        assert abs(small - scale * side) <= multiple / 2 or small == multiple


def test_odd_halves_snap_the_coarse_grid_never_the_output():
    wan = FAMILIES["wan2.1"]
    sigmas = describe("Wan-AI/Wan2.1-T2V-14B-Diffusers").sigmas(50, 720, 1280, 81)
    stages = plan(sigmas, (720, 1280), wan, levels=1).stages
    assert [stage.grid for stage in stages] == [(46, 80), (90, 160)]
    assert [stage.frames for stage in stages] == [21, 21]
    assert [stage.tokens for stage in stages] == [46 * 80 * 21 // 4, 90 * 160 * 21 // 4]
    # 46 rows carry more than half the frequencies, but the stage is trusted with what the scale says.
    assert carried((90, 160), 0.5, (46, 80)) == 22


def test_a_side_that_snapping_made_smaller_counts():
    assert coarse_grid((18, 64), 0.45, 4) == (8, 28)
    assert carried((18, 64), 0.45, (8, 28)) == math.floor(28 / 64 * 9)


@pytest.mark.parametrize(
    ("family", "size", "near"),
    [
        ("z-image", (360, 640), ["352x640", "368x640"]),
        ("flux1", (1000, 1001), ["992x992", "992x1008", "1008x992", "1008x1008"]),
        ("wan2.1", (721, 1280), ["720x1280", "736x1280"]),
        ("flux1", (8, 16), ["16x16"]),
    ],
)
def test_a_size_that_cannot_be_made_names_the_nearest_that_can(family, size, near):
    with pytest.raises(ValueError, match=f"height x width is {size[0]}x{size[1]} px") as error:
        grid_for(FAMILIES[family], *size)
    assert str(error.value).split("nearest sizes are ")[1].split(", ") == near
    for name in near:
        grid_for(FAMILIES[family], *map(int, name.split("x")))


def test_frames():
    wan, flux = FAMILIES["wan2.1"], FLUX1
    assert [latent_frames(wan, n) for n in (1, 5, 81, None)] == [1, 2, 21, 21]
    assert [latent_frames(flux, n) for n in (None, 1)] == [1, 1]
    with pytest.raises(ValueError, match=r"num_frames is 80; wan2.1 makes 4k \+ 1 frames; .* 77 and 81"):
        latent_frames(wan, 80)
    with pytest.raises(ValueError, match="num_frames is 16; flux1 makes images"):
        latent_frames(flux, 16)


# ------------------------------------------------------------------------------------------------- plans


@st.composite
def sizes_and_scales(draw):
    """A size with a ladder that fits it, or any size with `auto`."""
    scales = draw(st.one_of(st.just("auto"), ladders()))
    return draw(sizes(2 if scales == "auto" else 32)), scales


@settings(max_examples=200)
@given(
    schedules(), sizes_and_scales(), spectra, deltas, st.sampled_from(["dct", "dct_rewind", "dct_matched"])
)
def test_every_plan_covers_the_schedule_once(sigmas, size_and_scales, spectrum, delta, mode):
    size, scales = size_and_scales
    fit = (spectrum.amplitude, spectrum.beta)
    made = plan(sigmas, size, scales=scales, delta=delta, mode=mode, spectrum=fit)
    assert made.stages[0].first == 0
    assert made.stages[-1].last == made.num_steps == len(sigmas) - 1
    assert made.stages[-1].grid == (size[0] // 8, size[1] // 8)
    assert made.stages[-1].sigma_end == 0
    assert made.scales[-1] == 1
    assert len(made.scales) == len(made.stages)
    for stage in made.stages:
        assert stage.steps > 0
        assert len(stage.sigmas) == stage.steps + 1
        assert stage.height % 2 == stage.width % 2 == 0
        assert stage.tokens == stage.height * stage.width // 4
        assert all(b <= a for a, b in itertools.pairwise(stage.sigmas))
    for index, (stage, after) in enumerate(itertools.pairwise(made.stages)):
        assert stage.last == after.first
        assert stage.height <= after.height
        assert stage.width <= after.width
        kappa = made.kappa(index)
        if mode != "dct":
            assert kappa * stage.sigma_end == pytest.approx(after.sigma_start, abs=1e-6)
        else:
            assert kappa == 1
            assert stage.sigma_end == after.sigma_start
    assert made.token_steps <= made.fullres_token_steps
    assert made.token_saving >= 1


@settings(max_examples=200)
@given(schedules(), sizes(32), spectra, st.tuples(deltas, deltas), ladders())
def test_a_larger_delta_never_gives_fewer_coarse_steps(sigmas, size, spectrum, two, scales):
    fit = (spectrum.amplitude, spectrum.beta)
    small, large = (plan(sigmas, size, delta=d, scales=scales, spectrum=fit) for d in sorted(two))
    for scale in scales[:-1]:
        assert steps_up_to(small, scale) <= steps_up_to(large, scale)
    assert large.token_steps <= small.token_steps


def steps_up_to(made, scale):
    return sum(stage.steps for stage, s in zip(made.stages, made.scales, strict=True) if s <= scale)


@settings(max_examples=100)
@given(schedules(), sizes(4), spectra, deltas)
def test_matched_stages_land_on_the_full_schedule(sigmas, size, spectrum, delta):
    fit = (spectrum.amplitude, spectrum.beta)
    made = plan(sigmas, size, mode="dct_matched", scales=(0.5, 1.0), delta=delta, spectrum=fit)
    np.testing.assert_allclose(made.stages[-1].sigmas, sigmas[made.stages[-1].first :], atol=1e-9)
    for index in range(len(made.stages) - 1):
        fill = made.fill(index)
        ratio = side_ratio(made.stages[index + 1].grid, made.stages[-1].grid)
        assert (fill.amplitude, fill.beta) == (spectrum.amplitude / ratio**2, spectrum.beta)


def test_fullres_is_one_stage_with_the_schedule_untouched():
    sigmas = [1.0, 0.6, 0.2, 0.0]
    made = plan(sigmas, mode="fullres", scales="auto")
    assert [(s.grid, s.sigmas) for s in made.stages] == [((128, 128), tuple(sigmas))]
    assert made.saving == 1


def test_transition_sigmas_decide_where_stages_end():
    sigmas = np.linspace(1, 0, 11).tolist()
    made = plan(sigmas, levels=2, transition_sigmas=(0.7, 0.35), mode="dct")
    assert [(s.first, s.last) for s in made.stages] == [(0, 3), (3, 7), (7, 10)]


def test_heights_in_pixels_are_scales():
    sigmas = np.linspace(1, 0, 31).tolist()
    made = plan(sigmas, scales=(512, 768, 1024))
    assert made.stages == plan(sigmas, scales=(0.5, 0.75, 1.0)).stages


def test_the_same_plan_as_plain_data():
    made = plan(np.linspace(1, 0, 31).tolist(), levels=1, delta=0.05)
    shown = made.as_dict()
    assert shown["stages"][0]["steps"] == made.stages[0].steps
    assert shown["saving"] == made.saving
    assert shown["scales"] == [0.5, 1.0]


# -------------------------------------------------------------------------------------------------- auto


costs = st.builds(Cost, attention=st.floats(0, 1e-3), text_tokens=st.integers(0, 512))


def estimate(made, cost):
    return sum(cost.step(stage.tokens) * stage.steps for stage in made.stages)


@settings(max_examples=200)
@given(schedules(), sizes(4), spectra, deltas, costs)
def test_auto_never_costs_more_than_one_level(sigmas, size, spectrum, delta, cost):
    fit = (spectrum.amplitude, spectrum.beta)
    auto = plan(sigmas, size, scales="auto", delta=delta, spectrum=fit, cost=cost)
    one = plan(sigmas, size, levels=1, delta=delta, spectrum=fit)
    assert estimate(auto, cost) <= estimate(one, cost) * (1 + 1e-9)
    assert len(auto.stages) <= 5
    assert auto.scales[0] >= 0.25


@settings(max_examples=100)
@given(schedules(), sizes(most=9), spectra, deltas, costs, st.integers(1, 4), st.floats(0.1, 0.9))
def test_auto_is_the_best_of_all_ladders(sigmas, size, spectrum, delta, cost, max_rungs, min_scale):
    """Against every ladder there is, one by one."""
    fit = (spectrum.amplitude, spectrum.beta)
    limits = {"max_rungs": max_rungs, "min_scale": min_scale}
    auto = plan(sigmas, size, scales="auto", delta=delta, spectrum=fit, cost=cost, **limits)
    full = (size[0] // 8, size[1] // 8)
    ends = Ends(full, sigmas, spectrum, delta)
    short = min(full)
    rungs = {}
    for side in range(2, short, 2):
        grid = coarse_grid(full, side / short, 2)
        if side / short >= min_scale and grid != full:
            rungs.setdefault(grid, ends(side / short, grid))
    best = math.inf
    for count in range(max_rungs):
        for ladder in itertools.combinations(rungs, count):
            boundaries = [0, *(rungs[grid] for grid in ladder), len(sigmas) - 1]
            if any(b <= a for a, b in itertools.pairwise(boundaries)):
                continue
            grids = [*ladder, full]
            steps = [b - a for a, b in itertools.pairwise(boundaries)]
            best = min(best, sum(n * cost.step(h * w // 4) for n, (h, w) in zip(steps, grids, strict=True)))
    assert estimate(auto, cost) == pytest.approx(best)


def test_auto_on_flux_at_1024():
    """As ladders tried by hand gave: 1.9 times fewer token-steps from half size, 2.3 from a quarter."""
    sigmas = describe("black-forest-labs/FLUX.1-dev").sigmas(50, 1024, 1024)
    from_half = plan(sigmas, scales="auto", delta=0.05, min_scale=0.5)
    from_quarter = plan(sigmas, scales="auto", delta=0.05)
    assert plan(sigmas, levels=1, delta=0.05).token_saving == pytest.approx(1.72, abs=0.01)
    assert 1.9 < from_half.token_saving < 2.1
    assert from_quarter.token_saving == pytest.approx(2.3, abs=0.05)


def test_auto_with_haar_only_doubles():
    made = plan(np.linspace(1, 0, 31).tolist(), scales="auto", transform="haar", delta=0.2)
    assert len(made.stages) > 1
    for small, large in itertools.pairwise(made.stages):
        assert large.height % small.height == 0
        assert (large.height // small.height).bit_count() == 1


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("size", "sampling", "message"),
    [
        (
            (1024, 1024),
            {"levels": 7},
            r"levels is 7; a latent grid of 128x128 can be halved 6 times: set levels to 6",
        ),
        (
            (32, 1024),
            {"levels": 2},
            r"levels is 2; a latent grid of 4x128 can be halved once: set levels to 1",
        ),
        ((1024, 1024), {"scales": (0.01, 1.0)}, r"scales starts at 0.01; .* 128x128 allows 0.01562 to 1"),
        ((1024, 1024), {"scales": (0.25, 0.5)}, r"scales is \[0.25, 0.5\]; it must end at full size, 1.0"),
        ((1024, 1024), {"scales": (0.5, 512, 1024)}, "heights in pixels must be whole numbers"),
        ((1024, 1024), {"scales": (512.5, 1024)}, "heights in pixels must be whole numbers"),
        ((1024, 1024), {"scales": (512, 768)}, r"end at the output's height, 1024"),
        (
            (1024, 1024),
            {"scales": (0.5, 0.502, 1.0)},
            r"scales 0.5 and 0.502 both give a latent grid of 64x64",
        ),
        (
            (1024, 1024),
            {"levels": 1, "transition_sigmas": (0.7, 0.5)},
            r"transition_sigmas has 2 values; a ladder of 2 rungs \[0.5, 1.0\] takes 1",
        ),
        ((1024, 1024), {"scales": "auto", "transition_sigmas": (0.7,)}, "transition_sigmas needs a ladder"),
        ((1040, 1024), {"levels": 1, "transform": "haar"}, r"can only double a grid; .* 66x64 to 130x128"),
        ((1024, 1024), {"num_frames": 9}, "num_frames is 9; flux1 makes images"),
    ],
)
def test_what_a_plan_refuses(size, sampling, message):
    with pytest.raises(ValueError, match=message):
        plan(np.linspace(1, 0, 31).tolist(), size, **{"delta": 0.2} | sampling)


@pytest.mark.parametrize("sigmas", [[1.0], [], [1.0, 0.5], [0.5, 1.0, 0.0]])
def test_a_schedule_that_does_not_fall_to_zero_is_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas must fall to 0 over at least one step"):
        plan(sigmas or [1.0])


def test_without_a_wish_a_tiny_grid_just_runs_whole():
    assert len(plan(np.linspace(1, 0, 31).tolist(), (16, 16), delta=0.5).stages) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t_w(3, Spectrum(1, 1), 0), "delta is 0; it must be above 0 and below 1"),
        (lambda: t_w(3, Spectrum(1, 1), 1.0), "delta is 1.0; it must be above 0 and below 1"),
        (lambda: t_w(0, Spectrum(1, 1), 0.1), "frequency w is 0; it must be above 0"),
        (lambda: rewind(0.5, 0.9), "side ratio is 0.9; an expansion has a ratio of at least 1"),
        (lambda: Spectrum(0, 1), r"spectrum is \(0, 1\); both numbers must be above 0"),
        (lambda: Spectrum(math.inf, 1), "spectrum is"),
        (lambda: Spectrum(1, math.nan), "spectrum is"),
    ],
)
def test_formulas_name_the_value_and_the_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delta": 0.0}, "greater than 0"),
        ({"delta": 1.0}, "less than 1"),
        ({"delta": math.nan}, "delta"),
        ({"levels": -1}, "greater than or equal to 0"),
        ({"levels": 1, "scales": (0.5, 1.0)}, "give `levels` or `scales`, not both"),
        ({"scales": ()}, "scales is empty"),
        ({"scales": (0.5, 0.5, 1.0)}, r"scales must increase; got \[0.5, 0.5, 1.0\]"),
        ({"scales": (-0.5, 1.0)}, "scales must be above 0"),
        ({"scales": (math.nan, 1.0)}, "finite number"),
        ({"spectrum": (math.inf, 1.0)}, "finite number"),
        ({"transition_sigmas": (0.3, 0.5)}, "transition_sigmas must decrease"),
        ({"transition_sigmas": (1.0,)}, "less than 1"),
        ({"num_steps": 0}, "greater than or equal to 1"),
        ({"spectrum": (1.0, -1.0)}, "greater than 0"),
        ({"mode": "fast"}, "'fullres', 'dct', 'dct_rewind' or 'dct_matched'"),
        ({"deltas": 0.1}, "Extra inputs are not permitted"),
    ],
)
def test_settings_refuse_bad_values(fields, message):
    with pytest.raises(ValidationError, match=message):
        Sampling(**fields)


def test_settings_survive_json():
    sampling = Sampling(scales=(0.5, 0.75, 1.0), delta=0.1, spectrum=(2.0, 1.5), call_kwargs={"a": [1]})
    assert Sampling.model_validate_json(sampling.model_dump_json()) == sampling
