"""Writes the Kubernetes objects that run a job: a KubeRay RayJob, or a RayCluster to submit to. Knows specs
and the size of published models; it only prints YAML and talks to no cluster.

manifest(spec, image="registry/overtone:1", spot=True)      # text for `kubectl apply -f -`

`manifest` puts documents together, `_cluster` the head and the worker groups, `_pod` what is the same in all
pods. Field names are those of the ray.io/v1 API; tests/kuberay.py has the subset that is checked, and its
source.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from cluster.submit import packed_spec
from jobs.errors import UserError
from jobs.spec import JobSpec, is_url

IMAGE = "overtone:0.1.0"
"""What `docker build -f manifests/Dockerfile -t overtone:0.1.0 .` makes."""

IMAGE_FOLDER = "/opt/overtone"
"""Where the image has the project: local paths of a spec may lie in it."""

SPEC_FOLDER, SPEC_FILE = "/etc/overtone", "spec.yaml"
CACHE_FOLDER = "/models"
NODE_CACHE_FOLDER = "/var/lib/overtone/models"
USER = 1000

_GIB = 2**30
_OBJECT_STORE_BYTES = 256 * 2**20  # pictures never enter it
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

SPOT_LABELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cloud.google.com/gke-spot", ("true",)),
    ("eks.amazonaws.com/capacityType", ("SPOT",)),
    ("karpenter.sh/capacity-type", ("spot",)),
    ("kubernetes.azure.com/scalesetpriority", ("spot",)),
)
"""How the managed services label spot nodes."""

SPOT_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")
"""Taints that they put on them."""


@dataclass(frozen=True)
class Volume:
    """A persistent volume claim that head and workers see at `mount_path`. With a size the claim itself is
    printed too, otherwise it must exist."""

    claim: str
    mount_path: str
    size: str | None = None
    """Kubernetes quantity, e.g. `100Gi`."""
    access: Literal["ReadWriteMany", "ReadWriteOnce"] = "ReadWriteMany"
    """ReadWriteOnce holds only pods of one node together."""

    @classmethod
    def parse(cls, text: str) -> Volume:
        """`CLAIM:/mount` or `CLAIM:/mount:10Gi`; UserError otherwise."""
        claim, mount, size = [*text.split(":"), "", ""][:3]
        if text.count(":") > 2 or not claim or not mount.startswith("/"):
            raise UserError(f"a volume is CLAIM:/mount or CLAIM:/mount:10Gi, not {text!r}")
        return cls(claim, mount, size or None)


@dataclass(frozen=True)
class Options:
    """What a manifest says besides the spec. All of it is about the cluster; none of it changes samples."""

    kind: Literal["job", "cluster"] = "job"
    """`job`: a RayJob that runs the spec and goes. `cluster`: a RayCluster of the same shape that stays, for
    `overtone submit`."""
    name: str | None = None
    """Of the object; unset: `overtone-` and the spec's name."""
    namespace: str | None = None
    """Unset: the one kubectl is set to."""
    image: str = IMAGE
    """Made from manifests/Dockerfile, somewhere the cluster can pull it from."""
    gpus_per_pod: int = 1
    """GPUs of one worker pod; a pod holds as many workers as fit on them."""
    max_workers: int | None = None
    """Most workers where the spec's `workers.max` is unset; unset: 8, or `workers.min` if that is more."""
    spot: bool = False
    """Put all workers above `workers.min` on spot nodes."""
    queue: str | None = None
    """Kueue's LocalQueue that admits the job."""
    s3_secret: str | None = "overtone-s3"
    """Secret whose keys become environment variables (AWS_ACCESS_KEY_ID, ...), used where the spec names s3://;
    None: the pods' service account gives access."""
    hub_secret: str = "huggingface"
    """Secret with the key `token` for gated models; may be absent."""
    service_account: str | None = None
    """Of head and workers, e.g. one tied to a cloud role that may use the bucket."""
    cache: str = "node"
    """Where downloaded weights are kept: `node`, a folder of each node, so that its pods share one download;
    `pod`, lost with the pod; or the name of a ReadWriteMany claim, one download for the whole cluster."""
    volumes: tuple[Volume, ...] = ()
    """Claims for prompts, output or models that are files."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Labels that the workers' nodes must have."""
    deadline_s: int = 7 * 24 * 3600
    """The job is ended after this many seconds, retries included."""
    ttl_s: int = 600
    """The cluster is removed this many seconds after the job's end."""
    backoff_limit: int = 3
    """New tries, each on a fresh cluster, after the job failed; each goes on where the last one ended."""


def options_from_text(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `manifest` from a command line's: what was not given is left out, `volumes` are
    `CLAIM:/mount[:SIZE]`, `node_selector` are `KEY=VALUE`, an `s3_secret` called `none` is None."""
    found = {key: value for key, value in given.items() if value not in (None, (), False)}
    if "volumes" in found:
        found["volumes"] = tuple(Volume.parse(text) for text in found["volumes"])
    if "node_selector" in found:
        pairs = [text.partition("=") for text in found["node_selector"]]
        if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
            raise UserError(f"a node selector is KEY=VALUE, not {wrong[0]!r}")
        found["node_selector"] = {key: value for key, _, value in pairs}
    if found.get("s3_secret") == "none":
        found["s3_secret"] = None
    return found


def manifest(spec: JobSpec, **options: Any) -> str:
    """YAML that runs `spec` on Kubernetes: a RayJob with its ConfigMap, or for `kind="cluster"` a RayCluster;
    keyword arguments are the fields of `Options`.

    Raises UserError where the spec names a file that no pod would see, or a combination that cannot be.
    """
    asked = Options(**options)
    shape = shape_of(spec, asked)
    _check_paths(spec, asked)
    documents = [_claim(volume, asked) for volume in asked.volumes if volume.size]
    if asked.kind == "cluster":
        documents.append(_ray_cluster(spec, shape, asked))
    else:
        documents += [_config_map(spec, shape, asked), _ray_job(spec, shape, asked)]
    return _header(spec, shape, asked) + "".join(_dump(document) for document in documents)


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


def _check_paths(spec: JobSpec, options: Options) -> None:
    if options.kind == "cluster":
        return  # it runs any spec
    seen = [PurePosixPath(volume.mount_path) for volume in options.volumes]
    places = [("prompts.path", path, True) for path in spec.prompts.path]
    places.append(("output.path", spec.output.path, False))
    if spec.model.id.startswith(("/", "./", "../", "~")):
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


def _uses_s3(spec: JobSpec) -> bool:
    return any(path.startswith("s3://") for path in (*spec.prompts.path, spec.output.path))


# Documents.


def _name(spec: JobSpec, options: Options) -> str:
    if options.name is not None:
        return options.name
    plain = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")
    return f"overtone-{plain or 'job'}"[:47].rstrip("-")


def _metadata(name: str, options: Options, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    if options.namespace is not None:
        found["namespace"] = options.namespace
    found["labels"] = {**_POD_LABELS, **(labels or {})}
    return found


def entrypoint() -> str:
    """The command that the job runs on the head, as KubeRay hands it to a shell."""
    return shlex.join(["overtone", "run", f"{SPEC_FOLDER}/{SPEC_FILE}", "--address", "auto"])


def embedded_spec(spec: JobSpec, shape: Shape) -> JobSpec:
    """The spec with its workers pinned to what the manifest offers: on a cluster that grows from nothing
    there is no GPU to be seen when the job starts, and no bound on how many to ask for."""
    pinned = {
        "count": None,
        "min": shape.min_workers,
        "max": shape.max_workers,
        "num_gpus": shape.num_gpus,
    }
    return spec.model_copy(update={"workers": spec.workers.model_copy(update=pinned)})


def _config_map(spec: JobSpec, shape: Shape, options: Options) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(_name(spec, options), options),
        "data": {SPEC_FILE: packed_spec(embedded_spec(spec, shape))},
    }


def _claim(volume: Volume, options: Options) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(volume.claim, options),
        "spec": {
            "accessModes": [volume.access],
            "resources": {"requests": {"storage": volume.size}},
        },
    }


def _ray_job(spec: JobSpec, shape: Shape, options: Options) -> dict[str, Any]:
    name = _name(spec, options)
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else None
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(name, options, queue),
        "spec": {
            "entrypoint": entrypoint(),
            Note("The driver runs on the head, which offers no CPU to Ray."): None,
            "entrypointNumCpus": 0,
            "submissionMode": "K8sJobMode",
            Note("The cluster goes when the job has ended; what the job made is in its output folder."): None,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": options.ttl_s,
            "activeDeadlineSeconds": options.deadline_s,
            Note("Safe: a retried job goes on with the shards that are not there yet."): None,
            "backoffLimit": options.backoff_limit,
            "submitterPodTemplate": _submitter(options),
            "rayClusterSpec": _cluster(spec, shape, options, spec_from=name),
        },
    }


def _ray_cluster(spec: JobSpec, shape: Shape, options: Options) -> dict[str, Any]:
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else None
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(_name(spec, options), options, queue),
        "spec": _cluster(spec, shape, options, spec_from=None),
    }


def _submitter(options: Options) -> dict[str, Any]:
    """The pod that hands the entrypoint to the cluster and shows its log."""
    return {
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": _POD_SECURITY,
            "containers": [
                {
                    "name": "submitter",
                    "image": options.image,
                    "imagePullPolicy": "IfNotPresent",
                    "resources": _resources(cpu="250m", memory="1Gi"),
                    "securityContext": _CONTAINER_SECURITY,
                }
            ],
        }
    }


def _cluster(spec: JobSpec, shape: Shape, options: Options, spec_from: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"rayVersion": version("ray")}
    if options.queue:
        found |= {
            Note("Kueue admits the job with all its pods at once, and refuses one that scales itself."): None,
            "enableInTreeAutoscaling": False,
        }
    else:
        found |= {
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                Note("Workers that the job has given back go after this time without one."): None,
                "idleTimeoutSeconds": 120,
                "upscalingMode": "Default",
                "resources": _resources(cpu="500m", memory="1Gi"),
                "securityContext": _CONTAINER_SECURITY,
            },
        }
    return found | {
        Note("KubeRay 1.5.1 or later makes the token and gives it to all pods."): None,
        "authOptions": {"mode": "token"},
        "headGroupSpec": _head(spec, options, spec_from),
        "workerGroupSpecs": _worker_groups(spec, shape, options),
    }


def _head(spec: JobSpec, options: Options, spec_from: str | None) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "ray-head",
        "ports": [
            {"containerPort": 6379, "name": "gcs-server"},
            {"containerPort": 8265, "name": "dashboard"},
            {"containerPort": 10001, "name": "client"},
            {"containerPort": 8080, "name": "metrics"},
        ],
        "resources": _resources(cpu="2", memory="8Gi"),
        **_probes("/api/gcs_healthz", 8265),
    }
    mounts, volumes = [], []
    if spec_from is not None:
        mounts.append({"name": "spec", "mountPath": SPEC_FOLDER, "readOnly": True})
        volumes.append({"name": "spec", "configMap": {"name": spec_from}})
    pod = _pod(spec, options, container, mounts, volumes, grace_s=60)
    if options.spot:
        pod["affinity"] = _not_spot()
    return {
        Note("No workers on the head: it keeps the cluster's state and runs the driver."): None,
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
        "template": {"metadata": {"labels": _POD_LABELS}, "spec": pod},
    }


def _worker_groups(spec: JobSpec, shape: Shape, options: Options) -> list[dict[str, Any]]:
    steady = shape.min_pods
    kind = "gpu" if shape.gpus else "cpu"
    if options.queue:
        return [_worker_group(kind, shape.max_pods, shape.max_pods, spec, shape, options, spot=options.spot)]
    if not options.spot:
        return [_worker_group(kind, steady, shape.max_pods, spec, shape, options, spot=False)]
    if steady == shape.max_pods:  # nothing is above the minimum: all of it on spot nodes
        return [_worker_group(f"{kind}-spot", steady, steady, spec, shape, options, spot=True)]
    return [
        _worker_group(kind, steady, steady, spec, shape, options, spot=False),
        _worker_group(f"{kind}-spot", 0, shape.max_pods - steady, spec, shape, options, spot=True),
    ]


def _worker_group(
    name: str, low: int, high: int, spec: JobSpec, shape: Shape, options: Options, *, spot: bool
) -> dict[str, Any]:
    drain_s = math.ceil(spec.faults.grace_s)
    container: dict[str, Any] = {
        "name": "ray-worker",
        "resources": _resources(cpu=str(shape.cpus), memory=f"{shape.memory_gib}Gi", gpus=shape.gpus),
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", drain_command(drain_s)]}}},
        **_probes("/api/local_raylet_healthz", 52365),
    }
    mounts: list[dict[str, Any]] = []
    volumes: list[dict[str, Any]] = []
    first: list[dict[str, Any]] = []
    if spec.model.id != "tiny":
        mounts, volumes, first = _model_cache(shape, options)
    pod = _pod(spec, options, container, mounts, volumes, grace_s=drain_s + 45)
    if first:
        pod = {"initContainers": first, **pod}
    pod["automountServiceAccountToken"] = False
    tolerations = []
    if shape.gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if spot:
        pod["affinity"] = _only_spot()
        tolerations += [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in SPOT_TAINTS]
    elif options.spot:
        pod["affinity"] = _not_spot()
    if tolerations:
        pod["tolerations"] = tolerations
    if options.node_selector:
        pod["nodeSelector"] = dict(options.node_selector)
    return {
        "groupName": name,
        "replicas": low,
        "minReplicas": low,
        "maxReplicas": high,
        "labels": {"ray.io/market-type": "spot" if spot else "on-demand"},
        "rayStartParams": {
            "num-cpus": str(shape.cpus),
            "object-store-memory": str(_OBJECT_STORE_BYTES),
        },
        "template": {"metadata": {"labels": _POD_LABELS}, "spec": pod},
    }


def drain_command(grace_s: int) -> str:
    """What a worker pod does before it is stopped, in sh: tell Ray that its node is about to go, so that the
    driver gives it nothing new and takes its shards back; wait while actors live, `grace_s` at most."""
    return (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod is being stopped' "
        f"--deadline-remaining-seconds {grace_s}; "
        f"i=0; while [ $i -lt {grace_s} ] && {ACTORS_LIVE}; do i=$((i+1)); sleep 1; done; ray stop"
    )


ACTORS_LIVE = (
    "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep '^ray::' "
    "| grep -qvE '^ray::(IDLE|DashboardAgent|RuntimeEnvAgent)'"
)
"""In sh: whether a process of the pod is a Ray actor or task at work, by the titles that Ray gives them."""


# What pods are made of.

_POD_LABELS = {"app.kubernetes.io/part-of": "overtone"}  # KubeRay's services select by its own `name`
_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
}


def _pod(
    spec: JobSpec,
    options: Options,
    container: dict[str, Any],
    mounts: list[dict[str, Any]],
    volumes: list[dict[str, Any]],
    *,
    grace_s: int,
) -> dict[str, Any]:
    """A pod with one Ray container that sees the claims and has the environment a job needs."""
    mounts = [*mounts, *({"name": v.claim, "mountPath": v.mount_path} for v in options.volumes)]
    volumes = [
        *volumes,
        *({"name": v.claim, "persistentVolumeClaim": {"claimName": v.claim}} for v in options.volumes),
    ]
    env: list[dict[str, Any]] = []
    if spec.model.id != "tiny":
        env.append({"name": "HF_HOME", "value": CACHE_FOLDER if _has_cache(mounts) else "/tmp/huggingface"})
        token = {"name": options.hub_secret, "key": "token", "optional": True}
        env.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}})
    name, rest = container["name"], {key: value for key, value in container.items() if key != "name"}
    filled = {"name": name, "image": options.image, "imagePullPolicy": "IfNotPresent", **rest}
    if env:
        filled["env"] = env
    if options.s3_secret and (_uses_s3(spec) or options.kind == "cluster"):
        filled["envFrom"] = [{"secretRef": {"name": options.s3_secret}}]
    if mounts:
        filled["volumeMounts"] = mounts
    filled["securityContext"] = _CONTAINER_SECURITY
    pod: dict[str, Any] = {"containers": [filled]}
    if volumes:
        pod["volumes"] = volumes
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    return pod | {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_s,
        "securityContext": _POD_SECURITY,
    }


def _has_cache(mounts: list[dict[str, Any]]) -> bool:
    return any(mount["mountPath"] == CACHE_FOLDER for mount in mounts)


def _model_cache(
    shape: Shape, options: Options
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Mounts, volumes and init containers that keep downloaded weights. The hub's library locks each file
    while it downloads it, so pods that share a folder share one download."""
    mounts = [{"name": "models", "mountPath": CACHE_FOLDER}]
    if options.cache == "pod":
        size = f"{math.ceil(1.5 * shape.weights_gib + 10)}Gi"
        return mounts, [{"name": "models", "emptyDir": {"sizeLimit": size}}], []
    if options.cache != "node":
        return mounts, [{"name": "models", "persistentVolumeClaim": {"claimName": options.cache}}], []
    owner = {
        "name": "own-models",
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        Note("The kubelet makes the folder for root; this hands it to the image's user."): None,
        "command": ["chown", f"{USER}:{USER}", CACHE_FOLDER],
        "volumeMounts": mounts,
        "resources": _resources(cpu="100m", memory="64Mi"),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "runAsNonRoot": False,
            "runAsUser": 0,
            "capabilities": {"drop": ["ALL"], "add": ["CHOWN"]},
        },
    }
    folder = {"path": NODE_CACHE_FOLDER, "type": "DirectoryOrCreate"}
    return mounts, [{"name": "models", "hostPath": folder}], [owner]


def _resources(*, cpu: str, memory: str, gpus: int = 0) -> dict[str, Any]:
    """Memory and GPUs with a limit equal to the request; no limit on CPU, which would only throttle."""
    devices = {"nvidia.com/gpu": gpus} if gpus else {}
    return {
        "requests": {"cpu": cpu, "memory": memory, **devices},
        "limits": {"memory": memory, **devices},
    }


def _probes(path: str, port: int) -> dict[str, Any]:
    """Ray's own health pages, which need no token. Slow to kill: a busy node is not a dead one."""
    check = {"httpGet": {"path": path, "port": port}, "timeoutSeconds": 5}
    return {
        "startupProbe": check | {"periodSeconds": 5, "failureThreshold": 60},
        "readinessProbe": check | {"periodSeconds": 10, "failureThreshold": 6},
        "livenessProbe": check | {"periodSeconds": 10, "failureThreshold": 30},
    }


def _only_spot() -> dict[str, Any]:
    """Nodes with any of the labels: a list of terms is an or."""
    terms = [
        {"matchExpressions": [{"key": key, "operator": "In", "values": list(values)}]}
        for key, values in SPOT_LABELS
    ]
    return _affinity(terms)


def _not_spot() -> dict[str, Any]:
    """Nodes with none of the labels: the expressions of a term are an and; NotIn holds without the label."""
    none = [{"key": key, "operator": "NotIn", "values": list(values)} for key, values in SPOT_LABELS]
    return _affinity([{"matchExpressions": none}])


def _affinity(terms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


# Text.


def _header(spec: JobSpec, shape: Shape, options: Options) -> str:
    name = _name(spec, options)
    per_pod = f", {shape.workers_per_pod} to a pod" if shape.workers_per_pod > 1 else ""
    what = "A job" if options.kind == "job" else "A cluster for `overtone submit`"
    size = f"each with {shape.num_gpus:g} GPU" if shape.gpus else "on CPUs"
    low, high = shape.min_workers, shape.max_workers
    count = f"{low} to {high} workers" if low < high else f"{low} worker{'s' if low > 1 else ''}"
    lines = [f"{what}: {spec.model.id}, {count}{per_pod}, {size}."]
    if spec.model.id != "tiny":
        guess = "" if shape.weights_known else " (a guess: the model is not in the table of sizes)"
        lines.append(f"A worker's weights take about {shape.weights_gib:.0f} GiB{guess}.")
    lines += ["", "  kubectl apply -f THIS_FILE"]
    if options.kind == "job":
        status = f"overtone status {shlex.quote(spec.output.path)}"
        if not is_url(spec.output.path):
            label = ",".join(("ray.io/node-type=head", *(f"{k}={v}" for k, v in _POD_LABELS.items())))
            status = f'kubectl exec "$(kubectl get pod -o name -l {label})" -c ray-head -- {status}'
        lines += [f"  kubectl get rayjob {name}", f"  {status}"]
    else:
        lines += [
            f"  kubectl port-forward service/{name}-head-svc 8265:8265",
            f"  export RAY_AUTH_TOKEN=$(kubectl get secret {name} "
            "-o jsonpath={.data.auth_token} | base64 -d)",
            "  overtone submit SPEC --follow",
        ]
    needs = [
        "KubeRay 1.5.1 or later",
        f"the image {options.image} (made from manifests/Dockerfile) where the cluster can pull it",
    ]
    if options.queue:
        needs.append(f"Kueue with a LocalQueue {options.queue}")
    if options.s3_secret and (_uses_s3(spec) or options.kind == "cluster"):
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        needs.append(f"a Secret {options.s3_secret} with the keys {keys}")
    if spec.model.id != "tiny":
        needs.append(f"for gated models a Secret {options.hub_secret} with the key token")
    lines += ["", "Needs:", *(f"- {need}" for need in needs)]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


class Note(str):
    """A comment line, as a key of a mapping whose value is None."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _dump(document: dict[str, Any]) -> str:
    notes: list[str] = []
    text = yaml.dump(_numbered(document, notes), Dumper=_Dumper, sort_keys=False, width=1000)
    text = re.sub(r"^( *)'#(\d+)': null$", lambda m: f"{m[1]}# {notes[int(m[2])]}", text, flags=re.MULTILINE)
    return f"---\n{text}"


def _numbered(value: Any, notes: list[str]) -> Any:
    """A copy whose comments are keys `#0`, `#1`, ... into `notes`."""
    if isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for key, inner in value.items():
            if isinstance(key, Note):
                found[f"#{len(notes)}"] = None
                notes.append(str(key))
            else:
                found[key] = _numbered(inner, notes)
        return found
    if isinstance(value, list | tuple):
        return [_numbered(inner, notes) for inner in value]
    return value
