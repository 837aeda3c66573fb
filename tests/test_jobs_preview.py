"""`overtone plan`: what a job would do, before it does it, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from small_jobs import commit_part, model_folder, prompt_table, small_job, small_part

from overtone.cluster.cli import main
from overtone.jobs.errors import FingerprintMismatch, PromptsError, SizeError, SpecError, UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.media import encode_media
from overtone.jobs.plan import make_plan
from overtone.jobs.preview import notes_on_negatives, preview
from overtone.jobs.sampling import check_model, notes_on
from overtone.jobs.spec import JobSpec, load_spec
from overtone.jobs.store import open_store

ROOT = Path(__file__).parents[1]
FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.fixture
def prompts(tmp_path):
    pq.write_table(pa.table({"prompt": ["a red circle"] * 10}), tmp_path / "prompts.parquet")
    return tmp_path / "prompts.parquet"


def job(prompts: Path, model: str = FLUX, **sampling) -> JobSpec:
    return JobSpec(
        model=model, prompts=str(prompts), output=str(prompts.parent / "out"), shards=4, sampling=sampling
    )


def table(folder: Path, **columns) -> JobSpec:
    pq.write_table(pa.table(columns), folder / "prompts.parquet")
    return job(folder / "prompts.parquet", "tiny")


def test_stages_and_saving(prompts):
    shown = preview(job(prompts, levels=1, delta=0.05, num_steps=50)).as_dict()
    assert (shown["rows"], shown["shards"], shown["files"]) == (10, 3, 1)
    stages = shown["sampling"]["stages"]
    assert [(stage["height"], stage["width"]) for stage in stages] == [(64, 64), (128, 128)]
    assert sum(stage["steps"] for stage in stages) == 50
    coarse, fine = stages
    token_steps = coarse["steps"] * 32 * 32 + fine["steps"] * 64 * 64
    assert shown["job_token_steps"] == 10 * token_steps
    assert shown["sampling"]["token_saving"] == pytest.approx(50 * 64 * 64 / token_steps)
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
    assert f"predicted speed-up {data['sampling']['saving']:.2f}x" in text
    assert "(by FLOPs, 512 tokens of text included)" in text
    for stage in data["sampling"]["stages"]:
        assert f"{stage['height']}x{stage['width']}" in text
        assert f"{stage['sigma_start']:.4f}" in text


def test_sizes_are_height_by_width_as_grids_are(prompts):
    text = preview(job(prompts, height=512, width=1024)).text()
    assert "512x1024 px (height x width)" in text
    assert " 64x128 " in text


def test_guidance_within_an_interval(prompts):
    """Said where guidance is, with its steps, and counted in the cost."""
    guided = {"mode": "fullres", "num_steps": 10, "true_cfg_scale": 3.0}
    made = preview(job(prompts, guidance_interval=(0.2, 0.95), **guided))
    text, data = made.text(), made.as_dict()
    steps = data["sampling"]["guided_steps"]
    assert 0 < steps < 10
    assert f"only at steps from noise levels 0.2 to 0.95 ({steps} of 10), one pass at the others" in text
    assert data["guidance"]["interval"] == [0.2, 0.95]
    assert data["sampling"]["cost"] == pytest.approx(steps + (10 - steps) / 2)
    assert json.loads(json.dumps(data)) == data
    plain = preview(job(prompts, **guided))
    assert "noise levels" not in plain.text()
    assert plain.as_dict()["guidance"]["interval"] is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda p: job(p, guidance_interval=(0.2, 0.9)),
            SpecError,
            r"^sampling\.guidance_interval: flux1 has no second pass to leave out",
        ),
        (lambda p: job(p, height=500, width=512), SizeError, "sampling: "),
        (
            lambda p: job(p, "tiny", cache="magcache"),
            SpecError,
            r"^sampling\.cache: magcache has no measured ratios for tiny; give `cache_ratios`",
        ),
        (
            lambda p: job(p, cache="seacache"),
            SpecError,
            r"^sampling\.cache: seacache runs with WanPipeline alone, and .* is a FluxPipeline",
        ),
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
    spec = job(prompts, model_folder(prompts.parent / "model", *model), **sampling)
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
    spec = job(prompts, model_folder(prompts.parent / "model", "FluxPipeline", use_karras_sigmas=True))
    assert "use_karras_sigmas" in preview(spec).text()
    check_model(spec)


def test_sana_counts_cells_of_32_px(prompts):
    model = model_folder(
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
        ("Tongyi-MAI/Z-Image", {}, "always", "guidance_scale 5 runs a negative prompt (the pipeline"),
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
    [few] = preview(job(prompts, klein, num_steps=4)).notes
    assert "num_steps is 4, and the full grid gets one of them: with fewer than 10 steps" in few
    assert "set sampling.mode: fullres, or sampling.num_steps: 10 or more" in few
    assert f"note        {few}" in preview(job(prompts, klein, num_steps=4)).text()
    [also] = preview(job(prompts, klein, num_steps=9, delta=0.02)).notes
    assert "num_steps is 9: with fewer than 10 steps" in also
    [one] = preview(job(prompts, klein, num_steps=10, delta=0.5)).notes
    assert "the full grid gets one step of 10, from noise level" in one
    better = float(one.partition("set sampling.delta: ")[2].partition(",")[0])
    for fine in ({"num_steps": 10, "delta": better}, {"num_steps": 30}, {"num_steps": 4, "mode": "fullres"}):
        assert not preview(job(prompts, klein, **fine)).notes  # what one note says, no other takes back
    assert notes_on(job(prompts, klein, num_steps=4)) == [few]  # what `run` says
    assert notes_on(job(prompts, "nobody/nothing")) == []


def test_negative_prompts_that_nothing_runs_are_told(tmp_path):
    idle = table(tmp_path, prompt=["a red circle"], negative_prompt=["blur"])
    (note,) = preview(idle).notes
    assert "negative prompts have no effect" in note
    assert "set sampling.true_cfg_scale above 1" in note
    assert f"note        {note}" in preview(idle).text()
    guided = job(tmp_path / "prompts.parquet", "tiny", true_cfg_scale=3)
    columns = {"path": str(tmp_path / "prompts.parquet"), "columns": {"negative_prompt": None}}
    elsewhere = JobSpec(model="tiny", prompts=columns, output=str(tmp_path / "out"))
    hub = job(tmp_path / "prompts.parquet", "black-forest-labs/FLUX.2-dev")
    assert "it never does; let the column" in preview(hub).notes[-1]
    for spec in (guided, elsewhere, table(tmp_path, prompt=["a red circle"])):
        assert preview(spec).notes == ()
    assert notes_on_negatives(job(tmp_path / "prompts.parquet", "nobody/nothing"), make_plan(idle)) == []


def test_a_size_whose_schedule_overflows_is_refused_and_such_a_row_rejected(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", "b"], "height": [65536, None]}), tmp_path / "prompts.parquet")
    huge = job(tmp_path / "prompts.parquet", "tiny", height=65536, width=65536)
    with pytest.raises(SizeError, match="so large that the schedule's shift by its size overflows"):
        preview(huge)
    found = preview(job(tmp_path / "prompts.parquet", "tiny", width=65536), check=True).rows
    assert (found.samples, found.rejects) == (1, 1)


def test_a_preset_as_it_is_needs_no_other_steps(tmp_path):
    """Its source says what they are worth, measured; the spec's own number is warned of as ever."""
    pq.write_table(pa.table({"prompt": ["a red circle"]}), tmp_path / "prompts.parquet")
    (tmp_path / "job.yaml").write_text(
        "model: tiny\nprompts: prompts.parquet\noutput: out\nsampling: {preset: fast, true_cfg_scale: 3}\n"
    )
    shown = preview(load_spec(tmp_path / "job.yaml"))
    assert shown.sampling.num_steps < 9
    assert shown.notes == ()
    assert "this job" not in shown.preset_source
    assert "num_steps is 5" in preview(load_spec(tmp_path / "job.yaml", ["sampling.num_steps=5"])).notes[0]
    for scale, said in ((1, "this job runs none"), (2, "this job is at 2")):
        other = preview(load_spec(tmp_path / "job.yaml", [f"sampling.true_cfg_scale={scale}"]))
        assert f"; {said}, and how good its pictures are was not measured" in other.preset_source


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
    model_folder(cache / "snapshots" / "abc", "FluxPipeline")
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


# What it needs, and what is in its place


def test_it_tells_memory_disk_place_and_where_time_and_cost_are_told(prompts):
    text, data = (made(preview(job(prompts))) for made in (lambda p: p.text(), lambda p: p.as_dict()))
    needs = data["needs"]
    assert needs["weights_gib"] == pytest.approx(16.9 * 2e9 / 2**30)
    raw = 10 * 1024 * 1024 * 3
    assert raw / 6 < needs["size_bytes"] < raw
    assert needs["output"] == str(prompts.parent / "out")
    assert needs["state"] == "new"
    for shown in (
        "31.5 GiB",
        "MB as png",
        " free)",
        needs["output"],
        "overtone estimate",
        "plan SPEC --check",
    ):
        assert shown in text
    assert not (prompts.parent / "out").exists()


def test_an_output_that_will_not_fit_is_said_so(prompts):
    wan = preview(job(prompts, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")).needs
    assert wan.encoded == "mp4"
    assert not wan.too_large
    assert replace(wan, free_bytes=10).too_large
    assert "WILL NOT FIT" in "\n".join(replace(wan, free_bytes=10).lines())


def test_the_size_on_disk_is_that_of_photographs(prompts, tmp_path):
    """Noise is larger than any photograph, and a smooth picture smaller."""
    spec = job(prompts, height=256, width=256)
    foretold = preview(spec).needs.size_bytes / 10
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    smooth = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 256, 3))
    large, small = (len(encode_media(Image.fromarray(p), spec.output)) for p in (noise, smooth.copy()))
    assert small < foretold < large


@pytest.mark.parametrize(
    ("model", "spectrum", "said"),
    [(FLUX, None, False), ("Qwen/Qwen-Image", None, True), ("Qwen/Qwen-Image", (2.0, 1.0), False)],
)
def test_a_stand_in_spectrum_is_told(prompts, model, spectrum, said):
    shown = preview(job(prompts, model, **({"spectrum": spectrum} if spectrum else {})))
    assert shown.as_dict()["stand_in_spectrum"] is said
    assert ("stand-in" in shown.text()) is said


def test_an_output_that_run_refuses_is_refused(prompts):
    (prompts.parent / "out").write_text("a file")
    with pytest.raises(UserError, match=r"output\.path: .*/out is a file"):
        preview(job(prompts))
    missing = JobSpec.model_validate(
        job(prompts).model_dump() | {"model": {"id": FLUX, "loras": [{"id": "/no/adapter.safetensors"}]}}
    )
    with pytest.raises(SpecError, match=r"there is no file or folder /no/adapter\.safetensors"):
        preview(missing)


def test_a_job_that_is_there_goes_on_and_another_is_refused(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(5), shard_rows=2)
    spec = spec.model_copy(update={"sampling": spec.sampling.model_copy(update={"height": 32, "width": 32})})
    plan, store = make_plan(spec), open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    other = spec.model_copy(update={"seed": 9})
    assert "has made nothing yet" in preview(other).text()
    commit_part(store, small_part(spec, plan, 1))
    assert "holds this job, 1 of 3 shards done; run goes on" in preview(spec).text()
    with pytest.raises(FingerprintMismatch, match="seed was 0, now 9"):
        preview(other)


def test_two_rows_of_one_name_are_refused_as_run_refuses_them(tmp_path):
    spec = table(tmp_path, prompt=["a", "b", "c"], row_id=["x", "y", "x"])
    for check in (False, True):
        with pytest.raises(PromptsError, match="row_id 'x' is there twice"):
            preview(spec, check=check)


def test_check_reads_the_rows(tmp_path):
    spec = table(
        tmp_path,
        row_id=list("abcdefg"),
        prompt=["p", None, "p", "p", "p", "p", None],
        height=pa.array([256, 256, None, 512, 256, 250, 256]),
        width=pa.array([256, 256, None, 256, 256, 256, 256]),
        num_images=pa.array([1, 1, 1, 1, 3, 2, 1]),
        heavy=[b"x" * 1000] * 7,
    )
    unread = preview(spec)
    assert unread.rows is None
    for unknown in ("rejected", "sizes", "how many rows"):
        assert unknown in unread.text().splitlines()[-1]
    shown = preview(spec, check=True)
    data = json.loads(json.dumps(shown.as_dict()))["rows_checked"]
    assert (data["samples"], data["rejects"], data["stops_early"]) == (6, 4, False)
    assert [(s["height"], s["width"], s["samples"]) for s in data["sizes"]] == [(256, 256, 5), (512, 256, 1)]
    assert sorted((r["rejects"], r["row_id"]) for r in data["reasons"]) == [(2, "b"), (2, "f#0")]
    per_size = [preview(table(tmp_path, prompt=["p"])).sampling.token_steps, data["token_steps"]]
    assert 5 * per_size[0] < per_size[1] == shown.as_dict()["job_token_steps"]
    text = shown.text()
    for part in ("6 rows to make, 4 rejects", "512x256 px", "prompt is null (b, for one)", "250x256"):
        assert part in text
    assert not (tmp_path / "out").exists()  # what the store was tried with is gone again


def test_too_many_rejects_are_foretold(tmp_path):
    shown = preview(table(tmp_path, prompt=["p", None, None]), check=True)
    assert "THE JOB WOULD END EARLY" in shown.text()


def test_reasons_that_differ_in_their_values_are_one(tmp_path):
    sizes = pa.array([-k for k in range(50)])
    spec = table(tmp_path, prompt=["p"] * 50, height=sizes)
    [reason] = preview(spec, check=True).rows.reasons
    assert (reason.count, reason.row_id) == (50, "prompts:0")
