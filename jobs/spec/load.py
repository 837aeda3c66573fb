"""Reads a job spec from a YAML file, with `key=value` overrides on top. Knows which keys have short forms,
which exclude each other and what paths are relative to.

    spec = load_spec("job.yaml", ["sampling.delta=0.1"])
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from overtone.jobs.errors import SpecError
from overtone.jobs.spec.fields import is_url
from overtone.jobs.spec.job import JobSpec
from overtone.jobs.spec.messages import validation_messages
from overtone.jobs.spec.yaml_lines import Document, parse
from overtone.progressive.checkpoints import is_local_model, spectrum_profile
from overtone.progressive.presets import preset_for
from overtone.progressive.schedule import consistency_profile
from overtone.progressive.settings import PRESET_FILLED

_SHORT = {"model": "id", "prompts": "path", "workers": "count", "output": "path", "shards": "rows"}
_MAX_SPEC_BYTES = 4 * 1024**2

_RIVALS = {
    "workers.count": ("workers.min", "workers.max"),
    "workers.min": ("workers.count",),
    "workers.max": ("workers.count",),
    "sampling.levels": ("sampling.scales",),
    "sampling.scales": ("sampling.levels",),
}


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
    """A copy of the job with overrides on top, as `load_spec` takes them. SpecError names the key."""
    document = Document("the job's spec", spec.model_dump(mode="json"))
    for override in overrides:
        document.set(override, short=_SHORT, rivals=_RIVALS)
    if (document.data.get("sampling") or {}).get("preset") is not None:
        raise SpecError(
            f"{document.where(('sampling', 'preset'))}: sampling.preset: this job has all its settings "
            "already, and a preset fills in only what is unset; give num_steps, delta and levels or scales"
        )
    return _checked(document, Path.cwd())


def _checked(document: Document, folder: Path) -> JobSpec:
    data = {key: value for key, value in document.data.items() if value is not None}
    _read_measured(data, document, folder)
    _fill_preset(data, document, folder)
    try:
        spec = JobSpec.model_validate(data, context={PRESET_FILLED: True})
    except ValidationError as error:
        raise SpecError("\n".join(validation_messages(error, document, JobSpec))) from None
    return _placed(spec, document, folder)


def _read_measured(data: dict[str, Any], document: Document, folder: Path) -> None:
    """Replaces the names of saved measurements by their numbers, which are what changes samples."""
    for key, read in (("spectrum", _spectrum), ("consistency", consistency_profile)):
        sampling = data.get("sampling")
        if not isinstance(sampling, dict) or not isinstance(sampling.get(key), str):
            continue
        where = document.where(("sampling", key))
        file = (Path.cwd() if where.startswith("--set") else folder) / Path(sampling[key]).expanduser()
        try:
            data["sampling"] = sampling | {key: read(file)}
        except (OSError, ValueError) as error:
            raise SpecError(f"{where}: sampling.{key}: {error}") from None


def _spectrum(file: Path) -> list[float]:
    profile = spectrum_profile(file)
    return [profile.amplitude, profile.beta]


def _fill_preset(data: dict[str, Any], document: Document, folder: Path) -> None:
    """Adds a preset's settings to those that the spec has, which come first."""
    sampling, model = data.get("sampling"), data.get("model")
    name = sampling.get("preset") if isinstance(sampling, dict) else None
    if name is None:
        return
    assert isinstance(sampling, dict)
    section = model if isinstance(model, dict) else {"id": model}
    where = document.where(("sampling", "preset"))
    try:
        family = section.get("family") or "auto"
        id = section.get("id")
        if not isinstance(id, str):
            return  # which is told better where the model is checked
        if is_local_model(id):
            id = _absolute(id, Path.cwd() if document.where(("model", "id")).startswith("--set") else folder)
        data["sampling"] = preset_for(name, id, family).filled(sampling)
    except ValueError as error:
        raise SpecError(f"{where}: sampling.preset: {error}") from None


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
    """A copy with absolute paths, so that it means the same on every machine that has the same files."""
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
