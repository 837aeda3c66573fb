"""The part of the KubeRay v1 API, and of the Kubernetes objects inside it, that our manifests use: field
names, types, required fields, and the operator's own checks.

Sources, read when this was written:
- RayJob, RayCluster: `ray-operator/apis/ray/v1/rayjob_types.go` and `raycluster_types.go` of
  ray-project/kuberay, with the fields of release 1.5.1 (`authOptions`, group `labels`), and the generated
  reference of v1.6.2 at docs.ray.io, "KubeRay CRD API reference".
- What the operator refuses beyond types: `ray-operator/controllers/ray/utils/validation.go`, name lengths
  from `util.go` there (a cluster's name has 53 characters at most, a job's six fewer).
- What Kueue refuses of jobs in its queues: `pkg/controller/jobs/rayjob/rayjob_webhook.go` and
  `raycluster/raycluster_webhook.go` of kubernetes-sigs/kueue.
- Pods, volumes, claims, config maps: the Kubernetes core/v1 reference.

A field that is not listed here fails, whether or not Kubernetes has it: add it with its type first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jsonschema

INT32 = 2**31 - 1


@dataclass(frozen=True)
class Obj:
    """An object with these fields and no others."""

    fields: dict[str, Any]
    required: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Seq:
    """A list."""

    of: Any


@dataclass(frozen=True)
class Map:
    """Free keys, values of one type."""

    of: Any


@dataclass(frozen=True)
class Enum:
    """One of these strings."""

    values: tuple[str, ...]


def obj(*required: str, **fields: Any) -> Obj:
    """`required` names are among `fields`; a trailing underscore is dropped (`from_`)."""
    named = {name.rstrip("_"): kind for name, kind in fields.items()}
    assert set(required) <= set(named)
    return Obj(named, frozenset(required))


class Quantity:
    """`500m`, `16Gi`, `2`: a number with a Kubernetes suffix, written as a string or a number."""


class Port:
    """A port number or a port's name."""


STRINGS = Map(str)

METADATA = obj(
    "name",
    name=str,
    namespace=str,
    labels=STRINGS,
    annotations=STRINGS,
)
POD_METADATA = obj(labels=STRINGS, annotations=STRINGS)

SECRET_KEY = obj("name", "key", name=str, key=str, optional=bool)
ENV = obj(
    "name",
    name=str,
    value=str,
    valueFrom=obj(
        secretKeyRef=SECRET_KEY,
        configMapKeyRef=SECRET_KEY,
        fieldRef=obj("fieldPath", fieldPath=str, apiVersion=str),
    ),
)
ENV_FROM = obj(
    secretRef=obj("name", name=str, optional=bool), configMapRef=obj("name", name=str, optional=bool)
)
PROBE = obj(
    httpGet=obj("port", path=str, port=Port, scheme=Enum(("HTTP", "HTTPS"))),
    exec=obj("command", command=Seq(str)),
    initialDelaySeconds=int,
    periodSeconds=int,
    timeoutSeconds=int,
    successThreshold=int,
    failureThreshold=int,
)
RESOURCES = obj(requests=Map(Quantity), limits=Map(Quantity))
SECCOMP = obj("type", type=Enum(("RuntimeDefault", "Unconfined", "Localhost")))
SECURITY = obj(
    allowPrivilegeEscalation=bool,
    capabilities=obj(add=Seq(str), drop=Seq(str)),
    privileged=bool,
    readOnlyRootFilesystem=bool,
    runAsNonRoot=bool,
    runAsUser=int,
    runAsGroup=int,
    seccompProfile=SECCOMP,
)
POD_SECURITY = obj(
    runAsNonRoot=bool,
    runAsUser=int,
    runAsGroup=int,
    fsGroup=int,
    fsGroupChangePolicy=Enum(("OnRootMismatch", "Always")),
    seccompProfile=SECCOMP,
)
CONTAINER = obj(
    "name",
    name=str,
    image=str,
    imagePullPolicy=Enum(("Always", "IfNotPresent", "Never")),
    command=Seq(str),
    args=Seq(str),
    env=Seq(ENV),
    envFrom=Seq(ENV_FROM),
    ports=Seq(obj("containerPort", containerPort=int, name=str, protocol=str)),
    resources=RESOURCES,
    volumeMounts=Seq(obj("name", "mountPath", name=str, mountPath=str, readOnly=bool, subPath=str)),
    livenessProbe=PROBE,
    readinessProbe=PROBE,
    startupProbe=PROBE,
    lifecycle=obj(preStop=obj(exec=obj("command", command=Seq(str)))),
    securityContext=SECURITY,
)
VOLUME = obj(
    "name",
    name=str,
    emptyDir=obj(medium=str, sizeLimit=Quantity),
    hostPath=obj("path", path=str, type=str),
    persistentVolumeClaim=obj("claimName", claimName=str, readOnly=bool),
    configMap=obj("name", name=str, items=Seq(obj("key", "path", key=str, path=str)), optional=bool),
    secret=obj(secretName=str, optional=bool),
)
REQUIREMENT = obj("key", "operator", key=str, operator=str, values=Seq(str))
TERM = obj(matchExpressions=Seq(REQUIREMENT))
POD = obj(
    "containers",
    containers=Seq(CONTAINER),
    initContainers=Seq(CONTAINER),
    volumes=Seq(VOLUME),
    restartPolicy=Enum(("Always", "OnFailure", "Never")),
    terminationGracePeriodSeconds=int,
    nodeSelector=STRINGS,
    tolerations=Seq(
        obj(
            key=str,
            operator=Enum(("Exists", "Equal")),
            value=str,
            effect=Enum(("NoSchedule", "PreferNoSchedule", "NoExecute")),
            tolerationSeconds=int,
        )
    ),
    affinity=obj(
        nodeAffinity=obj(
            requiredDuringSchedulingIgnoredDuringExecution=obj(
                "nodeSelectorTerms", nodeSelectorTerms=Seq(TERM)
            ),
            preferredDuringSchedulingIgnoredDuringExecution=Seq(
                obj("weight", "preference", weight=int, preference=TERM)
            ),
        )
    ),
    securityContext=POD_SECURITY,
    serviceAccountName=str,
    automountServiceAccountToken=bool,
    imagePullSecrets=Seq(obj("name", name=str)),
    priorityClassName=str,
)
TEMPLATE = obj("spec", metadata=POD_METADATA, spec=POD)

AUTOSCALER = obj(
    resources=RESOURCES,
    image=str,
    imagePullPolicy=Enum(("Always", "IfNotPresent", "Never")),
    securityContext=SECURITY,
    idleTimeoutSeconds=int,
    upscalingMode=Enum(("Default", "Aggressive", "Conservative")),
    version=Enum(("v1", "v2")),
    env=Seq(ENV),
    envFrom=Seq(ENV_FROM),
)
HEAD_GROUP = obj(
    "template",
    template=TEMPLATE,
    serviceType=str,
    enableIngress=bool,
    labels=STRINGS,
    resources=STRINGS,
    rayStartParams=STRINGS,
)
WORKER_GROUP = obj(
    "groupName",
    "template",
    groupName=str,
    replicas=int,
    minReplicas=int,
    maxReplicas=int,
    numOfHosts=int,
    idleTimeoutSeconds=int,
    labels=STRINGS,
    resources=STRINGS,
    rayStartParams=STRINGS,
    template=TEMPLATE,
)
CLUSTER_SPEC = obj(
    "headGroupSpec",
    rayVersion=str,
    enableInTreeAutoscaling=bool,
    autoscalerOptions=AUTOSCALER,
    authOptions=obj(mode=Enum(("disabled", "token"))),
    suspend=bool,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=Seq(WORKER_GROUP),
)
JOB_SPEC = obj(
    entrypoint=str,
    runtimeEnvYAML=str,
    submissionMode=Enum(("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")),
    submitterPodTemplate=TEMPLATE,
    submitterConfig=obj(backoffLimit=int),
    metadata=STRINGS,
    entrypointNumCpus=float,
    entrypointNumGpus=float,
    shutdownAfterJobFinishes=bool,
    ttlSecondsAfterFinished=int,
    activeDeadlineSeconds=int,
    backoffLimit=int,
    suspend=bool,
    rayClusterSpec=CLUSTER_SPEC,
)

KINDS = {
    ("ray.io/v1", "RayJob"): obj(
        "metadata", "spec", apiVersion=str, kind=str, metadata=METADATA, spec=JOB_SPEC
    ),
    ("ray.io/v1", "RayCluster"): obj(
        "metadata", "spec", apiVersion=str, kind=str, metadata=METADATA, spec=CLUSTER_SPEC
    ),
    ("v1", "ConfigMap"): obj("metadata", apiVersion=str, kind=str, metadata=METADATA, data=STRINGS),
    ("v1", "PersistentVolumeClaim"): obj(
        "metadata",
        "spec",
        apiVersion=str,
        kind=str,
        metadata=METADATA,
        spec=obj(
            "accessModes",
            "resources",
            accessModes=Seq(Enum(("ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"))),
            resources=RESOURCES,
            storageClassName=str,
        ),
    ),
}

_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_SUFFIX = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SUFFIX |= {f"{letter}i": 1024 ** (i + 1) for i, letter in enumerate("KMGTP")}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def quantity(value: str | int | float) -> float:
    """A Kubernetes quantity as a number."""
    digits, suffix = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(value)).groups()
    return float(digits) * _SUFFIX[suffix]


def problems(document: dict[str, Any]) -> list[str]:
    """All that the API or the operator would refuse in one object, as `path: what`; empty if nothing."""
    key = (document.get("apiVersion"), document.get("kind"))
    if key not in KINDS:
        return [f"apiVersion/kind: {key} is not one of {sorted(KINDS)}"]
    found = list(_shape(document, KINDS[key], key[1]))
    if not found:
        found = list(_operator(document))
    return found


def against_crd(document: dict[str, Any], crd: dict[str, Any]) -> list[str]:
    """What a CustomResourceDefinition's own schema says against a document: types, required fields, and
    fields that it does not know, which the API server would drop."""
    (version,) = [
        v for v in crd["spec"]["versions"] if v["name"] == document["apiVersion"].rpartition("/")[2]
    ]
    schema = version["schema"]["openAPIV3Schema"]
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in jsonschema.Draft7Validator(schema).iter_errors(document)
    ]
    return found + list(_unknown(document, schema, ""))


def _unknown(value: Any, schema: dict[str, Any], at: str) -> Iterator[str]:
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from _unknown(one, schema.get("items", {}), f"{at}{index}.")
    elif isinstance(value, dict):
        known, others = schema.get("properties"), schema.get("additionalProperties")
        for key, one in value.items():
            if not at and key in ("apiVersion", "kind", "metadata"):
                continue
            if known is not None and key in known:
                yield from _unknown(one, known[key], f"{at}{key}.")
            elif isinstance(others, dict):
                yield from _unknown(one, others, f"{at}{key}.")
            elif known is not None and not others:
                yield f"{at}{key}: the schema has no such field"


def _shape(value: Any, kind: Any, at: str) -> Iterator[str]:
    if isinstance(kind, Obj):
        if not isinstance(value, dict):
            yield f"{at}: expected an object, not {value!r}"
            return
        yield from (f"{at}.{name}: unknown field" for name in value if name not in kind.fields)
        yield from (f"{at}.{name}: missing" for name in sorted(kind.required - set(value)))
        for name, inner in value.items():
            if name in kind.fields:
                yield from _shape(inner, kind.fields[name], f"{at}.{name}")
    elif isinstance(kind, Seq):
        if not isinstance(value, list):
            yield f"{at}: expected a list, not {value!r}"
            return
        for i, inner in enumerate(value):
            yield from _shape(inner, kind.of, f"{at}[{i}]")
    elif isinstance(kind, Map):
        if not isinstance(value, dict):
            yield f"{at}: expected a map, not {value!r}"
            return
        for name, inner in value.items():
            if not isinstance(name, str):
                yield f"{at}: key {name!r} is not a string"
            yield from _shape(inner, kind.of, f"{at}[{name}]")
    elif isinstance(kind, Enum):
        if value not in kind.values:
            yield f"{at}: {value!r} is not one of {kind.values}"
    elif kind is Quantity:
        if isinstance(value, bool) or not _QUANTITY.fullmatch(str(value)):
            yield f"{at}: {value!r} is not a quantity"
    elif kind is Port:
        if isinstance(value, bool) or not (isinstance(value, str) or 0 < value < 65536):
            yield f"{at}: {value!r} is not a port"
    elif kind is int:
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > INT32:
            yield f"{at}: {value!r} is not a 32-bit integer"
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{at}: {value!r} is not a number"
    elif not isinstance(value, kind):
        yield f"{at}: {value!r} is not {kind.__name__}"


def _operator(document: dict[str, Any]) -> Iterator[str]:
    name = document["metadata"]["name"]
    yield from _labels(document["metadata"].get("labels", {}), "metadata.labels")
    spec = document.get("spec", {})
    if document["kind"] == "RayJob":
        if len(name) > 47 or not _DNS_1035.fullmatch(name):
            yield f"metadata.name: {name} is not a DNS-1035 label of 47 characters at most"
        if spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"):
            yield "spec.ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
        if spec.get("activeDeadlineSeconds", 1) <= 0:
            yield "spec.activeDeadlineSeconds must be above 0"
        if spec.get("backoffLimit", 0) < 0:
            yield "spec.backoffLimit must not be below 0"
        if "rayClusterSpec" not in spec:
            yield "spec.rayClusterSpec: missing"
            return
        if "submitterPodTemplate" in spec:
            submitter = spec["submitterPodTemplate"]["spec"]
            if submitter.get("restartPolicy") not in ("Never", "OnFailure"):  # it becomes a batch/v1 Job's
                yield "spec.submitterPodTemplate.spec.restartPolicy must be Never or OnFailure"
            yield from _pod(submitter, "submitter")
        yield from _cluster(spec["rayClusterSpec"])
        yield from _kueue(document["metadata"], spec["rayClusterSpec"])
    elif document["kind"] == "RayCluster":
        if len(name) > 53 or not _DNS_1035.fullmatch(name):
            yield f"metadata.name: {name} is not a DNS-1035 label of 53 characters at most"
        yield from _cluster(spec)
        yield from _kueue(document["metadata"], spec)


def _cluster(spec: dict[str, Any]) -> Iterator[str]:
    version = tuple(int(part) for part in spec.get("rayVersion", "0.0").split(".")[:2])
    if spec.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        yield f"authOptions.mode token needs rayVersion 2.52 or later, not {spec.get('rayVersion')}"
    autoscaled = spec.get("enableInTreeAutoscaling", False)
    groups = [("head", spec["headGroupSpec"])]
    groups += [(group["groupName"], group) for group in spec.get("workerGroupSpecs", [])]
    if len({name for name, _ in groups}) < len(groups):
        yield "workerGroupSpecs: two groups of one name"
    for name, group in groups:
        pod = group["template"]["spec"]
        params = group.get("rayStartParams", {})
        if "labels" in params:
            yield f"{name}: rayStartParams.labels; use the group's labels"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(params):
            yield f"{name}: resources both in rayStartParams and in resources"
        yield from _labels(group.get("labels", {}), f"{name}.labels")
        if autoscaled and pod.get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy must be Never with autoscaler v2"
        yield from _pod(pod, name)
        if name == "head":
            continue
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", INT32)
        if not 0 <= low <= high:
            yield f"{name}: minReplicas {low}, maxReplicas {high}"
        if not low <= group.get("replicas", low) <= high:
            yield f"{name}: replicas {group['replicas']} outside [{low}, {high}]"
        if not autoscaled and not {"minReplicas", "maxReplicas"} <= set(group):
            yield f"{name}: minReplicas and maxReplicas are required without the autoscaler"


def _kueue(metadata: dict[str, Any], cluster: dict[str, Any]) -> Iterator[str]:
    if "kueue.x-k8s.io/queue-name" not in metadata.get("labels", {}):
        return
    if cluster.get("enableInTreeAutoscaling"):
        yield "enableInTreeAutoscaling: Kueue refuses it without its elastic jobs"
    names = [group["groupName"] for group in cluster.get("workerGroupSpecs", [])]
    if len(names) > 7 or "head" in names:
        yield f"workerGroupSpecs: Kueue takes seven groups, none called head; not {names}"


def _pod(pod: dict[str, Any], name: str) -> Iterator[str]:
    if not pod["containers"]:
        yield f"{name}: no container"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for volume in pod.get("volumes", []):
        if len(volume) != 2:
            yield f"{name}: volume {volume['name']} must have exactly one source"
    unused = set(volumes)
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        mounts = [mount["name"] for mount in container.get("volumeMounts", [])]
        yield from (f"{name}: mounts {mount}, which is no volume" for mount in mounts if mount not in volumes)
        unused -= set(mounts)
        limits = container.get("resources", {}).get("limits", {})
        for what, asked in container.get("resources", {}).get("requests", {}).items():
            if what in limits and quantity(asked) > quantity(limits[what]):
                yield f"{name}: requests {asked} of {what}, above the limit of {limits[what]}"
            if "/" in what and limits.get(what) != asked:
                yield f"{name}: {what} must have its limit equal to its request"
    yield from (f"{name}: volume {volume} is mounted nowhere" for volume in sorted(unused))


def _labels(labels: dict[str, str], at: str) -> Iterator[str]:
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
            yield f"{at}: {key}={value} is not a label"
