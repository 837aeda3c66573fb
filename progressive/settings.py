"""The settings of a sample: what to draw it with, never how fast. Knows no torch, no jobs."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

PresetName = Literal["faithful", "balanced", "fast"]
Mode = Literal["fullres", "dct", "dct_rewind", "dct_matched"]
Transform = Literal["dct", "haar", "fft"]
Noise = Literal["coupled", "fresh"]
StepCache = Literal["none", "first_block", "taylorseer", "magcache", "seacache"]
Fit = Literal["cover", "pad", "stretch"]


LAST_BITS = 1e-6
"""Noise levels that are no further apart are the same one."""

PRESET_FILLED = "preset_filled"
"""Key of the validation's context: the preset's settings are among the others."""


def _numbers(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError("give the two numbers (A, beta); only a job spec's file may name a saved spectrum")
    return value


def _measured(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(
            "give (scale, sigma, error) rows; only a job spec's file may name a saved measurement"
        )
    return value


_Share = Annotated[float, Field(gt=0, lt=1)]
_Level = Annotated[float, Field(ge=0, le=1)]


class Grown(BaseModel):
    """Settings that say what they said before there were the later ones, where these are unset: a job that
    was begun before goes on."""

    came_later: ClassVar[tuple[str, ...]] = ()
    """The later ones; None is unset."""

    @model_serializer(mode="wrap")
    def _as_before(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said: dict[str, Any] = plainly(self)
        return {key: value for key, value in said.items() if key not in self.came_later or value is not None}


class Sampling(Grown):
    """How a sample is made. Every field here changes pixels; none of them is about speed alone."""

    came_later = (
        *("consistency", "guidance_interval", "cache_max_skip", "cache_ratios", "cache_stages"),
        *("strength", "fit"),
    )
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    preset: PresetName | None = Field(default=None, exclude=True)
    """Of a job spec alone: settings that go by a name, for those of `num_steps`, `delta` and the ladder that
    the spec leaves out. `faithful` follows full resolution, `fast` is the cheapest to recommend; `overtone
    plan` tells where they are from. The job is the one with the same values written out."""

    mode: Mode = "dct_rewind"
    """`fullres`: the plain pipeline. `dct`: coarse grids first, spectral expansion between them.
    `dct_rewind`: the same, and the step after an expansion starts at the matching higher noise level.
    `dct_matched`: every stage runs at the noise levels whose signal-to-noise ratio is the full schedule's,
    so that an expansion lands on the full schedule, and the noise it adds follows the spectrum."""

    num_steps: Annotated[int, Field(ge=1)] | None = None
    """Scheduler steps over all stages; unset: the family's usual number."""

    flow_shift: Annotated[float, Field(gt=0)] | None = None
    """Static shift of the noise schedule, 1 for none: higher keeps more steps at high noise. Unset: the
    checkpoint's own. Refused where the checkpoint shifts its schedule by the size of the picture."""

    guidance_scale: Annotated[float, Field(ge=0)] | None = None
    """The pipeline's own `guidance_scale`; unset: the pipeline's default."""

    true_cfg_scale: Annotated[float, Field(ge=0)] | None = None
    """The pipeline's own `true_cfg_scale` (FLUX.1, Qwen-Image); unset: the pipeline's default."""

    guidance_interval: tuple[_Level, _Level] | None = None
    """Noise levels [low, high] within which a negative prompt runs; a step of the full schedule that starts
    from another level takes one pass of the transformer in place of two. The same steps on every ladder and
    in every `mode`. Unset: at every step. Refused where no negative prompt runs."""

    height: Annotated[int, Field(ge=1)] | None = None
    """Output height in pixels; unset: the family's usual size. A row's own `height` comes first."""

    width: Annotated[int, Field(ge=1)] | None = None
    """Output width in pixels; unset: the family's usual size. A row's own `width` comes first."""

    num_frames: Annotated[int, Field(ge=1)] | None = None
    """Frames of a video; unset: the family's usual number. Refused for image families."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of rows that start from a picture: the share of the steps that are made, the last ones. Low keeps more
    of the picture; 1 starts from noise alone. Unset: rows start from noise, and a picture is there for its
    mask, outside of which it is kept."""

    fit: Fit | None = None
    """Of rows that start from a picture with sides in another ratio than the sample's. `cover`: scaled until
    it covers the sample, and its middle cut out. `pad`: scaled until it fits, with grey around it, which a
    mask leaves to be made. `stretch`: scaled to the sample's sides. Unset: `cover`."""

    levels: Annotated[int, Field(ge=0)] | None = None
    """Number of halvings: 1 gives the ladder [0.5, 1], 2 gives [0.25, 0.5, 1]. Default 1.
    Give at most one of `levels` and `scales`."""

    scales: Literal["auto"] | tuple[float | int, ...] | None = None
    """The ladder itself: increasing, ending at full size; fractions in (0, 1], or heights in pixels
    (integers above 1). `auto`: the ladder with the fewest estimated FLOPs at this `delta`."""

    transition_sigmas: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = None
    """The noise level at or below which each coarse stage ends, decreasing, one fewer than the
    ladder has rungs; unset: from `delta` and the family's spectrum."""

    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Error allowed per frequency at a transition, in (0, 1): larger stays coarse for longer and
    saves more. Unset: the family's recommended value."""

    min_scale: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Smallest scale that `scales: auto` may choose."""

    max_rungs: Annotated[int, Field(ge=1)] = 5
    """Most stages that `scales: auto` may choose, the full-size one included."""

    transform: Transform = "dct"
    """Basis of the spectral expansion. `haar` can only double a grid."""

    noise: Noise = "coupled"
    """`coupled`: all stages share one full-resolution noise field, so that the result follows the
    full-resolution sample. `fresh`: each expansion draws its own."""

    spectrum: Annotated[
        tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None,
        BeforeValidator(_numbers, json_schema_input_type=tuple[float, float] | str | None),
    ] = None
    """(A, beta) of the latent power spectrum P(w) = A w^-beta; unset: the family's fit. A job spec may name
    the JSON file that `overtone calibrate` wrote (relative to the spec)."""

    consistency: Annotated[
        Annotated[tuple[tuple[_Share, _Share, Annotated[float, Field(ge=0)]], ...], Field(min_length=1)]
        | None,
        BeforeValidator(_measured, json_schema_input_type=str | None),
    ] = None
    """How far the model's coarse predictions are from its full ones, (scale, sigma, error) for each
    measurement: a second error beside the spectrum's that `delta` has to cover, so that stages end earlier on
    grids that the model is bad at. A job spec names the JSON file that `overtone calibrate --consistency`
    wrote (relative to the spec). Unset: the spectrum decides alone."""

    cache: StepCache = "none"
    """Leave out most of the transformer at steps that change little. `first_block`: where its first block
    gives nearly what it gave before, row by row. `taylorseer`: at a fixed interval, with the result
    extrapolated from the steps before. `magcache`: where the blocks' part of the result is known to change
    little, by ratios measured once for the model. `seacache`: where the part of the latent that is not noise
    has changed little, row by row."""

    cache_stages: Literal["all", "full"] | None = None
    """`full`: a cache in the full-size stage alone, where steps are longest. Unset, or `all`: in every stage,
    anew in each."""

    cache_warmup_steps: Annotated[int, Field(ge=1)] = 2
    """Steps at the start of each stage that run whole: what a cache remembers is of the coarser grid."""

    cache_threshold: Annotated[float, Field(ge=0)] | None = None
    """Change below which a step is left out: for `first_block` of its output, relative, unset 0.05; for
    `magcache` of the ratios from 1, added up, unset 0.06; for `seacache` of the latent, relative, added up,
    unset 0.25. 0 leaves out nothing."""

    cache_max_skip: Annotated[int, Field(ge=1)] | None = None
    """Of `magcache` and `seacache`: most steps in a row that are left out; unset: 3 and 2."""

    cache_ratios: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=2)] | None = None
    """Of `magcache`: for each step of a whole schedule the size of what the blocks add over that of the step
    before, as diffusers' MagCache measures it (`calibrate=True`); for another number of steps the nearest
    ones. Unset: diffusers' own for FLUX.1; refused for other models, which need their own."""

    cache_interval: Annotated[int, Field(ge=2)] | None = None
    """Of `taylorseer`: after the first steps one in this many runs whole; unset: 3."""

    cache_order: Annotated[int, Field(ge=0, le=3)] | None = None
    """Of `taylorseer`: order of the extrapolation; unset: 1, a straight line."""

    call_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More keyword arguments for the pipeline's call, as it documents them
    (`cfg_normalization`, `max_sequence_length`, ...)."""

    def guides_from(self, sigma: float) -> bool:
        """Whether guidance runs at a step that starts from this noise level of the full schedule, which two
        machines may reckon with other last bits."""
        low, high = self.guidance_interval or (0.0, 1.0)
        return low - LAST_BITS <= sigma <= high + LAST_BITS

    def first_step(self, num_steps: int) -> int:
        """The step that a sample begins with, as diffusers' own pipelines reckon it; 0 without `strength`."""
        if self.strength is None:
            return 0
        return min(int(num_steps - min(num_steps * self.strength, num_steps)), num_steps - 1)

    @model_validator(mode="after")
    def _preset_is_filled_in(self, info: ValidationInfo) -> Sampling:
        if self.preset is not None and not (info.context or {}).get(PRESET_FILLED):
            raise ValueError(
                "preset is filled in where a job spec is read, which names the model; in a program, "
                "give `**presets.preset(name, family).settings`"
            )
        return self

    @field_validator("call_kwargs")
    @classmethod
    def _not_the_engine_s(cls, value: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(filter(set_by_engine, value)):
            raise ValueError(
                f"names {', '.join(own)}, which the engine sets itself; use the fields of the sampling "
                "settings, or leave it out"
            )
        return value

    @model_validator(mode="after")
    def _one_ladder(self) -> Sampling:
        if self.levels is not None and self.scales is not None:
            raise ValueError("give `levels` or `scales`, not both")
        if isinstance(self.scales, tuple):
            if not self.scales:
                raise ValueError("scales is empty; it must end at full size (1.0)")
            if any(b <= a for a, b in pairwise(self.scales)):
                raise ValueError(f"scales must increase; got {list(self.scales)}")
            if any(s <= 0 for s in self.scales):
                raise ValueError(f"scales must be above 0; got {list(self.scales)}")
        if self.transition_sigmas is not None and any(b >= a for a, b in pairwise(self.transition_sigmas)):
            raise ValueError(f"transition_sigmas must decrease; got {list(self.transition_sigmas)}")
        if self.guidance_interval is not None and not self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(
                f"guidance_interval is {list(self.guidance_interval)}; give [low, high], two noise levels of "
                "which the second is the higher"
            )
        if self.consistency is not None and self.transition_sigmas is not None:
            raise ValueError(
                "consistency decides where stages end, and transition_sigmas does so by hand; leave one out"
            )
        for key, caches in _CACHES_WITH.items():
            if getattr(self, key) is not None and self.cache not in caches:
                raise ValueError(
                    f"{key} is of the cache {' or '.join(caches)}; set `cache: {caches[0]}`, or leave it out"
                )
        return self


_CACHES_WITH: dict[str, tuple[StepCache, ...]] = {
    "cache_threshold": ("first_block", "magcache", "seacache"),
    "cache_interval": ("taylorseer",),
    "cache_order": ("taylorseer",),
    "cache_max_skip": ("magcache", "seacache"),
    "cache_ratios": ("magcache",),
    "cache_stages": ("first_block", "taylorseer", "magcache", "seacache"),
}
"""The caches that a setting is of."""

MAGCACHE_MEASURED = ("FluxTransformer2DModel", 19)
"""Class and `num_layers` of the transformer of which the library has the ratios for `magcache`."""
SEACACHE_PIPELINES = ("WanPipeline",)
"""Those of the library's pipelines that tell a cache what `seacache` has to know."""

FRAMES = ("num_frames", "frames")
"""What pipelines call the number of a video's frames; SANA-Video's calls it otherwise than all others."""

_BY_ENGINE = {
    "height",
    "width",
    *FRAMES,
    "num_inference_steps",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "guidance_scale",
    "true_cfg_scale",
}


def set_by_engine(argument: str) -> bool:
    """Whether the engine sets this argument of a pipeline's call, so that `call_kwargs` may not name it."""
    return argument in _BY_ENGINE or ("prompt" in argument and not argument.startswith("enable_"))


NO_CACHE: dict[str, Any] = {
    name: field.default for name, field in Sampling.model_fields.items() if name.startswith("cache")
}
"""The fields that take a step cache away."""
