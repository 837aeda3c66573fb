"""`overtone plan`: what a job would do, before it does it, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from overtone.cluster.cli import main
from overtone.jobs.errors import PromptsError, SizeError, SpecError
from overtone.jobs.preview import preview
from overtone.jobs.sampling import check_model, notes_on
from overtone.jobs.spec import JobSpec

ROOT = Path(__file__).parents[1]
FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.fixture
def prompts(tmp_path):
    pq.write_table(pa.table({"prompt": ["a red circle"] * 10}), tmp_path / "prompts.parquet")
    return tmp_path / "prompts.parquet"


def job(prompts: Path, model: str = FLUX, **sampling) -> JobSpec:
    return JobSpec(model=model, prompts=str(prompts), output="/out", shards=4, sampling=sampling)


def test_stages_and_saving(prompts):
    shown = preview(job(prompts, levels=1, delta=0.05, num_steps=50)).as_dict()
    assert (shown["rows"], shown["shards"], shown["files"]) == (10, 3, 1)
    stages = shown["sampling"]["stages"]
    assert [(stage["height"], stage["width"]) for stage in stages] == [(64, 64), (128, 128)]
    assert sum(stage["steps"] for stage in stages) == 50
    coarse, fine = stages
    token_steps = coarse["steps"] * 32 * 32 + fine["steps"] * 64 * 64
    assert shown["job_token_steps"] == 10 * token_steps
    assert shown["sampling"]["saving"] == pytest.approx(50 * 64 * 64 / token_steps)
    assert json.loads(json.dumps(shown)) == shown


def test_fullres_saves_nothing(prompts):
    shown = preview(job(prompts, mode="fullres", height=512, width=768)).as_dict()
    (stage,) = shown["sampling"]["stages"]
    assert (stage["height"], stage["width"]) == (64, 96)
    assert shown["sampling"]["saving"] == 1


def test_text_says_the_same_as_the_data(prompts):
    made = preview(job(prompts, scales="auto", delta=0.1))
    text, data = made.text(), made.as_dict()
    assert "10 rows in 3 shards from 1 file" in text
    assert f"predicted saving {data['sampling']['saving']:.2f}x" in text
    for stage in data["sampling"]["stages"]:
        assert f"{stage['height']}x{stage['width']}" in text
        assert f"{stage['sigma_start']:.4f}" in text


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: job(p, height=500, width=512), SizeError, "sampling: "),
        (lambda p: job(p, model="nobody/nothing"), SpecError, r"model\.id: "),
        (lambda p: job(p.with_name("none.parquet")), PromptsError, "there is no file or folder"),
    ],
)
def test_what_cannot_be_made(prompts, make, error, message):
    with pytest.raises(error, match=message):
        preview(make(prompts))


def test_the_command(prompts):
    spec = prompts.with_name("job.yaml")
    spec.write_text(f"model: {FLUX}\nprompts: prompts.parquet\noutput: {prompts.parent}/out\n")
    shown = CliRunner().invoke(main, ["plan", str(spec), "--set", "sampling.delta=0.05", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.output)["sampling"]["delta"] == 0.05
    shown = CliRunner().invoke(main, ["plan", str(spec)])
    assert "10 rows in 1 shard " in shown.output
    assert not (prompts.parent / "out").exists()
    for args in (
        ["--set", "sampling.deltaa=1"],
        ["--set", "prompts=none.parquet"],
        ["--set", "sampling.height=7"],
    ):
        refused = CliRunner().invoke(main, ["plan", str(spec), *args])
        assert refused.exit_code == 2
        assert refused.output.startswith("overtone: ")
        assert refused.output.count("\n") == 1


def test_planning_loads_neither_torch_nor_ray(prompts):
    spec = prompts.with_name("job.yaml")
    spec.write_text(f"model: {FLUX}\nprompts: prompts.parquet\noutput: out\n")
    code = (
        "import sys; from overtone.jobs.spec import load_spec; from overtone.jobs.preview import preview; "
        f"print(preview(load_spec({str(spec)!r})).job.num_rows, "
        "[m for m in ('torch', 'diffusers', 'ray', 'boto3') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "10 []"


def folder(place: Path, pipeline: str, scheduler: str = "FlowMatchEulerDiscreteScheduler", **config) -> str:
    """A model's folder without weights."""
    files = {
        "model_index.json": {
            "_class_name": pipeline,
            "scheduler": ["diffusers", scheduler],
            "transformer": ["diffusers", "X"],
        },
        "scheduler/scheduler_config.json": {"shift": 3.0} | config,
        "transformer/config.json": {},
    }
    for name, value in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(json.dumps(value))
    return str(place)


FLOW = {"use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("model", "sampling", "why"),
    [
        (("SomeNewPipeline",), {"num_frames": 9}, "SomeNewPipeline runs on the generic entry"),
        (("FluxPipeline", "FlowMatchLCMScheduler"), {}, "scheduler is FlowMatchLCMScheduler"),
        (("FluxPipeline",), {"call_kwargs": {"sigmas": [1.0, 0.5]}}, "sets the schedule itself"),
    ],
)
def test_stages_that_only_the_loaded_model_knows_are_not_invented(prompts, model, sampling, why):
    spec = job(prompts, folder(prompts.parent / "model", *model), **sampling)
    made = preview(spec)
    assert (made.as_dict()["rows"], made.as_dict()["sampling"], made.as_dict()["job_token_steps"]) == (
        10,
        None,
        None,
    )
    assert why in made.text()
    assert "known once the model is loaded" in made.text()
    assert "saving" not in made.text()
    check_model(spec)  # and the job runs


def test_karras_sigmas_stop_no_job(prompts):
    spec = job(prompts, folder(prompts.parent / "model", "FluxPipeline", use_karras_sigmas=True))
    assert "use_karras_sigmas" in preview(spec).text()
    check_model(spec)


def test_sana_counts_cells_of_32_px(prompts):
    model = folder(
        prompts.parent / "model", "SanaPipeline", "DPMSolverMultistepScheduler", **FLOW, flow_shift=3
    )
    stages = preview(job(prompts, model)).sampling.stages
    assert [(s.steps, s.grid) for s in stages] == [(3, (16, 16)), (17, (32, 32))]


@pytest.mark.parametrize(
    ("model", "sampling", "runs", "words"),
    [
        (
            "Qwen/Qwen-Image",
            {},
            "given",
            "true_cfg_scale 4 runs a negative prompt where a row has one, at two",
        ),
        ("Qwen/Qwen-Image", {"true_cfg_scale": 4.0}, "always", "about twice the time of true_cfg_scale 1"),
        ("Tongyi-MAI/Z-Image", {}, "always", "guidance_scale 5 runs a negative prompt (the empty one"),
        ("Tongyi-MAI/Z-Image", {"guidance_scale": 0.0}, "never", "one pass of the transformer a step"),
        (FLUX, {}, "never", "no negative prompt runs"),
        ("black-forest-labs/FLUX.2-dev", {}, "never", "no negative prompt runs"),
        ("black-forest-labs/FLUX.2-klein-4B", {"num_steps": 30}, "never", "no negative prompt runs"),
        ("black-forest-labs/FLUX.2-klein-base-4B", {}, "always", "guidance_scale 4 runs a negative prompt"),
    ],
)
def test_whether_guidance_runs_and_what_it_costs(prompts, model, sampling, runs, words):
    made = preview(job(prompts, model, **sampling))
    assert made.as_dict()["guidance"]["runs"] == runs
    assert words in made.text()


def test_few_steps_are_warned_of_with_a_better_setting(prompts):
    klein = "black-forest-labs/FLUX.2-klein-4B"
    few, one = preview(job(prompts, klein, num_steps=4)).notes
    assert "num_steps is 4" in few
    assert "sampling.mode: fullres" in few
    assert "one step of 4, from noise level 0.87" in one
    assert "sampling.delta: 0.02" in one
    assert f"note: {one}" in preview(job(prompts, klein, num_steps=4)).text()
    better = preview(job(prompts, klein, num_steps=4, delta=0.02))
    assert better.sampling.stages[-1].steps > 1
    assert len(better.notes) == 1
    for fine in ({"num_steps": 30}, {"num_steps": 4, "mode": "fullres"}):
        assert not preview(job(prompts, klein, **fine)).notes
    assert notes_on(job(prompts, klein, num_steps=4)) == [few, one]  # what `run` says
    assert notes_on(job(prompts, "nobody/nothing")) == []


def test_a_fine_tune_of_the_hub_by_the_specs_family_or_its_cached_configuration(prompts):
    spec = job(prompts, "somebody/fine-tune")
    with pytest.raises(SpecError, match=r"set model.family, or load its files first"):
        preview(spec)
    check_model(spec)
    told = spec.model_copy(update={"model": spec.model.model_copy(update={"family": "flux1"})})
    made = preview(told)
    assert made.family == "flux1"
    assert "the configuration of somebody/fine-tune is not on this machine" in made.text()
    check_model(told)
    wrong = spec.model_copy(update={"model": spec.model.model_copy(update={"family": "flux9"})})
    with pytest.raises(SpecError, match=r"model\.family is 'flux9'; the known ones are flux1"):
        preview(wrong)


def test_a_model_in_the_hubs_cache_is_planned_from_its_own_configuration(prompts):
    """In a process of its own, for the hub's library reads where its cache is when it is imported."""
    cache = prompts.parent / "hub" / "models--somebody--fine-tune"
    folder(cache / "snapshots" / "abc", "FluxPipeline")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    spec = prompts.with_name("job.yaml")
    spec.write_text("model: somebody/fine-tune\nprompts: prompts.parquet\noutput: out\n")
    code = f"from overtone.cluster.cli import main; main(['plan', {str(spec)!r}, '--json'])"
    env = os.environ | {"HF_HUB_CACHE": str(prompts.parent / "hub")}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert shown.returncode == 0, shown.stderr
    data = json.loads(shown.stdout)
    assert (data["family"], data["sampling"]["num_steps"]) == ("flux1", 50)


def test_flow_shift_gives_the_published_split_of_wan(prompts):
    settings = {"height": 480, "width": 832, "num_steps": 50, "levels": 1, "delta": 0.05}
    wan = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    stages = preview(job(prompts, wan, flow_shift=5.0, **settings)).sampling.stages
    assert [stage.steps for stage in stages] == [33, 17]
    assert [s.steps for s in preview(job(prompts, wan, **settings)).sampling.stages] != [33, 17]
    with pytest.raises(SizeError, match="shifts its schedule by the size"):
        preview(job(prompts, flow_shift=5.0))
