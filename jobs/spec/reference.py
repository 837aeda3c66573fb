"""The spec as a JSON Schema, and as Markdown tables of its fields' docstrings. Knows no keys by name."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel

from overtone.jobs.spec.job import JobSpec


def spec_reference_markdown() -> str:
    """A table for each section of the spec: key, values, default, meaning."""
    return _markdown(JobSpec)


def spec_schema() -> dict[str, Any]:
    """The JSON Schema of a spec, with descriptions, units and defaults, for editors and other programs."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **JobSpec.model_json_schema(),
        "title": "Overtone job",
    }


def _markdown(model: type[BaseModel]) -> str:
    """A table of the model's own keys, then one for each section below it, in order."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    out: list[str] = []
    todo: list[tuple[str, dict[str, Any]]] = [("", schema)]
    for prefix, section in todo:  # grows as sections are found
        if prefix:
            out += [f"### `{prefix}`", "", _one_line(section.get("description", "")), ""]
        out += ["| key | value | default | meaning |", "|---|---|---|---|"]
        required = section.get("required", [])
        for name, prop in section["properties"].items():
            inner = _section(prop, definitions)
            if inner is not None:
                todo.append((f"{prefix}.{name}" if prefix else name, inner))
            meaning = prop.get("description") or (inner or {}).get("description", "")
            default = "required" if name in required else _default(prop, inner is not None)
            cells = (f"`{name}`", _values(prop, definitions), default, _one_line(meaning))
            out.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        out.append("")
    return "\n".join(out)


def _section(prop: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The model that a key holds, or each item of its list; None where it holds plain values."""
    for choice in [prop, prop.get("items", {}), *prop.get("anyOf", [])]:
        if "$ref" in choice:
            return definitions[choice["$ref"].rpartition("/")[2]]
    return None


def _default(prop: dict[str, Any], section: bool) -> str:
    default = prop.get("default")
    if section or default is None or default in ({}, []):
        return ""
    return f"`{json.dumps(default) if not isinstance(default, str) else default}`"


_PLAIN = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "`true` or `false`",
    "null": "",
    "object": "`key: value` lines",
}


def _values(prop: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What may be written: kinds, limits and choices."""
    if "anyOf" in prop:
        kinds = [_values(choice, definitions) for choice in prop["anyOf"]]
        if "number" in kinds and "whole number" in kinds:
            kinds.remove("whole number")
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind))
    if "$ref" in prop:
        return "section"
    if "enum" in prop:
        return ", ".join(f"`{value}`" for value in prop["enum"])
    if "const" in prop:
        return f"`{prop['const']}`"
    if prop.get("type") == "array":
        if "prefixItems" in prop:
            return f"list of {len(prop['prefixItems'])} numbers"
        return f"list of {_plural(_values(prop.get('items', {}), definitions))}"
    kind = _PLAIN.get(prop.get("type", ""), "anything")
    limits = [
        f"{sign} {_number(prop[key])}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in prop
    ]
    return f"{kind} {' and '.join(limits)}".strip()


def _number(value: float) -> str:
    if isinstance(value, int):
        return "2^63" if value == 2**63 else str(value)
    return f"{value:g}"


def _plural(kind: str) -> str:
    word = re.match(r"(whole )?number|text|section", kind)
    return f"{word[0]}s{kind[word.end() :]}" if word else kind


def _one_line(text: str) -> str:
    return " ".join(text.split())
