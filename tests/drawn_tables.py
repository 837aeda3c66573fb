"""Prompt tables as hypothesis draws them: all that pyarrow, DuckDB and polars write into a Parquet file.

A table has a column of prompts, at times one of those with a meaning, and some that pass through: of any
type, with hostile values and names. A second file may lack a column of the first, or have it in another
order, of another width or with nulls only.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

try:
    import polars
except ImportError:  # it has no wheels for every machine
    polars = None

NAMES = (
    *(
        "tag",
        "Tag",
        "TAG",
        "score",
        "a.b",
        ".",
        "a b",
        " ",
        "",
        "x.list.element",
        "élan",
        "e\u0301lan",
        "日本語",
    ),
    *(
        "__index_level_0__",
        "list",
        "element",
        "key",
        "value",
        "0",
        "null",
        'quo"te',
        "it's",
        "new\nline",
        "{x}",
    ),
    *(
        "%s",
        "a,b",
        "[0]",
        "-",
        "*",
        "tab\tbed",
        "#0",
        "x" * 200,
        "🎈",
        "nul\0",
        "image.bytes",
        "Image",
        "PROMPT",
    ),
    *(
        "prompt.x",
        "latents.values.list.element",
        "row_ids",
        "file",
        "_type",
        "dtype",
        "split",
        "__key__",
        "json",
    ),
)
OWN_NAMES = ("image", "stages", "mode", "model", "delta", "latents_shape", "denoise_seconds")
"""Of columns that the output has itself; no table with one of them can be used as it is."""
PROMPTS = ("a cat", "", "ä\u0085b", "line\nbreak", "nul\0", "🎈", "\u202e", "a" * 300, "!")
_PROMPTS = st.sampled_from(PROMPTS)

_TEXTS = (
    "",
    "a",
    "b",
    "ä",
    "nul\0",
    "\u0085",
    "🎈",
    "e\u0301",
    "line\nbreak",
    "null",
    "1",
    "\ufeff",
    "x" * 500,
)
_WIDTHS = {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}
_UNSIGNED = {8: pa.uint8(), 16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}
_UNITS = ("s", "ms", "us", "ns")
_A_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_YEAR_10000 = 253_402_300_800
_LEAVES = st.sampled_from(
    (
        *(
            pa.null(),
            pa.bool_(),
            pa.float16(),
            pa.float32(),
            pa.float64(),
            *_WIDTHS.values(),
            *_UNSIGNED.values(),
        ),
        *(
            pa.decimal32(5, 2),
            pa.decimal64(16, 0),
            pa.decimal128(38, 10),
            pa.decimal128(3, 3),
            pa.decimal256(70, 5),
        ),
        *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()),
        *(
            pa.binary(1),
            pa.binary(12),
            pa.date32(),
            pa.date64(),
            pa.time32("s"),
            pa.time32("ms"),
            pa.time64("us"),
        ),
        *(pa.time64("ns"), *map(pa.duration, _UNITS), *map(pa.timestamp, _UNITS)),
        *(pa.timestamp(unit, zone) for unit in _UNITS for zone in ("UTC", "Europe/Berlin", "+05:30")),
        pa.month_day_nano_interval(),
    )
)
_EXTENSIONS = st.sampled_from(
    (
        *(pa.uuid(), pa.bool8(), pa.json_(), pa.json_(pa.large_string()), pa.json_(pa.string_view())),
        *(
            pa.opaque(pa.binary(), "geometry", "somebody"),
            pa.opaque(pa.null(), "", ""),
            pa.opaque(pa.int64(), "a", "b"),
        ),
        *(pa.fixed_shape_tensor(pa.int16(), (2, 2)), pa.fixed_shape_tensor(pa.float32(), (1, 2, 2))),
        pa.fixed_shape_tensor(pa.float64(), (2, 1), permutation=[1, 0]),
        pa.fixed_shape_tensor(pa.int8(), (2, 1, 3), permutation=[2, 0, 1]),
        pa.fixed_shape_tensor(pa.uint8(), (1, 2), dim_names=["y", "x"]),
    )
)
_NESTED = st.sampled_from(
    [
        "list",
        "list",
        "large_list",
        "list_view",
        "large_list_view",
        "fixed_size_list",
        "struct",
        "struct",
        "map",
    ]
)
_KEYS = st.sampled_from([pa.string(), pa.int32(), pa.binary(), pa.date32(), pa.large_string()])
_INDICES = st.sampled_from([pa.int8(), pa.uint16(), pa.int32(), pa.int64()])
_WORDS = st.sampled_from(
    (
        *(
            pa.string(),
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.int64(),
            pa.binary(),
            pa.float64(),
        ),
        *(pa.date32(), pa.timestamp("s"), pa.null(), pa.bool_(), pa.decimal128(5, 2)),
    )
)
_SELDOM = st.sampled_from([False, False, False, True])
_ZERO_OR_ONE = st.sampled_from([0, 1])
_ZERO_TO_TWO = st.sampled_from([0, 1, 2])
_JSON = st.sampled_from(["{}", '{"a": [1, null]}', "1", "null", '"ä"'])
_FIELD_NAMES = st.sampled_from(
    ("a", "b", "A", "", "a.b", "element", "list", "key", "_type", "é", "bytes", "path", "feature")
)


# Columns of Arrow's types.


@st.composite
def types(draw: Any, depth: int = 2) -> pa.DataType:
    """Any type, `depth` times nested at most."""
    kind = draw(
        st.sampled_from(["leaf"] * 4 + ["extension"] * 2 + ["dictionary"] + ["nested"] * (3 if depth else 0))
    )
    if kind == "nested":
        return _nested(draw, depth)
    if kind == "dictionary":
        return pa.dictionary(draw(_INDICES), draw(_WORDS), draw(st.booleans()))
    return draw(_LEAVES if kind == "leaf" else _EXTENSIONS)


def _nested(draw: Any, depth: int) -> pa.DataType:
    kind = draw(_NESTED)
    inner = draw(types(depth - 1))
    if kind == "struct":
        names = draw(st.lists(_FIELD_NAMES, min_size=1, max_size=2, unique=True))
        return pa.struct([pa.field(names[0], inner), *(pa.field(name, draw(types(0))) for name in names[1:])])
    if kind == "map":
        return pa.map_(draw(_KEYS), inner)
    if kind == "fixed_size_list":
        return pa.list_(inner, draw(st.integers(1, 2)))
    return {
        "list": pa.list_,
        "large_list": pa.large_list,
        "list_view": pa.list_view,
        "large_list_view": pa.large_list_view,
    }[kind](inner)


@cache
def values_of(type: pa.DataType) -> st.SearchStrategy[Any]:
    """Values of a type without inner ones, its ends among them, as `pa.array` takes them."""
    if pa.types.is_null(type):
        return st.none()
    if pa.types.is_boolean(type):
        return st.booleans()
    if pa.types.is_integer(type):
        signed = pa.types.is_signed_integer(type)
        low = -(2 ** (type.bit_width - 1)) if signed else 0
        return st.sampled_from([0, 1, low, low + 2**type.bit_width - 1])
    if pa.types.is_floating(type):
        return st.sampled_from([0.0, 0.5, -0.0, float("nan"), float("inf"), float("-inf"), 5.9604645e-08])
    if pa.types.is_decimal(type):
        nines = Decimal((0, (9,) * type.precision, -type.scale))
        return st.sampled_from(
            [Decimal((0, (0,), -type.scale)), nines, nines.copy_negate(), Decimal((0, (1,), -type.scale))]
        )
    if pa.types.is_date(type):
        ends = [
            0,
            1,
            -719_163,
            2_932_897,
            -(2**31),
            2**31 - 1,
            2**31 - 2,
        ]  # of years, and DuckDB's infinities
        return st.sampled_from([day * (86_400_000 if pa.types.is_date64(type) else 1) for day in ends])
    if pa.types.is_time(type):
        return st.sampled_from([0, 1, 86_400 * _A_SECOND[type.unit] - 1])
    if pa.types.is_timestamp(type):
        far = min(_YEAR_10000 * _A_SECOND[type.unit], 2**63 - 1)
        return st.sampled_from([0, 1, -1, 1_700_000_000_123 * _A_SECOND[type.unit] // 1000, far, 2**63 - 1])
    if pa.types.is_duration(type):
        return st.sampled_from([0, 1, -1, 2**62])
    if pa.types.is_interval(type):
        return st.sampled_from([(0, 0, 0), (14, -3, 10**9)])
    if pa.types.is_fixed_size_binary(type):
        return st.sampled_from([b"\0" * type.byte_width, b"\xff" * type.byte_width])
    if pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type):
        return st.sampled_from([b"", b"a", b"\xff\x00", b"\x89PNG"])
    return st.sampled_from(_TEXTS)


def column(draw: Any, type: pa.DataType, rows: int) -> pa.Array:
    """An array of any type, built from the inside."""
    if isinstance(type, pa.BaseExtensionType):
        if type.extension_name == "arrow.json":
            storage = pa.array(_some(draw, _JSON, rows), type.storage_type)
        else:
            storage = column(draw, type.storage_type, rows)
        return pa.ExtensionArray.from_storage(type, storage)
    if pa.types.is_dictionary(type):
        words = pa.array([draw(values_of(type.value_type)) for _ in range(2)], type.value_type)
        indices = _some(draw, _ZERO_OR_ONE, rows)
        return pa.DictionaryArray.from_arrays(pa.array(indices, type.index_type), words, ordered=type.ordered)
    if not pa.types.is_nested(type):
        return pa.array(_some(draw, values_of(type), rows), type)
    nulls = [draw(_SELDOM) for _ in range(rows)]
    mask = pa.array(nulls, pa.bool_())
    if pa.types.is_struct(type):
        inner = [column(draw, field.type, rows) for field in type]
        return pa.StructArray.from_arrays(inner, fields=list(type), mask=mask)
    if pa.types.is_fixed_size_list(type):
        inner = column(draw, type.value_type, rows * type.list_size)
        return pa.FixedSizeListArray.from_arrays(inner, type=type, mask=mask)
    lengths = [0 if null else draw(_ZERO_TO_TWO) for null in nulls]
    starts = [sum(lengths[:k]) for k in range(rows + 1)]
    if pa.types.is_list_view(type) or pa.types.is_large_list_view(type):
        inner, kind = column(draw, type.value_type, starts[-1]), pa.ListViewArray
        kind, width = (
            (kind, pa.int32()) if pa.types.is_list_view(type) else (pa.LargeListViewArray, pa.int64())
        )
        ends = [pa.array(numbers, width) for numbers in (starts[:-1], lengths)]
        return kind.from_arrays(*ends, inner, type=type, mask=mask)
    wide = pa.types.is_large_list(type)
    offsets = pa.array(starts, pa.int64() if wide else pa.int32())
    if pa.types.is_map(type):
        some = [
            draw(st.lists(values_of(type.key_type), min_size=n, max_size=n, unique=True)) for n in lengths
        ]
        keys = [key for one in some for key in one]
        inner = column(draw, type.item_type, starts[-1])
        return pa.MapArray.from_arrays(offsets, pa.array(keys, type.key_type), inner, type, mask=mask)
    kind = pa.LargeListArray if wide else pa.ListArray
    return kind.from_arrays(offsets, column(draw, type.value_type, starts[-1]), type=type, mask=mask)


def _some(draw: Any, values: st.SearchStrategy[Any], rows: int) -> list[Any]:
    return [None if draw(_SELDOM) else draw(values) for _ in range(rows)]


# Files.


@dataclass(frozen=True)
class ArrowFile:
    """A table that pyarrow writes."""

    table: pa.Table
    options: dict[str, Any]

    def write(self, path: Path) -> None:
        pq.write_table(self.table, path, **self.options)

    def __repr__(self) -> str:
        columns = [
            f"{field.name!r}: {field.type} = {self.table[k]}" for k, field in enumerate(self.table.schema)
        ]
        return "\n".join([f"ArrowFile({self.options})", *columns])


@dataclass(frozen=True)
class DuckdbFile:
    """A table that DuckDB writes: for each column its name, its type and literals of that type."""

    columns: tuple[tuple[str, str, tuple[str, ...]], ...]

    def write(self, path: Path) -> None:
        rows = zip(*(values for _, _, values in self.columns), strict=True)
        columns = ", ".join(
            f"CAST(c{k} AS {type}) AS {_quoted(name)}" for k, (name, type, _) in enumerate(self.columns)
        )
        names = ", ".join(f"c{k}" for k in range(len(self.columns)))
        values = ", ".join(f"({', '.join(row)})" for row in rows)
        duckdb.sql(
            f"COPY (SELECT {columns} FROM (VALUES {values}) AS t({names})) TO '{path}' (FORMAT parquet)"
        )


@dataclass(frozen=True)
class PolarsFile:
    """A table that polars writes: for each column its name, its type as polars spells it, and values."""

    columns: tuple[tuple[str, str, tuple[Any, ...]], ...]

    def write(self, path: Path) -> None:
        assert polars is not None, "it was asked before"
        series = [
            polars.Series(name, list(values), eval(type, vars(polars)), strict=True)
            for name, type, values in self.columns
        ]
        polars.DataFrame(series).write_parquet(path)


File = ArrowFile | DuckdbFile | PolarsFile


@dataclass(frozen=True)
class Prompts:
    """Files whose rows are a job's, and how the job's output is to be written."""

    files: tuple[File, ...]
    shard_rows: int
    output: str
    reader: str
    """Of the output, beside pyarrow; `card`: `datasets` by the folder's card."""

    def write(self, folder: Path) -> list[Path]:
        folder.mkdir()
        paths = [folder / f"{'ab'[k]}.parquet" for k in range(len(self.files))]
        for file, path in zip(self.files, paths, strict=True):
            file.write(path)
        return paths


@st.composite
def prompts(draw: Any) -> Prompts:
    """A job's prompts, in one file or, more seldom, in two that differ."""
    kind = draw(st.sampled_from(["arrow"] * 4 + ["duckdb", "two"] + ["polars"] * (polars is not None)))
    rows = draw(st.integers(1, 4))
    if kind == "duckdb":
        files: tuple[File, ...] = (
            DuckdbFile(_foreign(draw, rows, _DUCKDB, "VARCHAR", "'{}'".format, "NULL")),
        )
    elif kind == "polars":
        files = (PolarsFile(_foreign(draw, rows, _POLARS, "String", str, None)),)
    else:
        files = (_arrow_file(draw, _arrow_table(draw, rows)),)
        if kind == "two":
            files = (*files, _arrow_file(draw, _changed(draw, files[0].table)))
    output = draw(st.sampled_from(["parquet"] * 5 + ["webdataset"]))
    reader = draw(st.sampled_from(["duckdb", "datasets", "card"]))
    return Prompts(files, draw(st.sampled_from([100, 1, 2])), output, reader)


def _arrow_table(draw: Any, rows: int) -> pa.Table:
    texts = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    array = pa.array(_some(draw, _PROMPTS, rows), pa.string())
    found: dict[str, pa.Array] = {"prompt": _as(array, draw(st.sampled_from(texts)))}
    if not draw(st.integers(0, 4)):
        name, type = draw(st.sampled_from(_MEANINGS))
        found[name] = column(draw, type, rows)
    own = st.sampled_from([False] * 30 + [True])
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(OWN_NAMES if draw(own) else NAMES))
        found.setdefault(name, column(draw, draw(types()), rows))
    return pa.table(found)


_MEANINGS = (
    *(("row_id", pa.string()), ("id", pa.int64()), ("id", pa.uuid()), ("id", pa.string_view())),
    *(("id", pa.decimal128(5, 0)), ("height", pa.int8()), ("width", pa.float64()), ("seed", pa.uint64())),
    *(("num_images", pa.float32()), ("negative_prompt", pa.large_string()), ("negative_prompt", pa.null())),
    *(("id", pa.float64()), ("seed", pa.date32()), ("id", pa.binary_view()), ("seed", pa.null())),
)


def _arrow_file(draw: Any, table: pa.Table) -> ArrowFile:
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "store_schema": st.just(False),
                "use_dictionary": st.just(False),
                "data_page_version": st.just("2.0"),
                "version": st.sampled_from(["1.0", "2.4"]),
                "row_group_size": st.just(1),
                "use_compliant_nested_type": st.just(False),
                "use_deprecated_int96_timestamps": st.just(True),
            },
        )
    )
    return ArrowFile(
        table.select([name for name in table.column_names if _writes(table, name, options)]), options
    )


def _writes(table: pa.Table, name: str, options: dict[str, Any]) -> bool:
    try:
        pq.write_table(table.select([name]), io.BytesIO(), **options)
    except (pa.ArrowException, OSError):
        return False
    return True


def _changed(draw: Any, table: pa.Table) -> pa.Table:
    """Another table whose columns are mostly those of this one."""
    rows, found = draw(st.integers(1, 3)), {}
    for field in table.schema:
        how = draw(st.sampled_from(["same", "same", "wider", "wider", "nulls", "other", "missing"]))
        if field.name == "prompt":
            found["prompt"] = pa.array(_some(draw, _PROMPTS, rows), pa.string())
        elif how == "nulls":
            found[field.name] = pa.nulls(rows)
        elif how != "missing":
            type = draw(types()) if how == "other" else field.type
            type = draw(st.sampled_from(_relatives(type))) if how == "wider" else type
            found[field.name] = column(draw, type, rows)
    if draw(st.booleans()):
        found.setdefault(draw(st.sampled_from(NAMES)), column(draw, draw(types()), rows))
    return pa.table({name: found[name] for name in draw(st.permutations(list(found)))})


@cache
def _relatives(type: pa.DataType) -> list[pa.DataType]:
    """Types that people mix with this one."""
    families = (
        (
            *_WIDTHS.values(),
            *_UNSIGNED.values(),
            pa.float32(),
            pa.float64(),
            pa.decimal128(38, 10),
            pa.float16(),
        ),
        (
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.dictionary(pa.int8(), pa.string()),
            pa.binary(),
        ),
        tuple(pa.timestamp(unit, zone) for unit in _UNITS for zone in (None, "UTC", "Europe/Berlin")),
        (pa.date32(), pa.date64(), pa.timestamp("us")),
        (*map(pa.duration, _UNITS),),
        (pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")),
        (pa.uuid(), pa.binary(16), pa.string()),
        (pa.json_(), pa.string()),
    )
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        inner = type.value_type
        return [pa.list_(inner), pa.large_list(inner), pa.list_(inner, 2), pa.list_(_relatives(inner)[0])]
    if pa.types.is_struct(type):
        return [pa.struct(list(type)[:-1] or list(type)), pa.struct([*type, pa.field("more", pa.int8())])]
    return [other for family in families if type in family for other in family] or [type]


def _as(array: pa.Array, type: pa.DataType) -> pa.Array:
    return array.dictionary_encode() if pa.types.is_dictionary(type) else array.cast(type)


# What only DuckDB and polars have.


def _foreign(draw: Any, rows: int, kinds: Iterable, text: str, quoted: Any, null: Any) -> tuple:
    def values(some: st.SearchStrategy[Any]) -> tuple:
        return tuple(null if value is None else value for value in _some(draw, some, rows))

    some = st.sampled_from([quoted(prompt) for prompt in PROMPTS if "\0" not in prompt])
    found = {"prompt": (text, values(some))}
    taken = {"prompt"}
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from([name for name in NAMES if name and "\0" not in name]))
        type, possible = draw(st.sampled_from(kinds))
        if name.lower() not in taken:  # DuckDB has names of any case, but not two that differ in it alone
            found[name] = (type, values(st.sampled_from(possible)))
        taken.add(name.lower())
    return tuple((name, *about) for name, about in found.items())


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_DUCKDB = (
    ("UUID", ("'00000000-0000-0000-0000-000000000001'", "'ffffffff-ffff-ffff-ffff-ffffffffffff'")),
    ("INTERVAL", ("'1 month 3 seconds'", "'1 day'")),
    ("HUGEINT", ("1", "170141183460469231731687303715884105727")),
    ("UHUGEINT", ("1",)),
    ("BIT", ("'0101'", "'1'")),
    ("ENUM('a', 'b')", ("'a'", "'b'")),
    ("TIMETZ", ("'12:00:00+02'", "'00:00:00-15:59'")),
    ("TIME", ("'12:00:00.000001'", "'24:00:00'")),
    ("TIME_NS", ("'12:00:00.000000001'",)),
    ("TIMESTAMP_S", ("'2020-01-01'",)),
    ("TIMESTAMP_MS", ("'2020-01-01'",)),
    ("TIMESTAMP_NS", ("'2020-01-01'", "'infinity'")),
    ("TIMESTAMP", ("'2020-01-01'", "'infinity'", "'0044-03-15 (BC)'", "'20000-01-01'")),
    ("TIMESTAMPTZ", ("'2020-01-01'", "'-infinity'")),
    ("DATE", ("'2020-01-01'", "'infinity'", "'0044-03-15 (BC)'", "'5000000-01-01'")),
    ("UNION(a INTEGER, b VARCHAR)", ("union_value(a := 1)", "union_value(a := 2)")),
    ("MAP(VARCHAR, INTEGER)", ("MAP{'a': 1}", "MAP{}", "MAP{'a': NULL, '': 2}")),
    ("MAP(INTEGER, UUID[])", ("MAP{1: ['00000000-0000-0000-0000-000000000001']}",)),
    ("STRUCT(a INTEGER, B VARCHAR)", ("{'a': 1, 'B': 'x'}", "{'a': NULL, 'B': NULL}")),
    ("STRUCT(u UUID, i INTERVAL)", ("{'u': '00000000-0000-0000-0000-000000000001', 'i': '1 day'}",)),
    ("INTEGER[2]", ("[1, 2]", "[NULL, 2]")),
    ("UUID[]", ("['00000000-0000-0000-0000-000000000001']", "[]")),
    ("JSON", ("'{\"a\": 1}'", "'null'")),
    ("JSON[]", ("['1']", "[]")),
    ("BLOB", ("'\\xFF'", "''")),
    ("VARIANT", ("1", "2")),
    ("GEOMETRY", ("'POINT(0 0)'",)),
    ("DECIMAL(38, 10)", ("1.5", "-9999999999999999999999999999.9999999999")),
    ("DECIMAL(4, 1)", ("1.5",)),
    ("BIGNUM", ("123", "-1")),
    ("DOUBLE", ("'nan'", "'-inf'", "'-0.0'")),
    ("FLOAT", ("'nan'", "'0.1'")),
    ("BOOLEAN", ("true", "false")),
    ("UTINYINT", ("255",)),
    ('"NULL"', ("NULL",)),
)
_POLARS = (
    ("Categorical", ("a", "b", "")),
    ("Enum(['a', 'b'])", ("a", "b")),
    ("Decimal(38, 10)", (Decimal("1.5"), Decimal("-0.0000000001"))),
    ("Int128", (1, 2**100)),
    ("UInt128", (1, 2**100)),
    ("Float16", (1.5, float("nan"))),
    ("Array(Int8, 2)", ((1, 2), (None, 2))),
    ("Array(Int8, 0)", ((),)),
    ("Array(Array(Float32, 1), 2)", (((0.5,), (None,)),)),
    ("List(List(String))", (((),), (("a", None), None))),
    ("List(Categorical)", (("a", "b"), ())),
    ("Struct({'a': Int8, 'b': Struct({'c': String})})", ({"a": 1, "b": {"c": "x"}}, {"a": None, "b": None})),
    ("List(Struct({'a': Datetime('ns', 'Europe/Berlin')}))", (({"a": None},), ())),
    ("Time", (0, 86_399_999_999_999)),
    ("Date", (0, -719_163, 2_932_897)),
    ("Datetime('ns', 'Europe/Berlin')", (0, 2**62)),
    ("Datetime('us')", (0, -(2**62))),
    ("Datetime('ms', 'UTC')", (0, _YEAR_10000 * 1000)),
    ("Duration('ns')", (0, -1)),
    ("Duration('us')", (0, 2**62)),
    ("Duration('ms')", (0, 2**62)),
    ("Binary", (b"", b"\xff")),
    ("Null", (None,)),
    ("UInt64", (0, 2**64 - 1)),
    ("Boolean", (True, False)),
    ("String", ("", "a" * 20)),
)
