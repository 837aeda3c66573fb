"""What a stage's call of the pipeline is told of the whole schedule: arguments in steps, and callbacks."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipes
import torch
from diffusers.callbacks import SD3CFGCutoffCallback

from overtone import progressive
from overtone.progressive.engine import Engine
from overtone.progressive.engine.step_arguments import check_step_arguments, of_stage
from overtone.progressive.families import FAMILIES
from overtone.progressive.schedule import plan_sampling
from overtone.progressive.settings import Sampling, set_by_engine

SIZE: dict[str, Any] = {"height": 64, "width": 64}


@cache
def sd3() -> Any:
    return tiny_pipes.sd3()


def run(pipe: Any, sampling: Sampling, prompts: list[str] | None = None) -> tuple[Any, torch.Tensor, Any]:
    engine = Engine(pipe)
    prompts = prompts or ["a large red circle"]
    plan, encoded = engine.plan(sampling), engine.encode(prompts, ["green"] * len(prompts), sampling)
    latents, reports = engine.denoise(plan, encoded, list(range(len(prompts))), sampling)
    return plan, latents, reports


# ---------------------------------------------------------------------------------------- arguments in steps


@pytest.mark.parametrize("mode", ["fullres", "dct", "dct_rewind", "dct_matched"])
def test_layers_are_skipped_at_the_pipelines_own_noise_levels_in_every_mode(mode):
    """SD3 with skip-layer guidance from .01 to .2 of 28 steps: its steps 1 to 5, whatever the stages."""
    pipe, skipped = sd3(), []
    forward = pipe.transformer.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("skip_layers", None) is not None:
            skipped.append(round(float(kwargs["timestep"].flatten()[0])))
        return forward(*args, **kwargs)

    coarse = {} if mode == "fullres" else {"transition_sigmas": (0.9,)}
    call = {"skip_guidance_layers": [0], "max_sequence_length": 16}
    sampling = Sampling(mode=mode, num_steps=28, guidance_scale=3.0, call_kwargs=call, **SIZE, **coarse)
    pipe.transformer.forward = watched
    try:
        plan, *_ = run(pipe, sampling)
    finally:
        del pipe.transformer.forward
    at = [1000 * sigma for stage in plan.stages for sigma in stage.sigmas[:-1]]
    assert skipped == pytest.approx(at[1:6], abs=1)
    if mode == "fullres":
        assert skipped == [987, 974, 960, 945, 930]
    else:
        assert len(plan.stages) == 2


def test_fractions_and_counts_of_a_stage_are_those_of_the_whole_schedule():
    """For every cut: whichever way a pipeline compares, the same steps."""
    family = FAMILIES["generic"]
    names = ("skip_layer_guidance_start", "cfg_trunc_ratio", "zero_steps")
    defaults = dict.fromkeys(names)
    for n in (7, 20, 28, 30, 50):
        sigmas = np.linspace(1, 0, n + 1).tolist()
        for transition in (0.9, 0.62, 0.31):
            plan = plan_sampling(Sampling(transition_sigmas=(transition,)), family, sigmas)
            for fraction in (0.0, 0.01, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0):
                after, until, zero = [], [], []
                given = dict(zip(names, (fraction, fraction, 3), strict=True))
                for stage in plan.stages:
                    told = of_stage(family, plan, stage, given, defaults)
                    m = stage.steps
                    after += [i > m * told["skip_layer_guidance_start"] for i in range(m)]
                    until += [i < m * told["skip_layer_guidance_start"] for i in range(m)]
                    zero += [i <= told["zero_steps"] for i in range(m)]
                assert len(plan.stages) == 2
                assert after == [i > n * fraction for i in range(n)]
                assert until == [i < n * fraction for i in range(n)]
                assert zero == [i <= 3 for i in range(n)]


def test_defaults_count_and_a_whole_schedule_is_told_as_it_is():
    family, sigmas = FAMILIES["sd3"], np.linspace(1, 0, 29).tolist()
    defaults = {"skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.2}
    whole = plan_sampling(Sampling(mode="fullres"), family, sigmas)
    assert of_stage(family, whole, whole.stages[0], {}, defaults) == {}
    cut = plan_sampling(Sampling(transition_sigmas=(0.5,)), family, sigmas)
    assert of_stage(family, cut, cut.stages[0], {}, defaults) == {
        "skip_layer_guidance_start": pytest.approx(0.01 * 28 / 14),
        "skip_layer_guidance_stop": pytest.approx(0.2 * 28 / 14),
    }


@pytest.mark.parametrize("name", ["guidance_stop", "warmup_steps", "cfg_interval", "detail_end"])
def test_an_argument_in_steps_that_nobody_knows_is_refused_where_a_schedule_is_cut(name):
    family, sigmas = FAMILIES["generic"], np.linspace(1, 0, 29).tolist()
    sampling = Sampling(transition_sigmas=(0.5,), call_kwargs={name: 0.5, "max_sequence_length": 16})
    cut = plan_sampling(sampling, family, sigmas)
    with pytest.raises(ValueError, match=f"nor how its argument {name} counts steps.*fullres"):
        check_step_arguments("OddPipeline", family, sampling, cut)
    whole = sampling.model_copy(update={"mode": "fullres", "transition_sigmas": None})
    check_step_arguments("OddPipeline", family, whole, plan_sampling(whole, family, sigmas))
    known = Sampling(transition_sigmas=(0.5,), call_kwargs={"skip_layer_guidance_stop": 0.2})
    check_step_arguments("OddPipeline", family, known, cut)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"generic"}))
def test_an_entry_names_every_argument_of_its_pipelines_that_is_told_in_steps(name):
    """By the rule for arguments that nobody knows."""
    family = FAMILIES[name]
    known = {"fractions": family.fractions, "counts": family.counts, "per_step": family.per_step}
    bare = replace(FAMILIES["generic"], **known)
    sigmas = np.linspace(1, 0, 29).tolist()
    for pipeline in family.pipelines:
        call = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
        arguments = {argument: None for argument in call if not set_by_engine(argument)}
        sampling = Sampling(transition_sigmas=(0.5,), call_kwargs=arguments)
        check_step_arguments(pipeline, bare, sampling, plan_sampling(sampling, bare, sigmas))


# ------------------------------------------------------------------------------------------------- callbacks


def watched_run(callback: Any, **fields: Any) -> tuple[Any, torch.Tensor, Any, list[bool]]:
    """Whether guidance was on at each step, with a callback, at 20 steps cut at step 6 or so."""
    pipe, guided = sd3(), []
    forward = pipe.transformer.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        guided.append(len(kwargs["hidden_states"]) == 2)
        return forward(*args, **kwargs)

    call = {"callback_on_step_end": callback, "max_sequence_length": 16}
    base: dict[str, Any] = {"num_steps": 20, "guidance_scale": 3.0, "call_kwargs": call, **SIZE}
    pipe.transformer.forward = watched
    try:
        return (*run(pipe, Sampling(**(base | fields))), guided)
    finally:
        del pipe.transformer.forward


@pytest.mark.parametrize("transition", [0.95, 0.7])
def test_a_guidance_cut_off_counts_the_whole_schedule_and_stays(transition):
    """diffusers' own callback at 40 % of 20 steps: off after step 8, in whichever stage that is."""
    plan, cut, _, guided = watched_run(SD3CFGCutoffCallback(0.4), transition_sigmas=(transition,))
    assert guided == [True] * 9 + [False] * 11
    assert (plan.stages[0].steps > 9) is (transition == 0.7)
    _, other, _, all_guided = watched_run(lambda *a: a[-1], transition_sigmas=(transition,))
    assert all(all_guided)
    assert not torch.allclose(cut, other)


def test_a_cut_off_at_the_last_step_of_a_stage_stays_off():
    plan, *_ = watched_run(lambda *a: a[-1], transition_sigmas=(0.7,))
    last = plan.stages[0].last - 1
    *_, guided = watched_run(
        SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=last), transition_sigmas=(0.7,)
    )
    assert guided == [True] * (last + 1) + [False] * (19 - last)


def test_a_callback_is_told_the_numbers_of_the_whole_schedule():
    seen: list[tuple[int, int]] = []

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, pipe.num_timesteps))
        return values

    plan, *_ = watched_run(callback, transition_sigmas=(0.7,))
    assert len(plan.stages) == 2
    assert seen == [(step, 20) for step in range(20)]


@pytest.mark.parametrize("at", [2, 15])
def test_an_interrupt_ends_the_row(at):
    """As the pipeline does: what there is is what comes out, at full size."""
    seen: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        pipe._interrupt = step == at
        return values

    plan, latents, reports, guided = watched_run(callback, transition_sigmas=(0.7,))
    assert seen == list(range(at + 1))
    assert len(guided) == at + 1
    assert sum(report.steps for report in reports) == at + 1
    assert latents.shape[-2:] == plan.stages[-1].grid


def test_what_a_callback_does_to_a_row_is_that_rows_alone():
    """Two rows, one of which is interrupted in its first stage, go on apart."""
    pipe, steps = sd3(), []

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = stop and step == 1
        return values

    call = {"callback_on_step_end": callback, "max_sequence_length": 16}
    sampling = Sampling(num_steps=6, transition_sigmas=(0.8,), call_kwargs=call, **SIZE)
    engine = Engine(pipe)
    plan, encoded = engine.plan(sampling), engine.encode(["a ring", "green"], [None, None], sampling)
    rows, stop = engine.begin(plan, encoded, [1, 2], sampling), True
    rows.run(0, [0])
    stop = False
    rows.run(0, [1])
    reports = rows.run(1, [0, 1])
    assert [r.steps for r in reports if r.kind == "denoise"] == [0, plan.stages[1].steps]
    alone, _ = engine.denoise(plan, encoded[[1]], [2], sampling)
    assert torch.equal(rows.latents([1]), alone)


def test_embeddings_that_a_callback_gives_back_stay():
    """Another prompt from step 3 on, which is in the first stage."""

    def switch(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return values | ({"prompt_embeds": values["prompt_embeds"] * 0.5} if step == 3 else {})

    call = {
        "callback_on_step_end": switch,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    call |= {"max_sequence_length": 16}
    pipe, given = sd3(), []
    forward = pipe.transformer.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["encoder_hidden_states"])
        return forward(*args, **kwargs)

    pipe.transformer.forward = watched
    try:
        plan, *_ = run(pipe, Sampling(num_steps=20, transition_sigmas=(0.7,), call_kwargs=call, **SIZE))
    finally:
        del pipe.transformer.forward
    assert plan.stages[0].steps > 4
    for step, states in enumerate(given):
        assert torch.equal(states, given[0] * (1 if step <= 3 else 0.5)), step


# ----------------------------------------------------------------------------------------------------- seeds


def test_seeds_of_any_kind_of_whole_number():
    arguments: dict[str, Any] = {"num_steps": 1, "mode": "fullres", "decode": False, **SIZE}
    pipe, expected = sd3(), None
    for seeds in (
        [5, 6],
        np.array([5, 6]),
        np.array([5, 6], np.uint64),
        torch.tensor([5, 6]),
        (np.int32(5), 6),
    ):
        made = progressive.generate(pipe, ["a", "a ring"], seeds=seeds, **arguments)
        assert made.seeds == [5, 6]
        assert all(type(seed) is int for seed in made.seeds)
        expected = made.latents if expected is None else expected
        assert torch.equal(made.latents, expected)
    for one in (np.int64(5), torch.tensor(5)):
        assert progressive.generate(pipe, ["a", "a ring"], seeds=one, **arguments).seeds == [5, 5]
    for wrong in ([0.5, 1], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), ["1", "2"]):
        with pytest.raises(ValueError, match="whole numbers"):
            progressive.generate(pipe, ["a", "a ring"], seeds=wrong, **arguments)
    engine, sampling = Engine(pipe), Sampling(num_steps=1, mode="fullres", **SIZE)
    encoded = engine.encode(["a", "a ring"], [None, None], sampling)
    latents, _ = engine.denoise(engine.plan(sampling), encoded, np.array([5, 6]), sampling)
    assert torch.equal(latents, expected)
