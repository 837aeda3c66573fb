"""TODO: cluster/kubernetes/shape.py."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from overtone.cluster.kubernetes.options import Options
from overtone.jobs.errors import UserError
from overtone.jobs.spec import JobSpec, is_url
from overtone.progressive.checkpoints import is_local_model

IMAGE_FOLDER = "/opt/overtone"
"""Where the image has the project: local paths of a spec may lie in it."""
_GIB = 2**30
_USUAL_MAX_WORKERS = 8

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


# Sizes.


@dataclass(frozen=True)
class Shape:
    """How many pods of which size; workers are Ray actors, several to a pod where they fit."""

    gpus: int
    """Of a pod; 0: the job runs on CPUs."""
    num_gpus: float
    """Of a worker."""
    workers_per_pod: int
    min_workers: int
    max_workers: int
    cpus: int
    """Of a worker pod."""
    memory_gib: int
    """Of a worker pod."""
    weights_gib: float
    """Of one worker's model."""
    weights_known: bool
    """False: the model is in no table and `weights_gib` is a guess."""

    @property
    def min_pods(self) -> int:
        return math.ceil(self.min_workers / self.workers_per_pod)

    @property
    def max_pods(self) -> int:
        return math.ceil(self.max_workers / self.workers_per_pod)


def shape_of(spec: JobSpec, options: Options) -> Shape:
    """The pods that the spec's workers need."""
    workers = spec.workers
    num_gpus = workers.num_gpus if workers.num_gpus is not None else float(spec.model.id != "tiny")
    if num_gpus >= 1:
        gpus = max(options.gpus_per_pod, int(num_gpus))
        per_pod = gpus // int(num_gpus)
    elif num_gpus > 0:
        gpus = options.gpus_per_pod
        per_pod = gpus * int(1 / num_gpus + 1e-9)
    else:
        gpus, per_pod = 0, 1
    weights, known = weights_gib(spec)
    # A core a worker computes with, one that encodes and uploads; on GPUs two more for loading and text.
    cpus = per_pod * (math.ceil(workers.num_cpus) + (3 if gpus else 1))
    # Weights pass through main memory on their way to the GPU; with `offload: model` they stay there.
    memory = per_pod * (1.25 * weights + 3) + (5 if gpus else 1)
    most = workers.max or options.max_workers or max(workers.min, _USUAL_MAX_WORKERS)
    if most < workers.min:
        raise UserError(f"max_workers ({most}) is below the spec's workers.min ({workers.min})")
    return Shape(
        gpus=gpus,
        num_gpus=num_gpus,
        workers_per_pod=per_pod,
        min_workers=workers.min,
        max_workers=most,
        cpus=cpus,
        memory_gib=math.ceil(memory),
        weights_gib=weights,
        weights_known=known,
    )


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


# Paths.


def check_paths(spec: JobSpec, options: Options) -> None:
    if options.kind == "cluster":
        return  # it runs any spec
    seen = [PurePosixPath(volume.mount_path) for volume in options.volumes]
    places = [("prompts.path", path, True) for path in spec.prompts.path]
    places.append(("output.path", spec.output.path, False))
    if is_local_model(spec.model.id):
        places.append(("model.id", spec.model.id, True))
    for key, path, readable in places:
        roots = [*seen, PurePosixPath(IMAGE_FOLDER)] if readable else seen
        if not is_url(path) and not any(PurePosixPath(path).is_relative_to(root) for root in roots):
            image = f", put it into the image below {IMAGE_FOLDER}" if readable else ""
            raise UserError(
                f"{key}: {path} is on this machine, where no pod sees it; give s3://bucket/... "
                f"(--set {key}=s3://bucket/...){image}, or mount a claim that holds it "
                "(--volume CLAIM:/mount)"
            )


def uses_s3(spec: JobSpec) -> bool:
    return any(path.startswith("s3://") for path in (*spec.prompts.path, spec.output.path))


# Documents.


def object_name(spec: JobSpec, options: Options) -> str:
    if options.name is not None:
        return options.name
    plain = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")
    return f"overtone-{plain or 'job'}"[:47].rstrip("-")
