"""A row is made again from its part alone, to the pixel; what is another row is named."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from overtone.cluster.cli import main
from overtone.cluster.dispatch import Assignment
from overtone.cluster.worker import Runner, load_engine, remake
from overtone.cluster.worker.remaking import TOLERANCE, Remade, spread
from overtone.jobs.columns import FOOTER_KEY
from overtone.jobs.folder import JobFolder
from overtone.jobs.parts import read_footer
from overtone.jobs.parts.footer import Footer
from overtone.jobs.plan import make_plan
from overtone.jobs.report import card, contents, report
from overtone.jobs.spec import JobSpec
from overtone.jobs.status import status
from overtone.jobs.store import open_store

LONG = "a large red circle left of a small blue square on grey " * 4
PROMPTS = ["a small red circle", "a large blue square on grey", LONG, "a green star", "two stars", "a square"]


@pytest.fixture(scope="module")
def engine():
    """Of this process, which all tests here share."""
    spec = JobSpec.model_validate({"model": "tiny", "prompts": "-", "output": "-", "workers": {"threads": 1}})
    return load_engine(spec)


@pytest.fixture(scope="module")
def made(tmp_path_factory, engine) -> Path:
    """A job whose rows have negative prompts, sizes and guidance of their own, in two parts."""
    folder = tmp_path_factory.mktemp("job")
    columns = {"row_id": [f"r{k}" for k in range(6)], "prompt": PROMPTS}
    columns |= {"negative_prompt": ["blue", None, "red", None, "grey", "a star"]}
    columns |= {"height": [64, 64, 64, 64, 96, 64]}
    pq.write_table(pa.table(columns), folder / "prompts.parquet")
    spec = JobSpec.model_validate(
        {
            "model": "tiny",
            "prompts": str(folder / "prompts.parquet"),
            "sampling": {"width": 64, "num_steps": 4, "true_cfg_scale": 2.0},
            "shards": 4,
            "workers": {"batch_size": 2, "threads": 1},
            "output": str(folder / "out"),
            "seed": 5,
        }
    )
    plan, store = make_plan(spec), open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    runner = Runner(spec, plan, store, engine)
    for index in range(plan.num_shards):
        list(runner.attempt(Assignment(index, 1, commit_first=True)))
    runner.close()
    return folder / "out"


@pytest.fixture
def output(made, tmp_path) -> Path:
    """A copy of the job's folder, to change."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def rewrite(path: Path, change_rows=lambda table: table, change_footer=lambda footer: footer) -> None:
    """A part with other rows or another footer."""
    file = pq.ParquetFile(path)
    table, footer = (
        change_rows(file.read()),
        change_footer(Footer.from_bytes(file.metadata.metadata[FOOTER_KEY])),
    )
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({FOOTER_KEY: footer.to_bytes()})


def first_part(output: Path) -> Path:
    return min((output / "data").iterdir())


def test_rows_are_made_again_from_the_data_alone(output, engine):
    """Not even the spec is there. Neighbours in a chunk change last bits, so they are made as well."""
    shutil.rmtree(output / "_job")
    shutil.rmtree(output / "timings")
    found = remake(open_store(str(output)), 6, lambda spec: engine)
    assert (found.same, found.close, found.wrong, found.skipped) == (6, 0, [], [])
    assert found.remarks() == ["made 6 rows again: 6 the same to the last bit of the picture"]


def test_the_rows_of_a_sample_are_spread_over_the_parts(made):
    store = open_store(str(made))

    def chosen(count: int) -> list[tuple[int, list[int]]]:
        return [(part.footer.shard, places) for part, places in spread(store, count, Remade())]

    assert chosen(100) == [(0, [0, 1, 2, 3]), (1, [0, 1])]
    assert chosen(3) == [(0, [1, 3]), (1, [1])]
    assert chosen(1) == [(1, [1])]  # fewer rows than parts: no more are opened than that


def test_what_a_row_was_made_from_is_in_the_row_and_the_footer(made):
    rows = [row for path in sorted((made / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [row["negative_prompt"] for row in rows] == ["blue", None, "red", None, "grey", "a star"]
    assert {(row["true_cfg_scale"], row["guidance_scale"]) for row in rows} == {(2.0, 3.5)}
    footer = read_footer(io.BytesIO(first_part(made).read_bytes()))
    assert footer.settings["sampling"]["true_cfg_scale"] == 2.0
    assert footer.settings["model"]["id"] == "tiny"
    assert footer.compute == {"threads": 1, "compile": "off", "offload": "none"}
    assert footer.device_name


def test_a_prompt_that_was_cut_is_marked_and_counted(made):
    rows = [row for path in sorted((made / "data").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [row["prompt_truncated"] for row in rows] == [False, False, True, False, False, False]
    shown = status(str(made))
    assert (shown.rows_truncated, shown.as_dict()["rows_truncated"]) == (1, 1)
    assert "prompts cut: of 1 row, whose end no text encoder read" in shown.text()
    assert "Prompts cut: of 1 row" in report(str(made))
    store = open_store(str(made))
    spec, plan = JobFolder(store).load()
    assert "prompts longer than the text encoders read, and cut | 1: see" in card(
        spec, plan, contents(store, plan)
    )


def swapped(table: pa.Table) -> pa.Table:
    return table.set_column(
        table.column_names.index("image"), "image", table["image"].take(pa.array([1, 0, 2, 3]))
    )


def test_another_picture_is_named(output, engine):
    rewrite(first_part(output), swapped)
    found = remake(open_store(str(output)), 6, lambda spec: engine)
    assert found.same == 4
    assert [(key, row_id) for key, row_id, _ in found.wrong] == [
        *((f"data/{first_part(output).name}", row_id) for row_id in ("r0", "r1")),
    ]
    assert "of 255 levels in the mean, where none should be" in found.wrong[0][2]


def test_rows_of_a_family_that_is_made_in_another_way_now_are_not_called_wrong(output, engine):
    def of_qwen(footer: Footer) -> Footer:
        """As an older version wrote it, whose parts name no edition of an entry."""
        settings = json.loads(json.dumps(footer.settings))
        settings["model"] |= {"id": "Qwen/Qwen-Image"}
        settings["sampling"] |= {"true_cfg_scale": None}
        return replace(footer, settings=settings)

    for part in (output / "data").iterdir():
        rewrite(part, change_footer=of_qwen)
    found = remake(open_store(str(output)), 6, lambda spec: engine)
    assert (found.same, found.wrong) == (0, [])
    assert set(found.skipped) == {"rows of a family whose samples this version makes in another way"}


def test_on_another_processor_little_may_differ_and_it_is_said_why(output, engine):
    def nearly(table: pa.Table) -> pa.Table:
        """Row r0 with one pixel another."""
        images = table["image"].to_pylist()
        picture = Image.open(io.BytesIO(images[0]["bytes"]))
        picture.putpixel((3, 3), tuple(255 - value for value in picture.getpixel((3, 3))))
        out = io.BytesIO()
        picture.save(out, "png")
        images[0]["bytes"] = out.getvalue()
        return table.set_column(
            table.column_names.index("image"), "image", pa.array(images, table.schema.field("image").type)
        )

    rewrite(first_part(output), nearly)
    store = open_store(str(output))
    found = remake(store, 6, lambda spec: engine)
    assert [row_id for _, row_id, _ in found.wrong] == ["r0"]  # here every pixel counts
    rewrite(first_part(output), change_footer=lambda footer: replace(footer, device_name="Abacus 9"))
    found = remake(store, 6, lambda spec: engine)
    assert (found.same, found.close, found.wrong) == (5, 1, [])
    assert f"1 within a mean difference of {TOLERANCE:g} of 255 levels" in found.remarks()[0]
    assert "last bits may differ in 1 row: made on Abacus 9; this is " in found.remarks()[1]
    rewrite(first_part(output), swapped)
    found = remake(store, 6, lambda spec: engine)
    assert len(found.wrong) == 2
    assert "where up to 4 could be, because made on Abacus 9" in found.wrong[0][2]


def test_verify_makes_rows_again_and_says_so(output):
    ran = CliRunner().invoke(main, ["verify", str(output), "--remake", "2"])
    assert ran.exit_code == 0, ran.output
    assert "made 2 rows again: 2 the same to the last bit of the picture" in ran.output
    rewrite(first_part(output), lambda table: swapped(table))
    ran = CliRunner().invoke(main, ["verify", str(output), "--remake", "6", "--json"])
    assert ran.exit_code == 4
    shown = json.loads(ran.output[ran.output.index("{") :])
    assert shown["num_problems"]["remade_differs"] == 2
    assert "row 'r0' made again it differs by" in " ".join(p["message"] for p in shown["problems"])
