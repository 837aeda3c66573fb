"""The YAML header of a data set card, which the Hugging Face Hub and `datasets` read. Knows no store."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pyarrow as pa

from overtone.jobs.features import Feature, as_yaml, feature_of, features_of
from overtone.jobs.media import Kind, media_extension
from overtone.jobs.parts import part_schema, stored_schema
from overtone.jobs.plan import JobPlan
from overtone.jobs.report.card_contents import Contents
from overtone.jobs.spec import JobSpec
from overtone.progressive.checkpoints import license_of

_SIZES = (
    *((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")),
    *((10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B")),
)


def metadata(spec: JobSpec, job_plan: JobPlan, contents: Contents) -> dict[str, Any]:
    """The header of a finished job's card. `overtone` in it is ours, and the rest is the Hub's."""
    ending = {"parquet": "parquet", "webdataset": "tar"}[spec.output.format]
    features = _features(spec, job_plan, contents.kind)
    return {
        "pretty_name": spec.name,
        **(license_fields(spec) or {"license": "unknown"}),
        "task_categories": ["text-to-video" if contents.kind == "video" else "text-to-image"],
        "tags": ["synthetic", "diffusion", "overtone"],
        "size_categories": [size_category(contents.rows)],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": f"data/*.{ending}"}]}
        ],
        "dataset_info": {
            **({"features": as_yaml(features)} if features is not None else {}),
            "splits": [
                {"name": "train", "num_bytes": contents.size_bytes, "num_examples": contents.rows},
            ],
            "download_size": contents.size_bytes,
            "dataset_size": contents.size_bytes,
        },
        "overtone": {
            "version": version("overtone"),
            "model": spec.model.id,
            "revision": spec.model.revision,
            "fingerprint": job_plan.fingerprint,
            "seed": spec.seed,
            "input_rows": job_plan.num_rows,
            "rows": contents.rows,
            "rejects": contents.rejects.total(),
        },
    }


def size_category(rows: int) -> str:
    """The Hub's bucket for a number of rows: `1K<n<10K` for 1,000 up to 9,999."""
    return next((name for limit, name in _SIZES if rows < limit), "n>1T" if rows >= 10**12 else "100B<n<1T")


def license_fields(spec: JobSpec) -> dict[str, str] | None:
    """The header's licence fields. None where they are not known, as for a model with adapters."""
    found = license_of(spec.model.id)
    if found is None or spec.model.loras:
        return None
    fields = {"license": found.id, "license_name": found.name, "license_link": found.link}
    return {key: value for key, value in fields.items() if value is not None}


def _features(spec: JobSpec, job_plan: JobPlan, kind: Kind) -> dict[str, Feature] | None:
    """The features of all columns as they are stored. None where `datasets` has no type for one of them."""
    schema = part_schema(spec, job_plan.passthrough, kind, job_plan.generation)
    stored = stored_schema(schema)
    features = features_of(stored)
    if len(features) < len(stored):
        return None
    if spec.output.format == "parquet":
        return features
    inside = [f for f in schema if f.name not in (kind, "latents")]
    text: Feature = {"dtype": "string", "_type": "Value"}
    latents: Feature = [{"dtype": "float32", "_type": "Value"}]
    for _ in range(3 if kind == "video" else 2):
        latents = [latents]
    return {
        media_extension(spec.output, kind): features[kind],
        "json": {f.name: _json_feature(f.type) for f in inside},
        "txt": text,
        **({"latents.npy": latents} if spec.output.latents else {}),
        "__key__": text,
        "__url__": text,
    }


def _json_feature(type: pa.DataType) -> Feature:
    """The feature of a column in the JSON of a tar, where all that is no number or truth value is text."""
    if pa.types.is_struct(type):
        return {field.name: _json_feature(field.type) for field in type}
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        return [_json_feature(type.value_type)]
    if pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_boolean(type):
        found = feature_of(type)
        assert found is not None, "plain types have features"
        return found
    return {"dtype": "string", "_type": "Value"}
