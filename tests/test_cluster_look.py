"""A few rows before the job: their pictures, their time, and no folder."""

from __future__ import annotations

import base64
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_pipes
from fake_engine import FakeEngine
from PIL import Image
from rich.console import Console
from small_jobs import prompt_table, small_job
from test_jobs_given import file_of, picture, spec_of

from overtone.cluster.measure import preview_rows, show_pictures
from overtone.jobs.errors import JobError, PromptsError, SpecError
from overtone.jobs.spec import JobSpec
from overtone.progressive.engine import Engine


def job(folder, rows: int, **sampling) -> JobSpec:
    prompts = [f"<b>picture</b> {k}" for k in range(rows)]
    spec, _ = small_job(folder, prompt_table(rows, prompt=prompts, seed=list(range(rows))))
    given = {"height": 64, "width": 64, "num_steps": 4, "levels": 1, "delta": 0.2} | sampling
    return JobSpec.model_validate(spec.model_dump() | {"sampling": given, "workers": {"batch_size": 2}})


def test_rows_are_those_that_the_job_would_make(tmp_path):
    spec, engine = job(tmp_path, 9), Engine(tiny_pipes.flux1())
    look = preview_rows(spec, 3, engine=engine, price=2.0)
    assert (look.samples, len(look.shown), look.batch_size, look.device) == (9, 3, 2, "CPU")
    for one in look.shown:
        encoded = engine.encode([one.row.prompt], [None], spec.sampling)
        latents, _ = engine.denoise(one.plan, encoded, [one.row.seed], spec.sampling)
        [alone] = engine.decode(one.plan, latents)
        apart = np.abs(np.asarray(one.still, float) - np.asarray(alone, float))
        assert apart.mean() < 1  # of 255
    assert [*look.phases] == ["text_encode", "denoise 4x4", "expand", "denoise 8x8", "vae_decode"]
    assert sum(look.phases.values()) == pytest.approx(look.seconds_per_row)
    hours = 9 * look.seconds_per_row / 3600
    assert "9 rows take " in look.cost_text
    assert f"{hours * 2:,.2f} at 2 a core-hour" in look.cost_text

    html = look.html()
    sources = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', html)
    assert [Image.open(io.BytesIO(base64.b64decode(s))).size for s in sources] == [(64, 64)] * 3
    assert "<b>picture</b>" not in html
    assert "&lt;b&gt;picture&lt;/b&gt; 0" in html
    assert not (tmp_path / "out").exists()


def test_a_video_is_shown_whole(tmp_path):
    spec = JobSpec.model_validate(
        job(tmp_path, 2).model_dump()
        | {"sampling": {"num_steps": 2, "num_frames": 5, "height": 64, "width": 64}}
    )
    look = preview_rows(spec, 2, engine=Engine(tiny_pipes.wan()))
    assert look.shown[0].media.shape == (5, 64, 64, 3)
    assert look.html().count('<video src="data:video/mp4;base64,') == 2
    assert look.shown[0].still.size == (64, 64)


def test_settings_that_the_loaded_model_refuses_are_a_mistake_of_the_spec(tmp_path):
    spec = job(tmp_path, 2, call_kwargs={"nope": 1})
    with pytest.raises(SpecError, match=r"`sampling` in the spec: FluxPipeline takes no argument nope"):
        preview_rows(spec, 2, engine=Engine(tiny_pipes.flux1()))


def test_rows_start_from_their_pictures_and_one_that_cannot_is_named(tmp_path):
    def pictured(*cells: bytes) -> JobSpec:
        table = prompt_table(len(cells), image=pa.array(cells, pa.binary()))
        pq.write_table(table, tmp_path / "prompts.parquet")
        return spec_of(tmp_path / "prompts.parquet", sampling={"num_steps": 4, "strength": 0.5})

    engine, file = FakeEngine(), file_of(picture(1, (96, 64)))
    look = preview_rows(pictured(file, file), 2, engine=engine)
    assert {one.image.size for one in engine.pictures} == {
        (one.plan.width_px, one.plan.height_px) for one in look.shown
    }
    assert len(look.shown) == 2
    with pytest.raises(PromptsError, match=r"^row .*row/1: its picture: it cannot be decoded"):
        preview_rows(pictured(file, file[:-200]), 2, engine=engine)


def test_ctrl_c_shows_what_there_is(tmp_path):
    class Impatient(FakeEngine):
        batches = 0

        def decode(self, plan, latents):
            self.batches += 1
            if self.batches > patience:
                raise KeyboardInterrupt
            return super().decode(plan, latents)

    spec, patience = job(tmp_path, 8), 3  # the first batch warms the size up
    assert len(preview_rows(spec, 8, engine=Impatient()).shown) == 4
    patience = 0
    with pytest.raises(JobError, match="before any row was made"):
        preview_rows(spec, 8, engine=Impatient())


def test_a_terminal_shows_pictures_and_a_pipe_does_not():
    quiet = io.StringIO()
    show_pictures(Console(file=quiet), [(Image.new("RGB", (8, 8)), "a")])
    assert quiet.getvalue() == ""
    code = (
        "from rich.console import Console; from PIL import Image;"
        "from overtone.cluster.measure import show_pictures;"
        "show_pictures(Console(), [(Image.new('RGB', (64, 64), (255, 0, 0)), 'a red square')])"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 80 * 8, 24 * 16))
    environ = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLUMNS": "80",
        "LINES": "24",
        "COLORTERM": "truecolor",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environ
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:
        pass  # the other end is closed
    assert process.wait(timeout=30) == 0, shown.decode()
    assert b"a red square" in shown
    assert b"255;0;0" in shown
