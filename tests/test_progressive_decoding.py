"""Pixels that are no numbers are told, row by row, and never become a black or white picture."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import tiny_pipes
import torch

from overtone.progressive.engine import Engine
from overtone.progressive.errors import NonFinitePixels
from overtone.progressive.settings import Sampling

SIZES: dict[str, dict[str, Any]] = {
    "flux1": {"height": 64, "width": 96},
    "flux2": {"height": 64, "width": 96},
    "qwen-image": {"height": 64, "width": 96},
    "wan2.1": {"height": 64, "width": 96, "num_frames": 5},
}


def made(family: str) -> tuple[Engine, Any, torch.Tensor]:
    """An engine of the family, a plan, and three rows of latents on its full grid."""
    engine = Engine(tiny_pipes.BUILDERS[family]())
    plan = engine.plan(Sampling(num_steps=2, mode="fullres", **SIZES[family]))
    full = plan.stages[-1]
    frames = [full.frames] if family == "wan2.1" else []
    shape = (3, engine.channels, *frames, *full.grid)
    return engine, plan, torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("flux1", torch.float16), ("flux2", torch.float32), ("wan2.1", torch.float32)],
)
def test_a_row_that_overflows_the_vae_is_named_and_the_rows_beside_it_are_not(family, dtype):
    engine, plan, latents = made(family)
    engine.pipe.to(dtype)
    engine.pipe.vae.decoder.conv_in.weight.data.fill_(1.0)
    latents[1] = 0.9 * torch.finfo(dtype).max
    latents = latents.to(dtype)
    assert torch.isfinite(latents).all()
    with pytest.raises(NonFinitePixels, match=r"rows \[1\].*bfloat16.*float32") as caught:
        engine.decode(plan, latents)
    assert caught.value.rows == [1]
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.rows, str(again)) == ([1], str(caught.value))
    good = engine.decode(plan, latents[[0, 2]])
    assert all(np.asarray(picture).std() > 0 for picture in good)


@pytest.mark.parametrize(
    ("family", "value"),
    [
        ("flux1", float("nan")),
        ("flux1", float("inf")),
        ("qwen-image", -float("inf")),
        ("wan2.1", float("nan")),
    ],
)
def test_one_weight_that_is_no_number_is_told(family, value):
    """Infinity is clamped to white or black by the pipeline, and NaN in one channel leaves the others."""
    engine, plan, latents = made(family)
    last = engine.pipe.vae.decoder.conv_out
    last.bias.data[0] = value
    with pytest.raises(NonFinitePixels) as caught:
        engine.decode(plan, latents)
    assert caught.value.rows == [0, 1, 2]
    assert not last._forward_hooks
    assert not engine.pipe.vae.decoder._forward_hooks
