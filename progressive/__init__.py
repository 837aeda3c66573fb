"""Spectral progressive generation for any flow-matching diffusers pipeline.

    from overtone import progressive
    result = progressive.generate(pipe, prompts, height=1024, width=1024, num_steps=50, delta=0.05, seeds=[7])
    result.images, result.latents, result.stages

Importing this package loads neither torch nor diffusers; the first call does.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Sampling": "overtone.progressive.settings",
    "generate": "overtone.progressive.engine",
    "Engine": "overtone.progressive.engine",
    "Result": "overtone.progressive.engine",
    "Pictures": "overtone.progressive.pictures",
    "NonFiniteLatents": "overtone.progressive.errors",
    "NonFinitePixels": "overtone.progressive.errors",
    "calibrate": "overtone.progressive.calibration",
    "measure_consistency": "overtone.progressive.consistency",
    "load": "overtone.progressive.pipelines",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
