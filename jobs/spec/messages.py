"""Says what is wrong in a spec, where, and what to write instead. Knows pydantic's errors, no key by name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from overtone.jobs.spec.yaml_lines import Document


def validation_messages(error: ValidationError, document: Document, model: type[BaseModel]) -> list[str]:
    """`job.yaml:7: sampling.deltaa: unknown key; did you mean delta?`: a line for each wrong key."""
    found: dict[tuple[str, str], _Wrong] = {}
    for problem in error.errors(include_url=False):
        path = document.known(problem["loc"])
        shown = ".".join(map(str, path))
        if problem["type"] == "missing":
            shown = ".".join(str(key) for key in problem["loc"])
        found.setdefault((document.where(path), shown), _Wrong()).add(problem, path, model)
    return [f"{where}: {f'{shown}: ' if shown else ''}{wrong}" for (where, shown), wrong in found.items()]


class _Wrong:
    """All that is wrong with a value: what a value of each of its types should be, and it is not."""

    def __init__(self) -> None:
        self._said: dict[str, None] = {}  # whole sentences, in order
        self._wanted: dict[str, None] = {}
        self._given: dict[str, None] = {}

    def add(self, problem: Any, path: tuple[str | int, ...], model: type[BaseModel]) -> None:
        match problem["type"]:
            case "extra_forbidden":
                self._said[f"unknown key{_suggestion(path, model)}"] = None
            case "missing":
                self._said["is missing"] = None
            case "value_error":
                self._said[str(problem["ctx"]["error"])] = None  # ours: it keeps credentials to itself
            case "model_type" | "dict_type":
                self._said["must be a section of `key: value` lines"] = None
            case _:
                self._wanted[_wanted(problem)] = None
                if isinstance(problem["input"], str | int | float | bool | None):
                    self._given[_cut(problem["input"])] = None

    def __str__(self) -> str:
        said = list(self._said)
        if self._wanted:
            wanted = [text for text in self._wanted if text != _WHOLE or _NUMBER not in self._wanted]
            got = f"; got {', '.join(self._given)}" if self._given else ""
            said.append(f"should be {' or '.join(wanted)}{got}")
        return ", or ".join(said)


_WHOLE, _NUMBER, _LIST = "a whole number", "a number", "a list, as in [a, b]"
_WANTED = {
    "string_type": "a text",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": _LIST,
    "list_type": _LIST,
    "too_short": "a list with something in it",
}
_BOUNDS = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "above {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "below {lt}",
    "literal_error": "{expected}",
}


def _wanted(problem: Any) -> str:
    """What a value should be, after these words."""
    kind = problem["type"]
    if kind in _WANTED:
        return _WANTED[kind]
    if kind in _BOUNDS:
        values = {key: str(value).removesuffix(".0") for key, value in problem["ctx"].items()}
        return _BOUNDS[kind].format(**values)
    if kind == "string_pattern_mismatch":
        return _characters(problem["ctx"]["pattern"])
    text: str = problem["msg"]
    return text.removeprefix("Input should be ")


def _characters(pattern: str) -> str:
    """`^[A-Za-z0-9][A-Za-z0-9.]{0,9}$` in words: a class of characters, or another one for the first."""
    classes = re.findall(r"\[A-Za-z0-9([^\]]*)\]", pattern)
    names = ["letters", "digits", *(f"`{mark}`" for mark in classes[-1])]
    text = f"{', '.join(names[:-1])} and {names[-1]} alone"
    if len(classes) > 1:
        text += ", begun by a letter or digit"
    longest = re.search(r"\{0,(\d+)\}", pattern)
    return f"{text}, at most {int(longest[1]) + 1} characters" if longest else text


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
