"""The entries of families.py that tiny_pipes.py has no pipeline for: each against its pipeline's own call."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipes
import tiny_zoo
import torch
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2
from small_jobs import model_folder

from overtone.progressive import layouts, noise
from overtone.progressive.checkpoints import Checkpoint, describe
from overtone.progressive.checkpoints.sigmas import CALLS
from overtone.progressive.engine import Engine
from overtone.progressive.families import FAMILIES
from overtone.progressive.settings import Sampling

SEEDS = [5, 2**40]
STEPS = 6
NEGATIVES = ["a ring", "green"]


@cache
def engine_of(family: str) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # an entry of its own, so no word about the generic one
        return Engine(tiny_zoo.BUILDERS[family]())


def settings(engine: Engine, **fields: Any) -> Sampling:
    """Small and guided, with half of the steps on the coarse grid unless told otherwise."""
    family = engine.family
    base: dict[str, Any] = {"num_steps": STEPS, "height": 8 * family.cell_px, "width": 6 * family.cell_px}
    if family.default_frames is not None:
        base["num_frames"] = family.frames_per_latent + 1
    if family.guidance is not None:
        base[family.guidance[0]] = 3.0
    if "max_sequence_length" in engine.call.defaults:
        base["call_kwargs"] = {"max_sequence_length": 16}
    if fields.get("mode") != "fullres":
        base["transition_sigmas"] = (0.8,)
    return Sampling(**(base | fields))


def own_call(engine: Engine, sampling: Sampling, latents: torch.Tensor, **extra: Any) -> Any:
    """The pipeline called by its own rules, from the same noise."""
    call = {name: value for name, (value, _) in engine.family.fixed.items()} | sampling.call_kwargs
    for name in ("height", "width", "num_frames", "guidance_scale", "true_cfg_scale"):
        if getattr(sampling, name) is not None:
            call[name] = getattr(sampling, name)
    call |= {"prompt": list(tiny_pipes.PROMPTS[: len(latents)]), "negative_prompt": NEGATIVES[: len(latents)]}
    call |= {"num_inference_steps": sampling.num_steps, "latents": engine.call.pack(latents)}
    call |= extra
    if call["negative_prompt"] is None:
        del call["negative_prompt"]  # the call has a default of its own
    return engine.pipe(**call, return_dict=False)[0]


def as_own(engine: Engine, latents: torch.Tensor) -> torch.Tensor:
    """Engine latents as the pipeline's `output_type="latent"` gives them."""
    return layouts.pack(engine.family, latents)


def run(engine: Engine, sampling: Sampling, rows: slice = slice(2)) -> Any:
    plan = engine.plan(sampling)
    encoded = engine.encode(tiny_pipes.PROMPTS[rows], NEGATIVES[rows], sampling)
    return (plan, encoded, *engine.denoise(plan, encoded, SEEDS[rows], sampling))


@pytest.mark.parametrize("family", tiny_zoo.BUILDERS)
def test_fullres_is_the_pipelines_own_call_and_a_cut_changes_no_bit(family):
    engine = engine_of(family)
    assert engine.family is FAMILIES[family]
    sampling = settings(engine, mode="fullres")
    rows = slice(1) if engine.family.alone else slice(2)  # such a pipeline's own batch is another sample
    plan, encoded, whole, _ = run(engine, sampling, rows)
    base = noise.batch_noise(SEEDS[rows], noise.BASE, whole.shape[1:])
    if family != "ernie-image":  # its call decodes whatever it is asked for
        assert torch.equal(as_own(engine, whole), own_call(engine, sampling, base, output_type="latent"))
    ours = np.stack([np.asarray(made, dtype=int) for made in engine.decode(plan, whole[:1])])
    theirs = own_call(engine, sampling, base[:1], output_type="np")
    assert np.abs(ours - (np.asarray(theirs) * 255).round()).max() <= 1
    assert ours.std() > 1
    (stage,) = plan.stages
    for cut in (1, 3, STEPS - 1):
        parts = (
            replace(stage, last=cut, sigmas=stage.sigmas[: cut + 1]),
            replace(stage, first=cut, sigmas=stage.sigmas[cut:]),
        )
        latents, _ = engine.denoise(replace(plan, stages=parts), encoded, SEEDS[rows], sampling)
        assert torch.equal(latents, whole), f"cut at step {cut}"


def test_guidance_that_lumina_leaves_out_after_a_fraction_of_the_steps_is_left_out_at_the_same_steps():
    engine = engine_of("lumina2")
    sampling = settings(
        engine, mode="fullres", call_kwargs={"max_sequence_length": 16, "cfg_trunc_ratio": 0.5}
    )
    plan, encoded, whole, _ = run(engine, sampling, slice(1))
    (stage,) = plan.stages
    parts = (
        replace(stage, last=1, sigmas=stage.sigmas[:2]),
        replace(stage, first=1, sigmas=stage.sigmas[1:]),
    )
    latents, _ = engine.denoise(replace(plan, stages=parts), encoded, SEEDS[:1], sampling)
    assert torch.equal(latents, whole)
    assert not torch.equal(run(engine, settings(engine, mode="fullres"), slice(1))[2], whole)


@pytest.mark.parametrize("family", tiny_zoo.BUILDERS)
def test_guidance_by_default_is_the_pipelines_own(family):
    """Nothing said of guidance, and no negative prompt."""
    engine = engine_of(family)
    told = {engine.family.guidance[0]: None} if engine.family.guidance else {}
    sampling = settings(engine, mode="fullres", num_steps=2, **told)
    plan = engine.plan(sampling)
    latents, _ = engine.denoise(
        plan, engine.encode(tiny_pipes.PROMPTS[:1], [None], sampling), SEEDS[:1], sampling
    )
    base = noise.batch_noise(SEEDS[:1], noise.BASE, latents.shape[1:])
    kind = "np" if family == "ernie-image" else "latent"  # its call decodes whatever it is asked for
    own = own_call(engine, sampling, base, negative_prompt=None, output_type=kind)
    if kind == "np":
        ours = np.asarray(engine.decode(plan, latents)[0], dtype=int)
        assert np.abs(ours - (np.asarray(own)[0] * 255).round()).max() <= 1
    else:
        assert torch.equal(as_own(engine, latents), own)


@pytest.mark.parametrize("family", tiny_zoo.BUILDERS)
def test_rows_together_are_the_rows_one_by_one_on_every_grid(family):
    engine = engine_of(family)
    for mode in ("dct_rewind", "dct_matched"):
        sampling = settings(engine, mode=mode)
        plan, encoded, together, reports = run(engine, sampling)
        coarse, full = plan.stages
        assert coarse.height < full.height
        assert {(r.height, r.width) for r in reports} == {coarse.grid, full.grid}
        assert together.shape[-2:] == full.grid
        assert torch.isfinite(together).all()
        for row, seed in enumerate(SEEDS):
            alone, _ = engine.denoise(plan, encoded[[row]], [seed], sampling)
            assert torch.allclose(alone[0], together[row], atol=1e-4)


@pytest.mark.parametrize("family", tiny_zoo.BUILDERS)
def test_a_plan_from_the_configuration_is_the_workers(family):
    engine = engine_of(family)
    pipe, entry = engine.pipe, engine.family
    checkpoint = Checkpoint(
        family=family,
        pipeline_class=entry.pipelines[0],
        transformer_class=type(pipe.transformer).__name__,
        scheduler_class=type(pipe.scheduler).__name__,
        transformer=dict(pipe.transformer.config),
        scheduler=dict(pipe.scheduler.config),
        source="",
    )
    for steps, height, width in ((20, 8, 6), (7, 4, 10)):
        size = {"height": height * entry.cell_px, "width": width * entry.cell_px}
        sampling = settings(engine, mode="fullres", num_steps=steps, **size)
        ours = checkpoint.sigmas(steps, *size.values(), sampling.num_frames)
        np.testing.assert_allclose(ours, engine.plan(sampling).sigmas, rtol=0, atol=3e-7)


def test_flux2_klein_kv_makes_of_prompts_what_klein_makes_without_guidance():
    """The same weights; what it remembers is of pictures to start from."""
    klein = tiny_pipes.flux2()
    made, plans = [], []
    for pipe, told in (
        (klein, {"guidance_scale": 1.0}),
        (diffusers.Flux2KleinKVPipeline(**klein.components), {}),
    ):
        pipe.set_progress_bar_config(disable=True)
        engine = Engine(pipe)
        sampling = Sampling(num_steps=STEPS, height=96, width=64, transition_sigmas=(0.8,), **told)
        plan = engine.plan(sampling)
        encoded = engine.encode(tiny_pipes.PROMPTS, [None, None], sampling)
        made.append(engine.denoise(plan, encoded, SEEDS, sampling)[0])
        plans.append(plan.stages)
    assert engine.family is FAMILIES["flux2-klein-kv"]
    assert len(plans[0]) == 2
    assert plans[0] == plans[1]
    assert torch.equal(*made)
    assert CALLS["Flux2KleinKVPipeline"] is CALLS["Flux2KleinPipeline"]  # so `overtone plan` tells the same


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.pipelines], ids=lambda f: f.name)
def test_an_entry_says_of_its_pipelines_call_what_that_says_itself(family):
    for name in family.pipelines:
        parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
        defaults = {key: parameter.default for key, parameter in parameters.items()}
        takes_negative = {"negative_prompt", "negative_prompt_embeds"} & defaults.keys()
        assert (name in family.without_negative) == (family.guidance is not None and not takes_negative)
        if family.guidance is not None:
            assert defaults[family.guidance[0]] == family.guidance_default
        assert family.fixed.keys() | family.call.keys() <= defaults.keys()
        assert set(filter(None, family.text or ())) <= defaults.keys()
        for key, entry in (("height", family.default_height), ("width", family.default_width)):
            if defaults.get(key) is not None and not family.name.startswith(("wan2.2-5b",)):
                assert defaults[key] == entry
        for preset in family.presets.values():
            assert preset.keys() <= defaults.keys()


def test_a_package_that_a_pipeline_calls_without_having_it_is_named():
    pipe = tiny_zoo.skyreels_v2()
    Engine(pipe)
    del pipeline_skyreels_v2.ftfy
    with pytest.raises(ValueError, match="SkyReelsV2Pipeline needs the package ftfy: pip install ftfy"):
        Engine(pipe)


@pytest.mark.parametrize(
    ("family", "call", "why"),
    [
        ("sana", {"use_resolution_binning": True}, "round the size of every stage"),
        ("ernie-image", {"use_pe": True}, "rewrite the prompts of the table instead"),
        ("longcat-image", {"enable_prompt_rewrite": True}, "anew at every stage"),
    ],
)
def test_what_stages_do_not_allow_is_refused(family, call, why):
    with pytest.raises(
        ValueError, match=f"call_kwargs names {next(iter(call))}, which is always False .*{why}"
    ):
        FAMILIES[family].arguments(Sampling(call_kwargs=call), 20)


def test_a_guider_that_counts_steps_is_refused():
    pipe = tiny_zoo.hunyuan_video_15()
    pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0, start=0.1)
    with pytest.raises(ValueError, match=r"a ClassifierFreeGuidance, guides by the step's number"):
        Engine(pipe)
    pipe.guider = diffusers.ClassifierFreeGuidance(enabled=False)
    engine = Engine(pipe)
    plan = engine.plan(settings(engine))
    encoded = engine.encode(["a"], ["green"], settings(engine))
    assert encoded.negative == (None,)
    latents, _ = engine.denoise(plan, encoded, [1], settings(engine))
    assert torch.isfinite(latents).all()


def test_attention_by_blocks_is_refused_before_and_when_a_model_is_loaded(tmp_path):
    folder = model_folder(tmp_path, "Kandinsky5T2VPipeline")
    assert describe(folder).family == "kandinsky5-video"
    (tmp_path / "transformer" / "config.json").write_text('{"attention_type": "nabla"}')
    with pytest.raises(ValueError, match="attention_type is 'nabla': it attends by blocks of 128 px"):
        describe(folder)
    pipe = tiny_zoo.kandinsky5_video()
    pipe.transformer.register_to_config(attention_type="nabla")
    with pytest.raises(ValueError, match="attention_type is 'nabla'"):
        Engine(pipe)
