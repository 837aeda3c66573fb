"""The section `prompts` of a job spec: the table of what to make, and what its columns mean. Knows no
files."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from overtone.jobs.spec.fields import Endpoint, Place, Section, Text, one_or_more
from overtone.progressive.settings import Grown

Column = Literal[
    "prompt", "row_id", "negative_prompt", "seed", "height", "width", "num_images", "image", "mask"
]
"""What a prompt table can say about a row; every other column passes through to the output."""
COLUMNS: tuple[str, ...] = get_args(Column)
PICTURES = ("image", "mask")
"""Those of them that count only in jobs whose rows start from pictures (`JobSpec.pictured`)."""


def _delimiter(value: Any) -> Any:
    if value == "tab":
        return "\t"
    if isinstance(value, str) and value != "auto" and (len(value) != 1 or value in '"\r\n'):
        raise ValueError("is one character, such as `;`, or `tab`, or `auto`")
    return value


def _encoding(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        try:
            if "prompt".encode(value).decode(value) == "prompt":
                return codecs.lookup(value).name
        except (LookupError, UnicodeError, ValueError):
            pass
        raise ValueError("is the name of an encoding as Python knows it, such as `cp1252`, or `auto`")
    return value


class Prompts(Section, Grown):
    """The table of what to make: one input row a sample, or `num_images` samples."""

    came_later = ("text", "urls")

    path: Annotated[
        tuple[Place, ...],
        Field(min_length=1),
        BeforeValidator(one_or_more, json_schema_input_type=str | list[str]),
    ]
    """One or a list of: file, folder (all its Parquet files, at any depth), glob (`*`, `**`, `?`,
    `[...]`); local (relative to the spec), `s3://`, `hf://datasets/...` or any other fsspec URL."""

    format: Literal["auto", "parquet", "csv", "jsonl"] = "auto"
    """`auto`: by the names' endings. csv and jsonl are read once from end to end to count their rows, also
    where they are compressed (gzip, bzip2, zstd, lz4, xz). A format given counts for names without endings
    too."""

    columns: dict[Column, Text | None] = Field(default_factory=dict)
    """Which column of the table holds what, where the names differ: `{prompt: caption}`. `{height: null}`:
    the table's `height` means something else; it passes through as `source_height`. `{row_id: null}`: so do
    `row_id` and `id`, and rows are named after their file and number. `image` and `mask`, pictures that rows
    start from, count where `sampling.strength` is set, or where they are named here."""

    text: Text | None = None
    """The prompt of all rows, in place of a column of the table. Unset: each row has its own."""

    urls: bool | None = None
    """Whether pictures that rows start from may be http and https URLs, which workers then fetch, from public
    addresses alone. Unset: a URL makes its row a reject."""

    delimiter: Annotated[str, BeforeValidator(_delimiter, json_schema_input_type=str)] = "auto"
    """What stands between the cells of a csv file, one character or `tab`. `auto`: comma, semicolon, tab or
    `|`, by which the first line has the column of the prompts."""

    encoding: Annotated[str, BeforeValidator(_encoding, json_schema_input_type=str)] = "auto"
    """Of csv and jsonl files, such as `cp1252`, `latin-1`, `utf-16` or `gb18030`. `auto`: UTF-8, and a file
    that is not is refused. `utf-8`: of such a file, the rows that are not become rejects."""

    keep: tuple[Text, ...] | None = None
    """The other columns of the table that pass through to the output; unset: all of them."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows of the table, in file order; unset: all."""

    endpoint_url: Endpoint | None = None
    """S3 server of `s3://` prompts; unset: the output's `endpoint_url`, if any."""

    region: Text | None = None
    """S3 region of `s3://` prompts; unset: the output's `region`, if any."""

    def column(self, name: str) -> str | None:
        """The name in the table of one of `COLUMNS`; None: nothing there means that."""
        if name == "prompt" and self.text is not None:
            return None
        return self.columns.get(name, name)  # type: ignore[call-overload]

    @model_validator(mode="after")
    def _has_prompts(self) -> Prompts:
        if self.text is not None:
            if self.columns.get("prompt"):
                raise ValueError("give `text`, or a column of prompts in `columns`, not both")
        elif self.column("prompt") is None:
            raise ValueError("`columns: {prompt: null}` leaves no prompts; name the column that holds them")
        return self
