"""Any table that people bring: `plan` refuses it in one line, or every row and every value comes back equal.

Equal means, for the input's and the output's file:
- to pyarrow: the same type (a view is its plain kind), and the same values: numbers by value, NaN is NaN and
  -0.0 is not 0.0, texts and bytes by their bytes, times by what they count, an extension's by its storage.
  Where two files differ, types widen: then numbers are equal by value, times as nanoseconds, and a field that
  a struct lacks is null.
- to DuckDB: the same type, and the same text of each value. Columns that it cannot read in the input are left
  out, and those of types that Arrow has not, and INT96 times, which come back as nanoseconds.
- to `datasets`: the same values, as for pyarrow. Where it cannot read the input, it need not read the output.
- in a tar: the JSON of a row has the same texts, whole numbers, truth values and nulls under the same names.
"""

from __future__ import annotations

import json
import math
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_tables import ArrowFile, PolarsFile, Prompts, polars, prompts
from fake_engine import FakeEngine
from hypothesis import HealthCheck, Phase, currently_in_test_context, given, note, settings

from overtone.cluster.dispatch import Assignment, ShardCommitted
from overtone.cluster.worker import Runner
from overtone.jobs.errors import UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import check_row_ids
from overtone.jobs.report import write_card
from overtone.jobs.spec import COLUMNS, JobSpec
from overtone.jobs.store import open_store
from overtone.jobs.verify import verify

SIDE_PX = 16
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Jobs there need not wait for a disk."""
USUAL = settings(
    max_examples=200,
    phases=(Phase.explicit, Phase.generate),  # what shrinking takes is for those who run the long form
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(USUAL, max_examples=5000, derandomize=False, phases=tuple(Phase))
REASONS = (
    "would pass through to the output, which has one",
    "is there twice",
    "but must hold",
    "no rows",
    "cannot pass through",
    "cannot be read: Integers with more than 64 bits",
    "for so DuckDB writes null arrays of a fixed size",
)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        import datasets

        datasets.disable_progress_bars()
        datasets.utils.logging.set_verbosity(60)
        yield datasets


@USUAL
@given(prompts())
def test_any_table_is_refused_or_comes_back(datasets, drawn):
    comes_back(drawn, datasets)


def views_of_json() -> pa.Array:
    texts = pa.array(["{}", '{"more": "than twelve bytes"}', None], pa.string_view())
    return pa.ExtensionArray.from_storage(pa.json_(pa.string_view()), texts)


def list_views(values: pa.Array) -> pa.Array:
    """Two: the last value, and before it in the values all the others."""
    last = len(values) - 1
    return pa.LargeListViewArray.from_arrays(
        pa.array([last, 0], pa.int64()), pa.array([1, last], pa.int64()), values
    )


def opaque_nulls() -> pa.Array:
    return pa.ExtensionArray.from_storage(pa.opaque(pa.null(), "", ""), pa.nulls(3))


FOUND = {
    "a column with the path of our latents": ("latents.values.list.element", pa.array([True, False])),
    "json on views": ("x", views_of_json().slice(1)),
    "json on views in lists": ("x", pa.ListArray.from_arrays([0, 1, 3], views_of_json())),
    "json on views in views": ("x", list_views(views_of_json())),
    "json on views in lists of a fixed size": (
        "x",
        pa.FixedSizeListArray.from_arrays(views_of_json()[:2], 1),
    ),
    "json on views in maps": ("x", pa.MapArray.from_arrays([0, 1, 3], ["a", "b", "c"], views_of_json())),
    "views of views of nulls": ("x", list_views(list_views(pa.nulls(3)))),
    "views of views of nothing known": ("x", list_views(list_views(opaque_nulls()))),
    "views in maps": ("x", pa.MapArray.from_arrays([0, 1, 2], ["a", "b"], list_views(pa.array([1, 2, 3])))),
}


@pytest.mark.parametrize("output", ["parquet", "webdataset"])
@pytest.mark.parametrize("found", list(FOUND))
def test_what_was_found_comes_back(datasets, found, output):
    name, array = FOUND[found]
    table = pa.table({"prompt": ["a", "b"], name: array})
    assert comes_back(Prompts((ArrowFile(table, {}),), 1, output, "datasets"), datasets) is None


def test_lists_of_no_elements_are_refused(datasets):
    table = pa.table({"prompt": ["a", "b"], "x": pa.nulls(2, pa.list_(pa.int8(), 0))})
    refused = comes_back(Prompts((ArrowFile(table, {}),), 1, "parquet", "duckdb"), datasets)
    assert refused is not None
    assert "column 'x' cannot pass through to the output: it has lists of a fixed size of 0" in refused


@pytest.mark.skipif(polars is None, reason="needs polars")
def test_a_type_that_arrow_has_not_is_refused_for_that(datasets):
    file = PolarsFile((("prompt", "String", ("a",)), ("x", "Int128", (1,))))
    refused = comes_back(Prompts((file,), 1, "parquet", "duckdb"), datasets)
    assert refused is not None
    assert "a.parquet has a column that cannot be read: Integers with more than 64 bits" in refused


@pytest.mark.chaos
@LONG
@given(prompts())
def test_many_more_tables_are_refused_or_come_back(datasets, drawn):
    comes_back(drawn, datasets)


def comes_back(drawn: Prompts, datasets: Any) -> str | None:
    """Make a job of the drawn prompts, and compare what its output's readers see with what they see in the
    input. Returns why the prompts were refused; None: they were not."""
    with TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        inputs = drawn.write(folder / "in")
        spec = JobSpec.model_validate(
            {
                "model": "tiny",
                "prompts": str(folder / "in"),
                "sampling": {"height": SIDE_PX, "width": SIDE_PX, "num_steps": 2},
                "shards": drawn.shard_rows,
                "output": {"path": str(folder / "out"), "format": drawn.output},
            }
        )
        try:
            plan = make_plan(spec)
            check_row_ids(spec, plan.files)
        except UserError as error:
            refused = str(error)
        else:
            refused = None
        if refused is not None:
            say(f"refused: {refused}")
            reasons = [*REASONS, "make them alike"] if len(inputs) > 1 else REASONS
            assert "\n" not in refused
            assert any(reason in refused for reason in reasons), refused
            return refused
        tables = [whole(path) for path in inputs]
        rejects = finished(spec, plan, card=drawn.reader == "card")
        output = folder / "out"
        made = rows_owed(tables, plan, rejects)
        if drawn.output == "webdataset":
            same_json(tables, made, output, plan)
            return None
        same_to_pyarrow(tables, made, output, plan, alike=len(inputs) == 1)
        if len(inputs) > 1:
            return None
        if drawn.reader != "duckdb":
            same_to_datasets(datasets, inputs[0], made, output, plan, card=drawn.reader == "card")
        elif not getattr(drawn.files[0], "options", {}).get("use_deprecated_int96_timestamps"):
            same_to_duckdb(inputs[0], made, output, plan)
        return None


def finished(spec: JobSpec, plan: JobPlan, *, card: bool) -> dict[tuple[int, int], str]:
    """Make the whole job. Returns why each (file, row) that was not made was rejected."""
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    runner = Runner(spec, plan, store, FakeEngine())
    try:
        for shard in plan.shards():
            *_, last = runner.attempt(Assignment(shard.index, 1))
            assert isinstance(last, ShardCommitted), last
    finally:
        runner.close()
    assert not card or write_card(store, spec, plan)
    report = verify(spec.output.path)
    assert not report.num_problems, report.problems
    rejects = {}
    for info in store.list("rejects/"):
        for row in pq.read_table(pa.BufferReader(store.read(info.key))).to_pylist():
            rejects[plan.shard(row["shard"]).file, row["source"]] = row["message"]
    return rejects


def rows_owed(
    tables: list[pa.Table], plan: JobPlan, rejects: dict[tuple[int, int], str]
) -> list[tuple[int, int]]:
    """The (file, row) of all rows that must have been made. No row may be a reject without a reason in it."""
    made = []
    for k, table in enumerate(tables):
        prompts = [neutral(value) for value in table["prompt"]]
        for row, prompt in enumerate(prompts):
            if (k, row) in rejects:
                say(f"rejected: {rejects[k, row]}")
                assert prompt is None or bad_value(table, row, rejects[k, row]), rejects[k, row]
            else:
                made.append((k, row))
    return made


def bad_value(table: pa.Table, row: int, message: str) -> bool:
    """Whether a row's reject names a column with a value that its meaning or its new type cannot have."""
    named = {
        "id" if name == "row_id" and "id" in table.column_names else name
        for name in COLUMNS
        if name in message
    }
    named |= {name for name in table.column_names if f"{name!r}" in message}
    return any(neutral(table[name][row]) is not None for name in named & set(table.column_names))


# What each reader sees.


def whole(path: Path) -> pa.Table:
    """By row groups: pyarrow reads no struct of categories that has several of them at once."""
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(k) for k in range(file.num_row_groups)]
    return pa.concat_tables(groups) if groups else file.read()


def same_to_pyarrow(
    tables: list[pa.Table], made: list[tuple[int, int]], output: Path, plan: JobPlan, *, alike: bool
) -> None:
    out = pa.concat_tables([pq.ParquetFile(path).read() for path in parts(output)])
    assert out["prompt"].to_pylist() == [tables[k]["prompt"][row].as_py() for k, row in made]
    for field in plan.passthrough:
        if alike:
            assert plain(out.schema.field(field.name).type) == plain(tables[0].schema.field(field.name).type)
        values = [
            tables[k][field.name][row] if field.name in tables[k].column_names else None for k, row in made
        ]
        expected = [None if value is None else neutral(value) for value in values]
        assert [neutral(value) for value in out[field.name]] == expected, field.name


def same_to_duckdb(path: Path, made: list[tuple[int, int]], output: Path, plan: JobPlan) -> None:
    names = pq.ParquetFile(path).schema_arrow.names
    before = seen_by_duckdb([path], [names.index(name) for name in plan.passthrough.names])
    names = pq.ParquetFile(parts(output)[0]).schema_arrow.names
    after = seen_by_duckdb(parts(output), [names.index(name) for name in plan.passthrough.names])
    for name, old, new in zip(plan.passthrough.names, before, after, strict=True):
        if old is not None and not any(kind in old[0] for kind in _ONLY_DUCKDBS):
            assert new is not None, f"DuckDB reads {name!r} in the input and not in the output"
            assert new[0] == old[0], name
            assert new[1] == [old[1][row] for _, row in made], name


_ONLY_DUCKDBS = ("VARIANT", "GEOMETRY", "TIME WITH TIME ZONE")
"""Types that Arrow has not: what it reads instead of them passes through, as structs, bytes or UTC times."""


def seen_by_duckdb(paths: list[Path], columns: list[int]) -> list[tuple[str, list[str | None]] | None]:
    """(type, values as text) of each of some columns, None where it cannot be read."""
    files = "[" + ", ".join(f"'{path}'" for path in paths) + "]"
    rows = duckdb.sql(f"FROM read_parquet({files}, hive_partitioning = false)")
    names = ['"' + rows.columns[k].replace('"', '""') + '"' for k in columns]
    kinds = [str(rows.types[k]) for k in columns]
    try:
        texts = rows.project(", ".join(f"CAST({name} AS VARCHAR)" for name in names)).fetchall()
        return [(kind, [row[k] for row in texts]) for k, kind in enumerate(kinds)]
    except duckdb.Error:
        return [None] if len(columns) == 1 else [one for k in columns for one in seen_by_duckdb(paths, [k])]


def same_to_datasets(
    datasets: Any, path: Path, made: list[tuple[int, int]], output: Path, plan: JobPlan, *, card: bool
) -> None:
    def read(files: list[Path]) -> pa.Table:
        cache = str(output.parent / "hf")
        return arrow_of(datasets.IterableDataset.from_parquet([str(file) for file in files], cache_dir=cache))

    try:
        before = read([path])
    except Exception as error:  # noqa: BLE001 - of whatever kind: it has no type for a column
        say(f"datasets: {error}")
        return
    if card:
        after = arrow_of(datasets.load_dataset(str(output), streaming=True)["train"])
    else:
        after = read(parts(output))
    assert after.num_rows == len(made)
    for name in plan.passthrough.names:
        old = [neutral(value) for value in before[name]]
        assert [neutral(value) for value in after[name]] == [old[row] for _, row in made], name


def arrow_of(rows: Any) -> pa.Table:
    tables = list(rows.with_format("arrow").iter(1000))
    return pa.concat_tables(tables) if tables else rows.features.arrow_schema.empty_table()


def same_json(tables: list[pa.Table], made: list[tuple[int, int]], output: Path, plan: JobPlan) -> None:
    rows = []
    for path in sorted((output / "data").iterdir()):
        with tarfile.open(path) as tar:
            rows += [json.load(tar.extractfile(one)) for one in tar if one.name.endswith(".json")]
    assert len(rows) == len(made)
    for row, (k, source) in zip(rows, made, strict=True):
        for name in plan.passthrough.names:
            value = tables[k][name][source] if name in tables[k].column_names else pa.scalar(None)
            type = plain(value.type)
            if not value.is_valid:
                assert row[name] is None, name
            elif type in (pa.string(), pa.large_string(), pa.bool_()) or pa.types.is_integer(value.type):
                assert row[name] == value.as_py(), name
            else:
                assert name in row


def parts(output: Path) -> list[Path]:
    return sorted((output / "data").iterdir())


# What equal means.

_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def neutral(value: pa.Scalar) -> Any:
    """A value without its type: bytes for texts, nanoseconds for times, a text for NaN and for -0.0."""
    type = value.type
    if not value.is_valid:
        return None
    if isinstance(type, pa.BaseExtensionType) or pa.types.is_dictionary(type):
        return neutral(value.value)
    if pa.types.is_struct(type):
        fields = ((field.name, neutral(value[k])) for k, field in enumerate(type))
        return {name: inner for name, inner in fields if inner is not None}
    if pa.types.is_map(type) or pa.types.is_nested(type):
        return [neutral(one) for one in value.values]
    if pa.types.is_floating(type):
        number = value.as_py()
        return "NaN" if math.isnan(number) else "-0.0" if str(number) == "-0.0" else number
    if pa.types.is_date(type):
        return ("time", value.value * (_NS["ms"] if pa.types.is_date64(type) else 86_400 * _NS["s"]))
    if pa.types.is_time(type) or pa.types.is_timestamp(type) or pa.types.is_duration(type):
        return ("time", value.value * _NS[type.unit])
    if hasattr(value, "as_buffer"):
        return value.as_buffer().to_pybytes()
    return value.as_py()


def plain(type: pa.DataType) -> Any:
    """A type as it must come back: of any depth, without names that Parquet gives to elements, without views,
    and with values for categories within others."""
    if isinstance(type, pa.BaseExtensionType):
        return (re.sub(r"storage_type=\w+", "", str(type)), plain(type.storage_type))
    if pa.types.is_dictionary(type):
        return ("dictionary", type.index_type, plain(type.value_type), type.ordered)
    if pa.types.is_struct(type):
        return ("struct", *((field.name, inner(field.type)) for field in type))
    if pa.types.is_map(type):
        return ("map", inner(type.key_type), inner(type.item_type))
    if pa.types.is_fixed_size_list(type):
        return ("list", type.list_size, inner(type.value_type))
    if pa.types.is_large_list(type) or pa.types.is_large_list_view(type):
        return ("large_list", inner(type.value_type))
    if pa.types.is_list(type) or pa.types.is_list_view(type):
        return ("list", inner(type.value_type))
    return {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(type, type)


def inner(type: pa.DataType) -> Any:
    return plain(type.value_type if pa.types.is_dictionary(type) else type)


def say(text: str) -> None:
    """A note of the example that hypothesis draws; fixed examples need none."""
    if currently_in_test_context():
        note(text)
