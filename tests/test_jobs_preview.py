"""`overtone plan`: what a job would do, before it does it, without torch."""

from __future__ import annotations

import json
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


def test_flow_shift_gives_the_published_split_of_wan(prompts):
    settings = {"height": 480, "width": 832, "num_steps": 50, "levels": 1, "delta": 0.05}
    wan = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    stages = preview(job(prompts, wan, flow_shift=5.0, **settings)).sampling.stages
    assert [stage.steps for stage in stages] == [33, 17]
    assert [s.steps for s in preview(job(prompts, wan, **settings)).sampling.stages] != [33, 17]
    with pytest.raises(SizeError, match="shifts its schedule by the size"):
        preview(job(prompts, flow_shift=5.0))
