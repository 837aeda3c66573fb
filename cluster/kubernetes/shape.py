"""How many pods of which size a spec's workers need. Knows nothing of how a Kubernetes document is
written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from overtone.cluster.kubernetes.options import Options
from overtone.jobs.errors import UserError
from overtone.jobs.needs import weights_gib
from overtone.jobs.spec import JobSpec

_USUAL_MAX_WORKERS = 8


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
    ray_cpus: int
    """That the pod offers to Ray. Without GPUs, which bound it otherwise, they leave room for
    `workers_per_pod` workers, for which its memory is reckoned, and for no more."""
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
        # Ray's CPUs of a pod are whole: where a worker takes less than one, several fit.
        gpus, per_pod = 0, int(math.ceil(workers.num_cpus) / workers.num_cpus + 1e-9)
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
        ray_cpus=cpus if gpus else math.ceil(workers.num_cpus),
        memory_gib=math.ceil(memory),
        weights_gib=weights,
        weights_known=known,
    )
