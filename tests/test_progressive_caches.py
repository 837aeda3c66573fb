"""Step caches: what they leave out, that they begin again at every stage, and what cannot have one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_pipes
import torch

from overtone.progressive.caches import repeated_blocks, transformers
from overtone.progressive.engine import Engine
from overtone.progressive.settings import Sampling

CACHED = ["flux1", "flux2", "qwen-image", "z-image", "wan2.1", "wan2.2"]
FIRST_BLOCK = ["flux1", "qwen-image", "wan2.1", "wan2.2"]


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


@pytest.mark.parametrize(
    ("family", "cache", "reason"),
    [
        ("sd3", "first_block", "does not tell a cache"),
        ("z-image", "first_block", "does not know how the blocks"),
        ("flux2", "first_block", "return different things"),
    ],
)
def test_what_cannot_have_a_cache_says_why(family, cache, reason):
    engine = Engine(tiny_pipes.BUILDERS[family]())
    with pytest.raises(ValueError, match=f"cannot run with cache {cache}: .*{reason}.*`cache: none`"):
        engine.plan(sampling_of(family, cache=cache))


def test_settings_of_another_cache_are_refused():
    with pytest.raises(ValueError, match="cache_threshold is of the cache first_block"):
        Sampling(cache="taylorseer", cache_threshold=0.1)
    with pytest.raises(ValueError, match="cache_interval is of the cache taylorseer"):
        Sampling(cache_interval=4)
