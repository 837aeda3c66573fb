"""The engine on the model that really draws: what random weights cannot show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from overtone import progressive
from overtone.progressive import tiny
from overtone.progressive.engine import Engine
from overtone.progressive.noise import BASE, batch_noise
from overtone.progressive.pipelines import load
from overtone.progressive.quality import as_tensor, psnr
from overtone.progressive.settings import Sampling
from overtone.progressive.tiny import world

STEPS = 9
ROWS = 4
SAMPLING = {"num_steps": STEPS, "true_cfg_scale": 3.0}


@pytest.fixture(scope="module")
def pipe():
    return load("tiny")


@pytest.fixture(scope="module")
def prompts():
    return [world.caption(world.scene(seed)) for seed in world.held_out(ROWS)]


@pytest.fixture(scope="module")
def fullres(pipe, prompts):
    return progressive.generate(pipe, prompts, seeds=list(range(ROWS)), mode="fullres", **SAMPLING)


def test_fullres_is_the_pipeline_itself(pipe, prompts, fullres):
    noise = batch_noise(range(ROWS), BASE, (pipe.transformer.config.in_channels // 4, 32, 32))
    packed = pipe._pack_latents(noise, *noise.shape)
    with torch.no_grad():
        theirs = pipe(
            prompts,
            negative_prompt=[""] * ROWS,
            height=256,
            width=256,
            num_inference_steps=STEPS,
            true_cfg_scale=3.0,
            max_sequence_length=tiny.MAX_SEQUENCE_LENGTH,
            latents=packed,
            output_type="latent",
        ).images
    assert torch.equal(pipe._pack_latents(fullres.latents, *fullres.latents.shape), theirs)


def test_coupled_noise_is_closer_to_fullres_than_fresh(pipe, prompts, fullres, capsys):
    reference = as_tensor(fullres.images)
    found = {}
    for noise in ("coupled", "fresh"):
        made = progressive.generate(
            pipe,
            prompts,
            seeds=list(range(ROWS)),
            mode="dct_rewind",
            levels=1,
            delta=0.05,
            noise=noise,
            **SAMPLING,
        )
        found[noise] = float(psnr(as_tensor(made.images), reference).mean())
    with capsys.disabled():
        shown = ", ".join(f"{noise} noise {value:.2f} dB" for noise, value in found.items())
        print(f"\nPSNR to fullres, dct_rewind, one level, delta 0.05: {shown}")
    assert found["coupled"] > found["fresh"] + 0.5


def test_a_row_is_the_same_in_any_batch(pipe, prompts):
    engine, sampling = Engine(pipe), Sampling(scales="auto", min_scale=0.5, **SAMPLING)
    plan = engine.plan(sampling)
    encoded = engine.encode(prompts, [None] * ROWS, sampling)

    def pictures(size: int) -> np.ndarray:
        made = []
        for start in range(0, ROWS, size):
            rows = slice(start, start + size)
            latents, _ = engine.denoise(plan, encoded[rows], list(range(ROWS))[rows], sampling)
            made += engine.decode(plan, latents)
        return np.stack([np.asarray(picture, np.float32) for picture in made])

    # Of a batch of four, three in one and the last alone.
    assert np.abs(pictures(3) - pictures(ROWS)).mean() <= 1  # of 255
