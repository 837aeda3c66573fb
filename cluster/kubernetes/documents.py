"""Writes the Kubernetes objects that run a job: a KubeRay RayJob, or a RayCluster to submit to. Knows specs;
it prints YAML and talks to no cluster.

    manifest(spec, image="registry/overtone:1", spot=True)      # text for `kubectl apply -f -`

`manifest` puts documents together; `pods` has the head and the workers in them. Field names are those of the
ray.io/v1 API; tests/kuberay.py has the subset that is checked, and its source.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

from overtone.cluster.kubernetes.options import IMAGE_FOLDER, Options, Volume
from overtone.cluster.kubernetes.pods import (
    CONTAINER_SECURITY,
    POD_LABELS,
    SPEC_FILE,
    SPEC_FOLDER,
    head,
    resources,
    s3_secret,
    submitter,
    worker_groups,
)
from overtone.cluster.kubernetes.shape import Shape, shape_of
from overtone.cluster.kubernetes.yaml_notes import Note, dump
from overtone.cluster.submit import packed_spec
from overtone.jobs.errors import UserError
from overtone.jobs.spec import JobSpec, is_url
from overtone.jobs.words import counted


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
    return _header(spec, shape, asked) + "".join(dump(document) for document in documents)


def _check_paths(spec: JobSpec, options: Options) -> None:
    """UserError where the spec names a file of this machine that no pod would see."""
    if options.kind == "cluster":
        return  # it runs any spec
    seen = [PurePosixPath(volume.mount_path) for volume in options.volumes]
    for key, path in spec.files():
        is_read, is_model = key != "output.path", key.startswith("model.")
        roots = [*seen, PurePosixPath(IMAGE_FOLDER)] if is_read else seen
        if not any(PurePosixPath(path).is_relative_to(root) for root in roots):
            other = "a hub name" if is_model else f"s3://bucket/... (--set {key}=s3://bucket/...)"
            image = f", put it into the image below {IMAGE_FOLDER}" if is_read else ""
            raise UserError(
                f"{key}: {path} is on this machine, where no pod sees it; give {other}{image}, or mount a "
                "claim that holds it (--volume CLAIM:/mount)"
            )


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


def _config_map(spec: JobSpec, shape: Shape, options: Options) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(_name(spec, options), options),
        "data": {SPEC_FILE: packed_spec(embedded_spec(spec, shape))},
    }


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
            "submitterPodTemplate": submitter(options),
            "rayClusterSpec": _cluster(spec, shape, options, spec_from=name),
        },
    }


def entrypoint() -> str:
    """The command that the job runs on the head, as KubeRay hands it to a shell."""
    return shlex.join(["overtone", "run", f"{SPEC_FOLDER}/{SPEC_FILE}", "--address", "auto"])


def _ray_cluster(spec: JobSpec, shape: Shape, options: Options) -> dict[str, Any]:
    queue = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else None
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(_name(spec, options), options, queue),
        "spec": _cluster(spec, shape, options, spec_from=None),
    }


def _name(spec: JobSpec, options: Options) -> str:
    """Of the job or the cluster: what Kubernetes allows of the spec's name, where no other was given."""
    if options.name is not None:
        return options.name
    plain = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")
    return f"overtone-{plain or 'job'}"[:47].rstrip("-")


def _metadata(name: str, options: Options, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if options.namespace is not None:
        metadata["namespace"] = options.namespace
    metadata["labels"] = {**POD_LABELS, **(labels or {})}
    return metadata


def _cluster(spec: JobSpec, shape: Shape, options: Options, spec_from: str | None) -> dict[str, Any]:
    cluster: dict[str, Any] = {"rayVersion": version("ray")}
    if options.queue:
        cluster |= {
            Note("Kueue admits the job with all its pods at once, and refuses one that scales itself."): None,
            "enableInTreeAutoscaling": False,
        }
    else:
        cluster |= {
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                Note("Workers that the job has given back go after this time without one."): None,
                "idleTimeoutSeconds": 120,
                "upscalingMode": "Default",
                "resources": resources(cpu="500m", memory="1Gi"),
                "securityContext": CONTAINER_SECURITY,
            },
        }
    return cluster | {
        Note("KubeRay 1.5.1 or later makes the token and gives it to all pods."): None,
        "authOptions": {"mode": "token"},
        "headGroupSpec": head(spec, options, spec_from),
        "workerGroupSpecs": worker_groups(spec, shape, options),
    }


def _header(spec: JobSpec, shape: Shape, options: Options) -> str:
    """The comment at the top: what the manifest runs, the commands that go with it, and what it needs."""
    name = _name(spec, options)
    per_pod = f", {shape.workers_per_pod} to a pod" if shape.workers_per_pod > 1 else ""
    what = "A job" if options.kind == "job" else "A cluster for `overtone submit`"
    size = f"each with {shape.num_gpus:g} GPU" if shape.gpus else "on CPUs"
    low, high = shape.min_workers, shape.max_workers
    count = f"{low} to {high} workers" if low < high else counted(low, "worker")
    lines = [f"{what}: {spec.model.id}, {count}{per_pod}, {size}."]
    if spec.model.id != "tiny":
        guess = "" if shape.weights_known else " (a guess: the model is not in the table of sizes)"
        lines.append(f"A worker's weights take about {shape.weights_gib:.0f} GiB{guess}.")
    lines += ["", "  kubectl apply -f THIS_FILE"]
    if options.kind == "job":
        status = f"overtone status {shlex.quote(spec.output.path)}"
        if not is_url(spec.output.path):
            label = ",".join(("ray.io/node-type=head", *(f"{k}={v}" for k, v in POD_LABELS.items())))
            status = f'kubectl exec "$(kubectl get pod -o name -l {label})" -c ray-head -- {status}'
        lines += [f"  kubectl get rayjob {name}", f"  {status}"]
        lines += ["", "An ended RayJob does not start again. To continue in its output folder:", ""]
        lines.append(f"  kubectl delete rayjob {name} && kubectl apply -f THIS_FILE")
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
    if secret := s3_secret(spec, options):
        needs.append(f"a Secret {secret} with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if spec.model.id != "tiny":
        needs.append(f"for gated models a Secret {options.hub_secret} with the key token")
    lines += ["", "Needs:", *(f"- {need}" for need in needs)]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
