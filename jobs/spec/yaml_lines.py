"""YAML whose every value knows its line, with `key=value` overrides on top. Knows no keys of any spec.

Scalars are those of YAML 1.2's core schema, so that `off` is a text, `1e-3` a number and 2024-01-01 no date.
Tags (they can name Python objects) and keys that exist twice are errors; aliases work as far as they stay
small. Values are built here from the nodes of the YAML library: one that it has built itself does not say on
which line it was written, nor that its key existed twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from overtone.jobs.errors import SpecError

Path = tuple[str | int, ...]
_MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own way to say it


_SCALARS: list[tuple[str, str, str]] = [
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
]


for _name, _regex, _first in _SCALARS:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}",
        re.compile(rf"(?:{_regex})\Z"),
        [*_first, *([""] if _name == "null" else [])],
    )


def parse(text: str, source: str, *, lines: bool = True) -> Document:
    """The mapping that a YAML text holds. SpecError, with the line, where it holds none or is not safe."""

    def place(mark: Any) -> str:
        return f"{source}:{mark.line + 1}" if lines and mark is not None else source

    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SpecError(f"{place(mark)}: not YAML: {_problem(text, error, mark)}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise SpecError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SpecError(f"{source}: not a spec: nested too deeply") from None
    document = Document(source)
    if root is None:
        raise SpecError(f"{source} is empty")
    if not isinstance(root, yaml.MappingNode):
        raise SpecError(f"{place(root.start_mark)}: a spec is made of `key: value` lines")
    try:
        document.data = _Builder(document, place).value(root, (), root.start_mark)
    except RecursionError:
        raise SpecError(f"{source}: not a spec: nested too deeply") from None
    return document


@dataclass
class Document:
    """A mapping as it was written: `data` is plain Python, `places` says where each value stands."""

    source: str
    """What errors call it: the file's name."""
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, str] = field(default_factory=dict)
    """By path into `data`: `job.yaml:7`, or `--set key`."""

    def where(self, path: Path) -> str:
        """The place of a value, or of the nearest one around it."""
        return self.places.get(self.known(path), self.source)

    def known(self, path: Path) -> Path:
        """The part of the path that was written, as far as it goes."""
        while path and path not in self.places:
            path = path[:-1]
        return path

    def set(self, override: str, *, short: Mapping[str, str], rivals: Mapping[str, Sequence[str]]) -> None:
        """Apply `key.key=value`, whose value is YAML. SpecError where it cannot be.

        `short`: sections that may be written as the value of their main key, e.g. {"workers": "count"}.
        `rivals`: keys that give way when one is set, e.g. {"workers.count": ["workers.min"]}.
        """
        key, equals, text = override.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys):
            raise SpecError(f"--set {key[:80]}: write it as key=value, for example --set sampling.delta=0.1")
        place = f"--set {key.strip()}"  # not its value, which may be a secret where none belongs
        value = _override_value(text, place)
        at = self.data
        for depth, name in enumerate(keys[:-1]):
            inner = at.get(name)
            if inner is None:
                inner = {}
            elif not isinstance(inner, dict):
                if depth or name not in short:
                    raise SpecError(f"{place}: {'.'.join(keys[: depth + 1])} is not a section")
                main = (name, short[name])
                self._move((name,), main)
                inner = {short[name]: inner}
            at[name] = inner
            self.places.setdefault(tuple(keys[: depth + 1]), place)
            at = inner
        for rival in rivals.get(".".join(keys), ()):
            at.pop(rival.rpartition(".")[2], None)
        at[keys[-1]] = value.data["value"]
        path = tuple(keys)
        self._forget(path)
        for inner_path in value.places:
            self.places[(*path, *inner_path[1:])] = place

    def _move(self, old: Path, new: Path) -> None:
        for path in [path for path in self.places if path[: len(old)] == old]:
            self.places[new + path[len(old) :]] = self.places[path]

    def _forget(self, path: Path) -> None:
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]


def _override_value(text: str, place: str) -> Document:
    """{"value": ...}. What is no YAML, such as `*.parquet`, is plain text unless clearly meant as YAML."""
    try:
        document = parse(f"value: {text}", place, lines=False)
        if list(document.data) == ["value"]:
            return document
    except SpecError:
        if text.lstrip()[:1] in ("[", "{", "'", '"', "!", "&"):
            raise
    return Document(place, {"value": _joined(text, place)}, {("value",): place})


class _Builder:
    """Builds Python values from YAML nodes, notes the place of each and refuses what is not safe."""

    def __init__(self, document: Document, place: Any) -> None:
        self._document, self._place = document, place
        self._count = 0
        self._open: set[int] = set()

    def value(self, node: Any, path: Path, mark: Any) -> Any:
        self._count += 1
        where = self._place(mark)
        if self._count > _MAX_VALUES:
            raise SpecError(f"{where}: the spec has more than {_MAX_VALUES:,} values")
        if id(node) in self._open:
            raise SpecError(f"{where}: an alias inside its own anchor")
        if path:
            self._document.places[path] = where
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, where)
            plain = "seq" if isinstance(node, yaml.SequenceNode) else "map"
            if node.tag != f"tag:yaml.org,2002:{plain}":
                raise SpecError(f"{where}: tags like {_tag(node.tag)} are not allowed")
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, i), item.start_mark) for i, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: Any, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = self._place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise SpecError(f"{where}: a key must be a word")
            key = _joined(key_node.value, where)
            if key == "<<":
                raise SpecError(f"{where}: merge keys (<<) are not supported; repeat the values")
            if key in values:
                raise SpecError(f"{where}: {'.'.join(map(str, (*path, key)))}: the key is there twice")
            values[key] = self.value(value_node, (*path, key), key_node.start_mark)
        return values

    def _scalar(self, node: Any, where: str) -> Any:
        text = _joined(node.value, where)
        match node.tag.removeprefix("tag:yaml.org,2002:"):
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                if len(text) > 1000:
                    raise SpecError(f"{where}: a number of {len(text):,} digits")
                return int(text, 16 if text[:2] == "0x" else 10)
            case "float":
                return _float(text)
        raise SpecError(f"{where}: tags like {_tag(node.tag)} are not allowed")


def _joined(text: str, where: str) -> str:
    """The text with each pair of surrogates, as JSON writes an emoji, joined to the character it means."""
    if text.isascii():
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise SpecError(f"{where}: {text[:60]!a} has half a character, which is not valid Unicode") from None


def _float(text: str) -> float:
    match text.lower().lstrip("+-"):
        case ".inf":
            return -math.inf if text[0] == "-" else math.inf
        case ".nan":
            return math.nan
    return float(text)


def _tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _problem(text: str, error: yaml.MarkedYAMLError, mark: Any) -> str:
    if mark is not None and text[mark.index : mark.index + 1] == "\t":
        return "a tab; indent with spaces"
    return ": ".join(part for part in (error.context, error.problem) if part) or "it cannot be read"
