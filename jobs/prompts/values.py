"""What one input row asks for: its samples, or as many rejects. Knows no files and no columns, only values.

Prompts are data: a text may hold anything that UTF-8 can write. A value has the type that the table's format
gives it, and a text that is not valid UTF-8 is its bytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import UUID

from overtone.jobs.rows import MAX_SEED, PROMPT_CUT, Given, Reject, Row, image_row_id, image_seed, row_seed

MAX_PROMPT = 100_000
"""Characters; text encoders read a few thousand and would spend minutes on the rest."""
MAX_ROW_ID = 1_000
"""Characters."""
MAX_IMAGES = 1_000
"""`num_images` of one row."""
MAX_SIDE_PX = 65_536


def samples(
    job_seed: int,
    default_id: str,
    source: int,
    values: dict[str, Any],
    problem: str | None,
    *,
    image: Given | None = None,
    mask: Given | None = None,
) -> tuple[list[Row], list[Reject]]:
    """The samples that one input row asks for, or as many rejects.

    `values` holds the values that the row's table has, by meaning (`jobs.spec.COLUMNS`). `default_id` is the
    row_id of a row that gives none that can be used. `problem` says why the row could not be read; None: it
    was read. `image` and `mask`: what its samples start from.
    """
    values = {meaning: _given(value) for meaning, value in values.items()}
    row_id, num_images, invalid = row_identity(default_id, values)
    problem = problem or invalid
    ids = [image_row_id(row_id, k, num_images) for k in range(num_images)]
    if problem is None:
        try:
            rows = _rows(job_seed, row_id, ids, source, values)
            return [replace(row, image=image, mask=mask) for row in rows] if image else rows, []
        except _InvalidError as error:
            problem = str(error)
    prompt = values.get("prompt")
    shown = prompt[:PROMPT_CUT].encode("utf-8", "replace").decode() if isinstance(prompt, str) else None
    return [], [Reject(id, "InvalidRow", problem, "read", 0, source, shown) for id in ids]


def row_identity(default_id: str, values: dict[str, Any]) -> tuple[str, int, str | None]:
    """(row_id, number of samples, what is wrong with these two). The names of a row's samples depend on
    nothing else."""
    problems = []
    try:
        row_id = _row_id(_given(values.get("row_id"))) or default_id
    except _InvalidError as error:
        row_id = default_id
        problems.append(str(error))
    try:
        num_images = _whole("num_images", _given(values.get("num_images")), 1, MAX_IMAGES) or 1
    except _InvalidError as error:
        num_images = 1
        problems.append(str(error))
    return row_id, num_images, "; ".join(problems) or None


def _rows(job_seed: int, row_id: str, ids: list[str], source: int, values: dict[str, Any]) -> list[Row]:
    prompt = _prompt("prompt", values.get("prompt"))
    if prompt is None:
        raise _InvalidError("prompt is null")
    negative_prompt = _prompt("negative_prompt", values.get("negative_prompt"))
    height = _whole("height", values.get("height"), 1, MAX_SIDE_PX)
    width = _whole("width", values.get("width"), 1, MAX_SIDE_PX)
    seed = _whole("seed", values.get("seed"), 0, MAX_SEED)
    if seed is None:
        seed = row_seed(job_seed, row_id)
    return [
        Row(
            row_id=id,
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=image_seed(seed, k),
            height=height,
            width=width,
            source=source,
            image_index=k,
        )
        for k, id in enumerate(ids)
    ]


def _given(value: Any) -> Any:
    """None for what data frames write where there is nothing: what is not a number."""
    return None if isinstance(value, float | Decimal) and math.isnan(value) else value


class _InvalidError(ValueError):
    """Why a row cannot be made."""


def _row_id(value: Any) -> str | None:
    """Text, or a whole number or UUID as text; None where it is null or empty."""
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        whole = _whole("row_id", value, -(2**63), 2**64)
        return str(whole)
    text = _checked_text("row_id", value)
    if text is not None and len(text) > MAX_ROW_ID:
        raise _InvalidError(f"row_id has {len(text):,} characters; at most {MAX_ROW_ID:,}")
    return text


def _prompt(name: str, value: Any) -> str | None:
    text = _checked_text(name, value)
    if text is not None and len(text) > MAX_PROMPT:
        raise _InvalidError(f"{name} has {len(text):,} characters; at most {MAX_PROMPT:,}")
    return text


def _checked_text(name: str, value: Any) -> str | None:
    """Any text that UTF-8 can write. Prompts are data, so that NUL and all else is allowed in them."""
    if value is None:
        return None
    if isinstance(value, bytes):
        raise _InvalidError(f"{name} is not valid UTF-8: {value[:50]!r}")
    if not isinstance(value, str):
        raise _InvalidError(f"{name} is not text but {shown_value(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _InvalidError(f"{name} is not valid Unicode: {value[:50]!a}") from None
    return value


def _whole(name: str, value: Any, low: int, high: int) -> int | None:
    """A whole number in [low, high]. csv gives it as text, and tables with missing values give it as a float
    that has no fraction."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "nan"):
        return None
    number: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, float) and math.isfinite(value) and value == int(value):
        number = int(value)
    elif isinstance(value, Decimal) and value.is_finite() and value == int(value):
        number = int(value)
    elif isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,30}(\.0*)?", value.strip(), re.ASCII):
        number = int(value.strip().partition(".")[0])
    if number is None:
        raise _InvalidError(f"{name} must be a whole number, not {shown_value(value)}")
    if not low <= number <= high:
        raise _InvalidError(f"{name} must be between {low} and {high}, not {number}")
    return number


def shown_value(value: Any) -> str:
    """A value as an error message shows it, cut after 80 characters."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= 80 else f"{text[:80]}..."


def plain_row_ids(row_ids: list[Any]) -> bool:
    """Whether `row_identity` would return each row_id unchanged. It makes the same checks, but for all at
    once."""
    if not all(type(value) is str and 0 < len(value) <= MAX_ROW_ID for value in row_ids):
        return False
    return "".join(row_ids).isascii()
