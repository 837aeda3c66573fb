"""The pods of a Ray cluster as Kubernetes describes them: the head, the workers, and the one that submits the
job. Knows what runs in each, what it may do and on which nodes; the documents around them are in `documents`.
"""

from __future__ import annotations

import math
from typing import Any

from overtone.cluster.kubernetes.options import Options
from overtone.cluster.kubernetes.shape import Shape
from overtone.cluster.kubernetes.yaml_notes import Note
from overtone.jobs.spec import JobSpec

SPEC_FOLDER, SPEC_FILE = "/etc/overtone", "spec.yaml"
CACHE_FOLDER = "/models"
NODE_CACHE_FOLDER = "/var/lib/overtone/models"
USER = 1000
_OBJECT_STORE_BYTES = 256 * 2**20  # pictures never enter it

SPOT_LABELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cloud.google.com/gke-spot", ("true",)),
    ("eks.amazonaws.com/capacityType", ("SPOT",)),
    ("karpenter.sh/capacity-type", ("spot",)),
    ("kubernetes.azure.com/scalesetpriority", ("spot",)),
)
"""How the managed services label spot nodes."""
SPOT_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")
"""Taints that they put on them."""

POD_LABELS = {"app.kubernetes.io/part-of": "overtone"}  # KubeRay's services select by its own `name`

_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}

CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
}


def head(spec: JobSpec, options: Options, spec_from: str | None) -> dict[str, Any]:
    """The head group; `spec_from` is the ConfigMap that holds the spec, None where there is none."""
    container: dict[str, Any] = {
        "name": "ray-head",
        "ports": [
            {"containerPort": 6379, "name": "gcs-server"},
            {"containerPort": 8265, "name": "dashboard"},
            {"containerPort": 10001, "name": "client"},
            {"containerPort": 8080, "name": "metrics"},
        ],
        "resources": resources(cpu="2", memory="8Gi"),
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
        "template": {"metadata": {"labels": POD_LABELS}, "spec": pod},
    }


def worker_groups(spec: JobSpec, shape: Shape, options: Options) -> list[dict[str, Any]]:
    """One group, or with `spot` two: what is always there, and what comes and goes."""
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
        "resources": resources(cpu=str(shape.cpus), memory=f"{shape.memory_gib}Gi", gpus=shape.gpus),
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
            "num-cpus": str(shape.ray_cpus),
            "object-store-memory": str(_OBJECT_STORE_BYTES),
        },
        "template": {"metadata": {"labels": POD_LABELS}, "spec": pod},
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


def submitter(options: Options) -> dict[str, Any]:
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
                    "resources": resources(cpu="250m", memory="1Gi"),
                    "securityContext": CONTAINER_SECURITY,
                }
            ],
        }
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
    for number, volume in enumerate(options.volumes):  # names of our own: a claim's may be taken, or too long
        mounts.append({"name": f"claim-{number}", "mountPath": volume.mount_path})
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": volume.claim}})
    env: list[dict[str, Any]] = []
    if spec.model.id != "tiny":
        env.append({"name": "HF_HOME", "value": CACHE_FOLDER if _has_cache(mounts) else "/tmp/huggingface"})
        token = {"name": options.hub_secret, "key": "token", "optional": True}
        env.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}})
    name, rest = container["name"], {key: value for key, value in container.items() if key != "name"}
    filled = {"name": name, "image": options.image, "imagePullPolicy": "IfNotPresent", **rest}
    if env:
        filled["env"] = env
    if secret := s3_secret(spec, options):
        filled["envFrom"] = [{"secretRef": {"name": secret}}]
    if mounts:
        filled["volumeMounts"] = mounts
    filled["securityContext"] = CONTAINER_SECURITY
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


def s3_secret(spec: JobSpec, options: Options) -> str | None:
    """The Secret with the keys for S3 that pods need; None where they need none. A cluster runs any spec."""
    uses_s3 = any(path.startswith("s3://") for path in (*spec.prompts.path, spec.output.path))
    return options.s3_secret if uses_s3 or options.kind == "cluster" else None


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
        "resources": resources(cpu="100m", memory="64Mi"),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "runAsNonRoot": False,
            "runAsUser": 0,
            "capabilities": {"drop": ["ALL"], "add": ["CHOWN"]},
        },
    }
    folder = {"path": NODE_CACHE_FOLDER, "type": "DirectoryOrCreate"}
    return mounts, [{"name": "models", "hostPath": folder}], [owner]


def resources(*, cpu: str, memory: str, gpus: int = 0) -> dict[str, Any]:
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
