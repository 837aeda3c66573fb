"""The engine on tiny random models in each family's real classes, against those pipelines' own calls."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_pipes
import tiny_zoo
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from diffusers.models import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from PIL import Image

from overtone import progressive
from overtone.progressive import layouts, noise
from overtone.progressive.checkpoints import describe
from overtone.progressive.engine import Encoded, Engine
from overtone.progressive.engine.one_call import generate
from overtone.progressive.errors import NonFiniteLatents
from overtone.progressive.pipelines import load
from overtone.progressive.settings import Sampling
from overtone.progressive.staged import Schedule, StageScheduler, Trajectory

FAMILIES = list(tiny_pipes.BUILDERS)
SEEDS = [5, 2**40]
STEPS = 6


@cache
def pipe_of(family: str) -> Any:
    """Shared by tests that change nothing about it."""
    return tiny_pipes.BUILDERS[family]()


@cache
def engine_of(family: str) -> Engine:
    return Engine(pipe_of(family))


def settings(family: str, **fields: Any) -> Sampling:
    """Small and guided, with half of the steps on the coarse grid unless told otherwise."""
    video = family.startswith("wan")
    size = {"height": 64, "width": 96, "num_frames": 5} if video else {"height": 128, "width": 96}
    guidance = {"true_cfg_scale": 3.0} if family in ("flux1", "qwen-image") else {"guidance_scale": 3.0}
    base: dict[str, Any] = {"num_steps": STEPS, "call_kwargs": {"max_sequence_length": 16}}
    if fields.get("mode") != "fullres" and not {"transition_sigmas", "scales", "delta"} & set(fields):
        base["transition_sigmas"] = (0.8,)
    return Sampling(**(base | size | guidance | fields))


def negatives(family: str) -> list[str | None]:
    return [None, None] if family == "flux2" else ["a ring", "green"]  # FLUX.2-klein's is always empty


def base_noise(engine: Engine, latents: torch.Tensor, seeds: list[int] = SEEDS) -> torch.Tensor:
    return noise.batch_noise(seeds, noise.BASE, latents.shape[1:])


def own_call(engine: Engine, sampling: Sampling, latents: torch.Tensor, **extra: Any) -> Any:
    """The pipeline called by its own rules, from the same noise."""
    call = dict(sampling.call_kwargs)
    for name in ("height", "width", "num_frames", "guidance_scale", "true_cfg_scale"):
        if getattr(sampling, name) is not None:
            call[name] = getattr(sampling, name)
    if engine.family.name != "flux2":
        call["negative_prompt"] = negatives(engine.family.name)
    return engine.pipe(
        prompt=list(tiny_pipes.PROMPTS),
        num_inference_steps=sampling.num_steps,
        latents=layouts.pack(engine.family, latents),
        return_dict=False,
        **(call | extra),
    )[0]


def as_own(engine: Engine, latents: torch.Tensor) -> torch.Tensor:
    """Engine latents as the pipeline's `output_type="latent"` gives them."""
    if engine.family.name == "flux2":
        vae = engine.pipe.vae
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return engine.pipe._unpatchify_latents(latents * std + vae.bn.running_mean.view(1, -1, 1, 1))
    return layouts.pack(engine.family, latents)


def run(engine: Engine, sampling: Sampling, seeds: list[int] = SEEDS, **extra: Any) -> Any:
    plan = engine.plan(sampling)
    encoded = engine.encode(tiny_pipes.PROMPTS, negatives(engine.family.name), sampling)
    return (plan, encoded, *engine.denoise(plan, encoded, seeds, sampling, **extra))


# ------------------------------------------------------------------------------------ against the pipelines


@pytest.mark.parametrize("family", FAMILIES)
def test_fullres_is_the_pipelines_own_call_bit_for_bit(family):
    engine, sampling = engine_of(family), settings(family, mode="fullres")
    assert engine.family.name == family
    plan, _, latents, reports = run(engine, sampling)
    own = own_call(engine, sampling, base_noise(engine, latents), output_type="latent")
    assert torch.equal(as_own(engine, latents), own)
    assert [r.kind for r in reports] == ["denoise"]
    # Decoding is the pipeline's own too; a row at a time may round the last bit of a pixel another way.
    ours = np.stack([np.asarray(made, dtype=int) for made in engine.decode(plan, latents)])
    theirs = own_call(engine, sampling, base_noise(engine, latents), output_type="np")
    assert np.abs(ours - (theirs * 255).round()).max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_without_expansion_changes_no_bit(family):
    engine, sampling = engine_of(family), settings(family, mode="fullres")
    plan, encoded, whole, _ = run(engine, sampling)
    (stage,) = plan.stages
    for cut in (1, 3, STEPS - 1):
        parts = (
            replace(stage, last=cut, sigmas=stage.sigmas[: cut + 1]),
            replace(stage, first=cut, sigmas=stage.sigmas[cut:]),
        )
        latents, reports = engine.denoise(replace(plan, stages=parts), encoded, SEEDS, sampling)
        assert torch.equal(latents, whole), f"cut at step {cut}"
        assert [(r.kind, r.steps) for r in reports] == [("denoise", cut), ("denoise", STEPS - cut)]


@pytest.mark.parametrize("mode", ["dct", "dct_rewind", "dct_matched"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_on_every_family(family, mode):
    engine, sampling = engine_of(family), settings(family, mode=mode)
    plan, _, latents, reports = run(engine, sampling)
    coarse, full = plan.stages
    assert latents.shape[-2:] == full.grid
    assert torch.isfinite(latents).all()
    assert [r.kind for r in reports] == ["denoise", "expand", "denoise"]
    assert [(r.height, r.width) for r in reports] == [coarse.grid, full.grid, full.grid]
    assert [r.steps for r in reports] == [coarse.steps, 0, full.steps]
    assert (reports[1].sigma_start, reports[1].sigma_end) == (coarse.sigma_end, full.sigma_start)
    assert all(r.seconds > 0 and r.frames == full.frames for r in reports)
    if family.startswith("wan"):
        assert latents.shape[2] == 2  # 5 frames are 2 latent ones, on every grid


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_different_lengths_together_as_one_by_one(family):
    engine, sampling = engine_of(family), settings(family)
    plan, encoded, together, _ = run(engine, sampling)
    for row, seed in enumerate(SEEDS):
        one = engine.encode([tiny_pipes.PROMPTS[row]], negatives(family)[row : row + 1], sampling)
        for part in (one, encoded[[row]], encoded[row : row + 1]):
            alone, _ = engine.denoise(plan, part, [seed], sampling)
            assert torch.allclose(alone[0], together[row], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_stage_in_batches_of_its_own_as_one_by_one(family):
    """Four rows: together on the coarse grid, then three and one on the full one."""
    engine, sampling = engine_of(family), settings(family)
    plan = engine.plan(sampling)
    seeds = [*SEEDS, 6, 7]
    encoded = engine.encode([*tiny_pipes.PROMPTS] * 2, negatives(family) * 2, sampling)
    seen: list[tuple[int, int]] = []
    latents, reports = engine.denoise(
        plan, encoded, seeds, sampling, batch_sizes=[4, 3], on_step=lambda *done: seen.append(done)
    )
    full, coarse = plan.stages[1], plan.stages[0]
    assert [(r.kind, r.height, r.rows, r.steps) for r in reports] == [
        ("denoise", coarse.height, 4, coarse.steps),
        ("expand", full.height, 3, 0),
        ("denoise", full.height, 3, full.steps),
        ("expand", full.height, 1, 0),
        ("denoise", full.height, 1, full.steps),
    ]
    total = coarse.steps + 2 * full.steps
    assert seen == [(done, total) for done in range(1, total + 1)]
    for row, seed in enumerate(seeds):
        alone, _ = engine.denoise(plan, encoded[[row]], [seed], sampling)
        assert torch.allclose(alone[0], latents[row], atol=1e-4)


def test_rows_wait_between_stages_and_what_fails_is_run_again():
    """A stochastic scheduler, whose noise must not be drawn on by the batch that ran out of memory."""
    pipe = copy.copy(pipe_of("flux1"))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    engine, sampling = Engine(pipe), settings("flux1", noise="fresh")
    plan, encoded, expected, _ = run(engine, sampling)

    def full(done: int, total: int) -> None:
        if done == 2:
            raise torch.OutOfMemoryError

    rows = engine.begin(plan, encoded, SEEDS, sampling)
    rows.run(0, [1])
    rows.run(0, [0])
    with pytest.raises(torch.OutOfMemoryError):
        rows.run(1, [0, 1], on_step=full)
    for row in (1, 0):
        rows.run(1, [row])
    assert torch.allclose(rows.latents([0, 1]), expected, atol=1e-4)


@pytest.mark.parametrize("sizes", [[2], [2, 0], [1, 2, 3]])
def test_batch_sizes_are_one_a_stage(sizes):
    with pytest.raises(ValueError, match="give 2 numbers of 1 or more"):
        run(engine_of("flux1"), settings("flux1"), batch_sizes=sizes)


def test_guidance_by_a_negative_prompt_changes_the_sample_and_none_is_the_empty_one():
    engine = engine_of("qwen-image")
    plain, guided = settings("qwen-image", true_cfg_scale=1.0), settings("qwen-image")
    plan = engine.plan(guided)

    def made(negative: str | None, sampling: Sampling) -> torch.Tensor:
        encoded = engine.encode(tiny_pipes.PROMPTS[:1], [negative], sampling)
        return engine.denoise(plan, encoded, [1], sampling)[0]

    assert torch.equal(made(None, guided), made("", guided))
    assert not torch.allclose(made(None, guided), made("green", guided))
    assert torch.equal(made("green", plain), made(None, plain))
    assert not torch.allclose(made(None, plain), made(None, guided))


def test_guidance_by_default_is_the_pipelines_own():
    """Qwen-Image's call has a true_cfg_scale of 4, which does nothing until a negative prompt is given."""
    pipe = tiny_pipes.qwen_image()
    engine, calls = Engine(pipe), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, given, named: calls.append(len(named["hidden_states"])), with_kwargs=True
    )
    sampling = settings("qwen-image", mode="fullres", true_cfg_scale=None)
    plan = engine.plan(sampling)
    for negative, passes in (([None, None], 1), (["green", ""], 2), ([None, "green"], 3)):
        encoded = engine.encode(tiny_pipes.PROMPTS, negative, sampling)
        calls.clear()
        latents, _ = engine.denoise(plan, encoded, SEEDS, sampling)
        assert len(calls) == passes * STEPS  # in the last case one pass for the first row, two for the other
        base = base_noise(engine, latents)
        for row, prompt in enumerate(tiny_pipes.PROMPTS):
            own = pipe(
                [prompt],
                negative_prompt=None if negative[row] is None else [negative[row]],
                height=128,
                width=96,
                num_inference_steps=STEPS,
                latents=layouts.pack(engine.family, base[[row]]),
                output_type="latent",
                max_sequence_length=16,
            ).images
            assert torch.allclose(as_own(engine, latents[[row]]), own, atol=1e-4)


def test_guidance_embedding_reaches_the_model():
    engine = engine_of("flux1")
    low, high = (run(engine, settings("flux1", true_cfg_scale=1.0, guidance_scale=g))[2] for g in (1.0, 30.0))
    assert not torch.allclose(low, high)


# -------------------------------------------------------------------------------------------- noise, modes


@pytest.mark.parametrize("mode", ["dct", "dct_rewind", "dct_matched"])
def test_coupled_noise_is_closer_to_fullres_than_fresh(mode):
    engine = engine_of("flux1")
    full = run(engine, settings("flux1", mode="fullres"))[2]
    coupled, fresh = (
        (run(engine, settings("flux1", mode=mode, noise=kind))[2] - full).norm()
        for kind in ("coupled", "fresh")
    )
    assert coupled < 0.5 * fresh


@pytest.mark.parametrize(
    "fields",
    [
        {"transform": "haar", "levels": 2, "transition_sigmas": (0.9, 0.7)},
        {"transform": "fft", "transition_sigmas": (0.8,)},
        {"scales": (0.5, 0.75, 1.0), "transition_sigmas": (0.9, 0.7)},
    ],
)
def test_transforms_and_ladders(fields):
    engine = engine_of("flux1")
    sampling = settings("flux1", height=128, width=128, **fields)
    plan, _, latents, reports = run(engine, sampling)
    assert len(plan.stages) == len(fields["transition_sigmas"]) + 1
    assert len(reports) == 2 * len(plan.stages) - 1
    assert latents.shape == (2, 4, 16, 16)
    full = run(engine, settings("flux1", height=128, width=128, mode="fullres"))[2]
    assert (latents - full).norm() < 0.5 * full.norm()


def test_a_row_depends_on_its_seed_alone():
    engine, sampling = engine_of("flux1"), settings("flux1", noise="fresh")
    plan = engine.plan(sampling)
    encoded = engine.encode([tiny_pipes.PROMPTS[0]] * 3, [None] * 3, sampling)
    latents, _ = engine.denoise(plan, encoded, [7, 8, 7], sampling)
    assert torch.equal(latents[0], latents[2])
    assert not torch.allclose(latents[0], latents[1])


def test_bfloat16_runs_as_the_pipeline_does():
    pipe = tiny_pipes.flux1().to(torch.bfloat16)
    engine, sampling = Engine(pipe), settings("flux1", mode="fullres")
    latents = run(engine, sampling)[2]
    assert latents.dtype == torch.bfloat16
    assert torch.equal(
        as_own(engine, latents), own_call(engine, sampling, base_noise(engine, latents), output_type="latent")
    )
    assert torch.isfinite(run(engine, settings("flux1"))[2]).all()


# --------------------------------------------------------------------------------------- schedules and stages


@pytest.mark.parametrize(
    ("family", "checkpoint", "size", "steps", "changes", "fields", "split"),
    [
        ("flux1", "black-forest-labs/FLUX.1-dev", (1024, 1024), 50, {}, {"delta": 0.05}, [28, 22]),
        (
            "flux1",
            "black-forest-labs/FLUX.1-dev",
            (1024, 1024),
            50,
            {},
            {"delta": 0.01, "levels": 2},
            [10, 8, 32],
        ),
        ("flux2", "black-forest-labs/FLUX.2-klein-4B", (1024, 1024), 30, {}, {"delta": 0.10}, [20, 10]),
        ("qwen-image", "Qwen/Qwen-Image", (1024, 1024), 30, {}, {"delta": 0.20}, [19, 11]),
        (
            "wan2.1",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            (480, 832),
            50,
            {"flow_shift": 5.0},
            {"delta": 0.05, "num_frames": 81},
            [33, 17],
        ),
    ],
)
def test_published_splits_from_the_pipelines_own_schedule(
    family, checkpoint, size, steps, changes, fields, split
):
    pipe = copy.copy(pipe_of(family))
    own = type(pipe.scheduler)
    pipe.scheduler = own.from_config(describe(checkpoint).scheduler | changes)
    plan = Engine(pipe).plan(Sampling(num_steps=steps, **fields), height_px=size[0], width_px=size[1])
    assert [stage.steps for stage in plan.stages] == split


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("mode", ["dct_rewind", "dct_matched"])
def test_a_stage_steps_from_its_own_noise_levels(scheduler, mode):
    family = "wan2.1" if scheduler.startswith("UniPC") else "flux1"
    engine, sampling = engine_of(family), settings(family, mode=mode)
    plan = engine.plan(sampling)
    schedule = engine.call.schedule(STEPS, plan.height_px, plan.width_px, plan.num_frames, sampling)
    assert type(schedule.scheduler).__name__ == scheduler
    trajectory = Trajectory(schedule, plan)
    for index, stage in enumerate(plan.stages):
        view = trajectory.stage(index)
        assert view.sigmas.tolist() == pytest.approx(stage.sigmas, abs=1e-6)
        scaled = [1000 * sigma for sigma in stage.sigmas[:-1]]
        assert view.timesteps.tolist() == pytest.approx(scaled, abs=1.0 if "UniPC" in scheduler else 1e-3)
        assert len(view.timesteps) == stage.steps
        sample = torch.ones(1, 4, 2, 2)
        for t in view.timesteps:  # steps of a model that always says "-sample": Euler is exact arithmetic
            sample = view.step(-sample, t, sample, return_dict=False)[0]
        if "Euler" in scheduler:
            expected = np.prod([1 + a - b for a, b in zip(stage.sigmas, stage.sigmas[1:], strict=False)])
            assert sample[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert plan.stages[1].sigma_start > plan.sigmas[plan.stages[1].first] or mode == "dct_matched"


def test_a_stochastic_scheduler_gets_the_rows_own_generators():
    pipe = copy.copy(pipe_of("flux1"))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    engine, sampling = Engine(pipe), settings("flux1", mode="fullres")
    torch.manual_seed(0)
    first = run(engine, sampling)[2]
    torch.manual_seed(1)
    assert torch.equal(run(engine, sampling)[2], first)
    plan = engine.plan(sampling)
    encoded = engine.encode(tiny_pipes.PROMPTS[1:], negatives("flux1")[1:], sampling)
    alone, _ = engine.denoise(plan, encoded, SEEDS[1:], sampling)
    assert torch.allclose(alone[0], first[1], atol=1e-4)


@pytest.mark.parametrize("family", ["flux1", "wan2.1"])
def test_the_callers_pipeline_is_left_as_it_was(family):
    pipe = tiny_pipes.BUILDERS[family]()
    pipe.set_progress_bar_config(leave=False)
    scheduler, config = pipe.scheduler, dict(pipe.config)
    before = {k: copy.deepcopy(v) for k, v in scheduler.__dict__.items()}
    engine, sampling = Engine(pipe), settings(family)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    run(engine, sampling)
    with pytest.raises(KeyboardInterrupt):
        run(engine, sampling, on_step=stop)
    assert pipe.scheduler is scheduler
    assert dict(pipe.config) == config
    assert pipe._progress_bar_config == {"leave": False}
    for name, value in before.items():
        now = scheduler.__dict__[name]
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value, name


def test_a_scheduler_changed_later_is_used():
    """Another one in its place, or the same one with another shift or configuration."""
    pipe = copy.copy(pipe_of("sd3"))
    engine, sampling = Engine(pipe), settings("sd3", mode="fullres")
    seen = [engine.plan(sampling).sigmas]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    seen.append(engine.plan(sampling).sigmas)
    pipe.scheduler.set_shift(2.0)
    seen.append(engine.plan(sampling).sigmas)
    pipe.scheduler.register_to_config(use_karras_sigmas=True)
    seen.append(engine.plan(sampling).sigmas)
    assert len(set(seen)) == 4
    pipe(prompt="a", num_inference_steps=2, height=128, width=96, output_type="latent")
    assert engine.plan(sampling).sigmas == seen[-1]
    pipe.scheduler.register_to_config(invert_sigmas=True)
    with pytest.raises(ValueError, match="inverted sigmas"):
        engine.plan(sampling)


@pytest.mark.parametrize("family", ["flux1", "wan2.1"])
def test_a_pipeline_sees_its_own_class_of_scheduler_all_the_way(family):
    """Pipelines ask with `isinstance`, step a copy for a second latent, and set attributes of their own."""
    pipe = copy.copy(pipe_of(family))
    own, seen = type(pipe.scheduler), []

    class Asks(type(pipe)):  # type: ignore[misc]
        def check_inputs(self, *args: Any, **kwargs: Any) -> None:
            second = copy.deepcopy(self.scheduler)
            assert isinstance(self.scheduler, own)
            assert isinstance(second, own)
            assert (type(second).__name__, second.config) == (own.__name__, pipe.scheduler.config)
            self.scheduler.note = "kept"
            seen.append(self.scheduler.note)
            if isinstance(self.scheduler, StageScheduler) and len(self.scheduler.timesteps):
                second.set_timesteps(7)
                second.step(torch.ones(1), second.timesteps[0], torch.ones(1))
                assert torch.equal(second.timesteps, self.scheduler.timesteps)
                assert second.step_index != self.scheduler.step_index

    engine, sampling = Engine(pipe), settings(family, mode="fullres")
    expected = run(engine, sampling)[2]
    pipe.__class__ = Asks
    engine = Engine(pipe, engine.family.name)
    assert torch.equal(run(engine, sampling)[2], expected)
    assert len(seen) >= 2
    assert not hasattr(pipe.scheduler, "note")


def test_flow_shift_takes_the_place_of_the_checkpoints():
    pipe = pipe_of("wan2.1")
    engine = Engine(pipe)
    for shift in (3.0, 5.0):
        found = engine.plan(settings("wan2.1", mode="fullres", flow_shift=shift)).sigmas
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=shift)
        scheduler.set_timesteps(len(found) - 1)
        assert found == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="shifts its schedule by the size"):
        Engine(pipe_of("flux1")).plan(settings("flux1", flow_shift=2.0))


def test_a_pipeline_that_never_asks_for_timesteps_is_told():
    class Odd(type(pipe_of("flux1"))):  # type: ignore[misc]
        def __call__(self, height=None, width=None, latents=None, **kwargs):
            return None

    pipe = copy.copy(pipe_of("flux1"))
    pipe.__class__ = Odd
    with pytest.raises(ValueError, match="never asked its scheduler"):
        Schedule.of(pipe, pipe.scheduler)


# ------------------------------------------------------------------------------------------ what comes free


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=1e9),
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1),
        MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, retention_ratio=0.2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_step_caches_start_afresh_at_every_stage(config):
    pipe = tiny_pipes.flux1(layers=2)
    plain = run(Engine(pipe), settings("flux1"))[2]
    pipe.transformer.enable_cache(config)
    engine, sampling, full = Engine(pipe), settings("flux1"), settings("flux1", mode="fullres")
    first = run(engine, sampling)[2]
    assert not torch.equal(first, plain)  # the cache does something
    assert torch.isfinite(first).all()
    latents = run(engine, full)[2]
    assert torch.equal(
        as_own(engine, latents), own_call(engine, full, base_noise(engine, latents), output_type="latent")
    )

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt  # leaves activations of the coarse grid behind

    with pytest.raises(KeyboardInterrupt):
        run(engine, sampling, on_step=stop)
    assert torch.equal(run(engine, full)[2], latents)
    assert torch.equal(run(engine, sampling)[2], first)


def test_lora_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    pipe, sampling = tiny_pipes.flux1(), settings("flux1", mode="fullres")
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    without = run(Engine(pipe), sampling)[2]
    torch.manual_seed(3)
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False),
        adapter_name="shapes",
    )
    engine = Engine(pipe)
    latents = run(engine, sampling)[2]
    assert torch.equal(
        as_own(engine, latents), own_call(engine, sampling, base_noise(engine, latents), output_type="latent")
    )
    assert not torch.allclose(latents, without)
    state = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="shapes")
    type(pipe).save_lora_weights(tmp_path / "lora", transformer_lora_layers=state)
    for scale, expected in ((1.0, latents), (0.0, without)):
        loaded = load(tmp_path / "model", device="cpu", loras=[{"id": tmp_path / "lora", "scale": scale}])
        assert torch.allclose(run(Engine(loaded), sampling)[2], expected, atol=1e-5)


def test_on_step_and_the_pipelines_own_callback():
    engine, seen, theirs = engine_of("flux1"), [], []

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        theirs.append(step)
        return {"latents": values["latents"] * 0 + 3}

    run(engine, settings("flux1"), on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(i, STEPS) for i in range(1, STEPS + 1)]
    sampling = settings("flux1", call_kwargs={"callback_on_step_end": callback, "max_sequence_length": 16})
    latents = run(engine, sampling)[2]
    assert theirs == list(range(STEPS))
    assert (latents == 3).all()  # what a callback puts in the latents' place counts


def test_attention_backend_and_offload(recwarn):
    pipe = tiny_pipes.flux1()
    expected = run(Engine(pipe), settings("flux1"))[2]
    pipe.transformer.set_attention_backend("native")
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.warns(UserWarning, match="dilutes the saving"):
        engine = Engine(pipe)
    assert torch.equal(run(engine, settings("flux1"))[2], expected)


# ----------------------------------------------------------------------------------------------- guards


def test_nan_is_caught_at_the_end_of_its_stage():
    engine, sampling = engine_of("flux1"), settings("flux1")
    plan = engine.plan(sampling)
    encoded = engine.encode(tiny_pipes.PROMPTS, negatives("flux1"), sampling)
    bad = dict(encoded.positive[1], prompt_embeds=encoded.positive[1]["prompt_embeds"] * float("nan"))
    encoded = Encoded((encoded.positive[0], bad), encoded.negative)
    for sizes in (None, [1, 1]):
        with pytest.raises(NonFiniteLatents, match="rows \\[1\\]") as caught:
            engine.denoise(plan, encoded, SEEDS, sampling, batch_sizes=sizes)
        assert (caught.value.rows, caught.value.stage) == ([1], 0)
    rows = engine.begin(plan, encoded, SEEDS, sampling)
    with pytest.raises(NonFiniteLatents):
        rows.run(0, [0, 1])
    rows.run(0, [0])  # the other row is where it was
    rows.run(1, [0])
    alone, _ = engine.denoise(plan, encoded[[0]], SEEDS[:1], sampling)
    assert torch.equal(rows.latents([0]), alone)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.rows, again.stage, str(again)) == ([1], 0, str(caught.value))


def test_context_parallelism_is_refused():
    pipe = tiny_pipes.flux1()
    engine = Engine(pipe)
    sampling = settings("flux1")
    plan = engine.plan(sampling)
    encoded = engine.encode(tiny_pipes.PROMPTS, [None, None], sampling)
    pipe.transformer._parallel_config = ParallelConfig(
        context_parallel_config=ContextParallelConfig(ulysses_degree=2)
    )
    with pytest.raises(RuntimeError, match="more workers"):
        engine.denoise(plan, encoded, SEEDS, sampling)
    with pytest.raises(RuntimeError, match="more workers"):
        Engine(pipe)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "not a flow-matching"),
        (UniPCMultistepScheduler(), "not a flow-matching"),
        (FlowMatchHeunDiscreteScheduler(), "2 calls a step"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "inverted sigmas"),
    ],
)
def test_what_is_not_flow_matching_is_refused(scheduler, message):
    pipe = copy.copy(pipe_of("flux1"))
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        Engine(pipe)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"call_kwargs": {"cfg_normalisation": True}}, "takes no argument cfg_normalisation"),
        ({"call_kwargs": {"height": 64}}, "names height, which the engine sets itself"),
        ({"call_kwargs": {"prompt_embeds": None}}, "names prompt_embeds, which the engine sets"),
        ({"seeds": [1]}, "1 seeds for 2 prompts"),
        ({"seeds": [2**64, 1]}, "seed is 18446744073709551616"),
        ({"negative_prompts": ["a"]}, "1 negative prompts for 2 prompts"),
        ({"height": 100}, "nearest sizes"),
        ({"num_frames": 5}, "makes images"),
        ({"delta": 1.5}, "delta"),
        ({"levels": 9}, "levels is 9"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"family": "flux9"}, "flux9"),
    ],
)
def test_mistakes_are_named(call, message):
    arguments = {"height": 128, "width": 128, "num_steps": 2} | call
    with pytest.raises(ValueError, match=message):
        generate(pipe_of("flux1"), tiny_pipes.PROMPTS, **arguments)


def test_a_setting_that_the_pipeline_does_not_take():
    with pytest.raises(ValueError, match="ZImagePipeline takes no argument true_cfg_scale"):
        engine_of("z-image").plan(Sampling(true_cfg_scale=2.0, num_steps=2))


def test_negatives_without_guidance_are_told_once(caplog):
    engine = Engine(pipe_of("flux1"))
    sampling = settings("flux1", true_cfg_scale=1.0)
    for _ in range(2):
        encoded = engine.encode(["a ring"], ["green"], sampling)
    assert encoded.negative == (None,)
    assert [r.message for r in caplog.records if "no effect" in r.message] != []
    assert len(caplog.records) == 1


# --------------------------------------------------------------------------- families, text, the one call


def test_text_is_encoded_once_a_distinct_prompt():
    engine, sampling = engine_of("flux1"), settings("flux1")
    encoded = engine.encode(["a ring", "green", "a ring"], [None, "a ring", None], sampling)
    assert len(encoded) == 3
    assert encoded.positive[0] is encoded.positive[2] is encoded.negative[1]
    assert encoded.negative[0] is encoded.negative[2]
    again = Encoded.cat([encoded[1:], encoded[[0]]])
    assert again.positive == (encoded.positive[1], encoded.positive[2], encoded.positive[0])


def test_a_text_that_is_known_is_not_encoded_again():
    pipe = tiny_pipes.flux1()
    engine, sampling, seen = Engine(pipe), settings("flux1"), []
    encoder = pipe.text_encoder_2
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    known: dict[str, Any] = {}
    first = engine.encode(["a ring", "green"], ["", ""], sampling, known=known)
    again = engine.encode(["green", "a cup", "a ring"], ["", "green", ""], sampling, known=known)
    assert seen == [2, 1, 1]  # the two prompts, the empty negative one, the new one
    assert again.positive[0] is first.positive[1] is again.negative[1]
    assert list(known) == ["a ring", "green", "", "a cup"]
    fresh = engine.encode(["a cup"], [""], sampling)
    assert torch.equal(fresh.positive[0]["prompt_embeds"], again.positive[1]["prompt_embeds"])


@pytest.mark.parametrize("family", ["flux1", "flux2", "wan2.1"])
def test_decoding_and_encoding_beside_a_denoising_loop(family):
    """In the middle of a step: the pipeline's own attributes, its scheduler too, are the loop's."""
    engine, sampling = engine_of(family), settings(family)
    plan, encoded, expected, _ = run(engine, sampling)
    pictures, own = engine.decode(plan, expected), engine.pipe.__dict__
    beside: list[Any] = []

    def go_on(done: int, total: int) -> None:
        before = dict(own)
        with ThreadPoolExecutor(2) as pool:
            decoding = pool.submit(engine.decode, plan, expected)
            encoding = pool.submit(engine.encode, tiny_pipes.PROMPTS, negatives(family), sampling)
            beside.append((decoding.result(), encoding.result()))
        assert {name: id(value) for name, value in own.items()} == {n: id(v) for n, v in before.items()}

    latents, _ = engine.denoise(plan, encoded, SEEDS, sampling, on_step=go_on)
    assert torch.equal(latents, expected)
    assert len(beside) == STEPS
    for decoded, texts in beside[:2]:
        assert all(np.array_equal(a, b) for a, b in zip(decoded, pictures, strict=True))
        for name, value in encoded.positive[0].items():
            assert torch.equal(texts.positive[0][name], value)
    assert not engine.overlaps  # on a CPU it may, but gains nothing


def test_the_tiny_family_is_known_by_where_it_was_loaded_from(tmp_path):
    pipe = pipe_of("flux1")
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    loaded = load(tmp_path, device="cpu")
    assert Engine(loaded).family.name == "flux1"
    (tmp_path / "spectrum.json").write_text(json.dumps({"amplitude": 8.6, "beta": 1.42}))
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    engine = Engine(loaded)
    assert engine.family.name == "tiny"
    assert Engine(loaded, "flux1").family.name == "flux1"
    plan = engine.plan(Sampling())
    assert (plan.height_px, plan.width_px, plan.num_steps) == (256, 256, 30)


def test_an_unknown_pipeline_runs_on_the_generic_entry_with_a_warning():
    pipe = tiny_zoo.ovis_image()
    with pytest.warns(UserWarning, match="OvisImagePipeline is not a family known here"):
        engine = Engine(pipe)
    assert (engine.family.name, engine.family.layout, engine.channels) == ("generic", "tokens2x2", 4)
    sampling = settings("generic", mode="fullres")
    latents = run(engine, sampling)[2]
    own = own_call(engine, sampling, base_noise(engine, latents), output_type="latent")
    assert torch.equal(as_own(engine, latents), own)
    plan, _, latents, _ = run(engine, settings("generic"))
    assert len(plan.stages) == 2
    assert torch.isfinite(latents).all()
    assert engine.decode(plan, latents)[0].size == (96, 128)


@pytest.mark.parametrize(
    "guidance",
    [{"guidance_scale": 3.0, "guidance_schedule": None}, {"guidance_schedule": [7.0] * 4 + [3.0] * 2}],
)
def test_ideogram_4_with_its_two_transformers_and_guidance_by_step(guidance):
    pipe = tiny_pipes.ideogram4()
    engine = Engine(pipe)
    assert engine.family.name == "ideogram4"
    call = {"max_sequence_length": 16} | {k: v for k, v in guidance.items() if k == "guidance_schedule" and v}
    fields: dict[str, Any] = {"height": 128, "width": 96, "num_steps": STEPS, "call_kwargs": call}
    fields["guidance_scale"] = guidance.get("guidance_scale")
    sampling = Sampling(mode="fullres", **fields)
    plan = engine.plan(sampling)
    encoded = engine.encode(tiny_pipes.PROMPTS, [None, None], sampling)
    latents, _ = engine.denoise(plan, encoded, SEEDS, sampling)
    own = pipe(
        list(tiny_pipes.PROMPTS),
        height=128,
        width=96,
        num_inference_steps=STEPS,
        latents=layouts.pack(engine.family, base_noise(engine, latents)),
        output_type="latent",
        max_sequence_length=16,
        **guidance,
    ).images
    assert torch.equal(layouts.pack(engine.family, latents), own)
    staged = Sampling(transition_sigmas=(0.8,), **fields)
    plan = engine.plan(staged)
    latents, _ = engine.denoise(plan, encoded, SEEDS, staged)
    assert len(plan.stages) == 2
    assert torch.isfinite(latents).all()
    assert engine.decode(plan, latents)[0].size == (96, 128)


def test_qwen_image_21_from_embeddings():
    engine = Engine(tiny_pipes.qwen_image_21())
    assert engine.family.name == "qwen-image-2.1"
    torch.manual_seed(2)
    text = [torch.randn(5, 8), torch.randn(9, 8)]
    encoded = Encoded(tuple({"prompt_embeds": t} for t in text), (None, None))
    sampling = Sampling(mode="fullres", height=128, width=96, num_steps=STEPS)
    latents, _ = engine.denoise(engine.plan(sampling), encoded, SEEDS, sampling)
    own = engine.pipe(
        prompt_embeds=torch.nn.utils.rnn.pad_sequence(text, batch_first=True),
        prompt_embeds_mask=torch.tensor([[1] * 5 + [0] * 4, [1] * 9]),
        height=128,
        width=96,
        num_inference_steps=STEPS,
        latents=layouts.pack(engine.family, base_noise(engine, latents)),
        output_type="latent",
    ).images
    assert torch.equal(layouts.pack(engine.family, latents), own)
    staged = Sampling(transition_sigmas=(0.8,), height=128, width=96, num_steps=STEPS)
    plan = engine.plan(staged)
    assert [stage.grid for stage in plan.stages] == [(4, 4), (8, 6)]  # sides must be even
    assert torch.isfinite(engine.denoise(plan, encoded, SEEDS, staged)[0]).all()


def test_a_pipeline_derived_from_a_known_one_is_called_like_it():
    class StillLifePipeline(type(pipe_of("sd3"))):  # type: ignore[misc]
        pass

    pipe = copy.copy(pipe_of("sd3"))
    pipe.__class__ = StillLifePipeline
    assert Engine(pipe).family.name == "sd3"


def test_generate():
    pipe = pipe_of("flux1")
    arguments: dict[str, Any] = {"height": 128, "width": 128, "num_steps": 4, "true_cfg_scale": 2.0}
    arguments |= {"call_kwargs": {"max_sequence_length": 16}, "transition_sigmas": (0.8,)}
    prompts = [*tiny_pipes.PROMPTS, "green"]
    together = progressive.generate(pipe, prompts, seeds=[1, 2, 3], **arguments)
    assert [image.size for image in together.images] == [(128, 128)] * 3
    assert isinstance(together.images[0], Image.Image)
    assert together.latents.shape == (3, 4, 16, 16)
    assert [stage.kind for stage in together.stages] == ["denoise", "expand", "denoise"]
    split = progressive.generate(pipe, prompts, seeds=[1, 2, 3], batch_size=2, decode=False, **arguments)
    assert split.images == []
    assert len(split.stages) == 6
    assert torch.allclose(split.latents, together.latents, atol=1e-4)
    drawn = progressive.generate(pipe, prompts[0], decode=False, **arguments)
    again = progressive.generate(pipe, prompts[0], seeds=drawn.seeds[0], decode=False, **arguments)
    assert torch.equal(drawn.latents, again.latents)
