"""The noise schedule that a pipeline will run, from configurations alone. Knows no torch and no checkpoint.

`CALLS` is what each pipeline asks its scheduler for, `SCHEDULES` what each scheduler makes of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overtone.progressive.families import Family

Config = dict[str, Any]
Sigmas = NDArray[Any]


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


@dataclass(frozen=True)
class Asked:
    """One call of a pipeline, as far as its schedule depends on it."""

    scheduler: Mapping[str, Any]
    """Its scheduler's configuration."""
    pipeline: Mapping[str, Any]
    """Its own configuration."""
    num_steps: int
    height_px: int
    width_px: int
    tokens: int
    """Image tokens of one frame."""
    frames: int = 1
    """Latent frames."""
    transformer: Mapping[str, Any] = field(default_factory=dict)
    """The transformer's configuration."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """The other arguments of the call."""


class UnknownSchedule(ValueError):
    """The schedule is the pipeline's own and cannot be told from configurations: no mistake of anybody's."""


_Call = Callable[[Asked], tuple[Sigmas | None, float | None]]
"""What a pipeline passes to its scheduler's `set_timesteps`: sigmas (None: only the number) and mu."""


def image_tokens(family: Family, height_px: int, width_px: int) -> int:
    """Image tokens of one frame, as the pipelines count them for their resolution shift."""
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


def like_flux(asked: Asked) -> tuple[Sigmas | None, float | None]:
    """Evenly spaced levels and FLUX.1's resolution shift, as FLUX.1's pipeline and its many followers ask."""
    config = asked.scheduler
    sigmas = None if config.get("use_flow_sigmas") else _uniform(asked.num_steps)
    return sigmas, linear_mu(config, asked.tokens)


def _flux2(asked: Asked) -> tuple[Sigmas | None, float | None]:
    sigmas, _ = like_flux(asked)
    return sigmas, empirical_mu(asked.tokens, asked.num_steps)


def _qwen_image_21(asked: Asked) -> tuple[Sigmas | None, float | None]:
    own = asked.pipeline.get("sample_sigmas")
    if own is not None and len(own) != asked.num_steps:
        raise ValueError(f"num_steps is {asked.num_steps}; this checkpoint is made for {len(own)} steps")
    sigmas = _uniform(asked.num_steps) if own is None else np.asarray(own)
    return sigmas, linear_mu(asked.scheduler, asked.tokens)


def _number_alone(asked: Asked) -> tuple[Sigmas | None, float | None]:
    return None, None


def _stable_diffusion_3(asked: Asked) -> tuple[Sigmas | None, float | None]:
    config = asked.scheduler
    dynamic = config.get("use_dynamic_shifting")
    return None, linear_mu(config, asked.tokens, max_shift=1.16) if dynamic else None


def _ideogram_4(asked: Asked) -> tuple[Sigmas | None, float | None]:
    """Logit-normal quantiles whose mean grows with the picture; both ends clamped in log-SNR (18 and -15)."""
    mean = asked.call.get("mu", 0.0) + 0.5 * math.log(asked.height_px * asked.width_px / 512**2)
    share = np.arange(asked.num_steps, 0, -1) / asked.num_steps  # from pure noise down; 0 is appended later
    normal = [NormalDist().inv_cdf(s) if s < 1 else math.inf for s in share]
    sigmas = 1 / (1 + np.exp(-(mean + asked.call.get("std", 1.5) * np.array(normal))))
    return np.clip(sigmas, 1 - 1 / (1 + math.exp(-15 / 2)), 1 - 1 / (1 + math.exp(18 / 2))), None


def _lumina_2(asked: Asked) -> tuple[Sigmas | None, float | None]:
    """Its pipeline takes the channels of a latent for the number of its tokens."""
    return _uniform(asked.num_steps), linear_mu(asked.scheduler, asked.transformer.get("in_channels", 16))


def _cogview_4(asked: Asked) -> tuple[Sigmas | None, float | None]:
    config = asked.scheduler
    count = config.get("num_train_timesteps", 1000)
    sigmas = np.linspace(count, 1.0, asked.num_steps).astype(np.int64).astype(np.float32) / count
    ratio = math.sqrt(asked.tokens / config.get("base_image_seq_len", 256))
    return sigmas, ratio * config.get("max_shift", 0.75) + config.get("base_shift", 0.25)


def _krea_2(asked: Asked) -> tuple[Sigmas | None, float | None]:
    config = {"max_image_seq_len": 6400, **asked.scheduler}
    mu = 1.15 if asked.pipeline.get("is_distilled") else linear_mu(config, asked.tokens)
    return _uniform(asked.num_steps), mu


def _ltx(asked: Asked) -> tuple[Sigmas | None, float | None]:
    return _uniform(asked.num_steps), linear_mu(asked.scheduler, asked.tokens * asked.frames)


def _to_nothing(asked: Asked) -> tuple[Sigmas | None, float | None]:
    """Evenly spaced levels of which the one after the last would be 0."""
    return np.linspace(1.0, 0.0, asked.num_steps + 1)[:-1], None


CALLS: dict[str, _Call] = {
    "FluxPipeline": like_flux,
    "Flux2Pipeline": _flux2,
    "Flux2KleinPipeline": _flux2,
    "Flux2KleinKVPipeline": _flux2,
    "QwenImagePipeline": like_flux,
    "QwenImage21Pipeline": _qwen_image_21,
    "ZImagePipeline": like_flux,
    "WanPipeline": _number_alone,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "Ideogram4Pipeline": _ideogram_4,
    "ChromaPipeline": like_flux,
    "SanaPipeline": _number_alone,
    "Lumina2Pipeline": _lumina_2,
    "CogView4Pipeline": _cogview_4,
    "ErnieImagePipeline": _to_nothing,
    "Krea2Pipeline": _krea_2,
    "LongCatImagePipeline": like_flux,
    "SkyReelsV2Pipeline": _number_alone,
    "HunyuanVideoPipeline": _to_nothing,
    "LTXPipeline": _ltx,
    "AuraFlowPipeline": _number_alone,
    "BriaFiboPipeline": like_flux,
    "HunyuanVideo15Pipeline": _to_nothing,
    "Kandinsky5T2VPipeline": _number_alone,
}


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
    _check_flow("UniPC", config)
    if sigmas is None:
        sigmas = np.linspace(1, 1 / config.get("num_train_timesteps", 1000), num_steps + 1)[:-1]
    dynamic = config.get("use_dynamic_shifting", False)
    sigmas = _shifted(sigmas, _factor(config, mu) if dynamic else config.get("flow_shift", 1.0))
    ended = _end(config, sigmas)
    if abs(ended[0] - 1) < 1e-6:
        ended[0] = 1 - 1e-6  # as diffusers does, so that log(1 - sigma) stays finite
    return ended


def _dpm_solver(config: Config, num_steps: int, sigmas: Sigmas | None, mu: float | None) -> Sigmas:
    """`DPMSolverMultistepScheduler.sigmas` where `use_flow_sigmas` is on, float32 [num_steps + 1]."""
    _refuse(config, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    _check_flow("DPM-Solver", config)
    if config.get("use_dynamic_shifting"):
        raise UnknownSchedule("the scheduler shifts by resolution; its schedule is not known here")
    even = 1 - np.linspace(1, 1 / config.get("num_train_timesteps", 1000), num_steps + 1)
    return np.append(_shifted(even, config.get("flow_shift", 1.0))[:0:-1], 0).astype(np.float32)


SCHEDULES: dict[str, Callable[[Config, int, Sigmas | None, float | None], Sigmas]] = {
    "FlowMatchEulerDiscreteScheduler": _flow_match_euler,
    "UniPCMultistepScheduler": _unipc,
    "DPMSolverMultistepScheduler": _dpm_solver,
}


def _check_flow(scheduler: str, config: Config) -> None:
    if not config.get("use_flow_sigmas") or config.get("final_sigmas_type", "zero") != "zero":
        raise ValueError(
            f"this {scheduler} scheduler is not set up for flow matching (use_flow_sigmas, ending at zero)"
        )


def _refuse(config: Config, *switches: str) -> None:
    for switch in switches:
        if config.get(switch):
            raise UnknownSchedule(f"the scheduler has {switch} on; its schedule is not known here")


def _factor(config: Config, mu: float | None) -> float:
    if mu is None:
        raise ValueError(
            "the scheduler shifts by resolution (use_dynamic_shifting) but its pipeline does not"
        )
    try:
        return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
    except OverflowError:
        raise ValueError("the picture is so large that the schedule's shift by its size overflows") from None


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
