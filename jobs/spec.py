"""A job as its user wrote it: YAML in, one checked and frozen object out. Knows no files but the spec itself.

spec = load_spec("job.yaml", ["sampling.delta=0.1"])
spec.samples()      # what changes samples: for the fingerprint
spec.to_json()      # canonical; never holds credentials
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from jobs.errors import SpecError
from jobs.spec_reference import reference_markdown
from jobs.spec_yaml import Document, parse
from progressive.checkpoints import spectrum_profile
from progressive.settings import Sampling

COLUMNS = ("prompt", "row_id", "negative_prompt", "seed", "height", "width", "num_images")
"""What a prompt table can say about a row; every other column passes through to the output."""

_SECRET = re.compile(r"(?i)signature|^sig$|token|secret|password|credential|access.?key")


def without_credentials(url: str) -> str:
    """The URL itself; ValueError, which does not repeat it, where it carries a password or signature."""
    if "://" not in url:
        return url
    split = urlsplit(url)
    if "@" in split.netloc or any(_SECRET.search(key) for key, _ in parse_qsl(split.query)):
        raise ValueError("the URL carries credentials; give them in the environment or a profile instead")
    return url


def is_url(path: str) -> bool:
    """Whether a path names a store or a server rather than a file of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path) is not None and "://" in path


def _plain(path: str) -> str:
    if not path:
        raise ValueError("is empty")
    if "\0" in path:
        raise ValueError("holds a NUL character")
    return without_credentials(path)


def _endpoint(url: str) -> str:
    split = urlsplit(without_credentials(url))
    if split.scheme not in ("http", "https") or not split.netloc:
        raise ValueError("is not a URL like https://host:9000")
    return url


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
Place = Annotated[str, AfterValidator(_plain)]
Endpoint = Annotated[str, AfterValidator(_endpoint)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class Lora(_Section):
    """An adapter loaded on top of the model."""

    id: Place
    """A hub name, or a folder or .safetensors file."""

    weight_name: Text | None = None
    """The file in it; unset: the only one."""

    revision: Text | None = None
    """Branch, tag or commit on the hub; unset: the newest."""

    scale: float = 1.0
    """Strength of the adapter; 1 is as trained."""


class Model(_Section):
    """What draws the samples."""

    id: Place
    """`tiny` (embedded, draws simple shapes), a Hugging Face hub name, or a diffusers folder (starting
    with `/`, `./`, `../` or `~`; relative to the spec)."""

    revision: Text | None = None
    """Branch, tag or commit on the hub; unset: the newest. A commit makes the job repeatable."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of weights and activations. `auto`: bfloat16 on GPUs that have it, else float32."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""

    family: Text = "auto"
    """How the pipeline's latents are laid out. `auto`: known from the pipeline's class."""

    quantize: Literal["none", "int8", "fp8"] = "none"
    """Low precision inside the transformer's blocks, which changes pixels a little. `int8`: weights alone,
    half the memory of bfloat16. `fp8`: weights and activations, on GPUs that have it (compute capability
    8.9). Needs torchao."""

    offload: Literal["none", "model"] = "none"
    """`model`: keep each part of the pipeline in main memory while it is not in use. Speed only."""

    loras: tuple[Lora, ...] = ()
    """Adapters, in the order in which they are loaded."""


class Prompts(_Section):
    """The table of what to make: one input row a sample, or `num_images` samples."""

    path: Annotated[
        tuple[Place, ...],
        Field(min_length=1),
        BeforeValidator(_one_or_more, json_schema_input_type=str | list[str]),
    ]
    """One or a list of: file, folder (all its Parquet files, at any depth), glob (`*`, `**`, `?`,
    `[...]`); local (relative to the spec), `s3://`, `hf://datasets/...` or any other fsspec URL."""

    format: Literal["auto", "parquet", "csv", "jsonl"] = "auto"
    """`auto`: by the names' endings. csv and jsonl are read once from end to end to count their rows."""

    columns: dict[
        Literal["prompt", "row_id", "negative_prompt", "seed", "height", "width", "num_images"], Text
    ] = Field(default_factory=dict)
    """Which column of the table holds what, where the names differ: `{prompt: caption}`."""

    keep: tuple[Text, ...] | None = None
    """The other columns of the table that pass through to the output; unset: all of them."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows of the table, in file order; unset: all."""

    endpoint_url: Endpoint | None = None
    """S3 server of `s3://` prompts; unset: the output's `endpoint_url`, if any."""

    region: Text | None = None
    """S3 region of `s3://` prompts; unset: the output's `region`, if any."""

    def column(self, name: str) -> str:
        """The name in the table of one of `COLUMNS`."""
        return self.columns.get(name, name)  # type: ignore[call-overload]


class Shards(_Section):
    """How the work is cut."""

    rows: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Input rows a shard: the unit of dispatch, retry and commit, and the size of an output file."""


class Workers(_Section):
    """How the samples are computed. Nothing here changes them."""

    count: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Exactly this many workers; the same as `min` and `max` set to it. `workers: 4` for short."""

    min: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Workers asked of the cluster from the start and kept until the end."""

    max: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Most workers; unset: as many as the cluster has room for, at any time."""

    num_gpus: Annotated[float, Field(ge=0, le=64)] | None = None
    """GPUs a worker reserves; a fraction shares one. Unset: 1 where the cluster has GPUs, else 0."""

    num_cpus: Annotated[float, Field(gt=0, le=1024)] = 1
    """CPU cores a worker reserves."""

    batch_size: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"] = "auto"
    """Rows denoised together at full size. `auto`: the fastest that fits, tried at the start."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads a worker computes with; unset: `num_cpus`, rounded up."""

    compile: Literal["off", "blocks", "max"] = "off"
    """`blocks`: compile the transformer's blocks for each grid and batch size, before the first row of a size
    and never during it. `max`: the same with autotuning, which takes longer. Last bits of a sample change."""

    compile_cache_dir: Place | None = None
    """Folder on the workers' machines for compiled code; workers of one machine share it, and it is found
    again by the next job. Unset: torch's own, which goes with the machine's temporary files."""

    @model_validator(mode="before")
    @classmethod
    def _count(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("count"), int):
            count = data["count"]
            if any(data.get(key, count) != count for key in ("min", "max")):
                raise ValueError("give `count`, or `min` and `max`, not both")
            return {**data, "min": count, "max": count}
        return data

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min}); make it {self.min} or more")
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(
                f"num_gpus must be a whole number above 1, or a fraction below; got {self.num_gpus}"
            )
        return self


_QUALITY = {"jpeg": 95, "webp": 90}


class Image(_Section):
    """How images are encoded."""

    codec: Literal["png", "jpeg", "webp"] = "png"
    """File format of the image bytes. png is lossless."""

    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Of a lossy codec, 1 (small) to 100 (faithful); unset: 95 for jpeg, 90 for webp."""

    lossless: bool = False
    """webp without loss."""

    @model_validator(mode="before")
    @classmethod
    def _usual_quality(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("quality") is None and data.get("lossless", False) is False:
            usual = _QUALITY.get(data["codec"]) if isinstance(data.get("codec"), str) else None
            return data if usual is None else {**data, "quality": usual}
        return data

    @model_validator(mode="after")
    def _possible(self) -> Image:
        if self.codec == "jpeg" and self.lossless:
            raise ValueError("jpeg cannot be lossless; use codec png, or webp with lossless: true")
        if self.quality is not None and (self.codec == "png" or self.lossless):
            what = "png" if self.codec == "png" else "lossless webp"
            raise ValueError(f"{what} has no quality; leave `quality` out, or use codec jpeg or webp")
        return self


class Video(_Section):
    """How videos are encoded: MP4 with H.264."""

    fps: Annotated[int, Field(ge=1, le=240)] = 16
    """Frames a second."""

    crf: Annotated[int, Field(ge=0, le=51)] = 18
    """Constant rate factor of H.264: 0 is lossless, 18 looks lossless, 51 is worst."""


class Output(_Section):
    """Where the data set goes, and in which form."""

    path: Place
    """Folder (relative to the current folder) or `s3://bucket/prefix`. One job a folder."""

    format: Literal["parquet", "webdataset"] = "parquet"
    """`parquet`: tables with an image column. `webdataset`: tar files of images, captions and JSON."""

    image: Image = Image()
    """How images are encoded."""

    video: Video = Video()
    """How videos are encoded, for families that make them."""

    latents: bool = False
    """Keep each sample's final latents in a column of their own."""

    endpoint_url: Endpoint | None = None
    """S3 server other than AWS, as https://host:port; unset: what boto3 finds in its environment."""

    region: Text | None = None
    """S3 region; unset: what boto3 finds in its environment."""

    unsafe_overwrite: bool = False
    """Go on with a store that cannot refuse a second create: two workers that finish one shard at the same
    time may then both write it."""


class Faults(_Section):
    """What is borne before giving up."""

    max_attempts: Annotated[int, Field(ge=1, le=1000)] = 3
    """Attempts of a shard that fails for a reason that is not one of its rows'."""

    row_deaths: Annotated[int, Field(ge=1, le=100)] = 2
    """Deaths of a worker with a row alone in its hands, after which the row becomes a reject."""

    row_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds a row or batch may take before its worker is killed and replaced; unset: no limit."""

    max_reject_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Rejects over rows, in [0, 1], above which the job stops early. 1 never stops it."""

    worker_failures: Annotated[int, Field(ge=1, le=1000)] = 3
    """Failures of a worker without a row made in between, after which it is retired."""

    grace_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds a worker has to finish the batch in its hands when its node is about to go."""

    store_retries: Annotated[int, Field(ge=0, le=100)] = 8
    """Further tries of a request to a store that failed for a passing reason."""


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


class JobSpec(_Section):
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
        raise SpecError("\n".join(_messages(error, document))) from None
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
        local = text.startswith(("/", "./", "../", "~")) or text in (".", "..")
        return _absolute(text, base) if local else text

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


def _messages(error: ValidationError, document: Document) -> list[str]:
    """`job.yaml:7: sampling.deltaa: unknown key; did you mean delta?`, a line for each key that is wrong."""
    found: dict[tuple[str, str], list[str]] = {}
    for problem in error.errors(include_url=False):
        path = document.known(problem["loc"])
        shown = ".".join(map(str, path))
        message = _message(problem, path, document)
        if problem["type"] == "missing":
            shown = ".".join(str(key) for key in problem["loc"])
        messages = found.setdefault((document.where(path), shown), [])
        if message not in messages:
            messages.append(message)
    return [
        f"{where}: {f'{shown}: ' if shown else ''}{', or '.join(messages)}"
        for (where, shown), messages in found.items()
    ]


def _message(problem: Any, path: tuple[str | int, ...], document: Document) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key{_suggestion(path)}"
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


def _suggestion(path: tuple[str | int, ...]) -> str:
    """`; did you mean delta?`: the nearest key of the same section, else where the key belongs."""
    *section, key = path
    fields = _fields(JobSpec, [part for part in section if isinstance(part, str)])
    for name in JobSpec.model_fields:
        if key in _fields(JobSpec, [name]):
            return f"; did you mean {name}.{key}?"
    near = get_close_matches(str(key), fields, 1, 0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(fields)}"


def _fields(model: type[BaseModel], section: Sequence[str]) -> list[str]:
    for name in section:
        info = model.model_fields.get(name)
        inner = info.annotation if info else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)


def spec_schema() -> dict[str, Any]:
    """The JSON Schema of a spec, with descriptions, units and defaults, for editors and other programs."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **JobSpec.model_json_schema(),
        "title": "Overtone job",
    }


def spec_reference_markdown() -> str:
    """A table for each section of the spec: key, values, default, meaning."""
    return reference_markdown(JobSpec)
