"""The sections of a job spec, without that of the prompts: each key with its values, its default and its
meaning. Knows no files, and nothing of how a spec is written down.

The docstring under a field is what the README's reference and the JSON Schema say of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from overtone.jobs.spec.fields import Attention, Endpoint, Place, Section, Text
from overtone.progressive.settings import Grown


class Lora(Section, Grown):
    """An adapter loaded on top of the model."""

    came_later = ("transformer",)

    id: Place
    """A hub name, or a folder or .safetensors file."""

    weight_name: Text | None = None
    """The file in it; unset: the only one."""

    revision: Text | None = None
    """Branch, tag or commit on the hub; unset: the newest."""

    scale: float = 1.0
    """Strength of the adapter; 1 is as trained."""

    transformer: Literal["transformer", "transformer_2", "both"] | None = None
    """Of a model with two transformers (Wan 2.2: the first for high noise, the second for low), the one that
    the adapter is for. Unset: the only one."""


class Model(Section, Grown):
    """What draws the samples."""

    came_later = ("variant", "attention")

    id: Place
    """`tiny` (embedded, draws simple shapes), a Hugging Face hub name, or a diffusers folder (starting
    with `/`, `./`, `../` or `~`; relative to the spec)."""

    revision: Text | None = None
    """Branch, tag or commit on the hub; unset: the newest. A commit makes the job repeatable."""

    variant: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")] | None = None
    """Which weights, where their files are called `*.VARIANT.safetensors`, such as `fp16`; unset: those
    without."""

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

    attention: Attention | None = None
    """How the transformer computes attention, by diffusers' names: `native` is torch's, `flash` and
    `_flash_3` need flash-attn, `sage` sageattention, `xformers` xformers; those with `hub` load code from the
    hub. Last bits of a sample change, with `sage` more. Refused where the model is loaded if the package, the
    device or the model does not allow it. Unset: diffusers' own choice, torch's."""

    offload: Literal["none", "model"] = "none"
    """`model`: keep each part of the pipeline in main memory while it is not in use. Speed only."""

    loras: tuple[Lora, ...] = ()
    """Adapters, in the order in which they are loaded."""


class Shards(Section):
    """How the work is cut."""

    rows: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Input rows a shard: the unit of dispatch, retry and commit, and the size of an output file."""


class Workers(Section, Grown):
    """How the samples are computed. Nothing here changes them."""

    came_later = ("graphs",)

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

    batch_cache_dir: Place | None = None
    """Folder on the workers' machines for the sizes that `batch_size: auto` finds best on a GPU, by model,
    GPU and grid: the next job begins with them and searches no more. Unset: `overtone/batches` among the
    user's caches."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads a worker computes with; unset: `num_cpus`, rounded up."""

    compile: Literal["off", "blocks", "max"] = "off"
    """`blocks`: compile the transformer's blocks for each grid and batch size, before the first row of a size
    and never during it. `max`: the same with autotuning, which takes longer. Last bits of a sample change."""

    compile_cache_dir: Place | None = None
    """Folder on the workers' machines for compiled code; workers of one machine share it, and it is found
    again by the next job. Unset: torch's own, which goes with the machine's temporary files."""

    graphs: Literal["off", "auto"] | None = None
    """`auto`: on a CUDA device capture the calls of the transformer, once for each grid and batch size before
    the first row of a size, and replay them at every step, which then waits for no launch. What cannot be
    captured runs as ever, and the worker's log says why. With `compile` the compiled blocks are captured.
    Unset: `off`."""

    @model_validator(mode="before")
    @classmethod
    def _count(cls, data: Any) -> Any:
        count = data.get("count") if isinstance(data, dict) else None
        if isinstance(count, int) and count >= 1:  # else the message is about `count` alone
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


class Image(Section):
    """How images are encoded."""

    codec: Literal["png", "jpeg", "webp"] = "png"
    """File format of the image bytes. png is lossless."""

    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Of a lossy codec, 1 (smallest file) to 100 (best picture); unset: 95 for jpeg, 90 for webp."""

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


class Video(Section):
    """How videos are encoded: MP4 with H.264."""

    fps: Annotated[int, Field(ge=1, le=240)] = 16
    """Frames a second."""

    crf: Annotated[int, Field(ge=0, le=51)] = 18
    """Constant rate factor of H.264: 0 is lossless, 18 looks lossless, 51 is worst."""


class Output(Section, Grown):
    """Where the data set goes, and in which form."""

    came_later = ("sources",)

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

    sources: Literal["bytes", "digest"] | None = None
    """Of a job whose rows start from pictures. `bytes`: each row has them beside its own picture, as files.
    `digest`: only their SHA-256. Unset: `bytes`."""

    endpoint_url: Endpoint | None = None
    """S3 server other than AWS, as https://host:port; unset: what boto3 finds in its environment."""

    region: Text | None = None
    """S3 region; unset: what boto3 finds in its environment."""

    unsafe_overwrite: bool = False
    """Go on with a store that cannot refuse a second create: two workers that finish one shard at the same
    time may then both write it."""


class Faults(Section):
    """What is tolerated before giving up."""

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
