"""Says what is wrong in a spec, where, and what to write instead. Knows pydantic's errors, no key by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from overtone.jobs.spec.yaml_lines import Document


def validation_messages(error: ValidationError, document: Document, model: type[BaseModel]) -> list[str]:
    """`job.yaml:7: sampling.deltaa: unknown key; did you mean delta?`: a line for each wrong key."""
    found: dict[tuple[str, str], list[str]] = {}
    for problem in error.errors(include_url=False):
        path = document.known(problem["loc"])
        shown = ".".join(map(str, path))
        message = _message(problem, path, model)
        if problem["type"] == "missing":
            shown = ".".join(str(key) for key in problem["loc"])
        messages = found.setdefault((document.where(path), shown), [])
        if message not in messages:
            messages.append(message)
    return [
        f"{where}: {f'{shown}: ' if shown else ''}{', or '.join(messages)}"
        for (where, shown), messages in found.items()
    ]


def _message(problem: Any, path: tuple[str | int, ...], model: type[BaseModel]) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key{_suggestion(path, model)}"
        case "missing":
            return "is missing"
        case "value_error":
            return str(problem["ctx"]["error"])  # ours: it says all, and keeps credentials to itself
        case "model_type" | "dict_type":
            return "must be a section of `key: value` lines"
    text = problem["msg"].removeprefix("Input ")
    value = problem["input"]
    if isinstance(value, str | int | float | bool | None):
        text += f"; got {_cut(value)}"
    return text


def _cut(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _suggestion(path: tuple[str | int, ...], model: type[BaseModel]) -> str:
    """`; did you mean delta?`: the one section that has the key, else the nearest key of the same section."""
    *section, key = path
    fields = _fields(model, [part for part in section if isinstance(part, str)])
    places = [name for name in model.model_fields if key in _fields(model, [name])]
    if len(places) == 1:  # of several sections with such a key none is the likely one
        return f"; did you mean {places[0]}.{key}?"
    near = get_close_matches(str(key), fields, 1, 0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(fields)}" if fields else ""


def _fields(model: type[BaseModel], section: Sequence[str]) -> list[str]:
    for name in section:
        info = model.model_fields.get(name)
        inner = info.annotation if info else None
        if get_origin(inner) is tuple:  # a list of sections, such as model.loras
            inner = get_args(inner)[0]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)
