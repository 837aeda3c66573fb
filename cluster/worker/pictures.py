"""TODO: cluster/worker/pictures.py."""

from __future__ import annotations

from typing import Any

import numpy as np

ENCODERS = 4
"""Threads that encode pictures, at most."""


def arrays(latents: Any) -> list[np.ndarray | None]:
    """Each row's latents, [C, H, W] or [C, T, H, W], as float32 on the CPU."""
    if hasattr(latents, "detach"):
        latents = latents.detach().float().cpu().numpy()
    return list(np.asarray(latents, np.float32))
