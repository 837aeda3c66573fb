"""TODO: jobs/spec/load.py."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from overtone.jobs.errors import SpecError
from overtone.jobs.spec.fields import is_url
from overtone.jobs.spec.messages import validation_messages
from overtone.jobs.spec.sections import Faults, Model, Output, Prompts, Section, Shards, Workers
from overtone.jobs.spec.yaml_lines import Document, parse
from overtone.progressive.checkpoints import is_local_model, spectrum_profile
from overtone.progressive.settings import Sampling


def _shorthand(key: str) -> Any:
    """Lets a section be written as the value of its main key."""

    def expand(value: Any) -> Any:
        return value if isinstance(value, dict | BaseModel) else {key: value}

    return expand


_SHORT = {"model": "id", "prompts": "path", "workers": "count", "output": "path", "shards": "rows"}
_MAX_SPEC_BYTES = 4 * 1024**2

_RIVALS = {
    "workers.count": ("workers.min", "workers.max"),
    "workers.min": ("workers.count",),
    "workers.max": ("workers.count",),
    "sampling.levels": ("sampling.scales",),
    "sampling.scales": ("sampling.levels",),
}


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
    """What is borne before giving up."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all rows that have none of their own; each gets its own noise from it and its row_id."""

    def samples(self) -> dict[str, Any]:
        """What changes the samples or their encoding, and nothing of how fast they are computed."""
        everything = self.model_dump(mode="json")
        model, output = everything["model"], everything["output"]
        return {
            "model": {key: model[key] for key in ("id", "revision", "dtype", "family", "quantize", "loras")},
            "columns": everything["prompts"]["columns"],
            "keep": everything["prompts"]["keep"],
            "sampling": everything["sampling"],
            "output": {key: output[key] for key in ("format", "image", "video", "latents")},
            "seed": self.seed,
        }

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


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The job in a YAML file, with `key=value` overrides on top.

    Relative paths of prompts and models are relative to the file, in overrides to the current folder; that of
    the output is always relative to the current folder. SpecError names the key and the line.
    """
    path = Path(path).expanduser()
    document = parse(_text_of(path), str(path))
    for override in overrides:
        document.set(override, short=_SHORT, rivals=_RIVALS)
    document.data.setdefault("name", _name_of(path))
    return _checked(document, path.absolute().parent)


def with_overrides(spec: JobSpec, overrides: Sequence[str]) -> JobSpec:
    """The same job with `key=value` overrides on top, as `load_spec` takes them. SpecError names the key."""
    document = Document("the job's spec", spec.model_dump(mode="json"))
    for override in overrides:
        document.set(override, short=_SHORT, rivals=_RIVALS)
    return _checked(document, Path.cwd())


def _checked(document: Document, folder: Path) -> JobSpec:
    data = {key: value for key, value in document.data.items() if value is not None}
    _read_spectrum(data, document, folder)
    try:
        spec = JobSpec.model_validate(data)
    except ValidationError as error:
        raise SpecError("\n".join(validation_messages(error, document, JobSpec))) from None
    return _placed(spec, document, folder)


def _read_spectrum(data: dict[str, Any], document: Document, folder: Path) -> None:
    """A saved spectrum that the spec names, as its two numbers: they, not the file's name, change samples."""
    sampling = data.get("sampling")
    if not isinstance(sampling, dict) or not isinstance(sampling.get("spectrum"), str):
        return
    where = document.where(("sampling", "spectrum"))
    file = (Path.cwd() if where.startswith("--set") else folder) / Path(sampling["spectrum"]).expanduser()
    try:
        found = spectrum_profile(file)
    except (OSError, ValueError) as error:
        raise SpecError(f"{where}: sampling.spectrum: {error}") from None
    data["sampling"] = sampling | {"spectrum": [found.amplitude, found.beta]}


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SPEC_BYTES + 1)
        if len(data) > _MAX_SPEC_BYTES:
            raise SpecError(f"{path} is no spec: it has more than {_MAX_SPEC_BYTES:,} bytes")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise SpecError(f"there is no spec {path}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is no spec: it is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}") from None


def _name_of(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:63] or "job"


def _placed(spec: JobSpec, document: Document, folder: Path) -> JobSpec:
    """The same spec with absolute paths, so that it means the same on every machine with the same files."""
    here = Path.cwd()

    def base(*key: str) -> Path:
        return here if document.where(key).startswith("--set") else folder

    def model_path(text: str, base: Path) -> str:
        return _absolute(text, base) if is_local_model(text) else text

    model, base_model = spec.model, base("model", "id")
    changed: dict[str, Any] = {
        "id": model_path(model.id, base_model),
        "loras": tuple(
            lora.model_copy(update={"id": model_path(lora.id, base("model", "loras"))})
            for lora in model.loras
        ),
    }
    prompts = tuple(_absolute(text, base("prompts", "path")) for text in spec.prompts.path)
    return spec.model_copy(
        update={
            "model": model.model_copy(update=changed),
            "prompts": spec.prompts.model_copy(update={"path": prompts}),
            "output": spec.output.model_copy(update={"path": _absolute(spec.output.path, here)}),
        }
    )


def _absolute(text: str, base: Path) -> str:
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if is_url(text):
        return text
    tail = "/" if text.endswith("/") and text != "/" else ""
    return str(Path(os.path.normpath(base / Path(text).expanduser()))) + tail
