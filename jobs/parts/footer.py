"""What a part records about itself, as bytes: counts, digests, rejects, timings. Knows no file format."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from overtone.jobs.errors import VerifyError
from overtone.jobs.media import Kind
from overtone.jobs.rows import Reject

_T = TypeVar("_T")
FOOTER_VERSION = 2
_READABLE = (1, 2)
"""Version 1 lacks `settings`, `compute`, `device_name` and `own_columns`, and `truncated` of the timings."""
_PACKAGES = ("overtone", "torch", "diffusers", "transformers", "ray", "pyarrow", "pillow", "av")


@dataclass(frozen=True, slots=True)
class StageTime:
    """One row's share of a denoising stage. `height` and `width` count latent cells."""

    height: int
    width: int
    tokens: int
    steps: int
    seconds: float
    """The batch's seconds, divided by the rows in the batch."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One line of the timings: rows that go through one stage together."""

    batch: int | None
    """Counts the attempt's batches from 0. A stage may take the rows of a batch in several chunks, which have
    a line each. None: the stage runs once for the whole shard."""
    stage: str
    """read, text_encode, denoise, expand, vae_decode, image_encode, part_write or upload."""
    rows: int
    """Rows that went through the stage together."""
    height: int | None = None
    """Latent cells, where the stage has a grid."""
    width: int | None = None
    tokens: int | None = None
    """Of one row."""
    steps: int | None = None
    seconds: float = 0.0
    start_s: float | None = None
    """Seconds from the attempt's start to this stage's, which show what overlapped what. They are below 0 for
    work that was done ahead, beside the shard before."""
    row_ids: tuple[str, ...] = ()
    """The names of the rows, for joins with the data."""
    truncated: int | None = None
    """Of part_write: rows whose prompt was cut by every text encoder. None: not known."""


@dataclass(frozen=True)
class Footer:
    """What a part records about itself."""

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
    """The retry that made the part, from the rejects of the shard's part before. 0: the job made it, from all
    the shard's rows."""
    device_name: str = ""
    """The kind of processor behind `device`, on which the last bits of a sample depend; empty: not known."""
    settings: dict[str, Any] | None = None
    """`JobSpec.samples()`: with the columns of a row, all that the row is made from. None: not kept."""
    compute: dict[str, Any] | None = None
    """The settings of the worker that change last bits alone: `threads`, `compile`, `offload`."""
    model_commit: str = ""
    """The hub's commit that the model was loaded from, which a revision may name by a branch; empty: not
    known, or no model of the hub."""
    own_columns: tuple[str, ...] = ()
    """The columns of the part that do not pass through; empty: those of the first generation."""
    version: int = FOOTER_VERSION

    def to_bytes(self) -> bytes:
        """JSON. The two tables in it are compressed, because every reader of the file fetches the footer."""
        about = {f.name: getattr(self, f.name) for f in fields(self)}
        about |= {"num_rejects": len(self.rejects)}
        about |= {"rejects": _packed(self.rejects), "timings": _packed(self.timings)}
        return json.dumps(about, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Footer:
        """The footer of `to_bytes`. VerifyError where the bytes are not one, or are of another version."""
        try:
            about = json.loads(data)
            if about["version"] not in _READABLE:
                raise VerifyError(
                    f"a part of footer version {about['version']}; this overtone reads {FOOTER_VERSION}"
                )
            about["own_columns"] = tuple(about.get("own_columns", ()))
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
    def truncated(self) -> int | None:
        """Rows whose prompt was cut by every text encoder; None: not known."""
        known = [timing.truncated for timing in self.timings if timing.truncated is not None]
        return sum(known) if known else None

    @property
    def kind(self) -> Kind:
        """Whether the part's rows are pictures or videos."""
        return "video" if "video" in self.digests else "image"


def digest(values: Iterable[bytes]) -> str:
    """SHA-256, in hex, of a column. Each value counts as its length, in 8 bytes little endian, and its
    bytes."""
    sha = sha256()
    for value in values:
        sha.update(len(value).to_bytes(8, "little"))
        sha.update(value)
    return sha.hexdigest()


@cache
def package_versions() -> dict[str, str]:
    """The versions of the packages that take part in making a row, where they are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _packed(records: Sequence[Any]) -> str:
    # Not `astuple`, which copies deeply and takes longer than the encoding.
    values = [[getattr(record, f.name) for f in fields(record)] for record in records]
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode())).decode()


def _unpacked(cls: type[_T], packed: str) -> tuple[_T, ...]:
    return tuple(cls(*values) for values in json.loads(zlib.decompress(base64.b64decode(packed))))
