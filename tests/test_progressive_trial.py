"""A class that no entry names is tried when it is loaded: what cannot run in stages is refused in a sentence,
and rows that change each other go alone."""

from __future__ import annotations

import copy
from functools import cache, wraps
from typing import Any

import pytest
import tiny_pipes
import torch
from diffusers import (
    ChromaPipeline,
    Flux2KleinPipeline,
    FluxControlPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)

from overtone.progressive import layouts, noise
from overtone.progressive.engine import Engine
from overtone.progressive.settings import Sampling

pytestmark = pytest.mark.filterwarnings("ignore:.*is not a family known here")

PROMPTS = ["a", *tiny_pipes.PROMPTS]
SEEDS = [3, 4, 5]


@cache
def chroma() -> Any:
    return tiny_pipes.chroma()


def as_class(pipe: Any, kind: type) -> Any:
    pipe = copy.copy(pipe)
    pipe.__class__ = kind
    return pipe


class PadsAndMasksNothing(ChromaPipeline):
    """As many do: the longest prompt of the batch says how long all are, and padding is attended to."""

    def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        found = list(super().encode_prompt(prompt, *args, **kwargs))
        longest = max(len(text.split()) for text in ([prompt] if isinstance(prompt, str) else prompt)) + 1
        found[0], found[2] = found[0][:, :longest], torch.ones_like(found[2][:, :longest])
        found[1] = found[1][:longest]
        return tuple(found)


@cache
def engine_of_padded_rows() -> Engine:
    return Engine(as_class(chroma(), PadsAndMasksNothing), "generic")


def settings(**fields: Any) -> Sampling:
    return Sampling(height=64, width=64, num_steps=4, guidance_scale=1.0, **fields)


def test_rows_that_change_each_other_go_alone():
    """Against the pipeline's own call for each prompt alone, bit for bit."""
    engine, sampling = engine_of_padded_rows(), settings(mode="fullres")
    assert engine.row_by_row(sampling)
    plan, encoded = engine.plan(sampling), engine.encode(PROMPTS, [None] * 3, sampling)
    latents, reports = engine.denoise(plan, encoded, SEEDS, sampling)
    assert [report.rows for report in reports] == [1, 1, 1]

    def own(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        base = noise.batch_noise(seeds, noise.BASE, latents.shape[1:])
        return engine.pipe(
            prompt=prompts,
            height=64,
            width=64,
            num_inference_steps=4,
            guidance_scale=1.0,
            latents=layouts.pack(engine.family, base),
            output_type="latent",
        ).images

    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        assert torch.equal(layouts.pack(engine.family, latents[row : row + 1]), own([prompt], [seed]))
    together = layouts.unpack(engine.family, own(PROMPTS, SEEDS), 8, 8)
    assert (together[0] - latents[0]).abs().max() > 0.01  # what the neighbours would have done to the first


def test_rows_that_do_not_go_together():
    engine, sampling = Engine(chroma(), "generic"), settings()
    assert not engine.row_by_row(sampling)
    plan, encoded = engine.plan(sampling), engine.encode(PROMPTS, [None] * 3, sampling)
    _, reports = engine.denoise(plan, encoded, SEEDS, sampling)
    assert {report.rows for report in reports} == {3}


def test_rows_that_go_alone_stay_where_they_were_when_one_of_them_fails():
    """A row that went through a stage before the failure must not go through it again from there."""
    engine = engine_of_padded_rows()
    sampling = settings(transition_sigmas=(0.8,))
    plan, encoded = engine.plan(sampling), engine.encode(PROMPTS, [None] * 3, sampling)
    expected, _ = engine.denoise(plan, encoded, SEEDS, sampling)

    def full(done: int, total: int) -> None:
        if done == plan.stages[0].steps + 1:  # in the second row
            raise torch.OutOfMemoryError

    rows = engine.begin(plan, encoded, SEEDS, sampling)
    with pytest.raises(torch.OutOfMemoryError):
        rows.run(0, [0, 1, 2], on_step=full)
    for index in range(2):
        rows.run(index, [0])
        rows.run(index, [1, 2])
    assert torch.equal(rows.latents([0, 1, 2]), expected)


class HasAnotherNegative(ChromaPipeline):
    """As some do: a negative prompt of its own where none is given."""

    @wraps(ChromaPipeline.__call__)
    def __call__(self, *args: Any, negative_prompt: Any = None, **kwargs: Any) -> Any:
        if negative_prompt is None and kwargs.get("negative_prompt_embeds") is None:
            negative_prompt = "green"
        return super().__call__(*args, negative_prompt=negative_prompt, **kwargs)


class Further(Flux2KleinPipeline):
    """It is given a grid, and steps tokens."""


def test_a_class_derived_from_a_known_one_runs_as_that():
    pipe = tiny_pipes.flux2()
    assert Engine(as_class(pipe, Further)).family.name == "flux2"


class ScalesItsLatents(ChromaPipeline):
    """As Cosmos does, by its own largest sigma."""

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        latents, ids = super().prepare_latents(*args, **kwargs)
        return latents * 80, ids


class TakesAnotherSize(FluxPipeline):
    """As Kontext does: the nearest of its own sizes. Derived from a class that is known."""

    @wraps(FluxPipeline.__call__)
    def __call__(self, *args: Any, height: int = 0, width: int = 0, **kwargs: Any) -> Any:
        return super().__call__(*args, height=256, width=256, **kwargs)


class DrawsLatents(ChromaPipeline):
    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        return super().prepare_latents(*args[:-1], None, **kwargs)


class RemembersItsSteps(ChromaPipeline):
    """It counts the steps of a call, and does something else at the first one."""

    @wraps(ChromaPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own, calls = self.transformer.forward, []

        def forward(*inputs: Any, **more: Any) -> Any:
            calls.append(1)
            return (own(*inputs, **more)[0] * (0 if len(calls) == 1 else 1),)

        self.transformer.forward = forward
        try:
            return super().__call__(*args, **kwargs)
        finally:
            del self.transformer.forward


def control() -> Any:
    optional = ("image_encoder", "feature_extractor")
    parts = tiny_pipes.flux1().components
    return FluxControlPipeline(**{name: part for name, part in parts.items() if name not in optional})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_class(chroma(), ScalesItsLatents), r"a standard deviation of \d\d"),
        (lambda: as_class(chroma(), DrawsLatents), "changes the latents that it is given"),
        (
            lambda: as_class(chroma(), HasAnotherNegative),
            "it runs one of its own, which is not known",
        ),
        (lambda: as_class(tiny_pipes.flux1(), TakesAnotherSize), r"noise of the shape \(1, 256, 16\)"),
        (lambda: as_class(chroma(), RemembersItsSteps), "two steps in two calls"),
        (control, "control_image"),
        (lambda: FluxKontextPipeline(**tiny_pipes.flux1().components), "image"),
    ],
)
def test_what_cannot_run_in_stages_is_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=f"cannot run in stages.*{message}") as caught:
        Engine(make())
    assert "\n" not in str(caught.value)
