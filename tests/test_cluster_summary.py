"""The end of a run: what is only about the rows that were made never changes how their job ended."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from crashing_store import CrashingStore
from PIL import Image
from small_jobs import finish, prompt_table, small_job

from overtone.cluster.dispatch import ShardCommitted
from overtone.cluster.driver import run_job
from overtone.cluster.driver.summary import SHEET, Ending, conclude
from overtone.cluster.driver.tally import Tally
from overtone.jobs.errors import JobError, StoreError
from overtone.jobs.folder import JobFolder
from overtone.jobs.report import CARD, contact_sheet
from overtone.jobs.shard_set import ShardSet
from overtone.jobs.store import open_store
from overtone.jobs.words import duration

ODD = ["next\x85line", "a\u2028b", "\u202eright to left", "bell \x07", "nothing\ufffe", "no\ud7ffsign"]
"""Prompts with characters that layout engines refuse or never saw."""


def finished(folder: Path, prompts: list[str]):
    spec, plan = small_job(folder, prompt_table(len(prompts), prompt=prompts))
    job = JobFolder(open_store(spec.output.path))
    job.open(spec, plan)
    finish(job.store, spec, plan)
    return spec, plan, job


def end(spec, plan, job):
    return conclude(spec, plan, plan, job, Tally(plan, job.finished()), Ending(), 0.0)


def test_any_prompt_can_be_a_caption(tmp_path):
    spec, plan, job = finished(tmp_path, ODD)
    summary = end(spec, plan, job)
    assert (summary.exit_code, summary.notes) == (0, ())
    assert Image.open(tmp_path / "out" / SHEET).format == "PNG"


@pytest.mark.parametrize("size", [(4000, 3), (3, 400)])
def test_a_picture_of_any_shape_has_a_place_on_the_sheet(size):
    sheet = Image.open(io.BytesIO(contact_sheet([("long", Image.new("RGB", size))])))
    assert sheet.width > 0


def test_a_card_and_a_sheet_that_cannot_be_written_are_notes(tmp_path):
    spec, plan, job = finished(tmp_path, ["one", "two"])
    for name in (CARD, SHEET):
        (tmp_path / "out" / name / "in the way").mkdir(parents=True)
    summary = end(spec, plan, job)
    assert (summary.exit_code, summary.shards_done) == (0, plan.num_shards)
    card, sheet = summary.notes
    assert card.startswith(f"{CARD} is not written, `overtone card` tries again: ")
    assert sheet.startswith(f"{SHEET} is not written, `overtone sheet` tries again: ")
    again = run_job(spec)  # finds every part there, and tries the card once more
    assert (again.exit_code, again.nothing_to_do) == (0, True)
    assert again.notes[0].startswith(f"{CARD} is not written")


class AwayStore(CrashingStore):
    """Nobody answers any more."""

    def _do(self, name, key, operation):
        self.operations.append(name)
        raise StoreError("the store does not answer")


@pytest.mark.parametrize("ended", [None, JobError("stopped")])
def test_a_store_that_is_away_at_the_end_is_asked_once_and_costs_no_number(tmp_path, ended):
    spec, plan, job = finished(tmp_path, ["one", "two", "three", "four", "five"])
    away = AwayStore(job.store)
    tally = Tally(plan, ShardSet(plan.num_shards))
    for shard in range(2):
        tally.record(ShardCommitted(0, shard, 1, rows=plan.rows_of(shard), rejects=0))
    summary = conclude(spec, plan, plan, JobFolder(away), tally, Ending(error=ended), 0.0)
    assert (summary.exit_code, summary.rows, summary.shards_done) == (3, 5, 2)
    told = "the end of the job could not be seen to: the store does not answer"
    assert told in (summary.notes if ended else (str(summary.error),))
    assert f"5 rows in {duration(summary.seconds)}" in summary.text()
    assert "2 of 2 shards done" in summary.text()
    assert len(away.operations) == 1


def test_a_broken_picture_costs_the_sheet_alone(tmp_path):
    spec, plan, job = finished(tmp_path, ["one", "two"])
    [part] = (tmp_path / "out" / "data").iterdir()
    part.write_bytes(part.read_bytes()[:-20])
    summary = end(spec, plan, job)
    assert summary.exit_code == 0
    assert len(summary.notes) == 2
