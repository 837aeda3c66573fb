"""Guidance within an interval of noise levels: its steps take the second pass, and no other bit changes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import tiny_pipes
import torch
from pydantic import ValidationError

from overtone.progressive.caches import repeated_blocks
from overtone.progressive.checkpoints import PUBLISHED, describe
from overtone.progressive.compile import CompiledEngine
from overtone.progressive.cost import step_cost
from overtone.progressive.engine import Encoded, Engine, StageInput, StageRunner
from overtone.progressive.families import FAMILIES
from overtone.progressive.schedule import SamplingPlan, plan_sampling
from overtone.progressive.settings import Sampling

GUIDED = ["flux1", "qwen-image", "z-image", "wan2.1", "sd3"]
"""Two calls a step, also with texts of their own lengths, one call of lists, a multistep solver, one call."""
SEEDS = [5, 2**40]
STEPS = 7
TRUE_CFG = ("flux1", "qwen-image")


@cache
def engine_of(family: str) -> Engine:
    return Engine(tiny_pipes.BUILDERS[family]())


def settings(family: str, *, scale: float = 3.0, **fields: Any) -> Sampling:
    size: dict[str, Any] = {"height": 64, "width": 64} | ({"num_frames": 5} if family == "wan2.1" else {})
    argument = "true_cfg_scale" if family in TRUE_CFG else "guidance_scale"
    call = {"max_sequence_length": 16}
    return Sampling(**(size | {"num_steps": STEPS, "call_kwargs": call, argument: scale} | fields))


def between(engine: Engine, sampling: Sampling, first: int, last: int) -> Sampling:
    """The settings with an interval that the steps [first, last) start in."""
    levels = engine.plan(sampling).sigmas
    return sampling.model_copy(update={"guidance_interval": (levels[last - 1], levels[first])})


def run(engine: Engine, sampling: Sampling, plan: SamplingPlan | None = None) -> torch.Tensor:
    plan = plan or engine.plan(sampling)
    guided = engine.call.guided(sampling) != "never"
    encoded = engine.encode(tiny_pipes.PROMPTS, ["a ring", "green"] if guided else [None, None], sampling)
    return engine.denoise(plan, encoded, SEEDS, sampling)[0]


def off(family: str) -> dict[str, Any]:
    """The settings without guidance."""
    name, value = FAMILIES[family].guidance or ("", 0.0)
    return {name: value, "guidance_interval": None}


class ByHand:
    """Runs some stages with the settings of no guidance and no negative prompts."""

    def __init__(self, inner: StageRunner, unguided: set[int], family: str) -> None:
        self.chunks, self._inner = inner.chunks, inner
        self._unguided, self._family = unguided, family

    def run(self, given: StageInput) -> torch.Tensor:
        whole = given.encoded
        if given.index in self._unguided:
            sampling = given.sampling.model_copy(update=off(self._family))
            texts = Encoded(given.encoded.positive, (None,) * len(given.encoded))
            given = replace(given, sampling=sampling, encoded=texts)
        latents = self._inner.run(given)
        given.carried.encoded = whole
        return latents


def rows_through(engine: Engine, sampling: Sampling) -> tuple[int, int, torch.Tensor]:
    """How often the transformer is called, how many rows it sees in all, and the latents."""
    seen: list[int] = []

    def count(module: Any, inputs: Any, given: dict[str, Any]) -> None:
        seen.append(len(given["hidden_states"] if "hidden_states" in given else inputs[0]))

    hook = engine.call.transformer.register_forward_pre_hook(count, with_kwargs=True)
    try:
        latents = run(engine, sampling)
    finally:
        hook.remove()
    return len(seen), sum(seen), latents


# ------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("family", GUIDED)
def test_an_interval_that_covers_all_changes_no_bit_and_one_that_covers_nothing_is_no_guidance(family):
    engine = engine_of(family)
    sampling = settings(family, transition_sigmas=(0.8,))
    calls, passes, plain = rows_through(engine, sampling)
    assert passes == 2 * STEPS * len(SEEDS)
    whole = sampling.model_copy(update={"guidance_interval": (0.0, 1.0)})
    assert engine.plan(whole) == engine.plan(sampling)
    again, _, latents = rows_through(engine, whole)
    assert torch.equal(latents, plain)
    assert again == calls
    nothing = sampling.model_copy(update={"guidance_interval": (0.0, 0.001)})
    assert engine.plan(nothing).guided_steps == 0
    calls, passes, latents = rows_through(engine, nothing)
    assert (calls, passes) == (STEPS, STEPS * len(SEEDS))
    assert torch.equal(latents, run(engine, sampling.model_copy(update=off(family))))
    assert not torch.allclose(latents, plain)


@pytest.mark.parametrize("mode", ["fullres", "dct_matched"])
@pytest.mark.parametrize("family", GUIDED)
def test_a_stage_across_the_ends_is_the_hand_made_calls(family, mode):
    """Cut by hand into stages on one grid, those outside without guidance: which keeps what a multistep
    solver remembers, as Wan's UniPC does."""
    engine = engine_of(family)
    ladder = {} if mode == "fullres" else {"transition_sigmas": (0.8,)}
    sampling = between(engine, settings(family, mode=mode, **ladder), 2, 5)
    plan = engine.plan(sampling)
    assert (plan.steps, plan.guided_steps) == (STEPS, 3)
    assert [step for stage in plan.stages for step in stage.unguided] == [0, 1, 5, 6]
    _, passes, latents = rows_through(engine, sampling)
    assert passes == (STEPS + 3) * len(SEEDS)

    parts = [part for stage in plan.stages for part in stage.parts]
    assert [part.steps for part in parts if part.unguided] == [2, 2] or mode != "fullres"
    plain = sampling.model_copy(update={"guidance_interval": None})
    by_hand = replace(plan, stages=tuple(replace(part, unguided=()) for part in parts))
    inner = engine.runner
    engine.runner = ByHand(inner, {i for i, part in enumerate(parts) if part.unguided}, family)
    try:
        assert torch.equal(run(engine, plain, by_hand), latents)
    finally:
        engine.runner = inner
    assert not torch.allclose(run(engine, plain), latents)


def test_rows_without_a_negative_prompt_have_no_ends():
    """Qwen-Image guides rows that give one: a row that does not goes through each stage in one call."""
    engine = engine_of("qwen-image")
    sampling = between(engine, settings("qwen-image", true_cfg_scale=None, mode="fullres"), 2, 5)
    encoded = engine.encode(tiny_pipes.PROMPTS, ["a ring", None], sampling)
    both, _ = engine.denoise(engine.plan(sampling), encoded, SEEDS, sampling)
    plain = sampling.model_copy(update={"guidance_interval": None})
    always, _ = engine.denoise(engine.plan(plain), encoded, SEEDS, plain)
    assert torch.equal(both[1], always[1])
    assert not torch.allclose(both[0], always[0])


def test_callbacks_count_the_whole_schedule_and_what_they_change_stays():
    """Told by every call the numbers of the whole schedule; guidance that is taken away in a part without it
    stays away in the one with it."""
    engine, told, done = engine_of("wan2.1"), [], []

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        told.append((step, pipe.num_timesteps))
        if step == stop:
            pipe._guidance_scale = 0.0
        return values

    stop = -1
    call = {"max_sequence_length": 16, "callback_on_step_end": callback}
    sampling = between(engine, settings("wan2.1", mode="fullres", call_kwargs=call), 2, 5)
    plan, before = engine.plan(sampling), run(engine, sampling)
    assert told == [(step, STEPS) for step in range(STEPS)]
    encoded = engine.encode(tiny_pipes.PROMPTS, [None, None], sampling)
    engine.denoise(plan, encoded, SEEDS, sampling, on_step=lambda *counted: done.append(counted))
    assert done == [(step + 1, STEPS) for step in range(STEPS)]
    stop = 1
    _, passes, latents = rows_through(engine, sampling)
    assert passes == STEPS * len(SEEDS)
    assert not torch.equal(latents, before)
    assert torch.equal(latents, run(engine, sampling.model_copy(update=off("wan2.1"))))


def test_a_step_cache_begins_afresh_where_guidance_does():
    """With a threshold that leaves out whatever it may: the first two steps of each part run whole."""
    engine, ran = Engine(tiny_pipes.flux1(layers=2)), []
    last = list(repeated_blocks(engine.call.transformer).values())[-1]
    last.attn.register_forward_hook(lambda *_: ran.append(1))
    cached = settings("flux1", mode="fullres", cache="first_block", cache_threshold=1e9)
    sampling = between(engine, cached, 0, 4)  # 4 steps of two passes, then 3 of one
    run(engine, sampling)
    assert len(ran) == len(SEEDS) * (2 * 2 + 2)


@pytest.mark.parametrize("family", ["sd3", pytest.param("z-image", marks=pytest.mark.chaos)])
def test_nothing_compiles_at_the_ends_of_an_interval(family):
    """Both guide by one call of twice the rows: both sizes are warm, and a stage of one kind alone is warm
    for that kind. Z-Image's texts also take another way through its blocks without guidance."""
    config: Any = torch._dynamo.config
    limits = config.recompile_limit, config.accumulated_recompile_limit
    torch._dynamo.reset()
    try:
        plain = Engine(tiny_pipes.BUILDERS[family]())
        sampling = settings(family, mode="fullres", num_steps=3, call_kwargs={})
        sampling = between(plain, sampling, 0, 2)
        plan, expected = plain.plan(sampling), run(plain, sampling)
        assert [part.guided_steps for part in plan.stages[0].parts] == [2, 0]
        engine = CompiledEngine(plain.pipe, backend="eager")
        engine.warm(plan, [(2,)], sampling)
        assert engine.sizes(plan, 0, sampling) == (2,)
        without = sampling.model_copy(update={"guidance_interval": None})
        assert engine.warm(engine.plan(without), [(2,)], without) == []
        counters = torch._dynamo.utils.counters["stats"]
        before = counters["unique_graphs"]
        assert torch.allclose(run(engine, sampling), expected, atol=1e-3)
        assert counters["unique_graphs"] == before
    finally:
        torch._dynamo.reset()
        config.recompile_limit, config.accumulated_recompile_limit = limits


# -------------------------------------------------------------------------------------------- plan and cost


@pytest.mark.parametrize("mode", ["fullres", "dct", "dct_rewind", "dct_matched"])
def test_the_same_steps_are_guided_in_every_mode(mode):
    sigmas = [1 - step / 10 for step in range(11)]
    ladder = {} if mode == "fullres" else {"scales": (0.25, 0.5, 1.0), "transition_sigmas": (0.75, 0.45)}
    sampling = Sampling(mode=mode, guidance_interval=(0.2, 0.9), true_cfg_scale=3.0, **ladder)
    for bits in (0.0, 1e-7, -1e-7):  # of another machine
        levels = [*(sigma + bits for sigma in sigmas[:-1]), 0.0]
        plan = plan_sampling(sampling, FAMILIES["flux1"], levels)
        assert [step for stage in plan.stages for step in stage.unguided] == [0, 9]
    assert plan.as_dict()["guided_steps"] == 8
    for stage in plan.stages:
        assert [part.sigmas[0] for part in stage.parts] == [
            stage.sigmas[part.first - stage.first] for part in stage.parts
        ]
        assert sum(part.steps for part in stage.parts) == stage.steps


def test_a_step_without_guidance_costs_one_pass():
    name = "black-forest-labs/FLUX.1-dev"
    known, family = PUBLISHED[name], FAMILIES["flux1"]
    sigmas = describe(name).sigmas(50, 1024, 1024)
    interval = sigmas[30], sigmas[10]
    costs = {}
    for key, fields in {"all": {}, "some": {"guidance_interval": interval}}.items():
        sampling = Sampling(mode="fullres", true_cfg_scale=3.0, **fields)
        cost = step_cost(known.transformer_class, known.transformer, family, sampling)
        costs[key] = plan_sampling(sampling, family, sigmas, step_cost=cost).cost
        unknown = step_cost("MysteryTransformer2DModel", {}, family, sampling)
        assert plan_sampling(sampling, family, sigmas, step_cost=unknown).cost == pytest.approx(costs[key])
    assert costs == pytest.approx({"all": 50, "some": 21 + 29 / 2})


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("flux1", {"true_cfg_scale": None}, "flux1 has no second pass to leave out"),
        ("flux1", {"true_cfg_scale": 1.0}, "flux1 has no second pass to leave out"),
        ("z-image", {"guidance_scale": 0.0}, "z-image has no second pass to leave out"),
        ("ideogram4", {}, "second transformer of ideogram4 runs at every step"),
        ("hunyuan-video-1.5", {}, "guides by its component `guider`"),
        ("generic", {"guidance_scale": 5.0}, "the pipeline is not known here"),
    ],
)
def test_what_has_no_pass_to_leave_out_is_refused(family, fields, message):
    sampling, entry = settings("flux1", guidance_interval=(0.2, 0.8), **fields), FAMILIES[family]
    guided = "always" if entry.guider else entry.guided(sampling, entry.guidance_default)
    with pytest.raises(ValueError, match=f"^guidance_interval: .*{message}.*; leave it out$"):
        entry.check_guidance_interval(sampling, guided)
    if family in GUIDED:
        with pytest.raises(ValueError, match=message):
            engine_of(family).plan(settings(family, guidance_interval=(0.2, 0.8), **fields))


@pytest.mark.parametrize("interval", [(0.8, 0.2), (0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.2,)])
def test_an_interval_is_two_noise_levels(interval):
    with pytest.raises(ValidationError, match="guidance_interval"):
        Sampling(guidance_interval=interval)


def test_settings_say_nothing_of_it_where_it_is_unset():
    assert "guidance_interval" not in Sampling().model_dump()
    assert Sampling(guidance_interval=(0.2, 0.8)).model_dump(mode="json")["guidance_interval"] == [0.2, 0.8]
