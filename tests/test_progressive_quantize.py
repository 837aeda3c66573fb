"""Low precision: what it changes, how little, and what cannot have it."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
import torch._inductor.config

from overtone.progressive.compile import CompiledEngine
from overtone.progressive.engine import Engine
from overtone.progressive.graphs import Recorder
from overtone.progressive.pipelines import load
from overtone.progressive.settings import Sampling

has_torchao = importlib.util.find_spec("torchao") is not None


@pytest.mark.skipif(not has_torchao, reason="needs overtone[quantize]")
def test_int8_is_close_to_full_precision_and_a_third_of_the_memory():
    sampling = Sampling(num_steps=4, delta=0.05)
    made, sizes = [], []
    for quantize in ("none", "int8"):
        engine = Engine(load("tiny", device="cpu", quantize=quantize))
        plan = engine.plan(sampling)
        encoded = engine.encode(["a large red circle"], [None], sampling)
        latents, _ = engine.denoise(plan, encoded, [7], sampling)
        made.append(latents)
        block = engine.pipe.transformer.transformer_blocks[0]
        sizes.append(sum(p.numel() * _bytes(p) for p in block.parameters()))
        linear = engine.pipe.transformer.x_embedder.weight
        assert linear.dtype == torch.float32  # around the blocks nothing changes
    full, low = made
    assert not torch.equal(full, low)
    assert float((full - low).norm() / full.norm()) < 0.05
    assert sizes[1] < 0.35 * sizes[0]  # float32 to int8, with scales and biases
    assert np.isfinite(low.numpy()).all()


@pytest.mark.skipif(not has_torchao, reason="needs overtone[quantize]")
def test_low_precision_leaves_the_rest_of_the_process_as_it_was():
    """Unless told not to, torchao switches inductor's tuning on for everything: minutes more of warm-up."""
    inductor = torch._inductor.config
    with inductor.patch(coordinate_descent_tuning=False):
        before = inductor.save_config_portable(), torch.get_float32_matmul_precision()
        load("tiny", device="cpu", quantize="int8")
        assert (inductor.save_config_portable(), torch.get_float32_matmul_precision()) == before


@pytest.mark.skipif(not has_torchao, reason="needs overtone[quantize]")
def test_int8_is_compiled_and_captured():
    pipe = load("tiny", device="cpu", quantize="int8")
    sampling = Sampling(height=64, width=64, num_steps=3, mode="fullres")

    def made(engine: Engine) -> torch.Tensor:
        encoded = engine.encode(["a large red circle"], [None], sampling)
        return engine.denoise(engine.plan(sampling), encoded, [7], sampling)[0]

    plain = made(Engine(pipe))
    engine = CompiledEngine(pipe, backend="eager", capturer=Recorder())
    (done,) = engine.warm(engine.plan(sampling), [(1,)], sampling)
    assert done.graphs == 3  # for six blocks of two kinds, as without
    assert done.captures == 1
    graphs = engine.graphs
    assert graphs is not None
    before = graphs.counts.replays
    assert torch.allclose(made(engine), plain, atol=1e-4)
    assert graphs.counts.replays == before + 3
    assert not graphs.refusals


def _bytes(parameter: torch.Tensor) -> int:
    return getattr(parameter, "qdata", parameter).element_size()


@pytest.mark.skipif(has_torchao, reason="torchao is there")
def test_without_torchao_the_error_says_what_to_install():
    with pytest.raises(ImportError, match=r"quantize: int8 needs torchao; install overtone\[quantize\]"):
        load("tiny", device="cpu", quantize="int8")


@pytest.mark.skipif(not has_torchao, reason="needs overtone[quantize]")
def test_fp8_where_no_device_can_says_so():
    with pytest.raises(
        ValueError, match=r"fp8 needs a GPU of compute capability 8\.9.*a CPU is not; use int8"
    ):
        load("tiny", device="cpu", quantize="fp8")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="quantize is 'int4'; the known ones are none, int8, fp8"):
        load("tiny", device="cpu", quantize="int4")
