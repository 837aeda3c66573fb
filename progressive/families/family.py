"""What an entry says of one family of models: sizes, layout of latents, text arguments, guidance, spectrum.

Plain data, no torch: `overtone plan` reads it too. What an entry cannot say (how to call the pipeline, its
decoding) comes from the pipeline itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from overtone.progressive.formulas import Spectrum

if TYPE_CHECKING:
    from overtone.progressive.settings import Sampling

Layout = Literal["grid", "tokens2x2", "tokens", "grid_to_tokens", "subcell_tokens", "channels_last"]
"""How latents go through the pipeline's `latents` argument and come out of its scheduler.
`grid`: [B, C, H, W] or [B, C, T, H, W]. `tokens2x2`: [B, H / 2 * W / 2, C * 4], channel c * 4 + row * 2 +
column of 2 x 2 cells. `tokens`: [B, H * W, C]. `grid_to_tokens`: in as `grid`, out as `tokens`.
`subcell_tokens`: `tokens` with channel (row * s + column) * C / s**2 + c for s x s subcells.
`channels_last`: [B, T, H, W, C], always a copy, for its pipeline writes into what it is given.
Of a video, `tokens` are [B, T * H * W, C]."""

Guided = Literal["never", "given", "always"]
"""Whether a row runs a negative prompt beside its prompt: never, where one is given, or always."""

FLUX1_VAE = Spectrum(203.615097, 1.915461)  # published with the method; FLUX.1's VAE, also Z-Image's
WAN21_VAE = Spectrum(219.484718, 2.422687)  # published with the method; Wan 2.1's VAE

GENERIC_BEFORE = ("it has an entry of its own, where it ran on the generic one",)
"""`Family.changes` of pipelines that were known by nothing but their class."""


@dataclass(frozen=True)
class Family:
    """One family of models. Lengths are in pixels where the name says so, else in latent cells."""

    name: str
    pipelines: tuple[str, ...]
    """Class names of the diffusers pipelines that make up the family."""
    cell_px: int
    """Pixels that a side of a latent cell covers, as the pipeline counts cells."""
    grid_multiple: int
    """Each side of a grid must be a multiple of this many cells."""
    patch: int
    """Cells on the side of a token: a grid has H * W * T / patch**2 image tokens."""
    spectrum: Spectrum
    default_delta: float
    default_height: int
    """Pixels."""
    default_width: int
    """Pixels."""
    default_steps: int
    default_frames: int | None = None
    """Frames of a video; None for families that make images."""
    frames_per_latent: int = 1
    """A latent frame after the first stands for this many frames."""
    layout: Layout = "grid"
    subcells: int = 1
    """Each cell's channels are a block of subcells x subcells finer cells, channel c * s * s + row * s +
    column: expansions happen on that finer grid, since each plane by itself would be half a cell off."""
    channels_per_latent: int = 1
    """The transformer's `in_channels`, without `channels_beside`, over the latent's channels C, rounded
    down."""
    channels_beside: int = 0
    """Channels of `in_channels` that are no latent's: zeros and a mask, for pictures to start from."""
    channels_key: str = "in_channels"
    """How the transformer's configuration names its `in_channels`."""
    text: tuple[str | None, ...] | None = ("prompt_embeds",)
    """The pipeline's call arguments that take the values `encode_prompt` returns, in that order; None for a
    value that is left out. None altogether: prompts go into each stage as text."""
    text_rank: int = 2
    """Axes of one prompt's embedding, [tokens, D] as a rule."""
    ragged: Literal["pad", "list"] | None = None
    """Embeddings that differ in length: `pad` to the longest, with `prompt_embeds_mask`, or a `list`."""
    guidance: tuple[str, float] | None = ("guidance_scale", 1.0)
    """(argument, value above which the pipeline also runs the negative prompt); None: it never does."""
    guidance_default: float | None = None
    """That argument's default in the pipeline's own call; None: not known, or none."""
    guider: str | None = None
    """The component of the pipeline that guides in an argument's place; `guidance` is then None."""
    negative_text: str = ""
    """The negative prompt that the pipeline's call runs where none is given."""
    negative: Literal["always", "given"] = "always"
    """Whether guidance runs `negative_text` where none is given, or only one that is."""
    without_negative: tuple[str, ...] = ()
    """Those of `pipelines` that never run a negative prompt."""
    unprompted: bool = False
    """At each step a second transformer runs without the text."""
    waves_per_cell: int = 1
    """The spectrum's frequencies are counted on a grid this many times finer than the cells."""
    unshifted: bool = False
    """The pipeline leaves its VAE's `shift_factor` aside."""
    per_step: tuple[str, ...] = ()
    """Call arguments that hold one value a step of the whole schedule."""
    fractions: tuple[str, ...] = ()
    """Call arguments that name a step as a fraction of the whole schedule's steps."""
    counts: tuple[str, ...] = ()
    """Call arguments that name a step by its number in the whole schedule."""
    transformers: tuple[str, ...] = ("transformer",)
    """The pipeline's denoisers that adapters can be loaded into; of several, an adapter says which."""
    call: dict[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of the pipeline's call that differ from its own defaults."""
    fixed: dict[str, tuple[Any, str]] = field(default_factory=dict, hash=False)
    """Arguments of the call with the only value that stages allow, and why; no setting may change them."""
    presets: dict[int, dict[str, Any]] = field(default_factory=dict, hash=False)
    """Arguments of the call that the model's authors recommend for a number of steps."""
    needs: tuple[str, ...] = ()
    """Packages that the pipeline's call uses, and that come with it by luck alone."""
    changes: tuple[str, ...] = ()
    """What has changed in what the entry means, oldest first, each such that samples made before differ."""
    unfit: dict[str, tuple[Any, str]] = field(default_factory=dict, hash=False)
    """Values of the transformer's configuration with which no stages are possible, and why."""
    alone: bool = False
    """Rows are encoded and denoised one at a time: the pipeline pads the prompts of a batch to the longest
    and masks nothing, so that a row would depend on its neighbours."""

    def arguments(self, sampling: Sampling, num_steps: int) -> dict[str, Any]:
        """The call's arguments that are neither text nor size: the entry's own, then the authors' for this
        number of steps, then the settings'. ValueError for a fixed argument, and where values by step are
        not one a step."""
        for name in self.fixed.keys() & sampling.call_kwargs.keys():
            value, why = self.fixed[name]
            raise ValueError(f"call_kwargs names {name}, which is always {value!r} for {self.name}: {why}")
        fields = {
            name: value
            for name in ("guidance_scale", "true_cfg_scale")
            if (value := getattr(sampling, name)) is not None
        }
        fixed = {name: value for name, (value, _) in self.fixed.items()}
        call = self.call | fixed | self.presets.get(num_steps, {}) | sampling.call_kwargs | fields
        if "guidance_scale" in fields:  # one value takes the place of values by step
            call |= dict.fromkeys(self.per_step)
        for name in self.per_step:
            values = call.get(name, ())
            if values is not None and len(values) != num_steps:
                raise ValueError(
                    f"num_steps is {num_steps}, for which {self.name} has no {name} of its own; set "
                    f"num_steps to {_one_of(sorted(self.presets))}, or give guidance_scale (one value for "
                    f"all steps), or call_kwargs.{name} with {num_steps} values"
                )
        return call

    def check_transformer(self, config: Mapping[str, Any]) -> None:
        """ValueError, in a sentence, for a transformer of this configuration that is `unfit`."""
        for key, (value, why) in self.unfit.items():
            if config.get(key) == value:
                raise ValueError(f"the transformer's {key} is {value!r}: {why}")

    def check_pictures(self) -> None:
        """ValueError, in a sentence, where no sample can start from a picture."""
        if self.default_frames is not None:
            why = "it makes videos, and a picture is no video to start from"
        elif self.name == "generic":
            why = "the pipeline is not known here, nor what it does to its autoencoder's latents"
        else:
            return
        raise ValueError(f"{self.name} cannot start from a picture: {why}; leave out pictures and `strength`")

    def check_guidance_interval(self, sampling: Sampling, guided: Guided) -> None:
        """ValueError where `guidance_interval` is set and these settings have no second pass that a step can
        leave out, or none that an argument of the call rules. `guided`: as the pipeline's call is."""
        if sampling.guidance_interval is None:
            return
        if self.name == "generic":
            why = "the pipeline is not known here, nor what else its guidance argument does"
        elif self.guider:
            why = f"{self.name} guides by its component `{self.guider}`, not by an argument of its call"
        elif self.unprompted:
            why = f"the second transformer of {self.name} runs at every step, whatever the guidance"
        elif guided == "never":
            why = f"{self.name} has no second pass to leave out with these settings: no negative prompt runs"
        else:
            return
        raise ValueError(f"guidance_interval: {why}; leave it out")

    def guided(self, sampling: Sampling, default: float | None, *, distilled: bool = False) -> Guided:
        """Whether a row runs a negative prompt with these settings.

        `default` is what the pipeline's call has for the guidance argument. This depends on the settings and
        on the row alone, so that a row never depends on its batch.
        """
        if self.guidance is None or distilled:
            return "never"
        name, above = self.guidance
        asked = getattr(sampling, name, None)
        scale = self.call.get(name, default) if asked is None else asked
        if scale is None or scale <= above:
            return "never"
        return self.negative if asked is None else "always"


def _one_of(values: Sequence[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))
