"""Columns of any type: from the table to those who read the output, or refused by the plan."""

from __future__ import annotations

import base64
import io
import json
import tarfile
import uuid
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from small_jobs import finish, prompt_table, small_job, small_part

from overtone.jobs.errors import PromptsError
from overtone.jobs.folder import JobFolder
from overtone.jobs.intervals import interval_leaves
from overtone.jobs.parts import Made, part_schema, rows_table
from overtone.jobs.plan import make_plan
from overtone.jobs.prompts import check_row_ids, read_shard
from overtone.jobs.prompts import values as prompt_values
from overtone.jobs.prompts.input_file import server_of, style_of
from overtone.jobs.prompts.parquet import may_have_null_arrays
from overtone.jobs.prompts.places import Found, place_of
from overtone.jobs.prompts.scan import Wanted
from overtone.jobs.prompts.table import read
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store
from overtone.jobs.verify import verify


def job(path: Path, rows: int = 256, **prompts) -> JobSpec:
    return JobSpec(model="tiny", prompts={"path": str(path), **prompts}, output="/out", shards=rows)


def made(folder: Path, table: pa.Table, **settings) -> pa.Table:
    """The output of a job with these prompts, which verify finds whole."""
    spec, plan = small_job(folder, table, **settings)
    finish(open_store(spec.output.path), spec, plan)
    return pa.concat_tables([pq.read_table(path) for path in sorted((folder / "out" / "data").iterdir())])


def tensors(permutation: list[int] | None) -> pa.Array:
    type = pa.fixed_shape_tensor(pa.int32(), (2, 3), permutation=permutation)
    return pa.ExtensionArray.from_storage(type, pa.array([range(6)] * 3, pa.list_(pa.int32(), 6)))


IDS = [uuid.UUID(int=n) for n in range(1, 4)]
UUIDS = pa.array([one.bytes for one in IDS], pa.uuid())
JSONS = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None, "[]"]))

VIEWS = {
    "text": (pa.array(["a", None, "c" * 40], pa.string_view()), pa.string()),
    "bytes": (pa.array([b"\xff", None, b""], pa.binary_view()), pa.binary()),
    "list": (pa.array([["a"], None, []], pa.list_(pa.string_view())), pa.list_(pa.string())),
    "views": (pa.array([["a"], None, []], pa.list_view(pa.binary_view())), pa.list_(pa.binary())),
    "struct": (
        pa.array([{"x": ["a"]}, None, {"x": None}], pa.struct([("x", pa.list_(pa.string_view()))])),
        pa.struct([("x", pa.list_(pa.string()))]),
    ),
    "map": (
        pa.array([[("a", "b")], None, []], pa.map_(pa.string_view(), pa.string_view())),
        pa.map_(pa.string(), pa.string()),
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_pass_through_as_what_they_view(tmp_path, name):
    array, type = VIEWS[name]
    found = made(tmp_path, prompt_table(3, it=array), shard_rows=2)["it"]
    assert found.to_pylist() == array.to_pylist()
    assert found.type.equals(type) or found.cast(type).equals(found)


@pytest.mark.parametrize("name", VIEWS)
def test_views_that_never_saw_a_file_pass_through_too(name):
    """As in somebody else's pipeline, where a table may have them."""
    array, type = VIEWS[name]
    spec = job(Path("/x.parquet"))
    schema = part_schema(spec, pa.schema([("it", array.type)]))
    assert schema.field("it").type == type
    row = prompt_values.samples(0, "r", 2, {"prompt": "x"}, None)[0][0]
    table = rows_table(spec, schema, [Made(row, b"", 1, 1, 1, (), 0.0)], pa.table({"it": array}), 0, "image")
    assert table["it"].to_pylist() == [array[2].as_py()]


EXTENSIONS = {
    "tensor": tensors(None),
    "permuted": tensors([1, 0]),
    "uuid": UUIDS,
    "json": JSONS,
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, None], pa.int8())),
    "opaque": pa.ExtensionArray.from_storage(pa.opaque(pa.int64(), "geometry", "us"), pa.array([1, 2, 3])),
    "uuids": pa.ListArray.from_arrays([0, 1, 1, 3], UUIDS),
    "inside": pa.StructArray.from_arrays([JSONS], ["it"]),
}


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
@pytest.mark.parametrize("name", EXTENSIONS)
def test_extension_types_pass_through_with_what_they_say(tmp_path, name, format):
    array = EXTENSIONS[name]
    spec, plan = small_job(tmp_path, prompt_table(3, it=array), shard_rows=2, format=format)
    there = pq.read_schema(tmp_path / "prompts.parquet").field("it").type
    assert plan.passthrough.field("it").type.equals(there)
    store = open_store(spec.output.path)
    finish(store, spec, plan)
    if format == "webdataset":
        part = small_part(spec, plan, 0)
        with tarfile.open(fileobj=io.BytesIO(part.data)) as tar:
            about = json.load(tar.extractfile("000000.json"))
        wanted = {"tensor": [[0, 1, 2], [3, 4, 5]], "uuid": str(IDS[0]), "json": '{"a": 1}', "bool8": True}
        assert about["it"] == wanted.get(name, about["it"])
        return
    found = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "out" / "data").iterdir()))
    assert found.schema.field("it").type.equals(plan.passthrough.field("it").type)
    assert found["it"].to_pylist() == array.to_pylist()


def test_a_type_that_nobody_registered_keeps_its_name(tmp_path):
    """As Ray's tensors, where Ray Data is not imported."""

    class Tensor(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.list_(pa.float32()), "test.tensor")

        def __arrow_ext_serialize__(self):
            return b"[2, 3]"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type, serialized):
            return cls()

    pa.register_extension_type(Tensor())
    try:
        storage = pa.array([[1.0], [2.0], None], pa.list_(pa.float32()))
        array = pa.ExtensionArray.from_storage(Tensor(), storage)
        pq.write_table(prompt_table(3, it=array), tmp_path / "p.parquet")
    finally:
        pa.unregister_extension_type("test.tensor")
    found = made(tmp_path, pq.read_table(tmp_path / "p.parquet"))
    assert found.schema.field("it").metadata[b"ARROW:extension:name"] == b"test.tensor"
    assert found.schema.field("it").metadata[b"ARROW:extension:metadata"] == b"[2, 3]"
    pa.register_extension_type(Tensor())  # now somebody did
    try:
        [path] = (tmp_path / "out" / "data").iterdir()
        assert pq.read_schema(path).field("it").type == Tensor()
        spec, plan = small_job(tmp_path / "again", pq.read_table(tmp_path / "p.parquet"))
        assert part_schema(spec, plan.passthrough).field("it").type == Tensor()
    finally:
        pa.unregister_extension_type("test.tensor")


def test_datasets_reads_columns_of_json(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", minversion="4.5")
    made(tmp_path / "job", prompt_table(3, it=JSONS))
    loaded = datasets.load_dataset(str(tmp_path / "job" / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert [row["it"] for row in loaded] == [{"a": 1}, None, []]


def test_uuids_of_duckdb_are_row_ids(tmp_path):
    path = tmp_path / "a.parquet"
    duckdb.sql(f"COPY (SELECT uuid() AS id, 'x' AS prompt, uuid() AS other FROM range(5)) TO '{path}'")
    ids = [row[0] for row in duckdb.sql(f"SELECT id::text FROM '{path}'").fetchall()]
    spec = job(path, rows=2)
    plan = make_plan(spec)
    check_row_ids(spec, plan.files)
    shards = [read_shard(spec, plan.files[0], shard.first_row, shard.num_rows) for shard in plan.shards()]
    assert [row.row_id for shard in shards for row in shard.rows] == ids
    spec, plan = small_job(tmp_path / "job", pq.read_table(path))
    finish(open_store(spec.output.path), spec, plan)
    parts = tmp_path / "job" / "out" / "data"
    assert duckdb.sql(f"SELECT DISTINCT typeof(other) FROM '{parts}/*.parquet'").fetchall() == [("UUID",)]


def test_intervals_of_duckdb_stay_intervals(tmp_path):
    """Those within others too, beside bytes that are as long; with enough columns, and a name long enough,
    for numbers of two bytes in the footer."""
    path, long = tmp_path / "a.parquet", "n" * 200
    deep = "{'it': '123456789012'::blob, 'other': [to_days(1), NULL], 'last': to_days(n::int)}"
    numbers = ", ".join(f"{k} AS i{k}" for k in range(20))
    duckdb.sql(
        f"COPY (SELECT 'x' AS prompt, to_months(n::int) + to_days(3) + to_hours(1) AS it, {deep} AS deep, "
        f"MAP {{'a': to_days(2)}} AS mapped, [{{'i': to_days(n::int)}}] AS structs, to_days(7) AS {long}, "
        f"{numbers} FROM range(6) AS of(n)) TO '{path}'"
    )
    spec, plan = small_job(tmp_path / "job", prompt_table(1))
    spec = spec.model_copy(update={"prompts": spec.prompts.model_copy(update={"path": (str(path),)})})
    plan = make_plan(spec)
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan)
    parts = f"'{spec.output.path}/data/*.parquet'"
    assert duckdb.sql(f"SELECT DISTINCT typeof(it) FROM {parts}").fetchall() == [("INTERVAL",)]
    names = ("it", "deep", "mapped", "structs", long)
    seen = ", ".join(f"{name}::text, typeof({name})" for name in names)
    there = duckdb.sql(f"SELECT {seen} FROM '{path}' ORDER BY it").fetchall()
    assert "INTERVAL[]" in str(there)
    assert duckdb.sql(f"SELECT {seen} FROM {parts} ORDER BY it").fetchall() == there
    found = duckdb.sql(f"SELECT row_id FROM {parts} WHERE it = INTERVAL '2 months 3 days 1 hour'").fetchall()
    assert found == [("a:2",)]
    again = pa.concat_tables([pq.read_table(tmp_path / "job" / "out" / "data", columns=["it", "row_id"])])
    assert again.schema.field("it").type == pa.binary(12)
    assert verify(spec.output.path).ok


@pytest.mark.parametrize("type", ["INTERVAL", "INTERVAL[]", "STRUCT(i INTERVAL, j INTERVAL)"])
def test_what_is_an_interval_in_one_file_alone_is_bytes(tmp_path, type):
    """Of two files with bytes of that length in the same place: one type must hold both."""
    values = {
        "INTERVAL": ("to_days(1)", b"123456789012"),
        "INTERVAL[]": ("[to_days(1)]", [b"123456789012"]),
    }
    made, other = values.get(type, ("{'i': to_days(1), 'j': to_days(1)}", {"i": b"123456789012", "j": None}))
    duckdb.sql(f"COPY (SELECT 'x' AS prompt, {made} AS it) TO '{tmp_path / 'a.parquet'}'")
    plain = make_plan(job(tmp_path / "a.parquet")).passthrough.field("it").type
    pq.write_table(pa.table({"prompt": ["y"], "it": pa.array([other], plain)}), tmp_path / "b.parquet")
    passed = make_plan(job(tmp_path)).passthrough
    assert interval_leaves(passed) == []
    assert interval_leaves(make_plan(job(tmp_path / "a.parquet")).passthrough)
    assert passed.field("it").type == plain


ARRAYS = {
    "INTEGER[2]": ("[1, 2]", "NULL"),
    "VARCHAR[3]": ("['a', 'b', NULL]", "NULL"),
    "STRUCT(a INTEGER[2])": ("{'a': [1, 2]}", "{'a': NULL}"),
    "INTEGER[2][]": ("[[1, 2]]", "[[1, 2], NULL]"),
    "INTEGER[2][2]": ("[[1, 2], [3, 4]]", "[NULL, [1, 2]]"),
    "MAP(VARCHAR, INTEGER[2])": ("MAP {'a': [1, 2]}", "MAP {'a': NULL}"),
    "INTERVAL[2]": ("[to_days(1), NULL]", "NULL"),
}


@pytest.mark.parametrize("type", ARRAYS)
def test_null_arrays_of_duckdb_are_told_by_the_plan(tmp_path, type):
    """DuckDB writes them as Arrow cannot read. The columns without any, and those that are left out, can be
    used."""

    def write(path: Path, *values: str) -> Path:
        rows = ", ".join(f"('a', {value}::{type})" for value in values)
        duckdb.sql(f"COPY (SELECT * FROM (VALUES {rows}) AS of(prompt, \"its.x\")) TO '{path}'")
        return path

    whole, null = ARRAYS[type]
    bad = write(tmp_path / "bad.parquet", whole, null, whole)
    with pytest.raises(PromptsError, match=r"bad\.parquet: column 'its\.x' cannot be read .*x::INTEGER\[\]"):
        make_plan(job(bad))
    assert make_plan(job(bad, keep=[])).num_rows == 3
    good = make_plan(job(write(tmp_path / "good.parquet", whole, whole)))
    assert read_shard(job(tmp_path / "good.parquet"), good.files[0], 0, 2).passthrough.num_rows == 2


def test_only_columns_that_may_have_null_arrays_are_read_by_the_plan(tmp_path):
    """Of lists that DuckDB wrote with nulls, and as many values in each row."""
    path = tmp_path / "a.parquet"
    columns = "[n, n] AS all_there, CASE WHEN n < 2 THEN [n, n] END AS uneven, [n, NULL] AS suspect, n AS one"
    duckdb.sql(f"COPY (SELECT 'x' AS prompt, {columns} FROM range(4) AS of(n)) TO '{path}'")
    metadata = pq.read_metadata(path)
    schema = make_plan(job(path)).passthrough
    assert may_have_null_arrays(metadata, pa.schema([pa.field("prompt", pa.string()), *schema])) == {
        "suspect": [0]
    }


WORDS = pa.array(["a", None, "c"])
CATEGORIES = WORDS.dictionary_encode()
INNER_CATEGORIES = {
    "struct": (pa.StructArray.from_arrays([CATEGORIES], ["x"]), pa.struct([("x", pa.string())])),
    "list": (pa.ListArray.from_arrays([0, 1, 1, 3], CATEGORIES), pa.list_(pa.string())),
    "deep": (
        pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays([CATEGORIES], ["x"])),
        pa.list_(pa.struct([("x", pa.string())])),
    ),
    "map": (
        pa.MapArray.from_arrays([0, 1, 2, 3], pa.array(["k"] * 3), CATEGORIES),
        pa.map_(pa.string(), pa.string()),
    ),
    "fixed": (pa.FixedSizeListArray.from_arrays(CATEGORIES, 1), pa.list_(pa.string(), 1)),
}


@pytest.mark.parametrize("name", INNER_CATEGORIES)
def test_parts_with_categories_within_a_column_are_read_whole(tmp_path, name):
    """Of several row groups at once, Arrow reads such a column only as values."""
    array, type = INNER_CATEGORIES[name]
    thrice = pa.array([row % 3 for row in range(101)])
    array = array.take(thrice)
    spec, plan = small_job(
        tmp_path, prompt_table(101, it=array, kind=CATEGORIES.take(thrice)), shard_rows=101
    )
    finish(open_store(spec.output.path), spec, plan)
    (path,) = (tmp_path / "out" / "data").iterdir()
    part = pq.ParquetFile(path)
    assert part.num_row_groups == 2
    found = pa.Table.from_batches(part.iter_batches())
    assert found.equals(part.read())
    assert found["it"].to_pylist() == array.to_pylist()
    assert found["it"].type.equals(type) or found["it"].cast(type).equals(found["it"])
    assert found["kind"].type == CATEGORIES.type
    pq.write_table(pa.table({"it": array.cast(type)}), tmp_path / "values.parquet")
    rows, expected = (
        duckdb.sql(f"SELECT CAST(it AS VARCHAR) FROM '{one}'").fetchall()
        for one in (path, tmp_path / "values.parquet")
    )
    assert rows == expected


def test_a_job_begun_with_inner_categories_keeps_them(tmp_path):
    """All parts of a job have the same columns."""
    array, _ = INNER_CATEGORIES["struct"]
    schema = pa.schema([("it", array.type)])
    assert part_schema(job(Path("/x.parquet")), schema).field("it").type == array.type


@pytest.mark.parametrize("inner", [False, True])
def test_extension_types_on_categories_are_refused_by_the_plan(tmp_path, inner):
    """Arrow would end the worker's process."""
    words = pa.StructArray.from_arrays([CATEGORIES], ["x"]) if inner else CATEGORIES
    array = pa.ExtensionArray.from_storage(pa.opaque(words.type, "type", "vendor"), words)
    pq.write_table(pa.table({"prompt": ["x"] * 3, "it": array}), tmp_path / "a.parquet")
    with pytest.raises(PromptsError, match=r"a\.parquet: column 'it' has an extension type on categories"):
        make_plan(job(tmp_path / "a.parquet"))
    assert make_plan(job(tmp_path / "a.parquet", keep=[])).passthrough.names == []


# Times


DEEP = pa.struct([("a", pa.list_(pa.struct([("t", pa.timestamp("us"))]))), ("b", pa.int8())])
DAY = "1970-01-01"
FAR = "<value out of range: 9223372036854775807>"
TIMES = {
    "ns": (pa.array([1], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
    "infinite": (pa.array([2**63 - 1], pa.timestamp("us")), FAR),
    "infinite, zone": (pa.array([2**63 - 1], pa.timestamp("us", "UTC")), f"{FAR}Z"),
    "zone": (pa.array([0], pa.timestamp("s", "Europe/Berlin")), "1970-01-01 00:00:00.000Z"),
    "no such zone": (pa.array([0], pa.timestamp("s", "Nowhere/At_All")), "1970-01-01 00:00:00.000Z"),
    "before year 1": (pa.array([-800_000], pa.date32()), "-0221-09-04"),
    "time": (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
    "duration": (pa.array([5], pa.duration("ns")), "5 ns"),
    "list": (pa.array([[1, None]], pa.list_(pa.timestamp("ns"))), ["1970-01-01 00:00:00.000000001", None]),
    "struct": (
        pa.array([{"a": [{"t": 2**62}], "b": 1}], DEEP),
        {"a": [{"t": "<value out of range: 4611686018427387904>"}], "b": 1},
    ),
    "map": (
        pa.array([[("k", 0)]], pa.map_(pa.string(), pa.timestamp("ns"))),
        [["k", f"{DAY} 00:00:00.000000000"]],
    ),
    "fixed": (pa.array([[0]], pa.list_(pa.date32(), 1)), ["1970-01-01"]),
    "bad text": (pa.array([b"a\xff"], pa.binary()).view(pa.string()), "a\ufffd"),
}


@pytest.mark.parametrize("name", TIMES)
def test_times_that_python_cannot_hold_are_text_in_a_tar(tmp_path, name, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)  # nobody needs to have it
    array, text = TIMES[name]
    nulls = pa.nulls(2, array.type)
    table = prompt_table(3, it=pa.concat_arrays([nulls, array]))
    spec, plan = small_job(tmp_path, table, format="webdataset")
    with tarfile.open(fileobj=io.BytesIO(small_part(spec, plan, 0).data)) as tar:
        about = [json.load(tar.extractfile(f"{row:06}.json"))["it"] for row in range(3)]
    assert about == [None, None, text]


# Large and encrypted


def test_large_rows_are_read_a_few_at_a_time(tmp_path):
    """More than 2 GiB of them, as one batch is, would be Arrow's end."""
    num_rows, size = 300, 1_000_000
    piece = np.random.default_rng(0).bytes(size)
    deep = pa.array([{"x": [piece]}] * 3)
    with pq.ParquetWriter(
        tmp_path / "a.parquet", pa.schema([("prompt", pa.string()), ("it", deep.type)]), use_dictionary=False
    ) as writer:
        table = pa.table({"prompt": ["p"] * num_rows, "it": pa.concat_arrays([deep] * (num_rows // 3))})
        writer.write_table(table, row_group_size=num_rows)
    del table
    spec = job(tmp_path / "a.parquet", limit=8)
    plan = make_plan(spec)
    file = plan.files[0]
    wanted = Wanted(["prompt"], file.passthrough)
    batches = read(
        place_of(file.path, **server_of(spec)), Found(file.path, file.size_bytes, file.etag), "parquet",
        wanted, style=style_of(spec), first_row=0, num_rows=num_rows, digest=file.footer_digest,
    )  # fmt: skip
    assert max(batch.others.nbytes for batch in batches) < 40_000_000
    assert read_shard(spec, file, 0, 8).passthrough["it"][7].as_py() == {"x": [piece]}


class Keys(pe.KmsClient):
    """Keys in the clear."""

    def __init__(self, config):
        super().__init__()

    def wrap_key(self, key, master):
        return base64.b64encode(key)

    def unwrap_key(self, wrapped, master):
        return base64.b64decode(wrapped)


def encrypted(path: Path, *columns: str) -> Path:
    """A table whose footer can be read, and all but these columns."""
    factory = pe.CryptoFactory(Keys)
    settings = pe.EncryptionConfiguration("f", column_keys={"c": columns}, plaintext_footer=True)
    keys = factory.file_encryption_properties(pe.KmsConnectionConfig(), settings)
    table = pa.table({"prompt": ["a", "b"], "secret": ["x", "y"], "n": [1, 2], "deep": [[1], [2]]})
    with pq.ParquetWriter(path, table.schema, encryption_properties=keys) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize(
    ("columns", "named"),
    [(("secret",), "secret"), (("deep.list.element",), "deep"), (("prompt",), "prompt")],
)
def test_an_encrypted_column_is_named_by_the_plan(tmp_path, columns, named):
    path = encrypted(tmp_path / "a.parquet", *columns)
    with pytest.raises(PromptsError, match=rf"a\.parquet: column '{named}' is encrypted; decrypt it, or"):
        make_plan(job(path))


def test_the_other_columns_of_an_encrypted_table_can_be_used(tmp_path):
    spec = job(encrypted(tmp_path / "a.parquet", "secret", "deep.list.element"), keep=["n"])
    shard = read_shard(spec, make_plan(spec).files[0], 0, 2)
    assert [row.prompt for row in shard.rows] == ["a", "b"]
    assert shard.passthrough.to_pydict() == {"n": [1, 2]}


# Values that mean nothing is there


def test_nan_is_missing(tmp_path):
    nan = float("nan")
    table = {"prompt": ["x", "y"], "height": [nan, 512.0], "num_images": pa.array([nan, 2], pa.float32())}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("prompt,height,num_images\nx,NaN,nan\ny,512.0,2\n")
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "x", "height": NaN, "num_images": NaN}\n{"prompt": "y", "height": 512, "num_images": 2}\n'
    )
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        spec = job(tmp_path / name)
        shard = read_shard(spec, make_plan(spec).files[0], 0, 2)
        found = [(row.row_id, row.height) for row in shard.rows]
        assert found == [("a:0", None), ("a:1#0", 512), ("a:1#1", 512)]
