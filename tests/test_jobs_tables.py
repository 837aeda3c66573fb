"""Small tables from bytes, and in this thread alone."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overtone.jobs.tables import read_all, stride_of, table_of


def written(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


TABLE = pa.table({"a": [1, 2], "b": ["x", None], "c": [[1.0], []]}).replace_schema_metadata({"about": "it"})


def test_all_of_it_or_some_columns_in_any_order():
    data = written(TABLE)
    assert table_of(data).to_pydict() == TABLE.to_pydict()
    assert table_of(data).schema.metadata == {b"about": b"it"}
    some = table_of(data, ("c", "a"))
    assert some.column_names == ["c", "a"]
    assert some.to_pydict() == TABLE.select(["c", "a"]).to_pydict()


def test_what_is_no_table_and_what_lacks_a_column():
    with pytest.raises(pa.ArrowInvalid):
        table_of(b"PAR1 and no more")
    with pytest.raises(KeyError, match="d"):
        table_of(written(TABLE), ["a", "d"])


def test_many_are_read_in_order_and_a_failure_is_the_first_one():
    assert list(read_all(lambda i: i * i, range(100))) == [i * i for i in range(100)]
    assert list(read_all(str, ())) == []
    with pytest.raises(ZeroDivisionError):
        list(read_all(lambda i: 1 // (3 - i), range(100)))


@pytest.mark.parametrize(
    ("count", "stride"), [(0, 1), (1, 1), (10, 1), (11, 2), (20, 2), (21, 4), (10**7, 2**20)]
)
def test_at_most_so_many_are_read_and_half_of_them_stay(count, stride):
    assert stride_of(count, 10) == stride
    assert len(range(0, count, stride)) <= 10


PICTURES = pa.table(
    {
        "row_id": ["r0", "r1"],
        "prompt": ["a", "b"],
        "height": [1, 1],
        "width": [1, 1],
        "image": [{"bytes": b"0" * 100_000, "path": "r0.png"}, {"bytes": b"1", "path": "r1.png"}],
    }
)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
@pytest.mark.parametrize(
    "read",
    [
        "from overtone.jobs.tables import table_of as read",
        "from overtone.jobs.parts import read_rows; "
        "read = lambda data: list(read_rows(io.BytesIO(data), 'image'))",
    ],
)
def test_no_thread_of_arrow_s_is_left_to_outlive_the_process(tmp_path, read):
    """One would abort the process where it ends just as that thread lets the bytes go."""
    (tmp_path / "pictures.parquet").write_bytes(written(PICTURES))
    code = (
        f"import io, os, sys; from pathlib import Path\n{read}\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "read(Path(sys.argv[1]).read_bytes())\n"
        "assert len(os.listdir('/proc/self/task')) == before"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "pictures.parquet")], check=True)
