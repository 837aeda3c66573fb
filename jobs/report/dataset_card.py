"""The data set card of a finished job: README.md in its folder, for people, the Hugging Face Hub, `datasets`.
Derived from spec, plan and parts, so it can be made again at any time. Knows no models.

    write_card(store, spec, plan)       # False: somebody else's README.md is there, and stays
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import jinja2
import pyarrow as pa
import yaml

from overtone.jobs.columns import code, data_columns_markdown
from overtone.jobs.errors import SizeError, SpecError, UserError
from overtone.jobs.features import Feature, as_yaml, feature_of, features_of
from overtone.jobs.folder import JobFolder
from overtone.jobs.media import Kind, media_extension
from overtone.jobs.parts import Footer, part_format, part_place, part_schema, read_footer, stored_schema
from overtone.jobs.plan import JobPlan
from overtone.jobs.sampling import checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import NoSuchObject, ObjectInfo, Store
from overtone.progressive.checkpoints import license_of

CARD = "README.md"
_READERS = 16
_SHOWN_FILES = 3

_SIZES = (
    *((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")),
    *((10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B")),
)


@dataclass(frozen=True)
class Contents:
    """What the parts of a job hold."""

    kind: Kind
    parts: int
    rows: int
    size_bytes: int
    rejects: Counter[str]
    """By error class."""
    versions: dict[str, tuple[str, ...]]
    """Of the packages that took part: more than one where a job went on after an upgrade."""
    devices: tuple[str, ...]


def write_card(store: Store, spec: JobSpec, plan: JobPlan) -> bool:
    """Write, or write again, the card of a job whose parts are all there. False: the README.md that is there
    is somebody else's, and stays."""
    there = _header(store)
    if there is not None and "overtone" not in there:
        return False
    store.put(CARD, card(spec, plan, contents(store, plan)).encode(), content_type="text/markdown")
    return True


def finished_job(store: Store) -> tuple[JobSpec, JobPlan]:
    """The job in a folder. UserError where there is none, or it is not finished."""
    folder = JobFolder(store)
    spec, plan = folder.load()
    done = len(folder.finished())
    if done < plan.num_shards:
        raise UserError(
            f"{store.url} has {done:,} of {plan.num_shards:,} shards, and a card counts the rows of all; run "
            "the job again to go on"
        )
    return spec, plan


def card_rows(store: Store) -> int | None:
    """The rows that the card in a folder promises; None where it holds no card of ours."""
    header = _header(store)
    try:
        return None if header is None else int(header["overtone"]["rows"])
    except (KeyError, TypeError, ValueError):
        return None


def _header(store: Store) -> dict[str, Any] | None:
    """The YAML at the beginning of README.md; {} where it has none, None where there is no such file."""
    try:
        text = store.read(CARD).decode(errors="replace")
    except NoSuchObject:
        return None
    if not text.startswith("---\n"):
        return {}
    try:
        header = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return header if isinstance(header, dict) else {}


def contents(store: Store, plan: JobPlan) -> Contents:
    """Read the footers of all parts. VerifyError for one that is broken."""
    parts = [(place, info) for info in store.list("data/") if (place := part_place(plan, info.key))]
    newest = {shard: run for (shard, run), _ in sorted(parts, key=lambda part: part[0])}
    with ThreadPoolExecutor(_READERS, "card") as pool:
        footers = pool.map(lambda part: _footer(store, part[1]), parts)
        return _summed([info for _, info in parts], footers, newest)


def _footer(store: Store, info: ObjectInfo) -> Footer:
    with store.open(info.key) as file:
        return read_footer(file, part_format(info.key))


def _summed(parts: list[ObjectInfo], footers: Iterable[Footer], newest: dict[int, int]) -> Contents:
    """`newest`: the retry whose part of a shard has the shard's rejects."""
    rows, rejects, kinds = 0, Counter[str](), set()
    versions: dict[str, set[str]] = {}
    devices: set[str] = set()
    for footer in footers:  # one at a time: they hold all timings
        rows += footer.rows
        if newest[footer.shard] == footer.retry:
            rejects.update(reject.error_class for reject in footer.rejects)
        kinds.add(footer.kind)
        devices.add(footer.device)
        for name, number in footer.versions.items():
            versions.setdefault(name, set()).add(number)
    return Contents(
        kind="video" if "video" in kinds else "image",
        parts=len(parts),
        rows=rows,
        size_bytes=sum(info.size_bytes for info in parts),
        rejects=rejects,
        versions={name: tuple(sorted(numbers)) for name, numbers in versions.items()},
        devices=tuple(sorted(devices)),
    )


def card(spec: JobSpec, plan: JobPlan, contents: Contents) -> str:
    """The text of README.md: a YAML header, then Markdown."""
    kind, format = contents.kind, spec.output.format
    samples = spec.samples()
    del samples["output"]["image" if kind == "video" else "video"]
    return _template().render(
        header=_yaml(_metadata(spec, plan, contents)),
        name=spec.name,
        things="videos" if kind == "video" else "pictures",
        model=code(spec.model.id),
        version=version("overtone"),
        license=_license(spec) is not None,
        settings=_settings(spec, contents),
        stages=_stages(spec),
        samples=_yaml(_given(samples)),
        seed=spec.seed,
        input_rows=plan.num_rows,
        files=_files(plan),
        rows=contents.rows,
        parts=contents.parts,
        rejects=contents.rejects,
        code=code,
        columns=data_columns_markdown(kind, latents=spec.output.latents, passthrough=plan.passthrough),
        format=format,
        field=media_extension(spec.output, kind) if format == "webdataset" else kind,
        latents=spec.output.latents,
    )


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("overtone.jobs"),
        autoescape=False,  # Markdown: what is foreign goes through `code`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md")


# The header.


def _metadata(spec: JobSpec, plan: JobPlan, contents: Contents) -> dict[str, Any]:
    ending = {"parquet": "parquet", "webdataset": "tar"}[spec.output.format]
    features = _features(spec, plan, contents.kind)
    return {
        "pretty_name": spec.name,
        **(_license(spec) or {"license": "unknown"}),
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
            "fingerprint": plan.fingerprint,
            "seed": spec.seed,
            "input_rows": plan.num_rows,
            "rows": contents.rows,
            "rejects": contents.rejects.total(),
        },
    }


def size_category(rows: int) -> str:
    """The Hub's bucket for a number of rows: `1K<n<10K` for 1,000 up to 9,999."""
    return next((name for limit, name in _SIZES if rows < limit), "n>1T" if rows >= 10**12 else "100B<n<1T")


def _license(spec: JobSpec) -> dict[str, str] | None:
    """The header's licence fields; None where they are not known, as for a model with adapters."""
    found = license_of(spec.model.id)
    if found is None or spec.model.loras:
        return None
    fields = {"license": found.id, "license_name": found.name, "license_link": found.link}
    return {key: value for key, value in fields.items() if value is not None}


def _features(spec: JobSpec, plan: JobPlan, kind: Kind) -> dict[str, Feature] | None:
    """Of all columns as they are stored; None where `datasets` has no type for one of them."""
    schema = part_schema(spec, plan.passthrough, kind)
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
    """Of a column's values in the JSON of a tar, where all that is no number or truth value is text."""
    if pa.types.is_struct(type):
        return {field.name: _json_feature(field.type) for field in type}
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        return [_json_feature(type.value_type)]
    if pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_boolean(type):
        found = feature_of(type)
        assert found is not None, "plain types have features"
        return found
    return {"dtype": "string", "_type": "Value"}


# The text.


def _settings(spec: JobSpec, contents: Contents) -> str:
    model, sampling = spec.model, spec.sampling
    size = f"{sampling.width or 'its usual'} x {sampling.height or 'its usual'} pixels"
    lines = {
        "model": code(model.id),
        "revision": code(model.revision) if model.revision else "none given: the newest at the time",
        "adapters": ", ".join(f"{code(lora.id)} at {lora.scale:g}" for lora in model.loras),
        "size": f"{size}, where a row does not say otherwise",
        "frames": str(sampling.num_frames or "") if contents.kind == "video" else "",
        "frames a second": str(spec.output.video.fps) if contents.kind == "video" else "",
        "seed": str(spec.seed),
        "made on": ", ".join(code(device) for device in contents.devices),
        "with": ", ".join(
            f"{name} {' and '.join(numbers)}" for name, numbers in sorted(contents.versions.items())
        ),
    }
    rows = [f"| {what} | {value} |" for what, value in lines.items() if value]
    return "\n".join(["| | |", "|---|---|", *rows])


def _stages(spec: JobSpec) -> str:
    """The stages of a row of the job's own size; empty where they cannot be known without the model."""
    try:
        plan = sampling_plan(spec, checkpoint_of(spec))
    except (SpecError, SizeError):
        return ""
    lines = ["| stage | grid | tokens | steps | noise from | to |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {i} | {stage.height} x {stage.width} | {stage.tokens:,} | {stage.last - stage.first} | "
        f"{stage.sigma_start:.4f} | {stage.sigma_end:.4f} |"
        for i, stage in enumerate(plan.stages)
    ]
    return "\n".join(lines)


def _files(plan: JobPlan) -> str:
    names = [plan.files[i].relpath for i in range(min(len(plan.files), _SHOWN_FILES))]
    more = f" and {len(plan.files) - len(names):,} more files" if len(plan.files) > len(names) else ""
    return ", ".join(map(code, names)) + more


def _given(value: Any) -> Any:
    """Without what is unset, at any depth."""
    if not isinstance(value, dict):
        return value
    inner = {key: _given(item) for key, item in value.items()}
    return {key: item for key, item in inner.items() if item not in (None, {}, [])}
