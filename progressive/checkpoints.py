"""Published checkpoints by hub name, and local diffusers folders, read without torch: classes, configurations
and the noise schedule that the pipeline will run. Knows no weights; never asks the network.

    describe("black-forest-labs/FLUX.1-dev").sigmas(50, 1024, 1024)     # 51 noise levels, the last 0

The table states facts as the checkpoints' own configuration files give them. Values that could not be
compared with such a file are named in `Checkpoint.unverified`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progressive.families import FAMILIES, Family, family_name
from progressive.schedule import Spectrum

Config = dict[str, Any]
Sigmas = NDArray[Any]


@dataclass(frozen=True)
class Checkpoint:
    """What a model's configuration files say, as far as a plan or a benchmark needs it."""

    family: str
    """Key of `progressive.families.FAMILIES`."""
    pipeline_class: str
    transformer_class: str
    scheduler_class: str
    """The three classes' names in diffusers."""
    transformer: Config
    """Arguments of the transformer class."""
    scheduler: Config
    """Arguments of the scheduler class; what is left out is the class's default."""
    source: str
    """Where the values are from."""
    default_steps: int | None = None
    """Steps that the model's authors recommend; None where the files do not tell."""
    pipeline: Config = field(default_factory=dict)
    """Plain values of model_index.json, such as `boundary_ratio`."""
    unverified: tuple[str, ...] = ()
    """Names of values taken from elsewhere than a copy of the checkpoint's own file."""

    def with_scheduler(self, **changes: Any) -> Checkpoint:
        """The same checkpoint under other scheduler settings, such as `flow_shift=5.0` for Wan."""
        return replace(self, scheduler=self.scheduler | changes)

    def sigmas(
        self, num_steps: int, height_px: int, width_px: int, num_frames: int | None = None
    ) -> list[float]:
        """The pipeline's full-resolution schedule: num_steps + 1 noise levels, falling, the last 0.

        Equal to what the diffusers scheduler holds after the pipeline's `set_timesteps`, to float32.
        `num_frames` is taken for symmetry: no pipeline here shifts its schedule by the number of frames.
        ValueError for fewer than one step or a scheduler whose schedule is not known here.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
        family = FAMILIES[self.family]
        asked = _Asked(self, num_steps, height_px, width_px, _tokens(family, height_px, width_px))
        sigmas, mu = _CALLS.get(self.pipeline_class, _like_flux)(asked)
        if self.scheduler_class not in _SCHEDULES:
            known = ", ".join(sorted(_SCHEDULES))
            raise ValueError(f"scheduler is {self.scheduler_class}; schedules are known for {known}")
        return [float(s) for s in _SCHEDULES[self.scheduler_class](self.scheduler, num_steps, sigmas, mu)]


def describe(model_id: str) -> Checkpoint:
    """The checkpoint called `model_id`: "tiny", a published hub name, or a folder in diffusers format.

    ValueError that lists the known names for any other, and for a folder that is no flow-matching pipeline.
    """
    if model_id == "tiny":
        return replace(_read_folder(_TINY), family="tiny")
    if model_id in PUBLISHED:
        return PUBLISHED[model_id]
    folder = Path(model_id).expanduser()
    if folder.is_dir() or model_id.startswith(("/", "./", "../", "~")):
        return _read_folder(folder)
    raise ValueError(
        f"{model_id!r} is no checkpoint known offline; give `tiny`, a folder in diffusers format, or one of "
        + ", ".join(sorted(PUBLISHED))
    )


def spectrum_profile(path: str | Path) -> Spectrum:
    """The (A, beta) that `progressive.calibrate` saved to a JSON file. ValueError that names the file."""
    values = _read_json(Path(path))
    try:
        return Spectrum(float(values["amplitude"]), float(values["beta"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a saved spectrum: {error!r}") from error


def flow_shift_change(scheduler: Mapping[str, Any], flow_shift: float | None) -> dict[str, Any]:
    """What to change in a scheduler's configuration for a static shift; nothing for None.

    ValueError where the schedule shifts by the size of the picture, or knows no shift.
    """
    if flow_shift is None:
        return {}
    if scheduler.get("use_dynamic_shifting"):
        raise ValueError(
            f"flow_shift is {flow_shift}; this checkpoint shifts its schedule by the size of the picture, "
            "leave it unset"
        )
    for name in ("flow_shift", "shift"):
        if name in scheduler:
            return {name: flow_shift}
    raise ValueError(f"flow_shift is {flow_shift}; this checkpoint's scheduler has no shift, leave it unset")


# ---------------------------------------------------------------------- how pipelines ask for a schedule


@dataclass(frozen=True)
class _Asked:
    """One call of a pipeline, as far as its schedule depends on it."""

    checkpoint: Checkpoint
    num_steps: int
    height_px: int
    width_px: int
    tokens: int
    """Image tokens of one frame."""


_Call = Callable[[_Asked], tuple[Sigmas | None, float | None]]
"""What a pipeline passes to its scheduler's `set_timesteps`: sigmas (None: only the number) and mu."""


def _tokens(family: Family, height_px: int, width_px: int) -> int:
    side = family.cell_px * family.patch
    return (height_px // side) * (width_px // side)


def _uniform(num_steps: int) -> Sigmas:
    return np.linspace(1.0, 1 / num_steps, num_steps)


def linear_mu(config: Mapping[str, Any], tokens: int, *, max_shift: float = 1.15) -> float:
    """The resolution shift of FLUX.1 and its many followers: linear in the number of image tokens."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (top - base) / (high - low)
    return tokens * slope + (base - slope * low)


def empirical_mu(tokens: int, num_steps: int) -> float:
    """FLUX.2's resolution shift: fits for 10 and 200 steps, linear in tokens and in the steps between."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * num_steps + (at_200 - 200 * slope)


def _like_flux(asked: _Asked) -> tuple[Sigmas | None, float | None]:
    config = asked.checkpoint.scheduler
    sigmas = None if config.get("use_flow_sigmas") else _uniform(asked.num_steps)
    return sigmas, linear_mu(config, asked.tokens)


def _flux2(asked: _Asked) -> tuple[Sigmas | None, float | None]:
    sigmas, _ = _like_flux(asked)
    return sigmas, empirical_mu(asked.tokens, asked.num_steps)


def _qwen_image_21(asked: _Asked) -> tuple[Sigmas | None, float | None]:
    own = asked.checkpoint.pipeline.get("sample_sigmas")
    if own is not None and len(own) != asked.num_steps:
        raise ValueError(f"num_steps is {asked.num_steps}; this checkpoint is made for {len(own)} steps")
    sigmas = _uniform(asked.num_steps) if own is None else np.asarray(own)
    return sigmas, linear_mu(asked.checkpoint.scheduler, asked.tokens)


def _number_alone(asked: _Asked) -> tuple[Sigmas | None, float | None]:
    return None, None


def _stable_diffusion_3(asked: _Asked) -> tuple[Sigmas | None, float | None]:
    config = asked.checkpoint.scheduler
    dynamic = config.get("use_dynamic_shifting")
    return None, linear_mu(config, asked.tokens, max_shift=1.16) if dynamic else None


def _ideogram_4(asked: _Asked) -> tuple[Sigmas | None, float | None]:
    """Logit-normal quantiles whose mean grows with the picture; both ends clamped in log-SNR (18 and -15)."""
    mean = 0.5 * math.log(asked.height_px * asked.width_px / 512**2)
    share = np.arange(asked.num_steps, 0, -1) / asked.num_steps  # from pure noise down; 0 is appended later
    normal = [NormalDist().inv_cdf(s) if s < 1 else math.inf for s in share]
    sigmas = 1 / (1 + np.exp(-(mean + 1.5 * np.array(normal))))
    return np.clip(sigmas, 1 - 1 / (1 + math.exp(-15 / 2)), 1 - 1 / (1 + math.exp(18 / 2))), None


_CALLS: dict[str, _Call] = {
    "FluxPipeline": _like_flux,
    "Flux2Pipeline": _flux2,
    "Flux2KleinPipeline": _flux2,
    "QwenImagePipeline": _like_flux,
    "QwenImage21Pipeline": _qwen_image_21,
    "ZImagePipeline": _like_flux,
    "WanPipeline": _number_alone,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "Ideogram4Pipeline": _ideogram_4,
}


# --------------------------------------------------------------------------------- what schedulers make of it


def _flow_match_euler(config: Config, num_steps: int, sigmas: Sigmas | None, mu: float | None) -> Sigmas:
    """`FlowMatchEulerDiscreteScheduler.sigmas`, float32 [num_steps + 1]."""
    _refuse(config, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
    dynamic, shift = config.get("use_dynamic_shifting", False), config.get("shift", 1.0)
    if sigmas is None:
        # Where only the number of steps is given, its range of sigmas has gone through the shift already.
        count = config.get("num_train_timesteps", 1000)
        ends = np.array([1.0, 1 / count])
        ends = ends if dynamic else _shifted(ends, shift)
        sigmas = np.linspace(ends[0], ends[1], num_steps)
    else:
        sigmas = np.asarray(sigmas, np.float32)
    if dynamic:
        sigmas = _shifted(sigmas, _factor(config, mu))
    else:
        sigmas = _shifted(sigmas, shift)
    return _end(config, sigmas)


def _unipc(config: Config, num_steps: int, sigmas: Sigmas | None, mu: float | None) -> Sigmas:
    """`UniPCMultistepScheduler.sigmas` where `use_flow_sigmas` is on, float32 [num_steps + 1]."""
    _refuse(config, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    if not config.get("use_flow_sigmas") or config.get("final_sigmas_type", "zero") != "zero":
        raise ValueError(
            "this UniPC scheduler is not set up for flow matching (use_flow_sigmas, ending at zero)"
        )
    if sigmas is None:
        sigmas = np.linspace(1, 1 / config.get("num_train_timesteps", 1000), num_steps + 1)[:-1]
    dynamic = config.get("use_dynamic_shifting", False)
    sigmas = _shifted(sigmas, _factor(config, mu) if dynamic else config.get("flow_shift", 1.0))
    ended = _end(config, sigmas)
    if abs(ended[0] - 1) < 1e-6:
        ended[0] = 1 - 1e-6  # as diffusers does, so that log(1 - sigma) stays finite
    return ended


_SCHEDULES: dict[str, Callable[[Config, int, Sigmas | None, float | None], Sigmas]] = {
    "FlowMatchEulerDiscreteScheduler": _flow_match_euler,
    "UniPCMultistepScheduler": _unipc,
}


def _refuse(config: Config, *switches: str) -> None:
    for switch in switches:
        if config.get(switch):
            raise ValueError(f"the scheduler has {switch} on; its schedule is not known here")


def _factor(config: Config, mu: float | None) -> float:
    if mu is None:
        raise ValueError(
            "the scheduler shifts by resolution (use_dynamic_shifting) but its pipeline does not"
        )
    return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


def _shifted(sigmas: Sigmas, factor: float) -> Sigmas:
    """The timestep shift: factor * s / (1 + (factor - 1) * s)."""
    return factor * sigmas / (1 + (factor - 1) * sigmas)


def _end(config: Config, sigmas: Sigmas) -> Sigmas:
    """Stretched so that the last step starts at `shift_terminal` where that is set, then 0 appended."""
    if terminal := config.get("shift_terminal"):
        if len(sigmas) < 2:
            raise ValueError("num_steps is 1; a schedule with shift_terminal needs at least 2 steps")
        sigmas = 1 - (1 - sigmas) * ((1 - terminal) / (1 - sigmas[-1]))
    return np.append(sigmas, 0).astype(np.float32)


# ---------------------------------------------------------------------------------------------- local folders

_TINY = Path(__file__).parent / "tiny" / "model"


def _read_folder(folder: Path) -> Checkpoint:
    """ValueError for a folder that is not in diffusers format or whose scheduler is not flow-matching."""
    index = _read_json(folder / "model_index.json")
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    classes = {}
    for name in ("transformer", "scheduler"):
        if len(parts.get(name, ())) != 2 or not parts[name][1]:
            raise ValueError(
                f"{folder / 'model_index.json'} names no {name}; only diffusion transformers work"
            )
        classes[name] = str(parts[name][1])
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    pipeline_class = str(index.get("_class_name"))
    pipeline = {
        k: v for k, v in index.items() if not k.startswith("_") and (k not in parts or k == "sample_sigmas")
    }
    if not classes["scheduler"].startswith("FlowMatch") and not scheduler.get("use_flow_sigmas"):
        raise ValueError(
            f"{folder} has a {classes['scheduler']} that is not flow-matching; only flow-matching models work"
        )
    family = family_name(pipeline_class, pipeline)
    if family == "flux1" and (folder / "spectrum.json").is_file():
        family = "tiny"  # an embedded model that its training script wrote elsewhere
    return Checkpoint(
        family=family,
        pipeline_class=pipeline_class,
        transformer_class=classes["transformer"],
        scheduler_class=classes["scheduler"],
        transformer=_public(_read_json(folder / "transformer" / "config.json")),
        scheduler=_public(scheduler),
        source=str(folder),
        pipeline=pipeline,
    )


def _read_json(path: Path) -> Config:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def _public(config: Config) -> Config:
    return {key: value for key, value in config.items() if not key.startswith("_")}


# --------------------------------------------------------------------------------- published checkpoints


def _hub(model_id: str) -> str:
    return f"https://huggingface.co/{model_id}"


_DYNAMIC = {  # FLUX's resolution shift; `shift` itself plays no part where shifting is dynamic
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def _flux1(model_id: str, *, dev: bool) -> Checkpoint:
    return Checkpoint(
        family="flux1",
        pipeline_class="FluxPipeline",
        transformer_class="FluxTransformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": dev,
            "axes_dims_rope": (16, 56, 56),
        },
        scheduler=_DYNAMIC if dev else _DYNAMIC | {"shift": 1.0, "use_dynamic_shifting": False},
        source=_hub(model_id),
        default_steps=28 if dev else 4,
    )


def _flux2_checkpoint(
    model_id: str, *, layers: tuple[int, int], heads: int, text_dim: int, distilled: bool | None
) -> Checkpoint:
    """`distilled` is None for FLUX.2-dev, whose pipeline has no such setting."""
    return Checkpoint(
        family="flux2",
        pipeline_class="Flux2Pipeline" if distilled is None else "Flux2KleinPipeline",
        transformer_class="Flux2Transformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "patch_size": 1,
            "in_channels": 128,
            "num_layers": layers[0],
            "num_single_layers": layers[1],
            "attention_head_dim": 128,
            "num_attention_heads": heads,
            "joint_attention_dim": text_dim,
            "timestep_guidance_channels": 256,
            "mlp_ratio": 3.0,
            "axes_dims_rope": (32, 32, 32, 32),
            "rope_theta": 2000,
            "eps": 1e-6,
            "guidance_embeds": distilled is None,
        },
        scheduler=_DYNAMIC,
        source=_hub(model_id),
        default_steps=4 if distilled else 50,
        pipeline={} if distilled is None else {"is_distilled": distilled},
        # The published stage splits confirm the dynamic exponential shift, all that sigmas depend on.
        unverified=("scheduler",),
    )


def _qwen_scheduler() -> Config:
    return _DYNAMIC | {"shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}


def _z_image(model_id: str, *, shift: float, steps: int) -> Checkpoint:
    return Checkpoint(
        family="z-image",
        pipeline_class="ZImagePipeline",
        transformer_class="ZImageTransformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "norm_eps": 1e-5,
            "qk_norm": True,
            "cap_feat_dim": 2560,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
        },
        scheduler={"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift": shift},
        source=_hub(model_id),
        default_steps=steps,
    )


def _wan(
    model_id: str,
    *,
    family: str,
    heads: int,
    layers: int,
    ffn: int,
    flow_shift: float,
    channels: int = 16,
    pipeline: Config | None = None,
    unverified: tuple[str, ...] = (),
) -> Checkpoint:
    return Checkpoint(
        family=family,
        pipeline_class="WanPipeline",
        transformer_class="WanTransformer3DModel",
        scheduler_class="UniPCMultistepScheduler",
        transformer={
            "patch_size": (1, 2, 2),
            "num_attention_heads": heads,
            "attention_head_dim": 128,
            "in_channels": channels,
            "out_channels": channels,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": ffn,
            "num_layers": layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "rope_max_seq_len": 1024,
        },
        scheduler={
            "num_train_timesteps": 1000,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "solver_order": 2,
            "prediction_type": "flow_prediction",
            "predict_x0": True,
            "solver_type": "bh2",
            "lower_order_final": True,
            "use_flow_sigmas": True,
            "flow_shift": flow_shift,
            "timestep_spacing": "linspace",
            "final_sigmas_type": "zero",
        },
        source=_hub(model_id),
        default_steps=50,
        pipeline=pipeline or {},
        unverified=unverified,
    )


def _sd3(model_id: str, transformer: Config, steps: int) -> Checkpoint:
    return Checkpoint(
        family="sd3",
        pipeline_class="StableDiffusion3Pipeline",
        transformer_class="SD3Transformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
        }
        | transformer,
        scheduler={"num_train_timesteps": 1000, "shift": 3.0},
        source=_hub(model_id),
        default_steps=steps,
        unverified=("scheduler", "default_steps"),
    )


@dataclass(frozen=True)
class License:
    """Under which terms weights are published, as a model card's header has it."""

    id: str
    """The Hub's identifier; `other` for terms of the publisher's own."""
    name: str | None = None
    """Of such terms."""
    link: str | None = None


def license_of(model_id: str) -> License | None:
    """The licence of a model's weights; None where it is not known here."""
    return _LICENSES.get(model_id)


_APACHE = License("apache-2.0")
_LICENSES: dict[str, License] = {
    "tiny": _APACHE,
    "black-forest-labs/FLUX.1-dev": License(
        "other",
        "flux-1-dev-non-commercial-license",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
    "black-forest-labs/FLUX.1-schnell": _APACHE,
    "black-forest-labs/FLUX.2-klein-4B": _APACHE,
    "black-forest-labs/FLUX.2-klein-base-4B": _APACHE,
    "Qwen/Qwen-Image": _APACHE,
    "Tongyi-MAI/Z-Image-Turbo": _APACHE,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _APACHE,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _APACHE,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _APACHE,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _APACHE,
    "stabilityai/stable-diffusion-3.5-large": License(
        "other",
        "stabilityai-ai-community",
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-large/blob/main/LICENSE.md",
    ),
}
"""Where the terms are well known; the others are left out, for a licence must not be guessed."""

PUBLISHED: dict[str, Checkpoint] = {
    "black-forest-labs/FLUX.1-dev": _flux1("black-forest-labs/FLUX.1-dev", dev=True),
    "black-forest-labs/FLUX.1-schnell": _flux1("black-forest-labs/FLUX.1-schnell", dev=False),
    "black-forest-labs/FLUX.2-dev": _flux2_checkpoint(
        "black-forest-labs/FLUX.2-dev", layers=(8, 48), heads=48, text_dim=15360, distilled=None
    ),
    **{
        f"black-forest-labs/FLUX.2-klein-{name}": _flux2_checkpoint(
            f"black-forest-labs/FLUX.2-klein-{name}",
            layers=layers,
            heads=heads,
            text_dim=text_dim,
            distilled=not name.startswith("base-"),
        )
        for size, layers, heads, text_dim in (("4B", (5, 20), 24, 7680), ("9B", (8, 24), 32, 12288))
        for name in (size, f"base-{size}")
    },
    "Qwen/Qwen-Image": Checkpoint(
        family="qwen-image",
        pipeline_class="QwenImagePipeline",
        transformer_class="QwenImageTransformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "guidance_embeds": False,
            "axes_dims_rope": (16, 56, 56),
        },
        scheduler=_qwen_scheduler(),
        source=_hub("Qwen/Qwen-Image"),
        default_steps=50,
    ),
    "Qwen/Qwen-Image-2.1": Checkpoint(
        family="qwen-image-2.1",
        pipeline_class="QwenImage21Pipeline",
        transformer_class="QwenImage21Transformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "patch_size": 1,
            "in_channels": 64,
            "out_channels": 64,
            "num_layers": 32,
            "attention_head_dim": 128,
            "num_attention_heads": 32,
            "context_in_dim": 4096,
            "mlp_ratio": 3,
            "axes_dims_rope": (16, 56, 56),
            "eps": 1e-6,
            "causal_condition": True,
        },
        scheduler=_qwen_scheduler(),
        source=_hub("Qwen/Qwen-Image-2.1"),
        default_steps=40,
        unverified=("default_steps",),
    ),
    "Tongyi-MAI/Z-Image": _z_image("Tongyi-MAI/Z-Image", shift=6.0, steps=50),
    "Tongyi-MAI/Z-Image-Turbo": _z_image("Tongyi-MAI/Z-Image-Turbo", shift=3.0, steps=9),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", family="wan2.1", heads=12, layers=30, ffn=8960, flow_shift=3.0
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        family="wan2.1",
        heads=40,
        layers=40,
        ffn=13824,
        flow_shift=3.0,
        unverified=("flow_shift",),
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        family="wan2.2",
        heads=40,
        layers=40,
        ffn=13824,
        flow_shift=3.0,
        pipeline={"boundary_ratio": 0.875},
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _wan(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        family="wan2.2-5b",
        heads=24,
        layers=30,
        ffn=14336,
        flow_shift=5.0,
        channels=48,
        pipeline={"expand_timesteps": True},
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        28,
    ),
    "stabilityai/stable-diffusion-3.5-large": _sd3(
        "stabilityai/stable-diffusion-3.5-large",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        28,
    ),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(
        "stabilityai/stable-diffusion-3.5-medium",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        40,
    ),
}
"""By hub name. The scheduler is the checkpoint's own: Wan's published splits are for flow shift 5."""
