"""What a job needs besides time, before it runs: memory of a worker, room on a disk, a place for its output.
Reads no rows, writes nothing, and knows nothing of how long anything takes.

    needs = needs_of(spec, job_plan, family, checkpoint)
    needs.lines()                          # for people; UserError where `run` would refuse the place

The sizes of models and of encoded pictures are rules of thumb. They say whether a GPU or a disk is far too
small, not whether it is just large enough.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from overtone.jobs.errors import SpecError, StoreError, UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import JobPlan
from overtone.jobs.spec import JobSpec, is_url
from overtone.jobs.store import Store, open_store, probed
from overtone.jobs.words import counted
from overtone.progressive.checkpoints import Checkpoint, is_local_model, without_weights
from overtone.progressive.families import Family
from overtone.progressive.schedule import grid_for, latent_frames, size_of

PARAMETERS_B = {
    "black-forest-labs/FLUX.1-dev": 16.9,
    "black-forest-labs/FLUX.1-schnell": 16.9,
    "black-forest-labs/FLUX.2-dev": 56.3,
    "black-forest-labs/FLUX.2-klein-4B": 8.0,
    "black-forest-labs/FLUX.2-klein-9B": 17.4,
    "Qwen/Qwen-Image": 28.9,
    "Tongyi-MAI/Z-Image": 10.3,
    "Tongyi-MAI/Z-Image-Turbo": 10.3,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 7.2,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 20.1,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 34.4,
    "stabilityai/stable-diffusion-3-medium-diffusers": 7.7,
    "stabilityai/stable-diffusion-3.5-large": 13.8,
}
"""Parameters of whole pipelines (transformers, text encoders, VAE) in billions, from the models' cards,
rounded. They size pods: a tenth more or less does not matter."""

UNKNOWN_PARAMETERS_B = 20.0
_GIB = 2**30
NEW = "new"
"""`Needs.state` where nothing is there yet, or nothing that stays."""

_PICTURE_BYTES = {"png": 1.6, "jpeg": 0.5, "webp": 0.3}
"""Of a pixel of a photograph; a lossless webp is a little smaller than a png, a drawing far smaller."""
_VIDEO_BYTES = 0.04
"""Of a pixel of a frame, H.264 at a rate factor of 18; six steps more of that factor halve it."""


def needs_of(spec: JobSpec, job_plan: JobPlan, family: Family, checkpoint: Checkpoint | None) -> Needs:
    """What the job needs, at the job's own size; `checkpoint` is None where it is not on this machine.

    UserError where `run` would refuse the output's place, which cannot be written or holds another job, or
    where an adapter or the weights of `model.variant` are missing. A store that does not answer, and a
    package that is not here, are notes, for the machine that plans may not be one that runs.
    """
    for lora in spec.model.loras:
        if is_local_model(lora.id) and not Path(lora.id).exists():
            raise SpecError(f"model.loras: there is no file or folder {lora.id}")
    if is_local_model(spec.model.id) and (why := without_weights(spec.model.id, spec.model.variant)):
        raise SpecError(f"model.variant: {why}")
    weights, known = weights_gib(spec)
    sample_bytes, encoded = None, None
    if family.name != "generic":  # of which only the loaded model tells whether it makes videos
        sample_bytes = _sample_bytes(spec, checkpoint, family)
        encoded = spec.output.image.codec if family.default_frames is None else "mp4"
    store = _store(spec)
    local = None if is_url(store.url) else Path(store.url)
    if local is not None:
        _check_folder(local)
    state, replaces = _state(store, job_plan)
    return Needs(
        output=store.url,
        state=state,
        replaces=replaces,
        weights_gib=weights if known else None,
        offloads=spec.model.offload != "none",
        size_bytes=None if sample_bytes is None else round(job_plan.num_rows * sample_bytes),
        free_bytes=None if local is None else _free_bytes(local),
        missing=tuple(_missing(spec, family)),
        encoded=encoded,
    )


def try_output(spec: JobSpec) -> None:
    """Whether two writers of the output's store cannot both win, by a few bytes that are removed again.
    StoreUnsafe where they could; StoreError where it cannot be written."""
    store = _store(spec)
    there = None if is_url(store.url) else _existing(Path(store.url))
    try:
        probed(store)
    finally:
        if there is not None:
            _remove_empty(Path(store.url), there)


def weights_gib(spec: JobSpec) -> tuple[float, bool]:
    """GiB of a worker's weights, and whether that is known: from the table, or a local folder's files."""
    model = spec.model
    if model.id == "tiny":
        return 0.1, True
    folder = Path(model.id).expanduser()
    if folder.is_absolute() and folder.is_dir():
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / _GIB, True
    bytes_each = 4 if model.dtype == "float32" else 2
    parameters = PARAMETERS_B.get(model.id, UNKNOWN_PARAMETERS_B)
    return parameters * 1e9 * bytes_each / _GIB, model.id in PARAMETERS_B


def _sample_bytes(spec: JobSpec, checkpoint: Checkpoint | None, family: Family) -> float:
    """Of one encoded sample of the job's own size, with its latents where they are kept."""
    height_px, width_px, num_frames = size_of(spec.sampling, family)
    if num_frames is None:
        made = height_px * width_px * _PICTURE_BYTES[spec.output.image.codec]
    else:
        made = height_px * width_px * num_frames * _VIDEO_BYTES * 2 ** ((18 - spec.output.video.crf) / 6)
    channels = checkpoint and checkpoint.transformer.get(family.channels_key)
    if spec.output.latents and isinstance(channels, int):
        grid = grid_for(family, height_px, width_px)
        cells = grid[0] * grid[1] * latent_frames(family, num_frames)
        made += 4 * cells * (channels // family.channels_per_latent)
    return made


def _missing(spec: JobSpec, family: Family) -> Iterator[str]:
    videos = family.default_frames is not None or (spec.sampling.num_frames or 1) > 1
    wanted = [("av", "videos need PyAV", "video")] if videos else []
    if spec.model.quantize != "none":
        wanted.append(("torchao", "`quantize` needs torchao", "quantize"))
    for module, what, extra in wanted:
        if find_spec(module) is None:
            yield f"{what} on every worker, which this machine has not: pip install 'overtone[{extra}]'"


def _store(spec: JobSpec) -> Store:
    """The output's store, which gives up soon: this is a look, not a job."""
    output = spec.output
    return open_store(
        output.path,
        endpoint_url=output.endpoint_url,
        region=output.region,
        retries=min(1, spec.faults.store_retries),
        unsafe_overwrite=output.unsafe_overwrite,
    )


def _state(store: Store, job_plan: JobPlan) -> tuple[str, bool]:
    """(what is in the output's place, whether that is a job that gives way). FingerprintMismatch where it is
    another job's."""
    folder = JobFolder(store)
    try:
        if not folder.exists():
            return NEW, False
        if folder.gives_way_to(job_plan):
            return NEW, True
        folder.check(job_plan)
        done = f"{len(folder.finished()):,} of {counted(job_plan.num_shards, 'shard')} done"
        return f"holds this job, {done}; run goes on", False
    except StoreError as error:
        return f"could not be looked at: {error}", False


def _check_folder(path: Path) -> None:
    """UserError where a folder cannot be made or written here."""
    above = _existing(path)
    if not above.is_dir():
        raise UserError(f"output.path: {above} is a file, not a folder; choose another `output`")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(
            f"output.path: {above} cannot be written by this user; choose another `output`, or get the right"
        )


def _existing(path: Path) -> Path:
    """The path itself, or the nearest above it that is there."""
    return next(one for one in (path, *path.parents) if os.path.exists(one))


def _remove_empty(folder: Path, above: Path) -> None:
    """Remove the folders that the probe made below one that was there, where nothing is in them."""
    made = [path for path in folder.rglob("*") if path.is_dir()] if folder.is_dir() else []
    for path in [*sorted(made, reverse=True), folder, *folder.parents]:
        if path == above:
            return
        with suppress(OSError):
            path.rmdir()


def _free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


@dataclass(frozen=True)
class Needs:
    """Memory, disk and place of a job."""

    output: str
    state: str
    """What is in the output's place already."""
    replaces: bool
    """Another job is there, which has made nothing and gives way to this one."""
    weights_gib: float | None
    """Of one worker's model; None: the model is in no table here."""
    offloads: bool
    """The weights stay in main memory, and pass to the device part by part."""
    size_bytes: int | None
    """Of all that the job makes, at the job's own size and one sample a row; None: only the loaded model
    tells what size and kind that is."""
    free_bytes: int | None
    """Of the disk of the output; None: it is not on a disk of this machine."""
    encoded: str | None
    """Codec of the samples; None as for `size_bytes`."""
    missing: tuple[str, ...]
    """What the workers need and this machine has not, one sentence each."""

    @property
    def too_large(self) -> bool:
        """Whether the output is not likely to fit on its disk."""
        if self.free_bytes is None or self.size_bytes is None:
            return False
        return self.size_bytes > self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        """The same as `lines`, as data."""
        return asdict(self) | {"missing": list(self.missing)}

    def lines(self) -> list[str]:
        """For a terminal."""
        free = "" if self.free_bytes is None else f" ({_size(self.free_bytes)} free)"
        if self.too_large:
            free += "; IT WILL NOT FIT: choose another `output`, or another codec in `output.image`"
        disk = "known once the model is loaded"
        if self.size_bytes is not None:
            disk = f"about {_size(self.size_bytes)} as {self.encoded}"
        if self.weights_gib is None:
            memory = "not known for this model; `overtone estimate` loads it"
        else:
            where = "main memory" if self.offloads else "the device's memory"
            memory = (
                f"{self.weights_gib:.1f} GiB of weights a worker in {where}, and what a batch needs; "
                f"about {1.25 * self.weights_gib + 3:.0f} GiB of main memory"
            )
        replaces = "; another job there has made nothing yet and is replaced" if self.replaces else ""
        return [
            f"output      {self.output} ({self.state}{replaces})",
            f"disk        {disk}{free}",
            f"memory      {memory}",
            "time, cost  depend on the device: `overtone estimate SPEC --price ...` times a few rows",
            *(f"packages    {one}" for one in self.missing),
        ]


def _size(size_bytes: float) -> str:
    """Bytes as people read them."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:,.1f} {unit}"
    return f"{size_bytes / 1e3:,.0f} kB"
