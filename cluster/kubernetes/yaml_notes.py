"""Kubernetes documents as YAML with comments. Knows how they are printed, and none of their fields.

    dump({"spec": {Note("The driver runs on the head."): None, "entrypointNumCpus": 0}})

    ---
    spec:
      # The driver runs on the head.
      entrypointNumCpus: 0

Kubernetes reads YAML 1.1, in which `yes` and `on` are booleans. PyYAML writes for such a reader and quotes
texts like these; a library that writes YAML 1.2 would not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml


class Note(str):
    """A comment line, as a key of a mapping whose value is None."""

    __slots__ = ()


def dump(document: dict[str, Any]) -> str:
    """One document of a YAML stream, with its notes as comments."""
    notes: list[str] = []
    text = yaml.dump(_numbered(document, notes), Dumper=_Dumper, sort_keys=False, width=1000)
    text = re.sub(r"^( *)'#(\d+)': null$", lambda m: f"{m[1]}# {notes[int(m[2])]}", text, flags=re.MULTILINE)
    return f"---\n{text}"


def _numbered(value: Any, notes: list[str]) -> Any:
    """A copy whose comments are keys `#0`, `#1`, ... into `notes`."""
    if isinstance(value, Mapping):
        copy: dict[Any, Any] = {}
        for key, inner in value.items():
            if isinstance(key, Note):
                copy[f"#{len(notes)}"] = None
                notes.append(str(key))
            else:
                copy[key] = _numbered(inner, notes)
        return copy
    if isinstance(value, list | tuple):
        return [_numbered(inner, notes) for inner in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Writes no anchors, indents lists, and texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
