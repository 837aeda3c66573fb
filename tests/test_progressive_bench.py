"""The benchmark builds every published model and times it; here at reduced widths, on the CPU."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map_only

from overtone.progressive import bench
from overtone.progressive.checkpoints import describe
from overtone.progressive.compile import compile_blocks
from overtone.progressive.engine import Engine

REAL = [name for name in bench.CASES if name != "tiny"]
REDUCED = {
    "flux1-dev": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    "flux2-klein-4b": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    "z-image": {
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": [4, 6, 6],
    },
    "qwen-image": {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    "wan2.1-1.3b": {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
    },
}
BILLIONS = {  # parameters of the published transformers
    "flux1-dev": 11.9,
    "flux2-klein-4b": 3.9,
    "z-image": 6.15,
    "qwen-image": 20.4,
    "wan2.1-1.3b": 1.42,
}


def reduced(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Engine, bench.Case]:
    """The case's real classes, narrow and shallow, at a small size."""
    case = bench.CASES[name]
    checkpoint = describe(case.model).with_scheduler(**case.scheduler)
    checkpoint = replace(checkpoint, transformer=checkpoint.transformer | REDUCED[name])
    frames = case.num_frames and 5
    case = replace(case, height_px=128, width_px=160, num_frames=frames, num_steps=5, text_tokens=8)
    return Engine(bench.build(checkpoint, "cpu", dtype)), case


@pytest.mark.parametrize("name", REAL)
def test_every_published_model_runs_its_settings(name):
    engine, case = reduced(name)
    settings = (case.settings[-1], bench.AUTO)
    measured = bench.measure(engine, name, case, settings=settings, repeats=1, batch_sizes=(2,))
    assert len(measured) == 1 + len(settings)
    full, *others = measured
    assert (full.setting, full.saving, full.ideal) == ("fullres", 1.0, 1.0)
    assert full.split.startswith("5 @ ")
    for one in others:
        assert one.ideal > 1
        assert " + " in one.split
        assert one.share_of_ideal == pytest.approx(one.saving / one.ideal)


@pytest.mark.parametrize("name", REAL)
def test_the_real_transformers_have_their_published_size(name):
    model = bench.empty_transformer(describe(bench.CASES[name].model))
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert billions == pytest.approx(BILLIONS[name], rel=0.02)


class OnMeta(torch.nn.Module):
    """A transformer of real size without weights: its inputs and outputs have shapes, and no values."""

    def __init__(self, model):
        super().__init__()
        object.__setattr__(self, "model", model.to("meta").eval())
        self.config, self.dtype, self.device = model.config, torch.bfloat16, torch.device("cpu")
        self.in_channels = model.config.in_channels

    def cache_context(self, *arguments, **named):
        return nullcontext()

    def forward(self, *arguments, **named):
        arguments, named = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (arguments, named))
        out = self.model(*arguments, **named)
        return tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=self.dtype), out)


@pytest.mark.parametrize(
    "name",
    [name if name == "flux1-dev" else pytest.param(name, marks=pytest.mark.chaos) for name in REAL],
)
def test_real_sizes_fit_together(name):
    """Published width, depth, grids and text lengths through the real pipeline; only numbers are left out."""
    case = bench.CASES[name]
    checkpoint = describe(case.model).with_scheduler(**case.scheduler)
    model = OnMeta(bench.empty_transformer(checkpoint).to(torch.bfloat16))
    pipe = bench.build(replace(checkpoint, transformer=checkpoint.transformer | REDUCED[name]), "cpu")
    pipe.register_modules(transformer=model)
    engine = Engine(pipe)
    sampling = case.sampling(**case.settings[-1])
    plan = engine.plan(sampling)
    assert plan.split == bench.expected(name, case)[-2][2]
    text = bench.random_text(engine, case.text_tokens, 1)
    latents, reports = engine.denoise(plan.one_step_each(), text, [0], sampling)
    grids = [(report.height, report.width) for report in reports if report.kind == "denoise"]
    assert grids == [stage.grid for stage in plan.stages]
    assert tuple(latents.shape[-2:]) == plan.stages[-1].grid


@pytest.mark.parametrize("name", REAL)
def test_published_splits_come_out_of_the_cases(name):
    """As in the method's own tables, from the schedule alone."""
    full, first, *_, auto = bench.expected(name, bench.CASES[name])
    assert full[3:] == (bench.CASES[name].num_steps, 1.0)
    assert auto[3] < full[3] / 1.25
    assert (
        first[2]
        == {
            "flux1-dev": "18 @ 64x64 + 32 @ 128x128",
            "flux2-klein-4b": "18 @ 32x32 + 12 @ 64x64",
            "z-image": "26 @ 64x64 + 24 @ 128x128",
            "qwen-image": "13 @ 64x64 + 17 @ 128x128",
            "wan2.1-1.3b": "23 @ 30x52 + 27 @ 60x104",
        }[name]
    )


def test_parts_that_checkpoints_keep_in_float32_stay_so():
    engine, _ = reduced("wan2.1-1.3b")
    transformer = engine.pipe.transformer
    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert not any(parameter.is_meta for parameter in transformer.parameters())


def test_the_same_seed_builds_the_same_model():
    a, b = (reduced("flux1-dev")[0].pipe.transformer.state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_warm_up_visits_every_grid_once():
    engine, case = reduced("flux1-dev")
    sampling = case.sampling(levels=2, delta=0.05)
    plan = engine.plan(sampling)
    text = bench.random_text(engine, 8, 1)
    _, reports = engine.denoise(plan.one_step_each(), text, [0], sampling)
    ran = [(report.height, report.width, report.steps) for report in reports if report.kind == "denoise"]
    assert ran == [(stage.height, stage.width, 1) for stage in plan.stages]
    assert len(ran) > 1


def test_compiled_blocks_give_the_same_latents_and_too_many_grids_are_an_error():
    engine, case = reduced("flux1-dev", torch.float32)
    sampling = case.sampling(levels=1, delta=0.05)
    plan = engine.plan(sampling)
    text = bench.random_text(engine, 8, 1)
    plain, _ = engine.denoise(plan, text, [3], sampling)
    before = torch._dynamo.config.recompile_limit
    try:
        compile_blocks(engine, "blocks", shapes=2, backend="eager")
        compiled, _ = engine.denoise(plan, text, [3], sampling)
        assert torch.allclose(compiled, plain, atol=1e-4)
        torch._dynamo.config.recompile_limit = 2  # both grids are in use
        more = replace(case, height_px=96).sampling(mode="fullres")
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            engine.denoise(engine.plan(more), text, [3], more)
    finally:
        torch._dynamo.config.recompile_limit = before
        torch._dynamo.config.fail_on_recompile_limit_hit = False
        torch._dynamo.reset()


def test_the_command_times_the_embedded_model(tmp_path, capsys):
    data, page = tmp_path / "bench.json", tmp_path / "bench.md"
    what = "--case tiny --device cpu --steps 4 --repeats 1 --batch-size 1 --batch-size 2".split()
    bench.main([*what, "--json", str(data), "--markdown", str(page)])
    written = json.loads(data.read_text())
    rows = written["measurements"]
    assert written["device"].startswith("CPU")
    assert [row["batch_size"] for row in rows] == [1] * 4 + [2] * 4
    assert all(row["seconds"] > 0 and row["memory_gib"] > 0 for row in rows)
    assert rows[4]["saving_over_plain"] == pytest.approx(2 * rows[0]["seconds"] / rows[4]["seconds"])
    assert len(page.read_text().splitlines()) == 2 + len(rows)
    assert "fullres" in capsys.readouterr().out


def test_the_ideal_of_every_model_needs_no_device(capsys):
    bench.main(["--case", "all", "--plan"])
    shown = capsys.readouterr().out
    assert "| 28 @ 64x64 + 22 @ 128x128" in shown
    assert "| 30.1            | 1.66x" in shown  # 28 steps of 0.289 full-size steps each, and 22
    assert len(shown.splitlines()) == 2 + sum(2 + len(bench.CASES[name].settings) for name in REAL)


def test_a_real_model_on_a_cpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--case", "tiny", "--case", "flux1-dev", "--device", "cpu"])
    assert "--case flux1-dev needs a GPU" in capsys.readouterr().err


def test_of_the_settings_only_those_that_a_pattern_names(tmp_path):
    data = tmp_path / "bench.json"
    what = "--case tiny --device cpu --steps 4 --repeats 1 --only *0.05".split()
    bench.main([*what, "--json", str(data)])
    settings = [row["setting"] for row in json.loads(data.read_text())["measurements"]]
    assert settings == ["fullres", "levels 1, delta 0.05", "scales auto, delta 0.05"]


def test_a_pattern_that_names_no_setting_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--case", "tiny", "--device", "cpu", "--only", "*0.07"])
    assert "--only *0.07 names none of tiny's settings: levels 1, delta 0.01; " in capsys.readouterr().err
