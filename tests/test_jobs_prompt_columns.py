"""Columns as people have them: of other types from file to file, with names of ours, in names of folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_jobs import finish, prompt_table, small_job
from test_jobs_prompts import job, read_all, rejects_of, rows_of, table

from overtone.jobs.errors import PromptsError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import make_plan
from overtone.jobs.preview import preview
from overtone.jobs.prompts import FileList, check_row_ids
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store
from overtone.jobs.verify import verify


def passed(spec: JobSpec) -> dict[str, list]:
    """The pass-through columns of all rows."""
    return pa.concat_tables([shard.passthrough for shard in read_all(spec)]).to_pydict()


# Types that differ from file to file


DRIFT: dict[str, tuple[Any, Any, pa.DataType]] = {
    "lengths": (pa.array(["a"]), pa.array(["b"], pa.large_string()), pa.large_string()),
    "categories": (pa.array(["a"]).dictionary_encode(), pa.array(["b"]), pa.string()),
    "more categories": (
        pa.array(["a"]).cast(pa.dictionary(pa.int8(), pa.string())),
        pa.array(["b"]).cast(pa.dictionary(pa.int16(), pa.string())),
        pa.string(),
    ),
    "fractions": (pa.array([1]), pa.array([1.5]), pa.float64()),
    "widths": (pa.array([1], pa.int8()), pa.array([300], pa.int32()), pa.int32()),
    "units": (pa.array([1], pa.timestamp("us")), pa.array([2], pa.timestamp("ns")), pa.timestamp("ns")),
    "zones": (
        pa.array([1], pa.timestamp("us", "UTC")),
        pa.array([2], pa.timestamp("us", "Europe/Berlin")),
        pa.timestamp("us", "UTC"),
    ),
    "prices": (pa.array([Decimal("1.10")]), pa.array([7]), pa.decimal128(38, 2)),
    "nothing": (pa.nulls(1), pa.array([["x"]]), pa.list_(pa.string())),
    "lists": (pa.array([[1]]), pa.array([[1.5]], pa.large_list(pa.float64())), pa.large_list(pa.float64())),
    "fields": (
        pa.array([{"a": 1, "b": "x"}]),
        pa.array([{"a": 1.5, "c": ["y"]}]),
        pa.struct([("a", pa.float64()), ("b", pa.string()), ("c", pa.list_(pa.string()))]),
    ),
    "deep": (
        pa.array([[{"k": "a"}]]),
        pa.array([[{"k": "b"}]], pa.list_(pa.struct([("k", pa.large_string()), ("n", pa.int8())]))),
        pa.list_(pa.struct([("k", pa.large_string()), ("n", pa.int8())])),
    ),
}


@pytest.mark.parametrize("name", DRIFT)
def test_types_that_differ_become_the_one_that_holds_both(tmp_path, name):
    first, second, type = DRIFT[name]
    for order in ((first, second), (second, first)):
        for file, values in zip("ab", order, strict=True):
            table(tmp_path / f"{file}.parquet", {"prompt": ["x"], "it": values})
        spec = job(tmp_path)
        found = pa.concat_tables([shard.passthrough for shard in read_all(spec)])["it"]
        wanted = pa.concat_arrays([_cast(values, found.type) for values in order])
        assert found.to_pylist() == wanted.to_pylist()
        assert not rejects_of(spec)
    assert found.type == type or found.cast(type).to_pylist() == found.to_pylist()


def _cast(values: pa.Array, type: pa.DataType) -> pa.Array:
    return pa.array(values.to_pylist(), type)


def test_a_column_that_some_files_lack_is_null_there(tmp_path):
    table(tmp_path / "a.parquet", {"prompt": ["x"], "tag": ["t"], "__index_level_0__": [0]})
    table(tmp_path / "b.parquet", {"prompt": ["y"], "score": [1.5], "height": [512]})
    table(tmp_path / "c.parquet", {"prompt": ["z"], "tag": ["u"], "score": [2.5]})
    assert passed(job(tmp_path)) == {
        "tag": ["t", None, "u"],
        "__index_level_0__": [0, None, None],
        "score": [None, 1.5, 2.5],
    }
    spec = job(tmp_path, keep=["score"], columns={"height": "tag", "row_id": "score"})
    assert set(passed(job(tmp_path, keep=["score"]))) == {"score"}
    with pytest.raises(PromptsError, match=r"column tag \(height\) has type string"):
        make_plan(spec)
    for wrong, where in (({"keep": ["no"]}, "prompts.keep"), ({"columns": {"seed": "no"}}, "for seed")):
        with pytest.raises(PromptsError, match=rf"like all other files, has no column 'no', .*{where}"):
            make_plan(job(tmp_path, **wrong))


def test_tables_of_all_formats_go_together(tmp_path):
    table(tmp_path / "a.parquet", {"prompt": ["x"], "n": pa.array([1], pa.int8()), "tag": ["t"]})
    (tmp_path / "b.jsonl").write_text('{"prompt": "y", "n": 1.5}\n')
    (tmp_path / "c.csv").write_text("prompt,tag\nz,u\n")
    spec = job(*(tmp_path / name for name in ("a.parquet", "b.jsonl", "c.csv")))
    assert passed(spec) == {"n": [1.0, 1.5, None], "tag": ["t", None, "u"]}


def test_a_value_that_is_not_in_the_common_type_is_its_rows_reject(tmp_path):
    table(tmp_path / "a.parquet", {"prompt": ["x", "y"], "n": [2**53 + 1, 5]})
    table(tmp_path / "b.parquet", {"prompt": ["z"], "n": [1.5]})
    spec = job(tmp_path)
    assert [reject.message for reject in rejects_of(spec)] == ["its 'n' does not fit in double"]
    assert [row.row_id for row in rows_of(spec)] == ["a:1", "b:0"]
    assert passed(spec) == {"n": [None, 5.0, 1.5]}


def test_what_datasets_knows_of_columns_comes_together(tmp_path):
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    other = {"names": ["dog", "cat"], "_type": "ClassLabel"}
    for file, features in (("a", {"k": label, "m": label}), ("b", {"k": label, "m": other, "n": label})):
        about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        columns = {"prompt": ["x"], **{name: [0] for name in features}}
        table(tmp_path / f"{file}.parquet", pa.table(columns).replace_schema_metadata(about))
    metadata = make_plan(job(tmp_path)).passthrough.metadata
    assert json.loads(metadata[b"huggingface"]) == {"info": {"features": {"k": label, "n": label}}}


# Names of ours that mean something else


def test_a_name_is_turned_off(tmp_path):
    source = {"prompt": ["x", "y"], "id": [1, 1], "height": ["tall", "short"], "width": [-1, 99999999]}
    table(tmp_path / "a.parquet", source)
    off = {"row_id": None, "height": None, "width": None}
    spec = job(tmp_path, columns=off)
    check_row_ids(spec, make_plan(spec).files)
    assert [(row.row_id, row.height) for row in rows_of(spec)] == [("a:0", None), ("a:1", None)]
    kept = {"id": [1, 1], "source_height": ["tall", "short"], "source_width": [-1, 99999999]}
    assert passed(spec) == kept
    assert set(passed(job(tmp_path, columns=off, keep=["width"]))) == {"source_width"}
    with pytest.raises(PromptsError, match=r"or none: `columns: \{height: null\}`"):
        make_plan(job(tmp_path))


def test_a_name_that_is_turned_off_goes_into_the_parts(tmp_path):
    spec, _ = small_job(tmp_path, prompt_table(6, height=[7] * 6, seed=[-1] * 6, row_id=["a"] * 6))
    spec = spec.model_copy(
        update={
            "prompts": spec.prompts.model_copy(
                update={"columns": dict.fromkeys(("height", "seed", "row_id"))}
            )
        }
    )
    plan = make_plan(spec)
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan)
    data = pa.concat_tables([pq.read_table(path) for path in (tmp_path / "out" / "data").iterdir()])
    assert data["source_height"].to_pylist() == [7] * 6
    assert data["source_seed"].to_pylist() == [-1] * 6
    assert data["source_row_id"].to_pylist() == ["a"] * 6
    assert verify(spec.output.path).ok


def test_a_column_that_has_the_name_of_one_turned_off(tmp_path):
    table(tmp_path / "a.parquet", {"prompt": ["x"], "source_height": [1]})
    assert passed(job(tmp_path)) == {"source_height": [1]}
    with pytest.raises(
        PromptsError, match="'source_height' has the name under which the column 'height' pass"
    ):
        make_plan(job(tmp_path, columns={"height": None}))


def test_prompts_cannot_be_turned_off():
    with pytest.raises(ValueError, match="leaves no prompts"):
        job("a.parquet", columns={"prompt": None})


def test_a_plan_finds_the_row_ids_that_a_run_would_refuse(tmp_path):
    table(tmp_path / "a.parquet", {"prompt": ["x", "y"], "id": [7, 7]})
    with pytest.raises(PromptsError, match=r"row_id '7' is there twice.*`columns: \{row_id: null\}`"):
        preview(job(tmp_path))
    assert preview(job(tmp_path, columns={"row_id": None})).job.num_rows == 2


# Folders


def folders(root: Path, files: Mapping[str, list[str]], **more: Any) -> None:
    for name, prompts in files.items():
        table(root / name, {"prompt": prompts, **more})


def test_folders_are_columns(tmp_path):
    files = {
        "lang=en/year=2024/a.parquet": ["x"],
        "lang=en/year=2025/a.parquet": ["y"],
        "lang=zh%20CN/year=__HIVE_DEFAULT_PARTITION__/a.parquet": ["z"],
    }
    folders(tmp_path / "in", files)
    wanted = {"lang": ["en", "en", "zh CN"], "year": [2024, 2025, None]}
    for path in ("in", "in/**/*.parquet", "in/lang=*/*/a.parquet"):
        assert passed(job(tmp_path / path)) == wanted
    for path in ("in/lang=en", "in/lang=en/*/*.parquet"):
        assert passed(job(tmp_path / path)) == {"lang": ["en"] * 2, "year": [2024, 2025]}
    one = job(tmp_path / "in/lang=en/year=2024/a.parquet")
    assert passed(one) == {"lang": ["en"], "year": [2024]}
    assert [row.row_id for row in rows_of(one)] == ["a:0"]
    assert passed(job(tmp_path / "in", keep=["year"])) == {"year": wanted["year"]}


def test_numbers_in_folders_are_numbers_where_all_of_them_are(tmp_path):
    folders(tmp_path, {"month=01/a.parquet": ["x"], "month=12/a.parquet": ["y"]})
    assert passed(job(tmp_path)) == {"month": ["01", "12"]}
    folders(tmp_path / "b", {"n=-5/a.parquet": ["x"], "n=12/a.parquet": ["y"], "n=007/a.parquet": ["z"]})
    assert passed(job(tmp_path / "b")) == {"n": ["-5", "007", "12"]}


def test_columns_of_folders_mean_what_others_do(tmp_path):
    folders(tmp_path, {"height=512/seed=3/a.parquet": ["x"], "height=768/seed=4/a.parquet": ["y"]})
    spec = job(tmp_path)
    assert [(row.height, row.seed) for row in rows_of(spec)] == [(512, 3), (768, 4)]
    assert passed(job(tmp_path, columns={"height": None})) == {"source_height": [512, 768]}
    folders(tmp_path / "b", {"model=flux/mode=x/a.parquet": ["x"]})
    assert passed(job(tmp_path / "b")) == {"source_model": ["flux"], "source_mode": ["x"]}


def test_a_files_own_column_comes_before_a_folders(tmp_path):
    folders(tmp_path, {"tag=folder/a.parquet": ["x"]}, tag=["own"])
    (tmp_path / "tag=folder" / "b.jsonl").write_text('{"prompt": "y"}\n')
    with (tmp_path / "tag=folder" / "c.csv").open("w") as file:
        csv.writer(file).writerows([["prompt"], ["z"]])
    names = ("a.parquet", "b.jsonl", "c.csv")
    assert passed(job(*(tmp_path / "tag=folder" / name for name in names))) == {
        "tag": ["own", "folder", "folder"]
    }


def test_a_folder_far_above_is_no_column(tmp_path):
    folders(tmp_path, {"run=3/prompts/a.parquet": ["x"]})
    assert passed(job(tmp_path / "run=3" / "prompts")) == {}
    assert passed(job(tmp_path)) == {"run": [3]}


def test_a_job_goes_on_with_the_columns_that_it_began_with(tmp_path):
    """An older version saw no columns in folders: parts of both would differ."""
    folders(tmp_path / "in", {"height=512/lang=en/a.parquet": ["x", "y"]})
    spec = JobSpec(
        model="tiny", prompts=str(tmp_path / "in"), output=str(tmp_path / "out"), shards=1,
        sampling={"height": 16, "width": 16},
    )  # fmt: skip
    plan = make_plan(spec)
    older = FileList.of([replace(plan.files[0], columns=(("prompt", "prompt"),))], pa.schema([]))
    folder = JobFolder(open_store(spec.output.path))
    folder.open(spec, replace(plan, files=older))
    again = JobFolder(open_store(spec.output.path))
    assert again.open(spec, plan)
    assert again.plan().passthrough == pa.schema([])
    assert dict(again.plan().files[0].columns) == {"prompt": "prompt"}
    finish(again.store, spec, again.plan())
    assert verify(spec.output.path).ok
