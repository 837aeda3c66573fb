"""Step caches: what they leave out, that they begin again at every stage, and what cannot have one."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny_pipes
import torch
from diffusers import NucleusMoEImageTransformer2DModel

from overtone.progressive.caches import keeps_text, repeated_blocks, step_cache, transformers
from overtone.progressive.engine import Engine
from overtone.progressive.settings import SEACACHE_PIPELINES, Sampling

CACHED = ["flux1", "flux2", "qwen-image", "z-image", "wan2.1", "wan2.2"]
FIRST_BLOCK = ["flux1", "qwen-image", "wan2.1", "wan2.2"]
MAGCACHE = ["flux1", "qwen-image", "wan2.1"]


def engine_of(family: str) -> Engine:
    """With three blocks of the kind that comes first, so that a cache has something to leave out."""
    pipe = tiny_pipes.BUILDERS[family]()
    for transformer in transformers(pipe):
        blocks = next(
            getattr(transformer, n)
            for n in ("transformer_blocks", "blocks", "layers")
            if hasattr(transformer, n)
        )
        blocks.extend(copy.deepcopy(blocks[0]) for _ in range(2))
    return Engine(pipe)


def sampling_of(family: str, **fields: Any) -> Sampling:
    """Unguided, so that the transformer is called once a step; five steps on each of two grids."""
    guidance = {"true_cfg_scale": 1.0} if family in ("flux1", "qwen-image") else {"guidance_scale": 0.0}
    video = {"num_frames": 5} if family.startswith("wan") else {}
    base: dict[str, Any] = {"height": 64, "width": 96, "num_steps": 10, "transition_sigmas": (0.8,)}
    return Sampling(**(base | guidance | video | fields))


def run(engine: Engine, sampling: Sampling, prompts: list[str] = tiny_pipes.PROMPTS) -> Any:
    plan = engine.plan(sampling)
    encoded = engine.encode(prompts, [None] * len(prompts), sampling)
    return plan, engine.denoise(plan, encoded, list(range(len(prompts))), sampling)[0]


class Calls:
    """Counts how often blocks really run, and keeps what the transformers give at each call."""

    def __init__(self, engine: Engine) -> None:
        self.blocks = 0
        self.outputs: list[torch.Tensor] = []
        for transformer in transformers(engine.pipe):
            transformer.register_forward_hook(self._output)
            for block in repeated_blocks(transformer).values():
                # Inside of what a cache wraps, which is the forward of the whole block.
                next(
                    m for n, m in block.named_children() if "attn" in n or n == "attention"
                ).register_forward_hook(self._block)

    def _block(self, *_: Any) -> None:
        self.blocks += 1

    def _output(self, module: Any, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output.sample
        self.outputs.append(torch.stack(list(output)).clone())


@pytest.mark.parametrize("family", FIRST_BLOCK)
def test_first_block_at_threshold_0_is_no_cache_and_above_it_leaves_blocks_out(family):
    engine = engine_of(family)
    plain_calls = Calls(engine)
    _, plain = run(engine, sampling_of(family))
    whole = plain_calls.blocks
    counts = []
    for threshold in (0.0, 0.2, 1e9):
        plain_calls.blocks = 0
        sampling = sampling_of(family, cache="first_block", cache_threshold=threshold)
        plan, latents = run(engine, sampling)
        counts.append(plain_calls.blocks)
        if not threshold:
            assert torch.allclose(latents, plain, atol=1e-4)  # rows go alone, which rounds differently
    rows, blocks = 2, whole // 10
    assert counts[0] == rows * whole
    # Two whole steps a stage, then the first block alone; a second transformer's first step is whole too.
    stages = [stage.steps for stage in plan.stages]
    more = (blocks - 1) * (len(transformers(engine.pipe)) - 1)
    assert counts[2] == rows * (sum(2 * blocks + (steps - 2) for steps in stages) + more)
    assert counts[2] <= counts[1] <= counts[0]
    plain_calls.blocks = 0
    _, again = run(engine, sampling_of(family))
    assert torch.equal(again, plain)  # nothing of it stays
    assert plain_calls.blocks == whole


def test_a_row_does_not_depend_on_the_rows_beside_it():
    engine = engine_of("flux1")
    sampling = sampling_of("flux1", cache="first_block", cache_threshold=0.2)
    plan = engine.plan(sampling)
    encoded = engine.encode(tiny_pipes.PROMPTS, [None, None], sampling)
    both, reports = engine.denoise(plan, encoded, [0, 1], sampling)
    alone, _ = engine.denoise(plan, encoded[1:], [1], sampling)
    assert torch.equal(both[1:], alone)
    assert [report.rows for report in reports if report.kind == "denoise"] == [1, 1] * len(plan.stages)


@pytest.mark.parametrize("family", CACHED)
def test_taylorseer_runs_whole_steps_at_its_interval_and_repeats_them_at_order_0(family):
    engine = engine_of(family)
    calls = Calls(engine)
    run(engine, sampling_of(family))
    whole, calls.blocks = calls.blocks // 10, 0
    calls.outputs.clear()
    sampling = sampling_of(family, cache="taylorseer", cache_order=0, cache_interval=2, cache_warmup_steps=1)
    plan, _ = run(engine, sampling)
    steps, expected = 0, 0
    for stage in plan.stages:
        for step in range(stage.steps):
            # The first step, then a step that is left out, then one in two.
            if step == 0 or step % 2 == 0:
                expected += 1
            else:
                assert torch.equal(calls.outputs[steps + step], calls.outputs[steps + step - 1])
        steps += stage.steps
    assert calls.blocks == expected * whole
    # A straight line through the last two whole steps.
    calls.outputs.clear()
    run(engine, sampling_of(family, cache="taylorseer", cache_interval=2, cache_warmup_steps=2))
    first, second, third = calls.outputs[:3]
    assert torch.allclose(third, 2 * second - first, atol=1e-4)


def test_first_steps_of_every_stage_run_whole():
    engine = engine_of("flux1")
    calls = Calls(engine)
    run(engine, sampling_of("flux1"))
    whole = calls.blocks // 10
    for warm in (1, 3, 99):
        calls.blocks = 0
        sampling = sampling_of("flux1", cache="first_block", cache_threshold=1e9, cache_warmup_steps=warm)
        plan, _ = run(engine, sampling, ["a circle"])
        assert calls.blocks == sum(min(warm, s.steps) * whole + max(0, s.steps - warm) for s in plan.stages)


RATIOS = (1.0, 1.01, 1.0, 0.99, 1.0, 1.02, 1.0, 1.0, 1.01, 1.0)
"""One a step; all of them together change less than the threshold."""


@pytest.mark.parametrize("family", MAGCACHE)
def test_magcache_leaves_out_as_many_steps_in_a_row_as_it_may_and_begins_anew_at_a_stage(family):
    engine = engine_of(family)
    calls = Calls(engine)
    _, plain = run(engine, sampling_of(family))
    whole, calls.blocks = calls.blocks // 10, 0
    given: dict[str, Any] = {"cache": "magcache", "cache_ratios": RATIOS, "cache_threshold": 1.0}
    for skip in (1, 2):
        calls.blocks = 0
        plan, latents = run(engine, sampling_of(family, cache_max_skip=skip, **given))
        expected = 0
        for stage in plan.stages:
            left_out = 0
            for step in range(stage.steps):
                left_out = left_out + 1 if step >= 2 and left_out < skip else 0
                expected += not left_out
        assert calls.blocks == expected * whole
        assert not torch.equal(latents, plain)
    calls.blocks = 0
    plan, _ = run(engine, sampling_of(family, cache_max_skip=2, cache_stages="full", **given))
    coarse, full = (stage.steps for stage in plan.stages)
    assert calls.blocks == (coarse + sum(step < 2 or step % 3 == 1 for step in range(full))) * whole
    given = {"cache": "magcache", "cache_ratios": (1.02, 1.02), "cache_threshold": 0.0}
    _, exact = run(engine, sampling_of(family, **given))
    assert torch.equal(exact, plain)


def test_magcache_takes_the_ratios_of_its_steps():
    """Of the whole schedule, of which a stage has its part; elsewhere it would leave out other steps."""
    engine = engine_of("flux1")
    calls = Calls(engine)
    run(engine, sampling_of("flux1"))
    whole, calls.blocks = calls.blocks // 10, 0
    plan = engine.plan(sampling_of("flux1"))
    first = plan.stages[1].first
    steep = tuple(9.0 if step == first + 3 else 1.0 for step in range(10))
    run(engine, sampling_of("flux1", cache="magcache", cache_ratios=steep, cache_max_skip=9))
    left_out = sum(max(0, stage.steps - 2) for stage in plan.stages) - 1
    assert calls.blocks == (10 - left_out) * whole
    few = tuple(9.0 if step == 1 else 1.0 for step in range(2))  # nearest: from the middle on
    calls.blocks = 0
    run(engine, sampling_of("flux1", cache="magcache", cache_ratios=few, cache_max_skip=9))
    assert calls.blocks > (10 - left_out) * whole


def test_seacache_leaves_out_steps_row_by_row_and_its_last_step_is_whole():
    engine = engine_of("wan2.1")
    calls = Calls(engine)
    sampling = sampling_of("wan2.1", cache="seacache", cache_threshold=1e9, cache_max_skip=2)
    assert engine.row_by_row(sampling)
    plan, plain = run(engine, sampling_of("wan2.1"))
    whole, calls.blocks = calls.blocks // 10, 0
    run(engine, sampling)
    expected = 0
    for stage in plan.stages:
        left_out = 0
        for step in range(stage.steps):
            left_out = left_out + 1 if 2 <= step < stage.steps - 1 and left_out < 2 else 0
            expected += not left_out
    assert calls.blocks == 2 * expected * whole
    assert expected < 10
    told: list[int] = []

    def callback(pipe: Any, *_: Any) -> dict[str, Any]:
        told.append(pipe.num_timesteps)
        return {}

    calls.blocks = 0
    run(engine, sampling.model_copy(update={"call_kwargs": {"callback_on_step_end": callback}}))
    assert calls.blocks == 2 * expected * whole  # also where a callback is told of the whole schedule
    assert set(told) == {10}
    exact = run(engine, sampling_of("wan2.1", cache="seacache", cache_threshold=0.0))[1]
    assert torch.allclose(exact, plain, atol=1e-4)


def test_keys_and_values_of_the_text_are_computed_once_a_stage_where_the_library_can():
    """Of one model, whose pipeline needs a text encoder too large for a test: its calls by hand."""
    torch.manual_seed(0)
    shape = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1}
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16, joint_attention_dim=8, axes_dims_rope=(4, 6, 6), moe_enabled=False, **shape
    )
    transformer.eval().requires_grad_(False)
    projected: list[int] = []
    for block in transformer.transformer_blocks:
        block.encoder_proj.register_forward_hook(lambda *_: projected.append(1))
    prompt, negative = torch.randn(1, 5, 8), torch.randn(1, 5, 8)

    def stage(tokens: int) -> list[torch.Tensor]:
        """Three steps on a grid, two passes each."""
        noise = torch.randn(1, tokens * tokens, 16, generator=torch.Generator().manual_seed(1))
        return [
            transformer(
                hidden_states=noise + step,
                timestep=torch.full((1,), 1.0 - step / 3),
                encoder_hidden_states=text,
                img_shapes=[[(1, tokens, tokens)]],
                return_dict=False,
            )[0]
            for step in range(3)
            for text in (prompt, negative)
        ]

    pipe = SimpleNamespace(components={"transformer": transformer})
    plan = engine_of("flux1").plan(sampling_of("flux1"))
    for tokens in (2, 4):
        projected.clear()
        plain = stage(tokens)
        assert len(projected) == 3 * 2 * 2  # steps, passes, blocks
        projected.clear()
        with step_cache(pipe, Sampling(), SimpleNamespace(), plan.stages[0], 10):
            kept = stage(tokens)
        assert len(projected) == 2 * 2
        assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))
    assert not transformer.is_cache_enabled
    assert keeps_text(transformer)  # so that no graph is made of its calls, which would keep a text for good


@pytest.mark.parametrize(
    ("family", "cache", "reason"),
    [
        ("sd3", "first_block", "does not tell a cache"),
        ("z-image", "first_block", "does not know how the blocks"),
        ("flux2", "first_block", "return different things"),
        ("flux1", "magcache", "nobody has measured the ratios"),
        ("wan2.2", "magcache", "two transformers"),
        ("flux1", "seacache", "does not tell a cache at which noise level"),
    ],
)
def test_what_cannot_have_a_cache_says_why(family, cache, reason):
    engine = Engine(tiny_pipes.BUILDERS[family]())
    with pytest.raises(ValueError, match=f"cannot run with cache {cache}: .*{reason}.*`cache: none`"):
        engine.plan(sampling_of(family, cache=cache))


def test_the_pipelines_that_a_plan_allows_seacache_are_those_that_tell_it_the_noise_level():
    folder = Path(diffusers.pipelines.__file__).parent
    telling = re.compile(r"cache_context_kwargs = \{[^}]*num_inference_steps")
    found = [path for path in folder.rglob("*.py") if telling.search(path.read_text("utf-8"))]
    classes = [re.search(r"^class (\w+Pipeline)\(", path.read_text("utf-8"), re.M)[1] for path in found]
    assert classes == list(SEACACHE_PIPELINES)


def test_settings_of_another_cache_are_refused():
    with pytest.raises(ValueError, match="cache_stages is of the cache first_block or taylorseer"):
        Sampling(cache_stages="full")
    with pytest.raises(ValueError, match="cache_ratios is of the cache magcache"):
        Sampling(cache="seacache", cache_ratios=(1.0, 1.0))
    with pytest.raises(ValueError, match="cache_threshold is of the cache first_block"):
        Sampling(cache="taylorseer", cache_threshold=0.1)
    with pytest.raises(ValueError, match="cache_interval is of the cache taylorseer"):
        Sampling(cache_interval=4)
