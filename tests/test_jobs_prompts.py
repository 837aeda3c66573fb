"""The prompt table, whatever is in it: each input row ends as samples or rejects, or no work begins."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import KEYS, S3Server

from overtone.jobs.columns import OUTPUT_COLUMNS
from overtone.jobs.columns import OUTPUT_COLUMNS as PARTS_COLUMNS
from overtone.jobs.errors import PromptsError, StoreError
from overtone.jobs.plan import JobPlan, difference, make_plan
from overtone.jobs.prompts import ShardRows, check_row_ids, expected_row_ids, lines, read_shard
from overtone.jobs.prompts.globs import glob_matcher, relative_names
from overtone.jobs.prompts.values import MAX_IMAGES, MAX_PROMPT, MAX_ROW_ID
from overtone.jobs.rows import MAX_SEED, image_seed, row_seed
from overtone.jobs.spec import JobSpec


def job(*paths: object, rows: int = 256, **prompts) -> JobSpec:
    return JobSpec(
        model="tiny",
        prompts={"path": [str(path) for path in paths], **prompts},
        output="/out",
        shards={"rows": rows},
        seed=5,
    )


def table(path: Path, columns: dict | pa.Table, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def read_all(spec: JobSpec, plan: JobPlan | None = None) -> list[ShardRows]:
    plan = plan or make_plan(spec)
    return [read_shard(spec, plan.files[s.file], s.first_row, s.num_rows) for s in plan.shards()]


def rows_of(spec: JobSpec) -> list:
    return [row for shard in read_all(spec) for row in shard.rows]


def owed(spec: JobSpec) -> Iterator[tuple[int, list[str]]]:
    plan = make_plan(spec)
    return expected_row_ids(spec, plan.files, plan.shard_rows)


def rejects_of(spec: JobSpec) -> list:
    return [reject for shard in read_all(spec) for reject in shard.rejects]


def refusal(spec: JobSpec, tmp_path: Path) -> str:
    with pytest.raises(PromptsError) as caught:
        check_row_ids(spec, make_plan(spec).files)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


# Which files


@pytest.fixture
def tree(tmp_path):
    for name in (
        "b.parquet",
        "a.parquet",
        "sub/c.parquet",
        "sub/deep/d.pq",
        "_tmp/x.parquet",
        ".hid.parquet",
    ):
        table(tmp_path / name, {"prompt": [name]})
    (tmp_path / "sub" / "_SUCCESS").touch()
    (tmp_path / "README.md").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["b.parquet"], ["b.parquet"]),
        (["."], ["a.parquet", "b.parquet", "sub/c.parquet", "sub/deep/d.pq"]),
        (["./"], ["a.parquet", "b.parquet", "sub/c.parquet", "sub/deep/d.pq"]),
        (["sub"], ["c.parquet", "deep/d.pq"]),
        (["*.parquet"], ["a.parquet", "b.parquet"]),
        (["?.parquet"], ["a.parquet", "b.parquet"]),
        (["[!a].parquet"], ["b.parquet"]),
        (["[a-b].parquet"], ["a.parquet", "b.parquet"]),
        (["**/*.p*"], ["a.parquet", "b.parquet", "sub/c.parquet", "sub/deep/d.pq"]),
        (["*/c.parquet"], ["sub/c.parquet"]),
        (["sub/**/*.pq"], ["deep/d.pq"]),
        (["_tmp/*"], ["x.parquet"]),
        ([".h*.parquet"], [".hid.parquet"]),
        (["b.parquet", "a.parquet"], ["b.parquet", "a.parquet"]),
        (["b.parquet", "*.parquet"], ["b.parquet", "a.parquet"]),
        (["sub/deep", "a.parquet"], ["sub/deep/d.pq", "a.parquet"]),
    ],
)
def test_files_folders_globs_and_lists(tree, paths, names):
    plan = make_plan(job(*(f"{tree}/{path}" for path in paths)))
    assert [file.relpath for file in plan.files] == names
    assert all(Path(file.path).is_file() for file in plan.files)


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path):
    table(tmp_path / "a[1].parquet", {"prompt": ["x"]})
    table(tmp_path / "a1.parquet", {"prompt": ["y"]})
    assert [row.prompt for row in rows_of(job(tmp_path / "a[1].parquet"))] == ["x"]


def test_folders_that_link_to_each_other_end(tree):
    (tree / "sub" / "up").symlink_to(tree, target_is_directory=True)
    assert len(make_plan(job(tree)).files) == 4


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nope.parquet", "prompts.path: there is no file or folder nope.parquet"),
        ("nope/*.parquet", "prompts.path: there is no folder nope, so nope/*.parquet matches nothing"),
        ("*.nope", "prompts.path: *.nope matches no file"),
        ("README.md", "prompts.path: README.md ends in none of .parquet, .pq, .csv"),
        ("a.parquet.gz", "prompts.path: a.parquet.gz ends in none of .parquet, .pq, .csv"),
        ("nothing", "prompts.path: there is no file nothing, and none in a folder of that name"),
        ("texts", "prompts.path: there is no parquet file in texts; set prompts.format to csv"),
        ("s3://*/x.parquet", "prompts.path: s3://*/x.parquet needs a bucket or server name"),
        ("nosuch://x/y.parquet", "nosuch://x/y.parquet: Protocol not known: nosuch"),
    ],
)
def test_paths_that_name_nothing(tree, path, message):
    (tree / "nothing").mkdir()
    (tree / "texts").mkdir()
    (tree / "texts" / "a.csv").write_text("prompt\na\n")
    if path == "a.parquet.gz":
        (tree / path).touch()
    assert refusal(job(path if "://" in path else f"{tree}/{path}"), tree).startswith(message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    table(tmp_path / "a.parquet", {"prompt": ["x"]}).chmod(0)
    assert "Permission denied" in refusal(job(tmp_path / "a.parquet"), tmp_path)


NAMES = st.text(alphabet="ab._[]!^-", min_size=1, max_size=6).filter(lambda n: n[0] not in "._")


@given(NAMES)
def test_a_literal_pattern_matches_itself_alone(name):
    matches = glob_matcher(name.replace("[", "[[]"))
    assert matches(name)
    assert not matches(name + "a")


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("**", ["a", "a/b", "a/b/c", "a//b", "/a"], ["", "_a", ".a/b", "a/_b", "a//_b", "a/"]),
        ("**/b", ["b", "a/b", "a/a/b"], ["a", "b/a", "_a/b", "a/_a/b"]),
        ("**/_a/**/b", ["_a/b", "c/_a/d/b"], ["_a", "_a/_c/b", "_a/_a/b", "b"]),
        ("a**b", ["ab", "acb"], ["a/b"]),
        ("a[!b]c", ["axc"], ["a/c", "abc"]),
        ("[z-a]", [], ["a", "z", "-"]),
        ("[]]", ["]"], ["["]),
        ("[^a]", ["^", "a"], ["b"]),
        ("*/b", ["a/b", "/b"], ["b", "_a/b", "a/a/b"]),
    ],
)
def test_a_pattern_matches_name_by_name(pattern, matching, others):
    matches = glob_matcher(pattern)
    assert [name for name in (*matching, *others) if matches(name)] == matching


@pytest.mark.parametrize(
    ("bases", "paths", "names"),
    [
        (["/d"], ["/d/a.parquet"], ["a.parquet"]),
        (["/d/x", "/d/y"], ["/d/x/a", "/d/y/a"], ["x/a", "y/a"]),
        (["/d/xa", "/d/xb"], ["/d/xa/a", "/d/xb/a"], ["xa/a", "xb/a"]),
        (["s3://b/p"], ["s3://b/p/q/a"], ["q/a"]),
        (["s3://b/p"], ["s3://b/p/a", "s3://b/p//a"], ["a", "/a"]),
        (["s3://b/p/"], ["s3://b/p//a"], ["a"]),
        (["s3://b", "s3://c"], ["s3://b/a", "s3://c/a"], ["b/a", "c/a"]),
        (["s3://b", "/d"], ["s3://b/a", "/d/a"], ["s3/b/a", "file/d/a"]),
    ],
)
def test_relative_names(bases, paths, names):
    assert relative_names(bases, paths) == names


def test_a_job_moved_with_its_inputs_is_the_same_job(tmp_path):
    for folder in ("one", "two/deeper"):
        table(tmp_path / folder / "p" / "a.parquet", {"prompt": ["x", "y"]})
        table(tmp_path / folder / "q" / "a.parquet", {"prompt": ["z"]})
    os.utime(tmp_path / "one" / "p" / "a.parquet", (1, 1))  # a copy has its own time
    one, two = (job(tmp_path / f / "p", tmp_path / f / "q" / "*.parquet") for f in ("one", "two/deeper"))
    assert make_plan(one).fingerprint == make_plan(two).fingerprint
    assert rows_of(one) == rows_of(two)


# Parquet


def test_rows_are_the_same_whatever_the_sharding(tmp_path):
    path = table(
        tmp_path / "a.parquet",
        {
            "prompt": [f"p{i}" for i in range(50)],
            "num_images": pa.array([1 + i % 3 for i in range(50)], pa.int8()),
            "height": pa.array([None, 512.0] * 25),
            "tag": [{"k": [i]} for i in range(50)],
        },
        row_group_size=8,
    )
    seen = []
    for rows in (1, 3, 8, 50, 999):
        spec = job(path, rows=rows)
        shards = read_all(spec)
        assert all(shard.num_rows <= rows and not shard.rejects for shard in shards)
        tags = [
            shard.passthrough["tag"][row.source - shard.first_row].as_py()
            for shard in shards
            for row in shard.rows
        ]
        seen.append([(row, tag) for row, tag in zip([r for s in shards for r in s.rows], tags, strict=True)])
    assert len(seen[0]) == 99
    assert all(other == seen[0] for other in seen[1:])
    first = [row for row, _ in seen[0][:3]]
    assert [(row.row_id, row.image_index, row.height) for row in first] == [
        ("a:0", 0, None),
        ("a:1#0", 0, 512),
        ("a:1#1", 1, 512),
    ]
    assert len({row.seed for row, _ in seen[0]}) == 99
    assert len({row.row_id for row, _ in seen[0]}) == 99


def test_seeds(tmp_path):
    path = table(
        tmp_path / "a.parquet",
        {"prompt": ["x"] * 3, "seed": [0, None, MAX_SEED], "id": ["r", "s", "t"], "num_images": [2, 1, 1]},
    )
    assert [row.seed for row in rows_of(job(path))] == [0, image_seed(0, 1), row_seed(5, "s"), MAX_SEED]


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["é\0x", None]),
        pa.array(["é\0x", None], pa.large_string()),
        pa.array(["é\0x", None], pa.string_view()),
        pa.array(["é\0x", None]).dictionary_encode(),
        pa.array(["é\0x".encode(), None], pa.binary()),
        pa.array(["é\0x".encode(), None], pa.large_binary()),
    ],
)
def test_texts_of_every_kind(tmp_path, array):
    path = table(tmp_path / "a.parquet", {"prompt": array, "negative_prompt": array})
    (shard,) = read_all(job(path))
    assert [(row.prompt, row.negative_prompt) for row in shard.rows] == [("é\0x", "é\0x")]
    assert [reject.message for reject in shard.rejects] == ["prompt is null"]


def test_an_empty_prompt_is_a_prompt(tmp_path):
    assert [row.prompt for row in rows_of(job(table(tmp_path / "a.parquet", {"prompt": [""]})))] == [""]


@pytest.mark.parametrize(
    ("array", "ids"),
    [
        (pa.array(["../../etc/passwd", "a/b", "{x}%s"]), ["../../etc/passwd", "a/b", "{x}%s"]),
        (pa.array([7, -1, 2**40]), ["7", "-1", str(2**40)]),
        (pa.array([1, 2, 2**64 - 1], pa.uint64()), ["1", "2", str(2**64 - 1)]),
        (pa.array([Decimal(1), Decimal(2), Decimal(3)], pa.decimal128(20, 0)), ["1", "2", "3"]),
        (pa.array([None, "x", ""]), ["a:0", "x", "a:2"]),
        (pa.nulls(3), ["a:0", "a:1", "a:2"]),
    ],
)
@pytest.mark.parametrize("name", ["row_id", "id"])
def test_row_ids(tmp_path, array, ids, name):
    path = table(tmp_path / "a.parquet", {name: array, "prompt": ["x", "y", "z"]})
    spec = job(path, rows=2)
    assert [row.row_id for row in rows_of(spec)] == ids
    assert list(owed(spec)) == [(0, ids[:2]), (1, ids[2:])]
    assert make_plan(spec).passthrough == pa.schema([])


def test_row_id_comes_before_id(tmp_path):
    path = table(tmp_path / "a.parquet", {"id": [1, 2], "row_id": ["a", "b"], "prompt": ["x", "y"]})
    spec = job(path)
    assert [row.row_id for row in rows_of(spec)] == ["a", "b"]
    assert make_plan(spec).passthrough.names == ["id"]


def test_columns_by_other_names(tmp_path):
    path = table(tmp_path / "a.parquet", {"caption": ["x"], "key": ["k"], "h": [64], "rest": [1]})
    spec = job(path, columns={"prompt": "caption", "row_id": "key", "height": "h"})
    assert [(row.prompt, row.row_id, row.height) for row in rows_of(spec)] == [("x", "k", 64)]
    assert make_plan(spec).passthrough.names == ["rest"]


def test_other_columns_pass_through_untouched(tmp_path):
    other = {
        "when": pa.array([1, None], pa.timestamp("ns", "Europe/Berlin")),
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "raw": pa.array([b"\xff\0", None]),
        "price": pa.array([Decimal("1.10"), None], pa.decimal128(9, 2)),
        "a.b": pa.array([1, 2], pa.uint8()),
        "a": pa.array([{"b": 1, "c": [None]}, None]),
        "none": pa.nulls(2),
        "half": pa.array(np.array([1, np.nan], np.float16)),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    }
    path = table(tmp_path / "a.parquet", {"prompt": ["x", "y"], **other}, row_group_size=1)
    spec = job(path)
    (shard,) = read_all(spec)
    stored = pq.read_table(path).select(list(other))
    assert shard.passthrough.schema == make_plan(spec).passthrough
    assert shard.passthrough.schema.equals(stored.schema)
    assert shard.passthrough.to_pydict().keys() == other.keys()
    assert repr(shard.passthrough.to_pylist()) == repr(stored.to_pylist())
    assert make_plan(job(path, keep=["raw", "a"])).passthrough.names == ["raw", "a"]


def test_what_datasets_knows_of_columns_is_kept(tmp_path):
    about = {b"huggingface": b'{"info": {}}', b"pandas": b"{}"}
    path = table(tmp_path / "a.parquet", pa.table({"prompt": ["x"], "k": [1]}).replace_schema_metadata(about))
    assert make_plan(job(path)).passthrough.metadata == {b"huggingface": b'{"info": {}}'}
    assert read_all(job(path))[0].passthrough.schema.metadata == {b"huggingface": b'{"info": {}}'}


def test_only_the_row_groups_of_the_shard_are_read(tmp_path):
    prompts = [f"{i:03d}" + os.urandom(1000).hex() for i in range(400)]
    path = table(tmp_path / "a.parquet", {"prompt": prompts}, row_group_size=100)
    spec = job(path, rows=50)
    plan = make_plan(spec)
    start = pq.read_metadata(path).row_group(0).total_byte_size
    damaged = bytearray(path.read_bytes())
    damaged[4 : start // 2] = os.urandom(start // 2 - 4)  # the first row group
    path.write_bytes(damaged)
    shard = read_shard(spec, plan.files[0], 150, 50)
    assert [row.prompt[:3] for row in shard.rows] == [f"{i:03d}" for i in range(150, 200)]
    with pytest.raises(PromptsError, match=r"a\.parquet cannot be read"):
        read_shard(spec, plan.files[0], 0, 50)


def test_a_limit_takes_the_first_rows_and_leaves_later_files_alone(tmp_path):
    for name, n in (("a", 4), ("b", 4), ("c", 4)):
        table(tmp_path / f"{name}.parquet", {"prompt": [name] * n})
    spec = job(tmp_path, limit=6, rows=3)
    plan = make_plan(spec)
    assert [(file.relpath, file.num_rows, file.file_rows) for file in plan.files] == [
        ("a.parquet", 4, 4),
        ("b.parquet", 2, 4),
    ]
    assert [row.row_id for row in rows_of(spec)] == ["a:0", "a:1", "a:2", "a:3", "b:0", "b:1"]
    assert [shard for shard, _ in owed(spec)] == [0, 1, 2]
    assert make_plan(job(tmp_path, limit=99)).num_rows == 12


def test_files_without_rows_are_no_trouble_among_others(tmp_path):
    table(tmp_path / "a.parquet", {"prompt": pa.array([], pa.string()), "x": pa.nulls(0)})
    table(tmp_path / "b.parquet", {"prompt": ["x"], "x": ["text"]})
    spec = job(tmp_path)
    assert make_plan(spec).passthrough.field("x").type == pa.string()
    assert [row.row_id for row in rows_of(spec)] == ["b:0"]
    assert list(owed(spec)) == [(0, ["b:0"])]


# Refused before any work


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"caption": ["x"], "n": [1]},
            "a.parquet has no column 'prompt', it has 'caption', 'n'; say which one holds the prompts, as in "
            "`columns: {prompt: caption}` under `prompts`",
        ),
        (
            {"Prompt": ["x"]},
            "a.parquet has no column 'prompt', it has 'Prompt'; say which one holds the prompts, as",
        ),
        ({"prompt": [1]}, "a.parquet: column prompt has type int64, but must hold text"),
        ({"prompt": [["x"]]}, "a.parquet: column prompt has type list<element: string>, but must hold text"),
        (
            {"prompt": ["x"], "seed": ["1"]},
            "a.parquet: column seed has type string, but must hold whole numbers",
        ),
        (
            {"prompt": ["x"], "seed": [1.0]},
            "a.parquet: column seed has type double, but must hold whole numbers",
        ),
        (
            {"prompt": ["x"], "height": [True]},
            "a.parquet: column height has type bool, but must hold whole numbers",
        ),
        ({"prompt": ["x"], "id": [1.5]}, "a.parquet: column id (row_id) has type double, but must hold text"),
        ({"prompt": pa.array([], pa.string())}, "a.parquet has no rows; there is nothing to make"),
        (
            {"prompt": ["x"], "image": [b"x"]},
            "a.parquet: column 'image' would pass through to the output, which has one of that name itself; ",
        ),
        (
            {"prompt": ["x", "y"], "row_id": ["a", "a"]},
            "row_id 'a' is there twice: row 0 of a.parquet, row 1 of a.parquet",
        ),
        (
            {"prompt": ["x", "y"], "row_id": ["a", "a#1"], "num_images": [2, 1]},
            "row_id 'a#1' is there twice: row 0 of a.parquet, row 1 of a.parquet",
        ),
        (
            {"prompt": ["x", "y"], "row_id": [None, "a:0"]},
            "row_id 'a:0' is there twice: row 0 of a.parquet, row 1 of a.parquet",
        ),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, columns, message):
    path = table(tmp_path / "a.parquet", columns)
    assert refusal(job(path), tmp_path).startswith(message)


def test_two_columns_of_one_name(tmp_path):
    both = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"])
    message = refusal(job(table(tmp_path / "a.parquet", both)), tmp_path)
    assert message == "a.parquet has two columns named 'prompt'; rename one of them"


def test_a_mapped_column_that_is_not_there(tmp_path):
    path = table(tmp_path / "a.parquet", {"prompt": ["x"]})
    message = refusal(job(path, columns={"seed": "zaad"}), tmp_path)
    assert message.startswith(
        "a.parquet has no column 'zaad', which prompts.columns names for seed; it has 'prompt'"
    )
    message = refusal(job(path, keep=["tag"]), tmp_path)
    assert message == "a.parquet has no column 'tag', which prompts.keep names"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1], ["text"]),
        ([True], [1]),
        ([[1]], [{"k": 1}]),
        (pa.array([0], pa.timestamp("us")), pa.array([0], pa.timestamp("us", "UTC"))),
        ([{"k": [1]}], [{"k": ["text"]}]),
    ],
)
def test_files_that_differ(tmp_path, first, second):
    table(tmp_path / "a.parquet", {"prompt": ["x"], "a": first})
    table(tmp_path / "b.parquet", {"prompt": ["y"], "a": second})
    types = [pq.read_schema(tmp_path / f"{name}.parquet").field("a").type for name in "ba"]
    message = f"b.parquet has type {types[0]} in its column 'a', not {types[1]}, unlike a.parquet; make them"
    assert refusal(job(tmp_path), tmp_path).startswith(message)
    assert make_plan(job(tmp_path, keep=[])).num_rows == 2


def test_columns_in_another_order_are_alike(tmp_path):
    table(tmp_path / "a.parquet", {"prompt": ["x"], "a": [1], "b": ["u"]})
    table(tmp_path / "b.parquet", {"b": ["v"], "a": [2], "prompt": ["y"]})
    shards = read_all(job(tmp_path))
    assert [shard.passthrough.to_pylist() for shard in shards] == [[{"a": 1, "b": "u"}], [{"a": 2, "b": "v"}]]


def test_files_whose_rows_would_have_the_same_names(tmp_path):
    table(tmp_path / "a.parquet", {"prompt": ["x"]})
    table(tmp_path / "a.pq", {"prompt": ["y"]})
    assert "differ only in their endings" in refusal(job(tmp_path), tmp_path)


def test_duplicates_across_files_are_found_in_any_number_of_rows(tmp_path):
    table(tmp_path / "a.parquet", {"prompt": ["x"] * 5000, "id": list(range(5000))})
    table(tmp_path / "b.parquet", {"prompt": ["x"] * 5000, "id": [*range(5000, 9999), 4321]})
    message = refusal(job(tmp_path), tmp_path)
    assert message.startswith("row_id '4321' is there twice: row 4321 of a.parquet, row 4999 of b.parquet")


@pytest.mark.parametrize("cut", [0, 3, 4, 8, 11, 12, 100, -1, -4, -8, -9])
def test_a_truncated_file(tmp_path, cut):
    path = table(tmp_path / "a.parquet", {"prompt": ["x" * 50] * 50})
    path.write_bytes(path.read_bytes()[:cut])
    assert refusal(job(path), tmp_path).startswith("a.parquet is not a whole Parquet file: ")


def test_a_file_of_another_format(tmp_path):
    (tmp_path / "a.parquet").write_text("prompt\n" + "hello\n" * 10)
    assert refusal(job(tmp_path / "a.parquet"), tmp_path).startswith(
        "a.parquet is not a whole Parquet file: it is tr"
    )


def test_a_footer_longer_than_one_read(tmp_path):
    columns = {f"column_{i}_{'x' * 200}": [i] for i in range(300)}
    path = table(tmp_path / "a.parquet", {"prompt": ["x"], **columns})
    assert path.stat().st_size > 2 * 64 * 1024
    assert len(make_plan(job(path)).passthrough) == 300


@pytest.mark.parametrize("how", ["other footer", "longer", "gone"])
def test_a_file_that_changed_since_the_plan(tmp_path, how):
    path = table(tmp_path / "a.parquet", {"prompt": ["aaa", "bbb"]})
    spec = job(path)
    plan = make_plan(spec)
    if how == "gone":
        path.unlink()
    else:
        table(path, {"prompt": ["aaa", "bbc" if how == "other footer" else "b" * 99]})
    with pytest.raises(
        PromptsError, match="no longer there" if how == "gone" else "changed since the job was pl"
    ):
        read_shard(spec, plan.files[0], 0, 2)
    if how != "gone":
        assert make_plan(spec).fingerprint != plan.fingerprint


def test_the_output_has_the_names_that_are_kept_for_it():
    assert set(PARTS_COLUMNS) == OUTPUT_COLUMNS


def test_a_format_that_is_given_counts_for_names_without_endings(tmp_path):
    for name in ("part-00000", "deep/part-00001-c000"):
        table(tmp_path / "in" / name, {"prompt": [name]})
    spec = job(tmp_path / "in", format="parquet")
    assert [row.row_id for row in rows_of(spec)] == ["deep/part-00001-c000:0", "part-00000:0"]
    assert "there is no parquet file in in" in refusal(job(tmp_path / "in"), tmp_path)


# Rejects


def text_bytes(*values: bytes | None) -> pa.Array:
    """Strings that need not be UTF-8: Parquet writers do not check."""
    return pa.array(values, pa.binary()).view(pa.string())


BAD = [
    ({"prompt": [None]}, "prompt is null"),
    ({"prompt": text_bytes(b"\xff\xfe")}, "prompt is not valid UTF-8: b'\\xff\\xfe'"),
    ({"prompt": ["x" * (MAX_PROMPT + 1)]}, "prompt has 100,001 characters; at most 100,000"),
    ({"prompt": ["x"], "negative_prompt": text_bytes(b"\x80")}, "negative_prompt is not valid UTF-8"),
    ({"prompt": ["x"], "seed": [-1]}, "seed must be between 0 and 9223372036854775807, not -1"),
    (
        {"prompt": ["x"], "seed": pa.array([2**63], pa.uint64())},
        "seed must be between 0 and 9223372036854775807, not",
    ),
    ({"prompt": ["x"], "width": [float("inf")]}, "width must be a whole number, not inf"),
    ({"prompt": ["x"], "width": [1e300]}, "width must be between 1 and 65536, not 1000"),
    ({"prompt": ["x"], "height": [512.5]}, "height must be a whole number, not 512.5"),
    ({"prompt": ["x"], "height": [0]}, "height must be between 1 and 65536, not 0"),
    ({"prompt": ["x"], "height": [10**9]}, "height must be between 1 and 65536, not 1000000000"),
    ({"prompt": ["x"], "num_images": [0]}, f"num_images must be between 1 and {MAX_IMAGES}, not 0"),
    ({"prompt": ["x"], "num_images": [10**12]}, f"num_images must be between 1 and {MAX_IMAGES}, not"),
    ({"prompt": ["x"], "row_id": text_bytes(b"a\xff")}, "row_id is not valid UTF-8"),
    ({"prompt": ["x"], "row_id": ["r" * (MAX_ROW_ID + 1)]}, "row_id has 1,001 characters; at most 1,000"),
]


@pytest.mark.parametrize(("columns", "message"), BAD)
def test_rows_that_cannot_be_made(tmp_path, columns, message):
    path = table(tmp_path / "a.parquet", {"rest": [7], **columns})
    spec = job(path)
    check_row_ids(spec, make_plan(spec).files)
    (shard,) = read_all(spec)
    (reject,) = shard.rejects
    assert not shard.rows
    assert reject.message.startswith(message)
    assert (reject.error_class, reject.stage, reject.attempts, reject.source) == ("InvalidRow", "read", 0, 0)
    assert reject.row_id == "a:0"
    assert shard.passthrough.to_pylist() == [{"rest": 7}]
    assert [ids for _, ids in owed(spec)] == [["a:0"]]


def test_a_prompt_of_ten_megabytes_is_a_reject_that_keeps_its_beginning(tmp_path):
    path = table(tmp_path / "a.parquet", {"prompt": ["fine", "é" * 10_000_000]})
    (shard,) = read_all(job(path))
    assert [row.prompt for row in shard.rows] == ["fine"]
    assert shard.rejects[0].message == "prompt has 10,000,000 characters; at most 100,000"
    assert shard.rejects[0].prompt == "é" * 1000


def test_a_bad_row_that_asks_for_several_images_is_as_many_rejects(tmp_path):
    path = table(tmp_path / "a.parquet", {"prompt": ["x", None], "num_images": [2, 3]})
    spec = job(path)
    (shard,) = read_all(spec)
    assert [row.row_id for row in shard.rows] == ["a:0#0", "a:0#1"]
    assert [reject.row_id for reject in shard.rejects] == ["a:1#0", "a:1#1", "a:1#2"]
    assert shard.num_rows == 2


# csv and JSON lines


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    path.write_bytes(text.getvalue().encode())
    return path


def test_csv(tmp_path):
    path = write_csv(
        tmp_path / "a.csv",
        ["prompt", "seed", "height", "note"],
        [
            ["a, b", "7", "512", "n1"],
            ['two\n"lines"', "", "512.0", ""],
            ["", "1", "1", "x"],
            ["c", "x", "", "y"],
        ],
    )
    spec = job(path, rows=2)
    shards = read_all(spec)
    assert [(row.row_id, row.prompt, row.height) for shard in shards for row in shard.rows] == [
        ("a:0", "a, b", 512),
        ("a:1", 'two\n"lines"', 512),
    ]
    assert shards[0].rows[0].seed == 7
    assert [reject.message for reject in shards[1].rejects] == [
        "prompt is null",
        "seed must be a whole number, not 'x'",
    ]
    assert pa.concat_tables(shard.passthrough for shard in shards)["note"].to_pylist() == [
        "n1",
        None,
        "x",
        "y",
    ]


CELLS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=30), st.integers(1, 7))
def test_csv_reads_back_what_csv_wrote(tmp_path, cells, rows):
    path = write_csv(tmp_path / "a.csv", ["prompt", "other"], [["x" + a, b] for a, b in cells])
    shards = read_all(job(path, rows=rows))
    assert [row.prompt for shard in shards for row in shard.rows] == ["x" + a for a, _ in cells]
    others = [value for shard in shards for value in shard.passthrough["other"].to_pylist()]
    assert others == [b or None for _, b in cells]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_any_run_of_rows_of_a_long_text_file(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        write_csv(path, ["prompt", "n"], [[f"p{i}\n", str(i)] for i in range(5000)])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    else:
        path.write_text("\n".join(json.dumps({"prompt": f"p{i}\n", "n": i}) for i in range(5000)) + "\n\n")
    spec = job(path, rows=5000)
    plan = make_plan(spec)
    assert (plan.files[0].file_rows, len(plan.files[0].blocks)) == (5000, 5)
    for first, count in [(0, 5000), (0, 1), (1023, 2), (1024, 1), (2047, 1026), (4999, 1)]:
        shard = read_shard(spec, plan.files[0], first, count)
        assert [row.prompt for row in shard.rows] == [f"p{i}\n" for i in range(first, first + count)]
        assert [int(n) for n in shard.passthrough["n"].to_pylist()] == list(range(first, first + count))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "a.csv is empty; a csv file begins with a line of column names"),
        (b"prompt\n", "a.csv has no rows"),
        (
            b"id; prompt\n1; x\n",
            "a.csv has no column 'prompt', it has 'id', ' prompt'; say which one holds the "
            'prompts, as in `columns: {prompt: " prompt"}` under `prompts`',
        ),
        (
            b"Caption;n\nx;1\n",
            "a.csv has no column 'prompt', it has 'Caption', 'n'; say which one holds the "
            "prompts, as in `columns: {prompt: Caption}`",
        ),
        (b"sep=;\n", "a.csv has no rows"),
        (b"prompt,prompt\nx,y\n", "a.csv has two columns named 'prompt'"),
        (b"text,n\nx,1\n", "a.csv has no column 'prompt', it has 'text', 'n'; say which one holds the"),
        (b'prompt\nx\n"y\nz\n', "a.csv:4: not csv: unexpected end of data"),
        (b'prompt\n"x"y\n', "a.csv:2: not csv: ',' expected after '\"'"),
        (b"pr\xffompt\nx\n", "a.csv: its column names are not valid UTF-8"),
        (b"prompt\rx\ry\r", "a.csv:1: not csv: new-line character seen in unquoted field"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text)
    assert refusal(job(tmp_path / "a.csv"), tmp_path).startswith(message)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_any_delimiter(tmp_path, name, delimiter):
    rows = [["x, y; z", "1"], ["a|b\tc", "2"]]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([["caption", "n"], *rows])
    (tmp_path / name).write_text(text.getvalue())
    for more in ({}, {"delimiter": delimiter}, {"delimiter": "tab"} if delimiter == "\t" else {}):
        spec = job(tmp_path / name, columns={"prompt": "caption"}, **more)
        (shard,) = read_all(spec)
        assert [row.prompt for row in shard.rows] == [prompt for prompt, _ in rows]
        assert shard.passthrough.to_pydict() == {"n": ["1", "2"]}


def test_csv_that_says_its_delimiter_as_excel_knows_it(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfsep=;\r\nprompt;n\r\nx,y;1\r\nz;2\r\n")
    shards = read_all(job(tmp_path / "a.csv", rows=1))
    assert [(row.row_id, row.prompt) for shard in shards for row in shard.rows] == [
        ("a:0", "x,y"),
        ("a:1", "z"),
    ]


def test_a_delimiter_that_worked_before_stays(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,a;b\nx;y,1\n")
    (shard,) = read_all(job(tmp_path / "a.csv"))
    assert [row.prompt for row in shard.rows] == ["x;y"]
    assert shard.passthrough.to_pydict() == {"a;b": ["1"]}
    plain, given = (make_plan(job(tmp_path / "a.csv", **more)) for more in ({}, {"delimiter": ","}))
    assert "delimiter" not in plain.samples
    assert plain.fingerprint != given.fingerprint


@pytest.mark.parametrize("delimiter", ["", ",,", "\n", '"'])
def test_delimiters_that_are_none(delimiter):
    with pytest.raises(ValueError, match=r"is one character"):
        job("a.csv", delimiter=delimiter)


FRENCH = [f"un café nº {n}" for n in range(2000)]


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-be", "utf-32"])
def test_text_in_another_encoding_is_refused_until_it_is_named(tmp_path, kind, encoding, compress):
    """Once for the file, and not by a reject for each row."""
    texts = FRENCH if kind == "csv" else [json.dumps({"prompt": text}, ensure_ascii=False) for text in FRENCH]
    path = tmp_path / f"a.{kind}"
    text = "".join(f"{line}\n" for line in (["prompt"] if kind == "csv" else []) + texts)
    path.write_bytes(compress(text.encode(encoding)))
    if "utf" in encoding:
        message = rf"a\.{kind} is not UTF-8 but {encoding}, by its first bytes; say so under `prompts`, as in"
    else:
        message = (
            rf"a\.{kind}:{1 + (kind == 'csv')}: the file is not UTF-8 \(([0-9,]+) of \1 lines beyond ASCII\)"
            r"; say under `prompts` what it is, as in `encoding: cp1252` if this line has '.*un café nº 0"
        )
    with pytest.raises(PromptsError, match=message):
        make_plan(job(path))
    spec = job(path, encoding=encoding, rows=1500)
    shards = read_all(spec)
    assert [row.prompt for shard in shards for row in shard.rows] == FRENCH
    with pytest.raises(PromptsError, match="can't decode byte"):
        make_plan(job(path, encoding="ascii"))


def test_a_file_that_is_utf8_in_most_lines_has_rows_that_are_not(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt\nfür\nnaïve\n".encode() + b"caf\xe9\n")
    (shard,) = read_all(job(tmp_path / "a.csv"))
    assert [row.prompt for row in shard.rows] == ["für", "naïve"]
    assert [reject.message for reject in shard.rejects] == ["prompt is not valid UTF-8: b'caf\\xe9'"]


def test_an_encoding_is_part_of_the_job_where_it_is_not_the_usual(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt\ncaf\xe9\n")
    usual, western, latin, same = (
        make_plan(job(tmp_path / "a.csv", encoding=name))
        for name in ("utf-8", "cp1252", "latin1", "ISO8859-1")
    )
    assert "encoding" not in usual.samples
    assert western.fingerprint != latin.fingerprint == same.fingerprint
    assert difference(western, latin)[0] == 'prompts.encoding was "cp1252", now "iso8859-1"'


@pytest.mark.parametrize("encoding", ["", "nope", "rot13", "undefined", "base64"])
def test_encodings_that_are_none(encoding):
    with pytest.raises(ValueError, match="is the name of an encoding as Python knows it"):
        job("a.csv", encoding=encoding)


def test_the_index_of_a_data_frame_is_a_column(tmp_path):
    frame = pd.DataFrame({"prompt": ["x", "y"], "seed": [3, 4]})
    frame.to_csv(tmp_path / "a.csv")
    (shard,) = read_all(job(tmp_path / "a.csv"))
    assert [(row.prompt, row.seed) for row in shard.rows] == [("x", 3), ("y", 4)]
    assert shard.passthrough.to_pydict() == {"Unnamed: 0": ["0", "1"]}
    (tmp_path / "b.csv").write_text("prompt,n,\nx,1,\ny,2,z\n")
    (shard,) = read_all(job(tmp_path / "b.csv"))
    assert shard.passthrough.to_pydict() == {"n": ["1", "2"], "Unnamed: 2": [None, "z"]}
    frame.set_index([["a", "b"], [1, 2]]).to_csv(tmp_path / "a.csv")
    (shard,) = read_all(job(tmp_path / "a.csv"))
    assert shard.passthrough.to_pydict() == {"Unnamed: 0": ["a", "b"], "Unnamed: 1": ["1", "2"]}


COMPRESSED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    "lz4": lambda data: pa.compress(data, "lz4", asbytes=True),
}


def long_text(kind: str) -> bytes:
    if kind == "csv":
        return b"prompt,n\n" + b"".join(b'"p%d\n",%d\n' % (i, i) for i in range(5000))
    return b"".join(b'{"prompt": "p%d\\n", "n": %d}\n' % (i, i) for i in range(5000))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("ending", COMPRESSED)
def test_any_run_of_rows_of_a_compressed_text_file(tmp_path, kind, ending):
    text = long_text(kind)
    half = len(text) // 2
    compress = COMPRESSED[ending]
    (tmp_path / f"a.{kind}.{ending}").write_bytes(compress(text[:half]) + compress(text[half:]))
    spec = job(tmp_path, format=kind, rows=5000)
    plan = make_plan(spec)
    assert (plan.files[0].file_rows, len(plan.files[0].blocks)) == (5000, 5)
    for first, count in [(0, 5000), (1023, 2), (2047, 1026), (4999, 1), (1024, 1)]:
        shard = read_shard(spec, plan.files[0], first, count)
        assert [row.prompt for row in shard.rows] == [f"p{i}\n" for i in range(first, first + count)]
        assert [int(n) for n in shard.passthrough["n"].to_pylist()] == list(range(first, first + count))


def test_a_large_compressed_text_is_unpacked_once(tmp_path):
    padding = "x" * 15_000
    text = "".join(f'{{"prompt": "p{i}", "pad": "{padding}"}}\n' for i in range(6000)).encode()
    assert len(text) > lines.SKIPPED_BYTES
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text, 1))
    spec = job(tmp_path / "a.jsonl.gz", keep=[])
    file = make_plan(spec).files[0]
    # The runs of rows at its end come from several threads, as a worker's do.
    with ThreadPoolExecutor(4) as pool:
        for first, shard in pool.map(lambda n: (n, read_shard(spec, file, n, 20)), range(5000, 6000, 20)):
            assert [row.prompt for row in shard.rows] == [f"p{i}" for i in range(first, first + 20)]


@pytest.mark.parametrize("ending", COMPRESSED)
def test_a_compressed_file_that_is_cut_is_refused(tmp_path, ending):
    data = COMPRESSED[ending](long_text("jsonl"))
    for cut in (len(data) // 2, len(data) - 3):
        (tmp_path / f"a.jsonl.{ending}").write_bytes(data[:cut])
        assert f"a.jsonl.{ending} cannot be read: " in refusal(job(tmp_path / f"a.jsonl.{ending}"), tmp_path)


def test_a_text_is_read_as_what_it_is_whatever_its_name(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(long_text("jsonl"))
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(long_text("jsonl")))
    assert [len(rows_of(job(tmp_path / name))) for name in ("a.jsonl.gz", "b.jsonl")] == [5000, 5000]


def test_a_file_beside_its_compressed_copy_is_not_read_twice(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(long_text("jsonl"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(long_text("jsonl")))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(long_text("jsonl")))
    message = refusal(job(tmp_path, format="jsonl"), tmp_path)
    assert message.startswith(
        "prompts.path: a.jsonl and a.jsonl.gz are in one folder, and both would be read"
    )
    assert len(rows_of(job(tmp_path / "*.gz", format="jsonl"))) == 10_000
    assert len(make_plan(job(tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz")).files) == 2


def test_csv_rows_that_cannot_be_made(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,n\nx,1\ny\nz,1,2\n\n\xff,3\nok,\xfe\nnul\0,5\n")
    (shard,) = read_all(job(tmp_path / "a.csv", encoding="utf-8"))
    assert [(row.row_id, row.prompt) for row in shard.rows] == [("a:0", "x"), ("a:5", "nul\0")]
    assert [(reject.row_id, reject.message) for reject in shard.rejects] == [
        ("a:1", "the row has 1 cells where the first line has 2"),
        ("a:2", "the row has 3 cells where the first line has 2"),
        ("a:3", "prompt is not valid UTF-8: b'\\xff'"),
        ("a:4", "its 'n' is not valid UTF-8"),
    ]
    assert shard.passthrough["n"].to_pylist() == ["1", None, "1", "3", None, "5"]


def test_json_lines(tmp_path):
    lines = [
        {"prompt": "a", "seed": 3, "tags": ["x"], "size": 1},
        {"prompt": "b", "height": 512.0, "size": 1.5, "late": {"k": None}},
        {"prompt": 5},
        {"prompt": "c", "seed": "many"},
        {"prompt": "\ud800"},
        {"prompt": "d", "num_images": 2, "seed": None},
        {"prompt": "e", "seed": 10**30},
        {"prompt": "f", "height": True},
    ]
    text = [json.dumps(line) for line in lines]
    text[3:3] = ["not json", '"text"', '{"prompt": "cut', "[" * 100_000]
    (tmp_path / "a.jsonl").write_text("\n".join(text))
    spec = job(tmp_path / "a.jsonl")
    (shard,) = read_all(spec)
    assert [(row.row_id, row.prompt) for row in shard.rows] == [
        ("a:0", "a"),
        ("a:1", "b"),
        ("a:9#0", "d"),
        ("a:9#1", "d"),
    ]
    assert shard.rows[1].height == 512
    messages = {reject.row_id: reject.message for reject in shard.rejects}
    assert messages["a:2"] == "prompt is not text but 5"
    assert messages["a:3"].startswith("the line is not JSON: ")
    assert messages["a:4"] == "the line is not a JSON object {...}"
    assert messages["a:5"].startswith("the line is not JSON: Invalid control char")
    assert messages["a:6"].startswith("the line is not JSON: ")
    assert messages["a:7"] == "seed must be a whole number, not 'many'"
    assert messages["a:8"].startswith("prompt is not valid Unicode: ")
    assert messages["a:10"].startswith("seed must be between 0 and")
    assert messages["a:11"] == "height must be a whole number, not True"
    assert shard.num_rows == 12
    assert shard.passthrough.schema.equals(make_plan(spec).passthrough)
    assert shard.passthrough.select(["tags", "size"]).slice(0, 3).to_pylist() == [
        {"tags": ["x"], "size": 1.0},
        {"tags": None, "size": 1.5},
        {"tags": None, "size": None},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"prompt": "x"}]', "a.jsonl:1: not JSON lines: the line is not JSON"),
        ("", "a.jsonl has no rows"),
        ('{"text": "x"}', "a.jsonl has no column 'prompt', it has 'text'"),
        (
            '{"prompt": "x", "k": 1}\n{"prompt": "y", "k": "z"}',
            "a.jsonl: column 'k' in lines 1 to 2 has values of",
        ),
        ('{"prompt": "x", "k": {}}', "a.jsonl: a column cannot pass through to the output"),
        (
            '{"prompt": "x", "k": "\\ud800"}',
            "a.jsonl: column 'k' in lines 1 to 1 has values of several kinds, or",
        ),
        (
            '{"prompt": "x", "k": 1e999}\n{"prompt": "y", "k": 99999999999999999999}',
            "a.jsonl: column 'k' in lines",
        ),
    ],
)
def test_json_lines_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    assert refusal(job(tmp_path / "a.jsonl"), tmp_path).startswith(message)


def test_columns_with_a_meaning_may_hold_anything_in_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "id": 1}\n{"prompt": "y", "id": "z"}\n{"prompt": [1]}')
    (shard,) = read_all(job(tmp_path / "a.jsonl"))
    assert [row.row_id for row in shard.rows] == ["1", "z"]
    assert [reject.row_id for reject in shard.rejects] == ["a:2"]


def test_json_lines_files_complete_each_other(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "k": 1}')
    (tmp_path / "b.jsonl").write_text('{"prompt": "y", "m": "z"}')
    shards = read_all(job(tmp_path, format="jsonl"))
    assert [shard.passthrough.to_pylist() for shard in shards] == [
        [{"k": 1, "m": None}],
        [{"k": None, "m": "z"}],
    ]


# Hostile tables

TEXTS = st.one_of(
    st.none(),
    st.text(max_size=8).map(str.encode),
    st.binary(max_size=8),
    st.sampled_from([b"../../x", b"a\0b", b"a/b", b"", b"x" * (MAX_PROMPT + 1), b"a#0", b"t:0", b"t:1"]),
)
WHOLE = st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 4)
FRACTIONS = st.none() | st.floats() | st.sampled_from([512.0, 1.0, float("nan"), -0.0])


def columns(num_rows: int):
    def some(values, *types):
        arrays = st.lists(values, min_size=num_rows, max_size=num_rows)
        return st.tuples(arrays, st.sampled_from(types)).map(lambda pair: pa.array(pair[0], pair[1]))

    texts = some(TEXTS, pa.binary()).map(lambda array: array.view(pa.string()))
    text = st.one_of(
        texts,
        some(TEXTS, pa.binary(), pa.large_binary()),
        texts.map(lambda array: array.cast(pa.binary()).dictionary_encode()),
    )
    whole = st.one_of(some(WHOLE, pa.int64()), some(FRACTIONS, pa.float64(), pa.float32()))
    other = st.one_of(
        text,
        whole,
        some(st.booleans(), pa.bool_()),
        some(st.lists(WHOLE, max_size=2), pa.list_(pa.int64())),
        some(WHOLE.map(lambda value: {"a": value}), pa.struct([("a", pa.int64())])),
        some(st.none(), pa.null()),
        some(st.integers(0, 2**40), pa.timestamp("us"), pa.duration("s"), pa.uint64()),
    )
    meanings = {
        **dict.fromkeys(("row_id", "id", "negative_prompt"), text),
        **dict.fromkeys(("height", "width", "num_images"), whole),
        "seed": some(WHOLE, pa.int64()),
    }
    right = st.fixed_dictionaries({"prompt": text}, optional={**meanings, "extra": other})
    any_type = {name: values | other for name, values in meanings.items()}
    wrong = st.fixed_dictionaries({}, optional={"prompt": text | other, **any_type, "image": other})
    return st.one_of(right, right, wrong)


TABLES = st.integers(0, 5).flatmap(
    lambda n: st.tuples(columns(n), st.integers(1, 3), st.integers(1, 4), st.none() | st.integers(1, 6))
)


def planned(spec: JobSpec, *, read: bool = False) -> tuple[JobPlan | None, str]:
    """(plan, "") of a table that can be used, all of it read if asked to, or (None, why not)."""
    try:
        plan = make_plan(spec)
        check_row_ids(spec, plan.files)
        assert not read or sum(shard.num_rows for shard in read_all(spec, plan)) == plan.num_rows
    except PromptsError as error:
        return None, str(error)
    return plan, ""


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TABLES)
def test_every_row_of_a_hostile_table_is_made_or_rejected_or_the_table_is_refused(tmp_path, drawn):
    made, group, rows, limit = drawn
    path = table(tmp_path / "t.parquet", pa.table(made), row_group_size=group)
    spec = job(path, rows=rows, limit=limit)
    plan, refused = planned(spec)
    if plan is None:
        assert str(path) in refused
        return
    every: list[str] = []
    for shard, expected in zip(plan.shards(), owed(spec), strict=True):
        read = read_shard(spec, plan.files[shard.file], shard.first_row, shard.num_rows)
        sources = {one.source for one in (*read.rows, *read.rejects)}
        assert sources == set(range(shard.first_row, shard.first_row + shard.num_rows))
        assert not {row.source for row in read.rows} & {reject.source for reject in read.rejects}
        assert read.num_rows == shard.num_rows
        assert expected[0] == shard.index
        assert sorted(expected[1]) == sorted(one.row_id for one in (*read.rows, *read.rejects))
        assert all(0 <= row.seed <= MAX_SEED and row.prompt.encode() is not None for row in read.rows)
        assert all(reject.message and reject.row_id.encode() for reject in read.rejects)
        every += expected[1]
        pickle.loads(pickle.dumps((read, plan.files[shard.file])))  # they cross processes
    assert len(set(every)) == len(every)


def test_damage_anywhere_in_a_file_is_a_prompts_error_at_worst(tmp_path):
    path = tmp_path / "a.parquet"
    whole = table(
        path,
        {
            "prompt": text_bytes(b"\xff", b"ok", None, b"x"),
            "row_id": pa.array(["a", "b", "c", None]).dictionary_encode(),
            "height": [float("nan"), 512.0, 1.5, None],
            "extra": [{"a": [1, 2]}, None, {"a": None}, {"a": []}],
        },
        row_group_size=2,
    ).read_bytes()
    spec, luck, refused = job(path), random.Random(1), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(luck.choice([0, 1, 1, 2, 5])):
            data[luck.randrange(len(data))] = luck.randrange(256)
        path.write_bytes(data if luck.random() < 0.8 else data[: luck.randrange(len(data))])
        plan, message = planned(spec, read=True)
        refused += plan is None
        assert plan is not None or str(path) in message
    assert 100 < refused < 400


# Elsewhere


@pytest.fixture(scope="module")
def server():
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(server, monkeypatch):
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    server.fault = lambda method, path, query: None
    name = server.bucket()
    yield name
    server.fault = lambda method, path, query: None
    server.empty(name)


def upload(server, bucket: str, folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            server.client.put_object(Bucket=bucket, Key=str(path.relative_to(folder)), Body=path.read_bytes())


def test_s3_gives_the_same_rows_as_the_disk(server, bucket, tmp_path):
    rows = {"prompt": [f"p{i}" for i in range(300)], "k": list(range(300))}
    table(tmp_path / "in" / "a.parquet", rows, row_group_size=64)
    table(tmp_path / "in" / "sub" / "b.parquet", rows, row_group_size=64)
    write_csv(tmp_path / "in" / "c.csv", ["prompt"], [[f"c{i}"] for i in range(2000)])
    (tmp_path / "in" / "_SUCCESS").touch()
    upload(server, bucket, tmp_path)
    s3 = {"endpoint_url": server.endpoint_url, "region": "us-east-1"}
    for name, kind in [
        ("in", {}),
        ("in/**/*.parquet", {}),
        ("in/sub/b.parquet", {}),
        ("in/*.csv", {}),
        ("in/", {}),
    ]:
        there = job(f"s3://{bucket}/{name}", rows=70, **s3, **kind)
        here = job(tmp_path / name, rows=70, **kind)
        assert rows_of(there) == rows_of(here)
        assert [f.relpath for f in make_plan(there).files] == [f.relpath for f in make_plan(here).files]
    whole = job(f"s3://{bucket}/in", **s3)
    assert make_plan(whole).fingerprint == make_plan(whole).fingerprint


def test_every_key_of_s3_is_read_also_below_folders_without_a_name(server, bucket, tmp_path):
    for key in ("in/x", "in//y", "in///z", "in/a//b", "/root"):
        data = table(tmp_path / "a.parquet", {"prompt": [f"of {key}"] * 2}).read_bytes()
        server.client.put_object(Bucket=bucket, Key=f"{key}.parquet", Body=data)
    s3 = {"endpoint_url": server.endpoint_url, "region": "us-east-1"}

    def found(path: str) -> list[str]:
        spec = job(f"s3://{bucket}/{path}", **s3)
        rows = rows_of(spec)
        assert len({row.row_id for row in rows}) == len(rows)
        assert [row.row_id for row in rows] == [row_id for _, ids in owed(spec) for row_id in ids]
        return sorted({row.prompt.removeprefix("of ") for row in rows})

    inside = ["in///z", "in//y", "in/a//b", "in/x"]
    assert found("in") == found("in/") == inside
    assert found("in//") == ["in///z", "in//y"]
    assert found("in/**/*.parquet") == inside
    assert found("in//*.parquet") == ["in//y"]
    assert found("in/*/*.parquet") == ["in//y"]
    assert found("in//y.parquet") == ["in//y"]
    assert found("") == ["/root", *inside]
    assert found("/*.parquet") == ["/root"]


@pytest.mark.parametrize("mark", ["in", "in/", "in_$folder$", "in/sub_$folder$", "in/sub"])
def test_objects_that_mark_folders_are_no_prompts(server, bucket, tmp_path, mark):
    data = table(tmp_path / "a.parquet", {"prompt": ["x"]}).read_bytes()
    for key in ("in/x.parquet", "in/sub/y.parquet"):
        server.client.put_object(Bucket=bucket, Key=key, Body=data)
    server.client.put_object(Bucket=bucket, Key=mark, Body=b"")
    s3 = {"endpoint_url": server.endpoint_url, "region": "us-east-1"}
    for path in ("in", "in/", "in/*", "**"):
        names = [Path(file.path).name for file in make_plan(job(f"s3://{bucket}/{path}", **s3)).files]
        assert names == (["x.parquet"] if path == "in/*" else ["y.parquet", "x.parquet"])


def test_a_folder_beside_an_object_of_its_name_is_meant_by_a_slash(server, bucket, tmp_path):
    data = table(tmp_path / "a.parquet", {"prompt": ["x"]}).read_bytes()
    server.client.put_object(Bucket=bucket, Key="in/x.parquet", Body=data)
    server.client.put_object(Bucket=bucket, Key="in", Body=b"a note")
    spec = job(f"s3://{bucket}/in/", endpoint_url=server.endpoint_url, region="us-east-1")
    assert [row.row_id for row in rows_of(spec)] == ["x:0"]


def test_s3_requests_of_a_file(server, bucket, tmp_path):
    """Planning asks once for each file; reading a small one, whose end is all of it, takes two requests."""
    for i in range(30):
        table(tmp_path / f"{i}.parquet", {"prompt": ["x", "y"], "row_id": [f"a{i}", f"b{i}"]})
    upload(server, bucket, tmp_path)
    spec = job(f"s3://{bucket}/*.parquet", rows=2, endpoint_url=server.endpoint_url, region="us-east-1")

    def asked(call):
        server.requests.clear()
        call()
        objects = [(method, path) for method, path, _ in server.requests if path.endswith(".parquet")]
        kinds = Counter(method for method, path in objects if "*" not in path)
        assert len(server.requests) - kinds.total() <= 3  # whether such a file is there, and the list
        return kinds

    assert asked(lambda: make_plan(spec)) == {"GET": 30}
    plan = make_plan(spec)
    assert asked(lambda: check_row_ids(spec, plan.files)) == {"GET": 30, "HEAD": 30}
    assert asked(lambda: read_shard(spec, plan.files[7], 0, 2)) == {"GET": 1, "HEAD": 1}


def test_the_outputs_server_serves_for_the_prompts(server, bucket, tmp_path):
    upload(server, bucket, table(tmp_path / "a.parquet", {"prompt": ["x"]}).parent)
    spec = JobSpec(
        model="tiny",
        prompts=f"s3://{bucket}/a.parquet",
        output={"path": f"s3://{bucket}/out", "endpoint_url": server.endpoint_url, "region": "us-east-1"},
    )
    assert [row.prompt for row in rows_of(spec)] == ["x"]


def test_s3_paths_that_name_nothing(server, bucket, tmp_path):
    s3 = {"endpoint_url": server.endpoint_url, "region": "us-east-1"}
    path = f"s3://{bucket}/nope.parquet"
    assert refusal(job(path, **s3), tmp_path).startswith(
        f"prompts.path: there is no file {path}, and none in"
    )
    path = "s3://no-such-bucket-at-all/x.parquet"
    assert path.rpartition("/")[0] in refusal(job(path, **s3), tmp_path)


def test_s3_files_that_change_or_fail_after_the_plan(server, bucket, tmp_path):
    path = table(tmp_path / "a.parquet", {"prompt": ["aaa", "bbb"]})
    upload(server, bucket, tmp_path)
    spec = job(f"s3://{bucket}/a.parquet", endpoint_url=server.endpoint_url, region="us-east-1")
    plan = make_plan(spec)
    assert len(read_shard(spec, plan.files[0], 0, 2).rows) == 2
    table(path, {"prompt": ["aaa", "ccc"]})
    upload(server, bucket, tmp_path)
    with pytest.raises(PromptsError, match="changed since the job was planned"):
        read_shard(spec, plan.files[0], 0, 2)
    server.client.delete_object(Bucket=bucket, Key="a.parquet")
    with pytest.raises(PromptsError, match="no longer there"):
        read_shard(spec, plan.files[0], 0, 2)


def test_missing_credentials_are_a_sentence_without_secrets(server, bucket, tmp_path):
    upload(server, bucket, table(tmp_path / "a.parquet", {"prompt": ["x"]}).parent)
    spec = job(f"s3://{bucket}/a.parquet", endpoint_url="http://127.0.0.1:1", region="us-east-1")
    server.fault = lambda method, path, query: None
    with pytest.raises(PromptsError, match="can be reached") as caught:
        make_plan(spec)
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_footers_of_many_small_files_are_read_side_by_side(server, bucket, tmp_path):
    data = table(tmp_path / "a.parquet", {"prompt": ["x"]}).read_bytes()
    for i in range(200):
        server.client.put_object(Bucket=bucket, Key=f"in/{i:03d}.parquet", Body=data)
    together = threading.Barrier(8)  # passes eight requests, when eight are waiting
    alone = []

    def fault(method, path, query):
        if method == "GET" and path.endswith(".parquet"):
            try:
                together.wait(timeout=20)
            except threading.BrokenBarrierError:
                alone.append(path)
        return None

    server.requests.clear()
    server.fault = fault
    plan = make_plan(job(f"s3://{bucket}/in", endpoint_url=server.endpoint_url, region="us-east-1"))
    assert plan.num_rows == 200
    assert not alone
    asked = [path for method, path, _ in server.requests if path.endswith(".parquet")]
    assert len(asked) == len(set(asked)) == 200  # one request a footer


def test_any_fsspec_url(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name in ("a", "sub/b", "_c"):
        memory.pipe(
            f"/in/{name}.parquet", table(tmp_path / f"{name}.parquet", {"prompt": [name]}).read_bytes()
        )
    spec = job("memory://in")
    assert [(row.row_id, row.prompt) for row in rows_of(spec)] == [("a:0", "a"), ("sub/b:0", "sub/b")]
    assert [row.prompt for row in rows_of(job("memory://in/*.parquet"))] == ["a"]
    assert [row.prompt for row in rows_of(job("memory://in/sub/b.parquet"))] == ["sub/b"]
    assert refusal(job("memory://in/x.parquet"), tmp_path).startswith(
        "prompts.path: there is no file memory:"
    )
    plan = make_plan(spec)
    memory.rm("/in/a.parquet")
    with pytest.raises(PromptsError, match="no longer there"):
        read_shard(spec, plan.files[0], 0, 1)


def test_a_file_system_that_fails_is_a_store_error_while_reading(tmp_path):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Failing(MemoryFileSystem):
        protocol = "failing"
        broken = False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("failing://"))

        def _open(self, *args, **kwargs):
            if self.broken:
                raise RuntimeError("the network is down")
            return super()._open(*args, **kwargs)

    fsspec.register_implementation("failing", Failing, clobber=True)
    Failing.store.clear()
    Failing().pipe("/in/a.parquet", table(tmp_path / "a.parquet", {"prompt": ["x"]}).read_bytes())
    spec = job("failing://in/a.parquet")
    plan = make_plan(spec)
    Failing.broken = True
    with pytest.raises(StoreError, match="the network is down"):
        read_shard(spec, plan.files[0], 0, 1)
    with pytest.raises(PromptsError, match="the network is down"):
        make_plan(spec)
