"""Parts as Parquet files and WebDataset tars, written whole and read a few rows at a time. Knows no jobs."""

from __future__ import annotations

import base64
import io
import json
import math
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from overtone.jobs.column_types import contains
from overtone.jobs.columns import FOOTER_KEY, SOURCE_MEDIA
from overtone.jobs.errors import VerifyError
from overtone.jobs.intervals import interval_leaves, with_intervals_typed
from overtone.jobs.media import Kind
from overtone.jobs.parts.footer import Footer
from overtone.jobs.parts.names import Format
from overtone.jobs.parts.table import Made, PartRow, leaf_paths, own_paths

TAR_FOOTER = "__overtone__/footer"
"""The name has no ending, because readers of tars take a name with one for a sample's."""
_PAGE_BYTES = 1024**2
_READ_ROWS = 1024
_READ_BYTES = 2 * 1024**2


def parquet_bytes(
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    kind: Kind,
    made: Sequence[Made],
    finished: Callable[[], Footer],
) -> tuple[Footer, bytes]:
    """(footer, a Parquet file with a row group for each table). `finished` makes the footer when all else is
    written."""
    paths = leaf_paths(schema)
    media, latents = {f"{name}.bytes" for name in (kind, *SOURCE_MEDIA)}, "latents.values.list.element"
    intervals = interval_leaves(schema)
    without_order = {paths[leaf] for leaf in intervals}
    small = [path for path in paths if path not in media and path != latents]
    mean_bytes = sum(len(sample.data) for sample in made) // max(1, len(made))
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        schema,
        # Pictures are compressed already; uncompressed, their bytes can be found by the page index alone.
        compression={path: "none" if path in media else "zstd" for path in paths},
        # Our own numbers and names hardly repeat; what passes through may be anything.
        use_dictionary=[path for path in small if path in ("mode", "model") or path not in own_paths(kind)],
        write_statistics=[path for path in small if path not in without_order],
        # Only our own column is floats; one that passes through may have a name like its path.
        use_byte_stream_split=[latents] if "latents" in schema.names and paths.count(latents) == 1 else False,
        write_page_index=True,
        write_page_checksum=True,
        data_page_size=_PAGE_BYTES,
        # Pages are cut between batches only, so a batch must not hold many pictures.
        write_batch_size=min(1024, max(1, _PAGE_BYTES // max(1, mean_bytes))),
    ) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=table.num_rows)
        footer = finished()
        writer.add_key_value_metadata({FOOTER_KEY: footer.to_bytes()})
    return footer, with_intervals_typed(sink.getvalue(), intervals)


def tar_bytes(tables: Iterable[pa.Table], kind: Kind, finished: Callable[[], Footer]) -> tuple[Footer, bytes]:
    """(footer, a tar). The tar has 000042.png, 000042.json and 000042.txt for each row, and
    000042.latents.npy where latents are kept. Its first file is the footer, so that it can be read without
    the rest."""
    body = io.BytesIO()
    index = 0
    with tarfile.open(fileobj=body, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for table in tables:
            for row in _python_rows(table):
                media, latents = row.pop(kind), row.pop("latents", None)
                about = json.dumps(_jsonable(row), ensure_ascii=False, allow_nan=False)
                key = f"{index:06d}"
                _add(tar, f"{key}.{media['path'].rpartition('.')[2]}", media["bytes"])
                _add(tar, f"{key}.json", about.encode(errors="replace"))
                _add(tar, f"{key}.txt", row["prompt"].encode(errors="replace"))
                if latents is not None:
                    _add(tar, f"{key}.latents.npy", _npy(latents))
                index += 1
    footer = finished()
    head = io.BytesIO()
    tar = tarfile.open(fileobj=head, mode="w", format=tarfile.USTAR_FORMAT)
    _add(tar, TAR_FOOTER, footer.to_bytes())
    return footer, head.getvalue() + body.getvalue()  # without the closing blocks of the first


def _npy(latents: dict[str, list]) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(latents["values"], np.float32).reshape(latents["shape"]), allow_pickle=False)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _python_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as Python values, of which times, of whatever precision and year, are text as Arrow writes it,
    and tensors lists of lists."""
    columns = {name: _python_values(table[name].combine_chunks()) for name in table.column_names}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _python_values(array: pa.Array) -> list[Any]:
    if isinstance(array, pa.ChunkedArray):  # too large to be one
        return [value for chunk in array.chunks for value in _python_values(chunk)]
    if isinstance(array.type, pa.FixedShapeTensorType):
        flat = (None if values is None else np.array(values, object) for values in array.storage.to_pylist())
        order = _tensor_order(array.type)
        return [None if values is None else values[order].tolist() for values in flat]
    return (_as_text(array) if contains(array.type, _needs_text) else array).to_pylist()


def _tensor_order(type: pa.FixedShapeTensorType) -> np.ndarray:
    """Where in its storage each element of a tensor is: the storage is in C order of `shape`, of whose
    dimensions the tensor's are a permutation. Arrow's own arrays of a permuted tensor are not always that."""
    places = np.arange(math.prod(type.shape)).reshape(type.shape)
    return places if type.permutation is None else places.transpose(type.permutation)


def _needs_text(type: pa.DataType) -> bool:
    time = pa.types.is_temporal(type) and not pa.types.is_interval(type)
    return time or pa.types.is_string(type) or pa.types.is_large_string(type)


def _as_text(array: pa.Array) -> pa.Array:
    """The same values with texts for times, at any depth, and only such as UTF-8 can write."""
    type = array.type
    if not contains(type, _needs_text):
        return array
    if isinstance(type, pa.BaseExtensionType):
        return _as_text(array.storage)
    if pa.types.is_dictionary(type):
        return _as_text(array.dictionary_decode())
    if pa.types.is_struct(type):
        fields = [_as_text(field) for field in array.flatten()]
        return pa.StructArray.from_arrays(fields, [field.name for field in type], mask=array.is_null())
    if pa.types.is_map(type):
        pairs = array.cast(pa.list_(pa.struct([array.type.key_field, array.type.item_field])))
        keys, items = map(_as_text, pairs.flatten().flatten())
        return pa.MapArray.from_arrays(_list_offsets(pairs).cast(pa.int32()), keys, items)
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        return pa.LargeListArray.from_arrays(_list_offsets(array), _as_text(array.flatten()))
    if pa.types.is_string(type) or pa.types.is_large_string(type):
        return _valid_text(array)
    return _times(array) if _needs_text(type) else array


def _list_offsets(lists: pa.Array) -> pa.Array:
    """Where each list begins in the flattened lists; null: there is none."""
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    none = np.append(lists.is_null().to_numpy(zero_copy_only=False), False)
    return pa.array(ends, pa.int64(), mask=none)


def _times(array: pa.Array) -> pa.Array:
    type = array.type
    if pa.types.is_duration(type):
        return pc.binary_join_element_wise(array.cast(pa.int64()).cast(pa.string()), type.unit, " ")
    if pa.types.is_timestamp(type) and type.tz is not None:  # the zone need not be known here
        return pc.binary_join_element_wise(array.cast(pa.timestamp(type.unit)).cast(pa.string()), "Z", "")
    return array.cast(pa.string())


def _valid_text(array: pa.Array) -> pa.Array:
    try:
        array.validate(full=True)
        return array
    except pa.ArrowInvalid:
        raw = array.cast(pa.large_binary()).to_pylist()
        return pa.array([None if text is None else text.decode("utf-8", "replace") for text in raw])


def _jsonable(value: Any) -> Any:
    """A value as JSON can hold it: base64 stands for bytes, text for numbers that JSON does not know, and
    null for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):  # of somebody's own types
        return _jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def read_footer(file: BinaryIO, format: Format = "parquet") -> Footer:
    """The footer of a part; little else is read. VerifyError where the file is not a part."""
    if format == "webdataset":
        return _read_tar_footer(file)
    try:
        metadata = pq.ParquetFile(file).metadata.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise VerifyError(f"it cannot be read: {error}") from error
    if FOOTER_KEY not in metadata:
        raise VerifyError("it is not a part that overtone wrote")
    return Footer.from_bytes(metadata[FOOTER_KEY])


def read_rows(
    file: BinaryIO,
    kind: Kind,
    format: Format = "parquet",
    *,
    limit: int | None = None,
    also: Sequence[str] = (),
) -> Iterator[PartRow]:
    """The rows of a part in order, a few at a time, with page checksums verified. With a `limit`, little more
    than the first `limit` rows is read. `also`: more columns, of those that a `PartRow` has a place for.
    VerifyError where the part is broken."""
    if format == "webdataset":
        rows = _tar_rows(file, also)
    else:
        rows = _parquet_rows(file, kind, limit, also)
    try:
        yield from islice(rows, limit)
    except (pa.ArrowException, OSError, KeyError, ValueError, tarfile.TarError) as error:
        raise VerifyError(f"it cannot be read: {error}") from error


def _parquet_rows(file: BinaryIO, kind: Kind, limit: int | None, also: Sequence[str]) -> Iterator[PartRow]:
    # Whole columns of a row group at once, or for a few rows page by page. Never `pre_buffer`: its threads
    # may hold the file a moment longer than we do, and abort a process that ends just then (jobs/tables.py).
    buffer = 0 if limit is None else _PAGE_BYTES
    parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False, buffer_size=buffer)
    columns = ["row_id", "prompt", "height", "width", *also, kind]
    batch_rows = min(_READ_ROWS, _READ_BYTES // max(1, _mean_bytes(parquet.metadata)))
    batch_rows = max(1, batch_rows if limit is None else min(limit, batch_rows))
    for batch in parquet.iter_batches(batch_size=batch_rows, columns=columns, use_threads=False):
        *plain, media = (batch.column(name) for name in columns)
        data = (value.as_py() for value in media.field("bytes"))  # one after the other, for they are large
        row_ids, prompts, heights, widths, *more = (column.to_pylist() for column in plain)
        for i, one in enumerate(data):
            further = {name: values[i] for name, values in zip(also, more, strict=True)}
            yield PartRow(row_ids[i], prompts[i], heights[i], widths[i], one, **further)


def _mean_bytes(metadata: pq.FileMetaData) -> int:
    """The mean size of a row, over all its columns."""
    groups = (metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups))
    return sum(groups) // max(1, metadata.num_rows)


def _tar_rows(file: BinaryIO, also: Sequence[str]) -> Iterator[PartRow]:
    media = b""
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            inside = tar.extractfile(member)
            if inside is None or member.name == TAR_FOOTER or member.name.endswith((".txt", ".npy")):
                continue
            if member.name.endswith(".json"):  # comes after its picture
                row = json.loads(inside.read())
                further = {name: row[name] for name in also}
                yield PartRow(row["row_id"], row["prompt"], row["height"], row["width"], media, **further)
            else:
                media = inside.read()


def _read_tar_footer(file: BinaryIO) -> Footer:
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            member = tar.next()
            if member is None or member.name != TAR_FOOTER:
                raise VerifyError("it is not a part that overtone wrote")
            inside = tar.extractfile(member)
            assert inside is not None, "a plain file has contents"
            return Footer.from_bytes(inside.read())
    except (tarfile.TarError, OSError) as error:
        raise VerifyError(f"it cannot be read: {error}") from error
