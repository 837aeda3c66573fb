"""The quickstart job as a user runs it, but shorter: the embedded model, two workers, real pictures."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from overtone.jobs.spec import load_spec
from overtone.jobs.verify import verify
from overtone.progressive.tiny import world

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "manifests" / "quickstart.yaml"
ROWS = 8


def overtone(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "overtone.cluster.cli", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(output folder, arguments of the command, what it did)."""
    output = tmp_path_factory.mktemp("quickstart") / "out"
    shorter = {"output.path": output, "prompts.limit": ROWS, "shards": 4, "sampling.num_steps": 8}
    arguments = [
        "run",
        SPEC,
        *[part for key, value in shorter.items() for part in ("--set", f"{key}={value}")],
    ]
    return output, arguments, overtone(*arguments)


def table(output: Path, kind: str) -> list[dict]:
    return [
        row for path in sorted((output / kind).glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def test_it_makes_every_picture(ran):
    output, _, done = ran
    assert done.returncode == 0, done.stderr
    rows = table(output, "data")
    assert [row["row_id"] for row in rows] == [f"scene-{k:02}" for k in range(ROWS)]
    for row in rows:
        picture = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert picture.size == (256, 256)
        assert len(picture.convert("RGB").getcolors(2**17) or range(2**17)) > 100  # no flat field
    assert verify(str(output)).ok


def test_it_says_where_the_pictures_are_and_what_to_look_at_next(ran):
    output, _, done = ran
    assert f"{output}/data/" in done.stdout
    for command in ("status", "report", "verify"):
        assert f"overtone {command} {output}\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 200
    assert Image.open(output / "contact-sheet.png").format == "PNG"


def test_progress_is_plain_lines_without_a_terminal(ran):
    _, _, done = ran
    assert f"of {ROWS} rows" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert "raylet" not in done.stderr + done.stdout


def test_pictures_are_made_on_growing_grids(ran):
    output, _, _ = ran
    stages = table(output, "data")[0]["stages"]
    assert len(stages) >= 2
    assert [stage["height"] for stage in stages] == sorted(stage["height"] for stage in stages)
    assert (stages[-1]["height"], stages[-1]["width"]) == (32, 32)
    assert sum(stage["steps"] for stage in stages) == 8


def test_both_workers_took_part_and_their_time_is_accounted_for(ran):
    output, _, _ = ran
    lines = table(output, "timings")
    assert len({line["worker"] for line in lines}) == 2
    batches = defaultdict(list)
    for line in lines:
        if line["batch"] is not None:
            span = (line["start_s"], line["start_s"] + line["seconds"])
            batches[line["attempt"], line["batch"]].append(span)
    for spans in batches.values():
        covered, reached = 0.0, 0.0
        for begin, end in sorted(spans):
            covered += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        assert covered >= 0.95 * (reached - min(spans)[0])


def test_a_second_run_does_nothing_and_says_so(ran):
    output, arguments, _ = ran
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    again = overtone(*arguments)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}


def test_its_prompts_are_captions_that_the_model_was_never_trained_on():
    table = pq.read_table(ROOT / "manifests" / "quickstart.parquet").to_pylist()
    assert len(table) >= 32
    for row in table:
        assert row["scene"] in world.HELD_OUT_SEEDS
        assert row["prompt"] == world.caption(world.scene(row["scene"]))


def test_the_spec_as_it_is():
    spec = load_spec(SPEC)
    assert (spec.model.id, spec.workers.count) == ("tiny", 2)
