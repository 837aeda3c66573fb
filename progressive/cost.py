"""What a step costs: FLOPs of a transformer from its configuration, and settings in steps at full size. Knows
no torch, no schedule and no seconds.

    cost = step_cost("FluxTransformer2DModel", config, FAMILIES["flux1"], Sampling())
    cost.step(1024) / cost.step(4096)       # FLUX.1-dev's step on half the sides is 0.289 full-size steps

A product of [n, a] and [a, b] counts 2nab, and scaled dot-product attention 4D for each pair of a query and
a key; norms, activations and rotations count nothing. Text takes part in every step whatever the grid, which
is why image tokens alone promise too much of FLUX.1, and attention grows with the square of the tokens, which
is why they promise too little of Wan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from overtone.progressive.settings import Sampling

if TYPE_CHECKING:
    from overtone.progressive.families import Family, Guided

Config = Mapping[str, Any]


@dataclass(frozen=True)
class PassCost:
    """FLOPs of one pass of a transformer over n image tokens: fixed + per_token * n + per_pair * n**2."""

    text_tokens: int
    """Tokens of text that the pass reads beside the image."""
    fixed: float
    per_token: float
    per_pair: float
    multiple: int = 1
    """The transformer fills its image tokens up to a multiple of this many."""

    def flops(self, tokens: int) -> float:
        """Of one pass over `tokens` image tokens."""
        n = -(-tokens // self.multiple) * self.multiple
        return self.fixed + self.per_token * n + self.per_pair * n**2


@dataclass(frozen=True)
class StepCost:
    """What a step of one row costs on any grid, in FLOPs or, where these are not known, in image tokens."""

    passes: tuple[PassCost, ...]
    """The passes that a step makes: one, or two where guidance runs, the one with the prompt first."""
    counts: Literal["FLOPs", "image tokens"] = "FLOPs"

    def step(self, tokens: int, *, guided: bool = True) -> float:
        """Cost of a step on `tokens` image tokens; without the passes after the first where not `guided`."""
        return sum(one.flops(tokens) for one in (self.passes if guided else self.passes[:1]))

    def full_size_steps(
        self,
        stages: Sequence[tuple[int, int]],
        full_tokens: int,
        *,
        unguided: Sequence[tuple[int, int]] = (),
    ) -> float:
        """Cost of stages, (image tokens, steps) each, in steps over `full_tokens` of the same model;
        `unguided`: steps beside them that make the first pass alone."""
        cost = sum(self.step(tokens) * steps for tokens, steps in stages)
        cost += sum(self.step(tokens, guided=False) * steps for tokens, steps in unguided)
        return cost / self.step(full_tokens)

    @property
    def text_tokens(self) -> int:
        """Of the pass with the prompt."""
        return self.passes[0].text_tokens


BY_TOKENS = StepCost((PassCost(0, 0.0, 1.0, 0.0),), counts="image tokens")
"""Of a transformer whose FLOPs are not known here: every image token costs the same, on any grid."""


def step_cost(
    transformer_class: str,
    config: Config,
    family: Family,
    sampling: Sampling,
    *,
    guided: Guided | None = None,
) -> StepCost:
    """Cost of a step, from the transformer's class and configuration (its config.json); image tokens, as in
    `BY_TOKENS`, for a class that is not known here and for a configuration that lacks what its class needs.

    A prompt counts as what the pipeline pads it to, else as `LONG_CAPTION`; a negative prompt, where every
    row runs one (`guided`; unset: as the family's own calls do), as much again. Where only rows that give one
    do, the others' cost counts. What a step cache leaves out is not taken off.
    """
    negative = (guided or family.guided(sampling, family.guidance_default)) == "always"
    by_tokens = StepCost(BY_TOKENS.passes * 2, BY_TOKENS.counts) if negative else BY_TOKENS
    architecture = ARCHITECTURES.get(transformer_class)
    if architecture is None:
        return by_tokens
    text = architecture.text_tokens
    asked = (family.call | sampling.call_kwargs).get("max_sequence_length")
    if architecture.padded and isinstance(asked, int):
        text = asked + architecture.more_text_tokens
    texts = [text] if architecture.negative_tokens is None else [text, architecture.negative_tokens]
    if negative:
        texts.append(text)
    try:
        return StepCost(tuple(architecture.of(config, one) for one in texts))
    except (KeyError, TypeError, IndexError, ValueError):
        return by_tokens


@dataclass(frozen=True)
class Architecture:
    """A transformer class of diffusers as far as its cost depends on it."""

    flops: Callable[[Config, int, int], float]
    """Of one pass: configuration, image tokens, text tokens. A polynomial of degree two in image tokens."""
    text_tokens: int
    """That its pipeline makes of any prompt; where `padded` is off, `LONG_CAPTION`."""
    padded: bool = True
    """The text has its length whatever the prompt."""
    more_text_tokens: int = 0
    """Text beside what the pipeline's `max_sequence_length` counts."""
    negative_tokens: int | None = None
    """Text of a second pass that every step makes; None: guidance alone makes one, over as much text."""
    multiple: int = 1
    """Image and text are each filled up to a multiple of this many tokens."""

    def of(self, config: Config, text_tokens: int) -> PassCost:
        """KeyError or TypeError for a configuration that is not of this class."""
        text = -(-text_tokens // self.multiple) * self.multiple
        at_0, at_1, at_2 = (float(self.flops(config, n, text)) for n in range(3))
        square = (at_2 - 2 * at_1 + at_0) / 2
        return PassCost(text, at_0, at_1 - at_0 - square, square, self.multiple)


LONG_CAPTION = 128
"""Tokens of text where a pipeline passes prompts at their own length."""

_TIME = 256
"""Width of the sinusoidal embedding of the noise level."""


def _width(config: Config) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _flux1(config: Config, n: int, text: int) -> float:
    """Blocks with weights of their own for image and text, then blocks with common ones: each 8 D^2 for the
    projections of attention and 16 D^2 for the MLP, a token."""
    d, m = _width(config), n + text
    double, single = config["num_layers"], config["num_single_layers"]
    blocks = (double + single) * (24 * d**2 * m + 4 * d * m**2) + (24 * double + 6 * single) * d**2
    levels = 2 if config["guidance_embeds"] else 1
    embedded = levels * 2 * (_TIME * d + d**2) + 2 * (config["pooled_projection_dim"] * d + d**2)
    return blocks + embedded + _ends(config, n, text, config["joint_attention_dim"]) + 4 * d**2


def _ends(config: Config, n: int, text: int, text_width: int) -> float:
    """The projections of latents and text into the transformer, and of its result out of it."""
    made = (config.get("out_channels") or config["in_channels"]) * config.get("patch_size", 1) ** 2
    return 2 * _width(config) * (n * (config["in_channels"] + made) + text * text_width)


def _flux2(config: Config, n: int, text: int) -> float:
    """As FLUX.1, with gated MLPs and modulations that the blocks share."""
    d, m = _width(config), n + text
    a_token = (8 + 6 * config["mlp_ratio"]) * d**2
    blocks = (config["num_layers"] + config["num_single_layers"]) * (a_token * m + 4 * d * m**2)
    levels = 2 if config["guidance_embeds"] else 1
    embedded = levels * 2 * (config["timestep_guidance_channels"] * d + d**2) + 30 * d**2
    return blocks + embedded + _ends(config, n, text, config["joint_attention_dim"]) + 4 * d**2


def _qwen_image(config: Config, n: int, text: int) -> float:
    """As FLUX.1 without its second kind of blocks."""
    d, m = _width(config), n + text
    blocks = config["num_layers"] * (24 * d**2 * (m + 1) + 4 * d * m**2)
    return blocks + 2 * _TIME * d + 6 * d**2 + _ends(config, n, text, config["joint_attention_dim"])


def _qwen_image_21(config: Config, n: int, text: int) -> float:
    """One sequence with gated MLPs. Text sees neither image nor noise level, so that its keys and values are
    kept from a stage's first step (not counted) for the others, whose image attends to them."""
    d = _width(config)
    a_token = (8 + 6 * config["mlp_ratio"]) * d**2
    blocks = config["num_layers"] * (a_token * n + 4 * d * n * (n + text))
    rows = 2 if config.get("causal_condition", True) else 1
    embedded = rows * (2 * _TIME * d + 12 * d**2)
    return blocks + embedded + 2 * text * d**2 + _ends(config, n, text, config["context_in_dim"])


def _z_image(config: Config, n: int, text: int) -> float:
    """Refiners of the image and of the text, each alone, then blocks over both."""
    d = config["dim"]
    mlp = int(d / 3 * 8)
    channels = config["all_patch_size"][0] ** 2 * config["all_f_patch_size"][0] * config["in_channels"]
    conditioned = min(d, _TIME)

    def block(tokens: int) -> float:
        return (8 * d**2 + 6 * d * mlp) * tokens + 4 * d * tokens**2

    refiners, layers = config["n_refiner_layers"], config["n_layers"]
    blocks = layers * block(n + text) + refiners * (block(n) + block(text))
    modulation = 2 * conditioned * d * (4 * (layers + refiners) + 1)
    ends = 2 * d * (2 * n * channels + text * config["cap_feat_dim"])
    return blocks + modulation + ends + 2 * 1024 * (_TIME + conditioned)


def _wan(config: Config, n: int, text: int) -> float:
    """Attention among the image's tokens, then from them to the text, then an MLP."""
    d, mlp = _width(config), config["ffn_dim"]
    own = 8 * d**2 * n + 4 * d * n**2
    cross = 4 * d**2 * (n + text) + 4 * d * n * text
    blocks = config["num_layers"] * (own + cross + 4 * d * mlp * n)
    channels = config["in_channels"] + (config.get("out_channels") or config["in_channels"])
    time, height, width = config["patch_size"]
    ends = 2 * d * (n * channels * time * height * width + text * (config["text_dim"] + d))
    return blocks + ends + 2 * config["freq_dim"] * d + 14 * d**2


def _sd3(config: Config, n: int, text: int) -> float:
    """Blocks with weights of their own for image and text; some let the image attend to itself once more, and
    the last has no use for the text's result."""
    d, m, layers = _width(config), n + text, config["num_layers"]
    dual = len(config.get("dual_attention_layers") or ())
    blocks = layers * (24 * d**2 * m + 4 * d * m**2) - 18 * d**2 * text
    blocks += dual * (8 * d**2 * n + 4 * d * n**2)
    modulation = (24 * layers - 8 + 6 * dual) * d**2
    patch = config["patch_size"] ** 2
    ends = 2 * d * n * patch * (config["in_channels"] + (config.get("out_channels") or config["in_channels"]))
    text_in = 2 * text * config["joint_attention_dim"] * d
    embedded = 2 * (_TIME * d + config["pooled_projection_dim"] * d) + 8 * d**2
    return blocks + modulation + ends + text_in + embedded


def _ideogram4(config: Config, n: int, text: int) -> float:
    """One sequence whose every place goes through both the latents' and the text's projection."""
    d, m, cond = _width(config), n + text, config["adaln_dim"]
    blocks = config["num_layers"] * (
        (8 * d**2 + 6 * d * config["intermediate_size"]) * m + 4 * d * m**2 + 8 * cond * d
    )
    ends = 2 * d * m * (2 * config["in_channels"] + config["llm_features_dim"])
    return blocks + ends + 4 * d**2 + 4 * cond * d


ARCHITECTURES: dict[str, Architecture] = {
    "FluxTransformer2DModel": Architecture(_flux1, 512),
    "Flux2Transformer2DModel": Architecture(_flux2, 512),
    "QwenImageTransformer2DModel": Architecture(_qwen_image, LONG_CAPTION, padded=False),
    "QwenImage21Transformer2DModel": Architecture(_qwen_image_21, LONG_CAPTION, padded=False),
    "ZImageTransformer2DModel": Architecture(_z_image, LONG_CAPTION, padded=False, multiple=32),
    "WanTransformer3DModel": Architecture(_wan, 512),
    "SD3Transformer2DModel": Architecture(_sd3, 77 + 256, more_text_tokens=77),  # CLIP's tokens, then T5's
    "Ideogram4Transformer2DModel": Architecture(_ideogram4, 2048, negative_tokens=0),
}
"""By class of diffusers, each held against torch's `FlopCounterMode` (tests/test_progressive_cost.py)."""
