"""What a step costs, against what torch counts while a transformer of each family runs."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipes
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from overtone.progressive import Engine, Sampling
from overtone.progressive.checkpoints import PUBLISHED, describe
from overtone.progressive.cost import ARCHITECTURES, BY_TOKENS, PassCost, StepCost, step_cost
from overtone.progressive.engine import Encoded
from overtone.progressive.families import FAMILIES
from overtone.progressive.schedule import plan_sampling


class Counted:
    """FLOPs of each pass of a pipeline's transformers, [(image tokens are the caller's to know), ...]."""

    def __init__(self, engine: Engine) -> None:
        self.flops: list[float] = []
        for name in engine.family.transformers:
            self._watch(getattr(engine.pipe, name))
        if hasattr(engine.pipe, "unconditional_transformer"):
            self._watch(engine.pipe.unconditional_transformer)

    def _watch(self, transformer: torch.nn.Module) -> None:
        def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
            return sdpa_flop_count(query, key, value)

        def begin(*_: Any) -> None:
            # torch counts the attention of GPUs alone.
            cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            self._mode = FlopCounterMode(display=False, custom_mapping={cpu: attention})
            self._mode.__enter__()

        def end(*_: Any) -> None:
            self._mode.__exit__(None, None, None)
            self.flops.append(self._mode.get_total_flops())

        transformer.register_forward_pre_hook(begin)
        transformer.register_forward_hook(end)


def encoded(engine: Engine, sampling: Sampling) -> Encoded:
    if engine.family.name != "qwen-image-2.1":
        return engine.encode([tiny_pipes.PROMPTS[1]], [None], sampling)
    return Encoded(({"prompt_embeds": torch.randn(128, 8)},), (None,))  # it has no text encoder here


BUILDERS = tiny_pipes.BUILDERS | {
    "ideogram4": tiny_pipes.ideogram4,
    "qwen-image-2.1": tiny_pipes.qwen_image_21,
}


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_the_formula_is_what_torch_counts(name):
    """At two grids and, where prompts are padded, two text lengths, with guidance and without."""
    engine = Engine(BUILDERS[name]())
    counted = Counted(engine)
    transformer = engine.pipe.transformer
    architecture = ARCHITECTURES[type(transformer).__name__]
    for height, width, length, guided in ((64, 96, 16, False), (192, 128, 40, True)):
        call: dict[str, Any] = {"max_sequence_length": length} if architecture.padded else {}
        fields: dict[str, Any] = {"num_frames": 5} if engine.family.default_frames else {}
        if engine.family.guidance is None:
            call["guidance_schedule"] = [3.0] * 2
        else:
            scale, above = engine.family.guidance
            fields[scale] = above + 2 if guided and architecture.padded else above
        sampling = Sampling(
            mode="fullres", num_steps=2, height=height, width=width, call_kwargs=call, **fields
        )
        plan = engine.plan(sampling)
        text = encoded(engine, sampling)
        counted.flops.clear()
        engine.denoise(plan, text, [0], sampling)
        cost = plan.step_cost
        assert cost == step_cost(type(transformer).__name__, transformer.config, engine.family, sampling)
        if not architecture.padded:  # a prompt of another length than is assumed
            embedded = text.positive[0]["prompt_embeds"]
            tokens = len(embedded[0] if isinstance(embedded, list) else embedded)
            cost = StepCost((architecture.of(transformer.config, tokens),))
        second = counted.flops[len(counted.flops) // 2 :]  # the first may fill a cache of keys and values
        assert sum(second) == pytest.approx(cost.step(plan.stages[0].tokens), rel=0.02)


def flux1_dev(**fields: Any) -> StepCost:
    checkpoint = describe("black-forest-labs/FLUX.1-dev")
    return step_cost(
        checkpoint.transformer_class, checkpoint.transformer, FAMILIES["flux1"], Sampling(**fields)
    )


def test_flux1_dev_at_its_real_size():
    """74.384653418496 TFLOP is what FlopCounterMode counts of the real transformer on the meta device with
    4,096 image tokens and 512 of text, which takes it too long to be counted here."""
    assert flux1_dev().step(4096) == 74_384_653_418_496
    assert flux1_dev(call_kwargs={"max_sequence_length": 256}).step(4096) < flux1_dev().step(4096)


def test_a_plan_counts_text_and_attention():
    """One level at delta 0.05, which is 28 + 22 steps: tokens alone promise more."""
    sigmas = describe("black-forest-labs/FLUX.1-dev").sigmas(50, 1024, 1024)
    sampling = Sampling(levels=1, delta=0.05)
    cost = flux1_dev()
    made = plan_sampling(sampling, FAMILIES["flux1"], sigmas, step_cost=cost)
    assert made.split == "28 @ 64x64 + 22 @ 128x128"
    coarse = cost.step(1024) / cost.step(4096)
    assert made.cost == pytest.approx(28 * coarse + 22)
    assert (round(made.cost, 1), round(made.saving, 2), round(made.token_saving, 2)) == (30.1, 1.66, 1.72)
    shown = made.as_dict()
    assert (shown["cost"], shown["cost_counts"], shown["text_tokens"]) == (made.cost, "FLOPs", 512)
    by_tokens = plan_sampling(sampling, FAMILIES["flux1"], sigmas)
    assert by_tokens.step_cost == BY_TOKENS
    assert by_tokens.saving == by_tokens.token_saving == made.token_saving
    assert by_tokens.stages == made.stages


def test_full_resolution_costs_its_steps():
    sigmas = describe("black-forest-labs/FLUX.1-dev").sigmas(50, 1024, 1024)
    made = plan_sampling(Sampling(mode="fullres"), FAMILIES["flux1"], sigmas, step_cost=flux1_dev())
    assert (made.cost, made.saving) == (50, 1)


def test_guidance_is_a_second_pass():
    plain, guided = flux1_dev(), flux1_dev(true_cfg_scale=3.0)
    assert len(guided.passes) == 2
    assert guided.step(1024) == 2 * plain.step(1024)
    assert guided.step(1024, guided=False) == plain.step(1024)
    stages = [(1024, 28), (4096, 22)]
    assert guided.full_size_steps(stages, 4096) == pytest.approx(plain.full_size_steps(stages, 4096))


def test_every_published_checkpoint_is_counted_in_flops():
    for name, checkpoint in PUBLISHED.items():
        cost = step_cost(
            checkpoint.transformer_class, checkpoint.transformer, FAMILIES[checkpoint.family], Sampling()
        )
        assert cost.counts == "FLOPs", name
        assert 0 < cost.step(1024) < cost.step(4096) / 3


@pytest.mark.parametrize(
    ("transformer", "config"),
    [("MysteryTransformer2DModel", {"num_layers": 3}), ("FluxTransformer2DModel", {"num_layers": 3})],
)
def test_what_is_not_known_is_counted_by_image_tokens(transformer, config):
    cost = step_cost(transformer, config, FAMILIES["generic"], Sampling())
    assert (cost, cost.counts) == (BY_TOKENS, "image tokens")
    assert cost.full_size_steps([(256, 4), (1024, 2)], 1024) == 3


def test_tokens_are_filled_up_as_the_transformer_does():
    one = PassCost(text_tokens=0, fixed=1.0, per_token=2.0, per_pair=3.0, multiple=32)
    assert one.flops(33) == one.flops(64) == 1 + 2 * 64 + 3 * 64**2
