"""A part: the finished rows of one shard as one object, encoded whole, then committed. Knows no models.

    part = build_part(spec, plan, shard, attempt=attempt, made=made, rejects=rejects, ...)
    upload = create_part(store, part)     # None: another attempt was first; else ours is the shard's part
    write_derived(store, part.footer, [upload])      # any time later

Everything that must survive is in the part: its rows and, in the footer under `overtone`, what happened. The
tables under `timings/` and `rejects/` are derived from the footer (`write_derived`) and can be made again;
only the `upload` line of the timings, which a part cannot hold about itself, is then gone.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache, lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import VerifyError
from jobs.features import as_metadata, features_of, known_features
from jobs.media import Kind, media_extension, media_kind, media_name
from jobs.plan import JobPlan, Shard
from jobs.prompts import OUTPUT_COLUMNS
from jobs.rows import Reject, Row
from jobs.spec import JobSpec
from jobs.store import Store

Format = Literal["parquet", "webdataset"]

FOOTER_KEY = b"overtone"
FOOTER_VERSION = 1
TAR_FOOTER = "__overtone__/footer"
"""Without an ending, for readers of tars take a name that has one for a sample's."""
ROW_GROUP_ROWS = 100
ROW_GROUP_BYTES = 100_000_000
_PAGE_BYTES = 1024**2
_READ_ROWS = 1024
_READ_BYTES = 2 * 1024**2
_DIGITS = 5
_EXTENSION: dict[Format, str] = {"parquet": "parquet", "webdataset": "tar"}
_CONTENT_TYPE = {"parquet": "application/vnd.apache.parquet", "tar": "application/x-tar"}
_NAME = re.compile(r"data/train-(\d{5,})-of-\d{5,}(?:-retry-(\d{3,}))?\.(?:parquet|tar)")
_TIMINGS = re.compile(r"timings/part-(\d{5,})(?:-retry-(\d{3,}))?\.parquet")
_REJECTS = re.compile(r"rejects/part-(\d{5,})\.parquet")
_PACKAGES = ("overtone", "torch", "diffusers", "transformers", "ray", "pyarrow", "pillow", "av")

MEDIA = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
STAGES = pa.list_(
    pa.struct(
        [
            pa.field("height", pa.int32()),
            pa.field("width", pa.int32()),
            pa.field("tokens", pa.int64()),
            pa.field("steps", pa.int32()),
            pa.field("seconds", pa.float64()),
        ]
    )
)
LATENTS = pa.struct([pa.field("shape", pa.list_(pa.int32())), pa.field("values", pa.list_(pa.float32()))])

TIMINGS = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("attempt", pa.string()),
        pa.field("batch", pa.int32()),
        pa.field("stage", pa.string()),
        pa.field("rows", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("tokens", pa.int64()),
        pa.field("steps", pa.int32()),
        pa.field("seconds", pa.float64()),
        pa.field("start_s", pa.float64()),
        pa.field("start", pa.timestamp("us", tz="UTC")),
        pa.field("worker", pa.string()),
        pa.field("device", pa.string()),
        pa.field("node", pa.string()),
        pa.field("row_ids", pa.list_(pa.string())),
    ]
)
REJECTS = pa.schema(
    [
        pa.field("row_id", pa.string()),
        pa.field("error_class", pa.string()),
        pa.field("message", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("source", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("shard", pa.int64()),
        pa.field("attempt", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class StageTime:
    """One row's share of a denoising stage. `height` and `width` count latent cells."""

    height: int
    width: int
    tokens: int
    steps: int
    seconds: float
    """The batch's seconds over the rows in the batch."""


@dataclass(frozen=True, slots=True)
class Made:
    """One finished sample."""

    row: Row
    data: bytes
    """The encoded picture or video."""
    height_px: int
    width_px: int
    num_steps: int
    stages: tuple[StageTime, ...]
    denoise_seconds: float
    """The row's share of all denoising and expansions."""
    latents: np.ndarray | None = None
    """Kept as float32, whatever they are; None: not asked for."""
    delta: float | None = None
    """The one used; None: the spec's."""
    guidance_scale: float | None = None
    """The one used; None: the spec's."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One line of the timings: rows that go through one stage at once."""

    batch: int | None
    """Counts the attempt's batches from 0: rows that are made together, though a stage may take a few at a
    time, with a line for each. None: what is done once for the whole shard."""
    stage: str
    """read, text_encode, denoise, expand, vae_decode, image_encode, part_write or upload."""
    rows: int
    """At once."""
    height: int | None = None
    """Latent cells, where the stage has a grid."""
    width: int | None = None
    tokens: int | None = None
    """Of one row."""
    steps: int | None = None
    seconds: float = 0.0
    start_s: float | None = None
    """Seconds from the attempt's start to this stage's: tells what overlapped what. Below 0 for what was done
    ahead, beside the shard before."""
    row_ids: tuple[str, ...] = ()
    """The rows, for joins with the data."""


@dataclass(frozen=True)
class Footer:
    """What a part says about itself."""

    shard: int
    num_shards: int
    attempt: str
    fingerprint: str
    first_row: int
    """Index in the input file of the shard's first row."""
    input_rows: int
    """Rows of the input that the shard covers."""
    rows: int
    """Rows in the part."""
    digests: dict[str, str]
    """Of the columns `row_id` and `image` or `video`: see `digest`."""
    worker: str
    device: str
    node: str
    started: float | None
    """When the attempt began, in seconds since 1970; None: not known."""
    versions: dict[str, str]
    """Of the packages that took part."""
    rejects: tuple[Reject, ...] = ()
    timings: tuple[Timing, ...] = ()
    retry: int = 0
    """The retry that made it, from the rejects of the shard's part before; 0: the job, from all its rows."""
    version: int = FOOTER_VERSION

    def to_bytes(self) -> bytes:
        """JSON; the two tables in it are compressed, for every reader of the file fetches this."""
        about = {f.name: getattr(self, f.name) for f in fields(self)}
        about |= {"num_rejects": len(self.rejects)}
        about |= {"rejects": _packed(self.rejects), "timings": _packed(self.timings)}
        return json.dumps(about, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Footer:
        """VerifyError where it is not one, or another version's."""
        try:
            about = json.loads(data)
            if about["version"] != FOOTER_VERSION:
                raise VerifyError(
                    f"a part of footer version {about['version']}; this overtone reads {FOOTER_VERSION}"
                )
            num_rejects = about.pop("num_rejects")
            about["rejects"] = _unpacked(Reject, about["rejects"])
            about["timings"] = tuple(
                Timing(**{**asdict(t), "row_ids": tuple(t.row_ids)})
                for t in _unpacked(Timing, about["timings"])
            )
            if num_rejects != len(about["rejects"]):
                raise ValueError(f"{len(about['rejects'])} rejects instead of {num_rejects}")
            return cls(**about)
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            raise VerifyError(f"its footer is damaged: {error}") from error

    @property
    def kind(self) -> Kind:
        """What the part's rows are."""
        return "video" if "video" in self.digests else "image"


@dataclass(frozen=True)
class Part:
    """A finished shard, ready to be committed."""

    key: str
    data: bytes = field(repr=False)
    footer: Footer = field(repr=False)

    @property
    def attempt(self) -> str:
        return self.footer.attempt

    @property
    def num_rows(self) -> int:
        return self.footer.rows

    @property
    def num_rejects(self) -> int:
        return len(self.footer.rejects)


@dataclass(frozen=True, slots=True)
class PartRow:
    """What is checked and shown of a row in a part."""

    row_id: str
    prompt: str
    height_px: int
    width_px: int
    data: bytes


# Names


def part_name(plan: JobPlan | int, index: int, format: Format = "parquet", retry: int = 0) -> str:
    """`data/train-00042-of-00128.parquet` (or `.tar`); `plan` may be just the number of shards.

    Of a retry `data/train-00042-of-00128-retry-001.parquet`, which `datasets` counts to the same split. Past
    99,999 shards all numbers get more digits, so that names sort like shards.
    """
    num_shards, digits = _digits(plan)
    return f"data/train-{index:0{digits}}-of-{num_shards:0{digits}}{_suffix(retry)}.{_EXTENSION[format]}"


def timings_name(plan: JobPlan | int, index: int, retry: int = 0) -> str:
    """`timings/part-00042.parquet`, of a retry `timings/part-00042-retry-001.parquet`."""
    return f"timings/part-{index:0{_digits(plan)[1]}}{_suffix(retry)}.parquet"


def rejects_name(plan: JobPlan | int, index: int) -> str:
    """`rejects/part-00042.parquet`: those of the shard's newest part, whichever run made it."""
    return f"rejects/part-{index:0{_digits(plan)[1]}}.parquet"


def part_index(plan: JobPlan | int, key: str, retry: int = 0) -> int | None:
    """The shard whose part of this run has this name; None where it is no such part."""
    found = part_place(plan, key)
    return found[0] if found is not None and found[1] == retry else None


def part_place(plan: JobPlan | int, key: str) -> tuple[int, int] | None:
    """(shard, retry) of the part with this name; None where it is no part of such a plan."""
    match = _NAME.fullmatch(key)
    if match is None:
        return None
    index, retry = int(match[1]), int(match[2] or 0)
    known = index < _digits(plan)[0] and key == part_name(plan, index, part_format(key), retry)
    return (index, retry) if known else None


def timings_place(plan: JobPlan | int, key: str) -> tuple[int, int] | None:
    """(shard, retry) of the timings with this name; None where they are no such plan's."""
    match = _TIMINGS.fullmatch(key)
    if match is None:
        return None
    index, retry = int(match[1]), int(match[2] or 0)
    return (index, retry) if index < _digits(plan)[0] and key == timings_name(plan, index, retry) else None


def rejects_index(plan: JobPlan | int, key: str) -> int | None:
    """The shard whose rejects have this name; None where they are no such plan's."""
    match = _REJECTS.fullmatch(key)
    index = int(match[1]) if match else -1
    return index if 0 <= index < _digits(plan)[0] and key == rejects_name(plan, index) else None


def part_format(key: str) -> Format:
    """The format of a part by its name."""
    return "webdataset" if key.endswith(".tar") else "parquet"


def _suffix(retry: int) -> str:
    return f"-retry-{retry:03}" if retry else ""


def _digits(plan: JobPlan | int) -> tuple[int, int]:
    num_shards = plan if isinstance(plan, int) else plan.num_shards
    return num_shards, max(_DIGITS, len(str(num_shards)))


# Building


def build_part(
    spec: JobSpec,
    plan: JobPlan,
    shard: Shard,
    *,
    attempt: str,
    made: Sequence[Made],
    rejects: Sequence[Reject],
    passthrough: pa.Table,
    first_row: int,
    timings: Sequence[Timing],
    worker: str,
    device: str,
    node: str = "",
    started: float | None = None,
    kind: Kind | None = None,
    retry: int = 0,
) -> Part:
    """The part of a shard, with its rows in the order of the input, however they were batched.

    `passthrough` has the input rows from `first_row` on (`ShardRows`). `started` (`time.time()`) is when the
    attempt began, from which the timings' `start_s` count. `kind` says what the model makes; None: as `made`
    shows, or images where nothing was made.
    """
    begin = time.time()
    made = sorted(made, key=lambda one: (one.row.source, one.row.image_index))
    rejects = sorted(rejects, key=lambda one: one.source)
    kind = kind or (media_kind(made[0].data) if made else "image")
    format = spec.output.format
    footer = Footer(
        shard=shard.index,
        num_shards=plan.num_shards,
        attempt=attempt,
        fingerprint=plan.fingerprint,
        first_row=shard.first_row,
        input_rows=shard.num_rows,
        rows=len(made),
        digests={
            "row_id": digest(one.row.row_id.encode() for one in made),
            kind: digest(one.data for one in made),
        },
        worker=worker,
        device=device,
        node=node,
        started=started,
        versions=_versions(),
        rejects=tuple(rejects),
        retry=retry,
    )
    schema = part_schema(spec, passthrough.schema, kind)
    tables = (rows_table(spec, schema, made[a:b], passthrough, first_row, kind) for a, b in _row_groups(made))

    def finished() -> Footer:
        """The footer with the time that writing took so far: the last thing that is written."""
        writing = Timing(
            None,
            "part_write",
            len(made),
            seconds=time.time() - begin,
            start_s=None if started is None else begin - started,
        )
        return Footer(**{**_shallow(footer), "timings": (*timings, writing)})

    if format == "webdataset":
        footer, data = _tar_bytes(tables, kind, finished)
    else:
        footer, data = _parquet_bytes(tables, schema, kind, made, finished)
    return Part(part_name(plan, shard.index, format, retry), data, footer)


def part_schema(spec: JobSpec, passthrough: pa.Schema, kind: Kind = "image") -> pa.Schema:
    """The columns of every part of a job; the metadata has what `datasets` needs to see pictures.

    Everything is nullable, as `datasets` wants it. ValueError for a pass-through column with a name of ours.
    """
    return _part_schema(passthrough.serialize().to_pybytes(), kind, spec.output.latents)


@lru_cache(maxsize=16)  # every part of a job has the same
def _part_schema(passthrough_ipc: bytes, kind: Kind, latents: bool) -> pa.Schema:
    """By the bytes: schemas that differ in their metadata alone, which `datasets` reads, count as equal."""
    passthrough = pa.ipc.read_schema(pa.py_buffer(passthrough_ipc))
    taken = sorted(set(passthrough.names) & set(OUTPUT_COLUMNS))
    if taken:
        raise ValueError(f"pass-through columns {', '.join(taken)} have the names of output columns")
    own = own_columns(kind, latents=latents)
    schema = pa.schema([*own, *(f.with_nullable(True) for f in passthrough)])
    features = features_of(schema) | known_features(passthrough)
    features[kind] = {"_type": kind.capitalize()}
    return schema.with_metadata(as_metadata({f.name: features[f.name] for f in schema if f.name in features}))


def own_columns(kind: Kind, *, latents: bool) -> list[pa.Field]:
    """The columns of a part that do not pass through from the input. `latents`: with theirs."""
    return [
        pa.field("row_id", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field(kind, MEDIA),
        pa.field("mode", pa.string()),
        pa.field("delta", pa.float64()),
        pa.field("num_steps", pa.int32()),
        pa.field("guidance_scale", pa.float64()),
        pa.field("model", pa.string()),
        pa.field("stages", STAGES),
        pa.field("denoise_seconds", pa.float64()),
        *([pa.field("latents", LATENTS)] if latents else []),
    ]


def digest(values: Iterable[bytes]) -> str:
    """SHA-256, in hex, of a column: of each value its length, 8 bytes little endian, and its bytes."""
    sha = sha256()
    for value in values:
        sha.update(len(value).to_bytes(8, "little"))
        sha.update(value)
    return sha.hexdigest()


def rows_table(
    spec: JobSpec, schema: pa.Schema, made: Sequence[Made], passthrough: pa.Table, first_row: int, kind: Kind
) -> pa.Table:
    """Finished samples as rows of `part_schema`. `passthrough` has the input rows from `first_row` on."""
    sampling, model = spec.sampling, spec.model
    extension = media_extension(spec.output, kind)
    name = f"{model.id}@{model.revision}" if model.revision else model.id
    columns: dict[str, Any] = {
        "row_id": [one.row.row_id for one in made],
        "prompt": [one.row.prompt for one in made],
        "seed": [one.row.seed for one in made],
        "height": [one.height_px for one in made],
        "width": [one.width_px for one in made],
        kind: [{"bytes": one.data, "path": media_name(one.row.row_id, extension)} for one in made],
        "mode": [sampling.mode] * len(made),
        "delta": [sampling.delta if one.delta is None else one.delta for one in made],
        "num_steps": [one.num_steps for one in made],
        "guidance_scale": [
            sampling.guidance_scale if one.guidance_scale is None else one.guidance_scale for one in made
        ],
        "model": [name] * len(made),
        "stages": [[asdict(stage) for stage in one.stages] for one in made],
        "denoise_seconds": [one.denoise_seconds for one in made],
    }
    if spec.output.latents:
        columns["latents"] = [
            None
            if one.latents is None
            else {"shape": one.latents.shape, "values": np.asarray(one.latents, np.float32).ravel()}
            for one in made
        ]
    foreign = passthrough.take(pa.array([one.row.source - first_row for one in made], pa.int64()))
    arrays = [
        foreign[f.name] if f.name in foreign.column_names else pa.array(columns[f.name], f.type)
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _row_groups(made: Sequence[Made]) -> Iterable[tuple[int, int]]:
    """Ranges of rows: at most `ROW_GROUP_ROWS`, and at most `ROW_GROUP_BYTES` unless it is one row."""
    first = size_bytes = 0
    for i, one in enumerate(made):
        row_bytes = len(one.data) + (0 if one.latents is None else 4 * one.latents.size)
        if i > first and (i - first >= ROW_GROUP_ROWS or size_bytes + row_bytes > ROW_GROUP_BYTES):
            yield first, i
            first, size_bytes = i, 0
        size_bytes += row_bytes
    if first < len(made):
        yield first, len(made)


def _parquet_bytes(
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    kind: Kind,
    made: Sequence[Made],
    finished: Callable[[], Footer],
) -> tuple[Footer, bytes]:
    paths = _leaf_paths(schema)
    media, latents = f"{kind}.bytes", "latents.values.list.element"
    small = [path for path in paths if path not in (media, latents)]
    mean_bytes = sum(len(one.data) for one in made) // max(1, len(made))
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        schema,
        # Pictures are compressed already; uncompressed, their bytes can be found by the page index alone.
        compression={path: "none" if path == media else "zstd" for path in paths},
        # Our own numbers and names hardly repeat; what passes through may be anything.
        use_dictionary=[path for path in small if path in ("mode", "model") or path not in _own_paths(kind)],
        write_statistics=small,
        use_byte_stream_split=[latents] if latents in paths else False,
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
    return footer, sink.getvalue()


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """A schema as it comes back from Parquet, which has no timestamps in seconds, for example."""
    return _empty_file(schema).schema_arrow


@lru_cache(maxsize=16)  # every part of a job has the same
def _leaf_paths(schema: pa.Schema) -> list[str]:
    """The names of the Parquet columns, with those inside structs and lists."""
    columns = _empty_file(schema).schema
    return [columns.column(i).path for i in range(len(columns))]


@cache
def _own_paths(kind: Kind) -> frozenset[str]:
    """Those of them that do not pass through from the input."""
    return frozenset(_leaf_paths(pa.schema(own_columns(kind, latents=True))))


def _empty_file(schema: pa.Schema) -> pq.ParquetFile:
    sink = io.BytesIO()
    pq.ParquetWriter(sink, schema).close()
    return pq.ParquetFile(sink)


def _tar_bytes(
    tables: Iterable[pa.Table], kind: Kind, finished: Callable[[], Footer]
) -> tuple[Footer, bytes]:
    """A tar of 000042.png, 000042.json and 000042.txt for each row, and 000042.latents.npy where latents are
    kept. The footer is its first file, so that it can be read without the rest."""
    body = io.BytesIO()
    index = 0
    with tarfile.open(fileobj=body, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for table in tables:
            for row in table.to_pylist():
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


def _jsonable(value: Any) -> Any:
    """JSON has no bytes, times or NaN: base64, text and null stand for them."""
    if isinstance(value, dict):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# Committing


def create_part(store: Store, part: Part) -> Timing | None:
    """Create the part under its final name, if no attempt did so before: this is the commit.

    How long that took: the part is ours, and `write_derived` is due. None: another's was first, and ours is
    forgotten. StoreError: not known; call again, which is harmless.
    """
    begin = time.time()
    content_type = _CONTENT_TYPE[part.key.rpartition(".")[2]]
    if not store.create(part.key, part.data, attempt=part.attempt, content_type=content_type):
        return None
    started = part.footer.started
    return Timing(
        None,
        "upload",
        part.num_rows,
        seconds=time.time() - begin,
        start_s=None if started is None else begin - started,
    )


def commit_part(store: Store, part: Part) -> bool:
    """`create_part`, then what is derived from it; whether the part is ours."""
    upload = create_part(store, part)
    if upload is not None:
        write_derived(store, part.footer, (upload,))
    return upload is not None


def write_derived(store: Store, footer: Footer, more: Sequence[Timing] = ()) -> None:
    """Write a part's timings and, if it has any, its rejects; `more`: what it cannot know about itself.

    The rejects of a retry take the place of those before, empty where none is left: writers need no right to
    delete. Of the parts of one shard, the newest has to be the last.
    """
    if footer.rejects or footer.retry:
        store.put(rejects_name(footer.num_shards, footer.shard), _table_bytes(rejects_table(footer)))
    timings = _table_bytes(timings_table(footer, more))
    store.put(timings_name(footer.num_shards, footer.shard, footer.retry), timings, durable=False)


def timings_table(footer: Footer, more: Sequence[Timing] = ()) -> pa.Table:
    """One row for each stage of each batch."""
    timings = (*footer.timings, *more)
    same = {name: [getattr(footer, name)] for name in ("shard", "attempt", "worker", "device", "node")}
    columns = {name: value * len(timings) for name, value in same.items()}
    columns |= {f.name: [getattr(timing, f.name) for timing in timings] for f in fields(Timing)}
    columns["start"] = [_moment(footer.started, timing.start_s) for timing in timings]
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in TIMINGS], schema=TIMINGS)


def rejects_table(footer: Footer) -> pa.Table:
    """One row for each reject."""
    lines = [
        {**asdict(reject), "shard": footer.shard, "attempt": footer.attempt} for reject in footer.rejects
    ]
    return pa.Table.from_pylist(lines, schema=REJECTS)


def read_footer(file: BinaryIO, format: Format = "parquet") -> Footer:
    """The footer of a part; reads little else. VerifyError where the file is not one."""
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
    file: BinaryIO, kind: Kind, format: Format = "parquet", *, limit: int | None = None
) -> Iterator[PartRow]:
    """The rows of a part in order, a few at a time, with page checksums verified; of only the first `limit`,
    little more than those is read. VerifyError where it is broken."""
    rows = _tar_rows(file) if format == "webdataset" else _parquet_rows(file, kind, limit)
    try:
        yield from islice(rows, limit)
    except (pa.ArrowException, OSError, KeyError, ValueError, tarfile.TarError) as error:
        raise VerifyError(f"it cannot be read: {error}") from error


def _parquet_rows(file: BinaryIO, kind: Kind, limit: int | None) -> Iterator[PartRow]:
    # Whole columns of a row group at once, or for a few rows page by page. Never `pre_buffer`: its threads
    # may hold the file a moment longer than we do, and abort a process that ends just then (jobs/tables.py).
    buffer = 0 if limit is None else _PAGE_BYTES
    parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False, buffer_size=buffer)
    columns = ["row_id", "prompt", "height", "width", kind]
    batch_rows = min(_READ_ROWS, _READ_BYTES // max(1, _mean_bytes(parquet.metadata)))
    batch_rows = max(1, batch_rows if limit is None else min(limit, batch_rows))
    for batch in parquet.iter_batches(batch_size=batch_rows, columns=columns, use_threads=False):
        *plain, media = (batch.column(name) for name in columns)
        data = (value.as_py() for value in media.field("bytes"))  # one after the other, for they are large
        yield from map(PartRow, *(column.to_pylist() for column in plain), data)


def _mean_bytes(metadata: pq.FileMetaData) -> int:
    """Of a row, all its columns."""
    groups = (metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups))
    return sum(groups) // max(1, metadata.num_rows)


def _tar_rows(file: BinaryIO) -> Iterator[PartRow]:
    media = b""
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            inside = tar.extractfile(member)
            if inside is None or member.name == TAR_FOOTER or member.name.endswith((".txt", ".npy")):
                continue
            if member.name.endswith(".json"):  # comes after its picture
                row = json.loads(inside.read())
                yield PartRow(row["row_id"], row["prompt"], row["height"], row["width"], media)
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


def _table_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    texts = [column.name for column in table.schema if pa.types.is_string(column.type)]
    pq.write_table(table, sink, compression="zstd", use_dictionary=texts, write_page_index=True)
    return sink.getvalue()


def _moment(started: float | None, start_s: float | None) -> datetime | None:
    return None if started is None or start_s is None else datetime.fromtimestamp(started + start_s, UTC)


_T = TypeVar("_T")


def _packed(records: Sequence[Any]) -> str:
    # Not `astuple`, which copies deeply and takes longer than the encoding.
    values = [[getattr(record, f.name) for f in fields(record)] for record in records]
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _unpacked(cls: type[_T], packed: str) -> tuple[_T, ...]:
    return tuple(cls(*values) for values in json.loads(zlib.decompress(base64.b64decode(packed))))


def _shallow(footer: Footer) -> dict[str, Any]:
    return {f.name: getattr(footer, f.name) for f in fields(footer)}
