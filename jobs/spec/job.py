"""A job as its user wrote it: one checked and frozen object. Knows no files and no YAML.

spec.samples()      # what changes samples: for the fingerprint
spec.to_json()      # canonical; never holds credentials
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from overtone.jobs.errors import SpecError
from overtone.jobs.spec.fields import Section, is_url
from overtone.jobs.spec.sections import Faults, Model, Output, Shards, Workers
from overtone.jobs.spec.table import COLUMNS, PICTURES, Prompts
from overtone.progressive.checkpoints import is_local_model
from overtone.progressive.settings import Sampling


def _shorthand(key: str) -> Any:
    """Lets a section be written as the value of its main key."""

    def expand(value: Any) -> Any:
        return value if isinstance(value, dict | BaseModel) else {key: value}

    return expand


class JobSpec(Section):
    """One job: a model, a prompt table, an output folder, and how to get from one to the other."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "job"
    """Shown in logs and reports; letters, digits, `.`, `_` and `-`. Unset: the spec's file name."""

    model: Annotated[Model, BeforeValidator(_shorthand("id"), json_schema_input_type=str | Model)]
    """What draws the samples. A text is its `id`."""

    prompts: Annotated[
        Prompts, BeforeValidator(_shorthand("path"), json_schema_input_type=str | list[str] | Prompts)
    ]
    """The table of what to make. A text or list is its `path`."""

    sampling: Sampling = Sampling()
    """How a sample is made. Every key here changes pixels."""

    shards: Annotated[Shards, BeforeValidator(_shorthand("rows"), json_schema_input_type=int | Shards)] = (
        Shards()
    )
    """How the work is cut. A number is its `rows`."""

    workers: Annotated[
        Workers, BeforeValidator(_shorthand("count"), json_schema_input_type=int | Workers)
    ] = Workers()
    """How the samples are computed. A number is its `count`."""

    output: Annotated[Output, BeforeValidator(_shorthand("path"), json_schema_input_type=str | Output)]
    """Where the data set goes. A text is its `path`."""

    faults: Faults = Faults()
    """What is tolerated before giving up."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all rows that have none of their own; each gets its own noise from it and its row_id."""

    @property
    def pictured(self) -> bool:
        """Whether rows start from pictures of the prompt table: with a strength, or where the spec names
        their columns. A table's columns `image` and `mask` are like any others in all other jobs."""
        named = [name for meaning, name in self.prompts.columns.items() if meaning in PICTURES]
        return self.sampling.strength is not None or any(named)

    @property
    def meanings(self) -> tuple[str, ...]:
        """Those of `COLUMNS` that the job's table can say something by."""
        return tuple(name for name in COLUMNS if self.pictured or name not in PICTURES)

    @property
    def keeps_sources(self) -> bool:
        """Whether rows have the pictures that they start from beside their own."""
        return self.pictured and self.output.sources != "digest"

    @model_validator(mode="after")
    def _pictures_are_whole(self) -> JobSpec:
        if not self.pictured:
            named = [
                ("sampling.fit", self.sampling.fit),
                ("output.sources", self.output.sources),
                ("prompts.urls", self.prompts.urls),
            ]
            if odd := [key for key, value in named if value is not None]:
                raise ValueError(
                    f"{odd[0]} is for rows that start from pictures; set sampling.strength, or name their "
                    "column as in `columns: {image: photo, mask: hole}` under `prompts`; or leave it out"
                )
            return self
        if self.prompts.column("image") is None:
            raise ValueError("rows start from pictures, and `columns: {image: null}` leaves none")
        if self.sampling.strength is None and not self.prompts.columns.get("mask"):
            raise ValueError(
                "prompts.columns names an image that would change nothing: set sampling.strength, or name a "
                "mask of what is made anew, as in `columns: {image: photo, mask: hole}`"
            )
        if self.output.format == "webdataset" and self.output.sources != "digest":
            raise ValueError(
                "webdataset has no place for the pictures that rows start from; set output.sources: digest, "
                "or output.format: parquet"
            )
        return self

    def samples(self) -> dict[str, Any]:
        """What changes the samples or their encoding, and nothing of how fast they are computed."""
        everything = self.model_dump(mode="json")
        model, output, prompts = everything["model"], everything["output"], everything["prompts"]
        # Settings that came later are left out where they are what was always done: jobs begun before go on.
        before = {"delimiter": ("auto",), "encoding": ("auto", "utf-8"), "text": ()}
        later = {key: prompts[key] for key, usual in before.items() if prompts.get(key) not in (None, *usual)}
        if self.pictured:
            later["sources"] = "bytes" if self.keeps_sources else "digest"
        return later | {
            "model": {
                key: model[key]
                for key in ("id", "revision", "variant", "dtype", "family", "quantize", "attention", "loras")
                if key in model
            },
            "columns": prompts["columns"],
            "keep": prompts["keep"],
            "sampling": everything["sampling"],
            "output": {key: output[key] for key in ("format", "image", "video", "latents")},
            "seed": self.seed,
        }

    def files(self) -> list[tuple[str, str]]:
        """(key, path) of all that the spec names on disks: what another machine must see as this one does."""
        models = [("model.id", self.model.id), *(("model.loras", lora.id) for lora in self.model.loras)]
        places = [
            *(("prompts.path", path) for path in self.prompts.path),
            *((key, path) for key, path in models if is_local_model(path)),
            ("output.path", self.output.path),
        ]
        return [(key, path) for key, path in places if not is_url(path)]

    def to_json(self) -> str:
        """Canonical: one spec has one text. Holds no credentials, for the spec has no place for any."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> JobSpec:
        """The spec of `to_json`. SpecError where it is not one, or another version's."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise SpecError(
                "the job's spec (_job/spec.json) is damaged, or of another version of overtone: "
                f"{f'{key}: ' if key else ''}{first['msg']}"
            ) from None
