"""A row, a reject, and where seeds come from. Knows no files, shards or models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

MAX_SEED = 2**63 - 1
PROMPT_CUT = 1000  # characters of a prompt that a reject keeps


@dataclass(frozen=True, slots=True)
class Given:
    """A picture of the prompt table: what its file's header says, and where its bytes are."""

    sha256: str
    """Of the file, in hex."""
    name: str | None
    """The name that the table gives it; None: it gives bytes alone."""
    height_px: int
    """As people see it: turned as its EXIF says."""
    width_px: int
    size_bytes: int
    read: Callable[[], bytes] = field(compare=False, repr=False)
    """The file's bytes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sample to make, checked and complete: nothing in it needs the input file again."""

    row_id: str
    """Unique in the job, and the same whatever the sharding, order or worker count. Text, never a path."""
    prompt: str
    negative_prompt: str | None
    """None: none was given."""
    seed: int
    """In [0, 2**63 - 1], already resolved: the row's own, or from the job's seed and the row_id."""
    height: int | None
    """Pixels; None: the job's."""
    width: int | None
    """Pixels; None: the job's."""
    source: int
    """Index of the row in its input file, from 0."""
    image_index: int
    """Which of the input row's `num_images` this is, from 0."""
    image: Given | None = None
    """The picture that it starts from; None: noise alone."""
    mask: Given | None = None
    """White where that picture is made anew; None: all of it."""


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that cannot be made, and its reason, kept as data."""

    row_id: str
    error_class: str
    """The name of the exception type; `InvalidRow` for a row that the reader refused."""
    message: str
    stage: str
    """Where it ended: `read`, or a stage of generation."""
    attempts: int
    """How often it was tried; 0: refused by the reader."""
    source: int
    """Index of the row in its input file, from 0."""
    prompt: str | None
    """Cut to 1000 characters; None: it had none."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that kills workers. Later attempts and later runs reject it without running it."""

    shard: int
    row_id: str
    error_class: str
    message: str
    deaths: int
    """How many workers died while they ran this row alone."""


def row_seed(job_seed: int, row_id: str) -> int:
    """The seed in [0, 2**63 - 1] of a row that has none of its own.

    It is a hash, so that neighbouring job seeds and row_ids share no seeds.
    """
    return _hash63(b"overtone-row", job_seed, row_id.encode())


def image_seed(seed: int, image_index: int) -> int:
    """The seed of image k of a row that asks for several. Image 0 has the row's own, and the others a hash of
    both."""
    return seed if image_index == 0 else _hash63(b"overtone-image", seed, b"%d" % image_index)


def image_row_id(row_id: str, image_index: int, num_images: int) -> str:
    """`a` where the row asks for one image; `a#0`, `a#1`, ... where it asks for several."""
    return row_id if num_images == 1 else f"{row_id}#{image_index}"


def _hash63(person: bytes, number: int, data: bytes) -> int:
    digest = blake2b(b"%d:" % number + data, digest_size=8, person=person).digest()
    return int.from_bytes(digest, "big") >> 1
