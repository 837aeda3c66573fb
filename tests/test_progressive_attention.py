"""Ways to compute attention: diffusers' own, refused with the reason where one cannot be had."""

from __future__ import annotations

import importlib.util
from typing import get_args

import pytest
import tiny_pipes
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from overtone.jobs.errors import SpecError
from overtone.jobs.spec import JobSpec
from overtone.jobs.spec.fields import Attention
from overtone.progressive import library
from overtone.progressive.denoisers import set_attention
from overtone.progressive.engine import Engine
from overtone.progressive.graphs import GraphedEngine, Recorder
from overtone.progressive.pipelines import load
from overtone.progressive.settings import Sampling

CPU = torch.device("cpu")


def made(engine: Engine) -> torch.Tensor:
    sampling = Sampling(height=64, width=64, num_steps=3, mode="fullres")
    plan = engine.plan(sampling)
    encoded = engine.encode(tiny_pipes.PROMPTS[:1], [None], sampling)
    return engine.denoise(plan, encoded, [1], sampling)[0]


def test_the_names_are_diffusers_own():
    elsewhere = {"_native_npu", "_native_xla"}  # devices that nothing here runs on
    assert set(get_args(Attention)) == {name.value for name in AttentionBackendName} - elsewhere


def test_attention_is_computed_as_asked_for_and_elsewhere_as_ever():
    pipe = tiny_pipes.flux1()
    engine = GraphedEngine(pipe, capturer=Recorder())
    native = made(engine)
    before = library.attention_of_all()
    set_attention(pipe, "_native_math", CPU)
    math = made(engine)
    assert engine.graphs.counts.dropped == 1  # it was captured with the other one
    assert torch.allclose(math, native, atol=1e-4)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    assert {library.attention_of(block.attn.processor).value for block in blocks} == {"_native_math"}
    assert library.attention_of_all() == before


@pytest.mark.parametrize(
    ("family", "attention", "why"),
    [
        ("flux1", "_native_cudnn", "_native_cudnn cannot be used by the Flux.* in torch.float32 on cpu"),
        ("sd3", "native", "the SD3Transformer2DModel does not let it be chosen"),
        ("flux1", "flesh", "must be one of the following"),
        *(
            [("flux1", "xformers", "xformers cannot be used .* is not usable because of missing package")]
            if importlib.util.find_spec("xformers") is None
            else []
        ),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_first_row(family, attention, why):
    with pytest.raises(ValueError, match=why):
        set_attention(tiny_pipes.BUILDERS[family](), attention, CPU)


def test_load_and_the_spec_take_it():
    blocks = load("tiny", device="cpu", attention="_native_math").transformer.transformer_blocks
    assert library.attention_of(blocks[0].attn.processor).value == "_native_math"

    def spec(**model: str) -> JobSpec:
        keys = {"model": {"id": "tiny", **model}, "prompts": "p.csv", "output": "out"}
        return JobSpec.model_validate(keys)

    assert "attention" not in spec().samples()["model"]  # jobs that were begun before go on
    assert spec(attention="sage").samples()["model"]["attention"] == "sage"  # it changes pixels
    with pytest.raises((SpecError, ValueError), match="attention"):
        spec(attention="flesh")
