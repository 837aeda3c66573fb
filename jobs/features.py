"""How Hugging Face `datasets` sees columns: as JSON in a Parquet file's metadata, as YAML in a data set card.
Knows Arrow types but no rows, and does not need `datasets`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

Feature = dict[str, Any] | list[Any]
"""As in `datasets.Features.to_dict`: {"dtype": "int64", "_type": "Value"}; a struct is a dict of fields."""

_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"} | {
    "date32[day]": "date32",
    "date64[ms]": "date64",
}
"""Where Arrow and `datasets` call a type differently."""
_PLAIN = {"Value", "List", "LargeList", "Sequence"}


def feature_of(type: pa.DataType) -> Feature | None:
    """The feature that `datasets` has for a type. None where it has none, as for maps and tensors."""
    if pa.types.is_struct(type):
        inner = {field.name: feature_of(field.type) for field in type}
        return None if None in inner.values() else inner
    if pa.types.is_dictionary(type):
        return feature_of(type.value_type)
    if pa.types.is_fixed_size_list(type) or pa.types.is_large_list(type) or pa.types.is_list(type):
        element = feature_of(type.value_type)
        if element is None:
            return None
        if pa.types.is_list(type):
            return [element]
        if pa.types.is_large_list(type):
            return {"feature": element, "_type": "LargeList"}
        return {"feature": element, "length": type.list_size, "_type": "List"}
    if isinstance(type, pa.BaseExtensionType):
        return {"_type": "Json"} if type.extension_name == "arrow.json" else None
    if pa.types.is_nested(type):
        return None
    return {"dtype": _NAMES.get(str(type), str(type)), "_type": "Value"}


def known_features(schema: pa.Schema) -> dict[str, Feature]:
    """The features that a schema's metadata records and its types do not, such as pictures and class
    labels."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {name: features[name] for name in schema.names if name in features}
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: feature for name, feature in found.items() if not _is_plain(feature)}


def merged_metadata(a: pa.Schema, b: pa.Schema) -> dict[bytes, bytes] | None:
    """The metadata for the columns of two files: what both say the same of, or one alone."""
    if not (a.metadata and b.metadata) or a.metadata == b.metadata:
        return a.metadata or b.metadata
    one, other = known_features(a), known_features(b)
    features = {
        name: feature for name, feature in (other | one).items() if other.get(name, feature) == feature
    }
    return {b"huggingface": as_metadata(features)["huggingface"].encode()}


def features_of(schema: pa.Schema) -> dict[str, Feature]:
    """The feature of every column that has one, in order."""
    known = known_features(schema)
    found = ((field.name, known.get(field.name) or feature_of(field.type)) for field in schema)
    return {name: feature for name, feature in found if feature is not None}


def as_metadata(features: Mapping[str, Feature]) -> dict[str, str]:
    """The entry of a Parquet file's metadata from which `datasets` takes the features."""
    return {"huggingface": json.dumps({"info": {"features": features}})}


def as_yaml(features: Mapping[str, Feature]) -> list[dict[str, Any]]:
    """The `features` of `dataset_info` in a card's header."""
    return [{"name": name, **_yaml(feature)} for name, feature in features.items()]


def _yaml(feature: Feature) -> dict[str, Any]:
    if isinstance(feature, list):
        return {"list": _short(_yaml(feature[0]))}
    kind = feature.get("_type")
    rest = {
        key: value for key, value in feature.items() if key not in ("_type", "feature") and value is not None
    }
    if not isinstance(kind, str):
        return {"struct": as_yaml(feature)}
    if kind == "Value":
        return rest
    if "feature" in feature:
        return {_snake(kind): _short(_yaml(feature["feature"])), **rest}
    if isinstance(rest.get("names"), list):  # of a class label; the Hub wants texts as keys
        rest["names"] = {str(index): name for index, name in enumerate(rest["names"])}
    return {"dtype": {_snake(kind): rest} if rest else _snake(kind)}


def _short(inner: dict[str, Any]) -> Any:
    """A list names a plain element, or the fields of a struct, without a key of its own."""
    return inner.get("dtype", inner.get("struct")) if inner.keys() in ({"dtype"}, {"struct"}) else inner


def _snake(name: str) -> str:
    """`ClassLabel` as `class_label`, `Array2D` as `array2_d`: the spelling of `datasets`."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return re.sub(r"([a-z\d])([A-Z])", r"\1_\2", name).lower()


def _is_plain(feature: Any) -> bool:
    """Whether a type alone says as much as the feature; True also for what is no feature at all."""
    if isinstance(feature, list):
        return all(map(_is_plain, feature))
    if not isinstance(feature, dict):
        return True
    kind = feature.get("_type")
    if isinstance(kind, str):
        return kind in _PLAIN and _is_plain(feature.get("feature"))
    return all(map(_is_plain, feature.values()))
