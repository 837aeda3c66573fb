"""The models and settings that the benchmark knows. Knows no torch and measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from overtone.progressive.settings import Sampling


@dataclass(frozen=True)
class Case:
    """One published model at its published size."""

    model: str
    height_px: int
    width_px: int
    num_frames: int | None
    num_steps: int
    settings: tuple[dict[str, Any], ...]
    """The published settings of the method for this model."""
    text_tokens: int = 512
    """What the pipeline pads prompts to; 128, a long caption, where it does not pad."""
    call: dict[str, Any] = field(default_factory=dict)
    """Sampling settings. Guidance that doubles the forward passes is off: it changes no ratio."""
    guided: dict[str, Any] = field(default_factory=dict)
    """What switches it on, in place of what `call` says; empty: the model runs no negative prompt."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Where the published rows use another schedule than the checkpoint's."""

    def sampling(self, **setting: Any) -> Sampling:
        """The case's sampling with the fields of one setting, which come before its own."""
        own = {
            "num_steps": self.num_steps,
            "height": self.height_px,
            "width": self.width_px,
            "num_frames": self.num_frames,
        }
        return Sampling(**(own | self.call | setting))


def _levels(*pairs: tuple[int, float]) -> tuple[dict[str, Any], ...]:
    return tuple({"levels": levels, "delta": delta} for levels, delta in pairs)


CASES: dict[str, Case] = {
    "flux1-dev": Case(
        "black-forest-labs/FLUX.1-dev", 1024, 1024, None, 50, _levels((1, 0.01), (1, 0.05), (2, 0.01))
    ),
    "flux2-klein-4b": Case(
        "black-forest-labs/FLUX.2-klein-4B",
        1024,
        1024,
        None,
        30,
        _levels((1, 0.05), (1, 0.10)),
        call={"guidance_scale": 1.0},
    ),
    "z-image": Case(
        "Tongyi-MAI/Z-Image",
        1024,
        1024,
        None,
        50,
        _levels((1, 0.01), (1, 0.05), (1, 0.10)),
        text_tokens=128,
        call={"guidance_scale": 0.0},
        guided={"guidance_scale": 4.0},
    ),
    "qwen-image": Case(
        "Qwen/Qwen-Image",
        1024,
        1024,
        None,
        30,
        _levels((1, 0.05), (1, 0.10), (1, 0.20)),
        text_tokens=128,
        call={"true_cfg_scale": 1.0},
        guided={"true_cfg_scale": 4.0},
    ),
    "wan2.1-1.3b": Case(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        480,
        832,
        81,
        50,
        _levels((1, 0.01), (1, 0.02), (1, 0.05), (1, 0.10)),
        call={"guidance_scale": 1.0},
        guided={"guidance_scale": 5.0},
        scheduler={"flow_shift": 5.0},
    ),
    "tiny": Case(
        "tiny",
        256,
        256,
        None,
        30,
        _levels((1, 0.01), (1, 0.05)),
        text_tokens=32,
        call={"true_cfg_scale": 1.0},
        guided={"true_cfg_scale": 3.0},
    ),
}

AUTO: dict[str, Any] = {"scales": "auto", "delta": 0.05}
FULLRES: dict[str, Any] = {"mode": "fullres"}


def chosen_settings(case: Case, patterns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The case's settings and `AUTO`, or those of them whose names match."""
    every = [*case.settings, AUTO]
    if patterns is None:
        return every
    return [one for one in every if any(fnmatchcase(label(one), pattern) for pattern in patterns)]


def label(setting: dict[str, Any]) -> str:
    """A setting's name in tables and for `--only`: `levels 1, delta 0.05`."""
    if setting == FULLRES:
        return "fullres"
    return ", ".join(f"{key} {value}" for key, value in setting.items())
