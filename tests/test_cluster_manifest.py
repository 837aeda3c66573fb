"""Manifests: the KubeRay API takes them, they say what a job needs, and their entrypoint runs."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from kuberay import against_crd, problems, quantity
from moto.server import ThreadedMotoServer

from overtone.cluster.kubernetes import IMAGE_FOLDER, Volume, manifest, options_from_text
from overtone.cluster.kubernetes.documents import embedded_spec
from overtone.cluster.kubernetes.options import Options
from overtone.cluster.kubernetes.pods import ACTORS_LIVE, SPEC_FILE, SPEC_FOLDER, drain_command
from overtone.cluster.kubernetes.shape import shape_of
from overtone.jobs.errors import UserError
from overtone.jobs.needs import PARAMETERS_B, weights_gib
from overtone.jobs.spec import JobSpec, load_spec

ROOT = Path(__file__).parents[1]
READY = ROOT / "manifests" / "kuberay"
NAMES = sorted(path.name for path in READY.glob("*.yaml"))


def make_spec(**keys) -> JobSpec:
    document = {
        "name": "pictures",
        "model": "black-forest-labs/FLUX.1-dev",
        "prompts": "s3://bucket/prompts/",
        "output": "s3://bucket/out",
        **keys,
    }
    return JobSpec.model_validate(document)


def documents(text: str) -> dict[str, dict[str, Any]]:
    """By kind; the manifests hold one of each."""
    loaded = list(yaml.safe_load_all(text))
    found = {document["kind"]: document for document in loaded}
    assert len(found) == len(loaded)
    return found


def job_of(spec: JobSpec, **options) -> dict[str, Any]:
    return documents(manifest(spec, **options))["RayJob"]["spec"]


def cluster_of(name: str) -> dict[str, Any]:
    found = documents((READY / name).read_text())
    return found["RayCluster"]["spec"] if "RayCluster" in found else found["RayJob"]["spec"]["rayClusterSpec"]


def pods(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


# The ready ones.


def test_the_ready_manifests_are_up_to_date():
    made = runpy.run_path(str(READY / "make.py"))["manifests"]()
    assert sorted(made) == NAMES
    stale = [name for name, text in made.items() if (READY / name).read_text() != text]
    assert not stale, "run python manifests/kuberay/make.py"


@pytest.mark.parametrize("name", NAMES)
def test_kuberay_takes_the_ready_manifests(name):
    for document in documents((READY / name).read_text()).values():
        assert problems(document) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_pod_is_confined_probed_and_has_time_to_end(name):
    cluster = cluster_of(name)
    spec = (
        load_spec(ROOT / "manifests" / re.sub(r"-(spot|kueue)|cluster", "", name))
        if "cluster" not in name
        else None
    )
    for group, pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = "/api/gcs_healthz" if group == "head" else "/api/local_raylet_healthz"
            assert container[probe]["httpGet"]["path"] == path
        resources = container["resources"]
        assert resources["limits"]["memory"] == resources["requests"]["memory"]
        if group != "head":
            grace_s = spec.faults.grace_s if spec else 60
            assert f"--deadline-remaining-seconds {grace_s:.0f};" in _drain(container)
            assert pod["terminationGracePeriodSeconds"] >= grace_s + 30
            assert pod["automountServiceAccountToken"] is False


def _drain(container: dict[str, Any]) -> str:
    return container["lifecycle"]["preStop"]["exec"]["command"][-1]


@pytest.mark.parametrize("name", NAMES)
def test_no_manifest_holds_a_secret(name):
    """Credentials come from Secrets by name: no environment variable that sounds like one has a value."""
    for _, pod in pods(cluster_of(name)):
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            given = [entry["name"] for entry in container.get("env", []) if "value" in entry]
            assert set(given) <= {"HF_HOME"}
            sources = [source["secretRef"]["name"] for source in container.get("envFrom", [])]
            assert set(sources) <= {"overtone-s3"}
    uses_s3 = "s3://" in (READY / name).read_text() or "cluster" in name
    assert ("secretRef" in (READY / name).read_text()) == uses_s3


def test_the_head_is_on_cpus_and_the_workers_ask_for_gpus():
    for name in NAMES:
        cluster = cluster_of(name)
        head = cluster["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
        for group in cluster["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            resources = pod["containers"][0]["resources"]
            if name == "quickstart.yaml":
                assert "nvidia.com/gpu" not in resources["limits"]
                continue
            assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == 1
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod[
                "tolerations"
            ]


def test_a_job_ends_retries_and_cleans_up():
    job = job_of(make_spec(), deadline_s=3600, ttl_s=60, backoff_limit=5)
    assert job["shutdownAfterJobFinishes"] is True
    assert (job["ttlSecondsAfterFinished"], job["activeDeadlineSeconds"], job["backoffLimit"]) == (
        60,
        3600,
        5,
    )
    cluster = job["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token"}


def test_spot_takes_what_is_above_the_minimum():
    cluster = cluster_of("flux1-dev-spot.yaml")
    steady, spot = cluster["workerGroupSpecs"]
    assert steady["labels"] == {"ray.io/market-type": "on-demand"}
    assert spot["labels"] == {"ray.io/market-type": "spot"}
    assert [(g["minReplicas"], g["maxReplicas"]) for g in (steady, spot)] == [(1, 1), (0, 7)]
    on_spot = _terms(spot["template"]["spec"])
    assert {term["matchExpressions"][0]["key"] for term in on_spot} >= {
        "cloud.google.com/gke-spot",
        "karpenter.sh/capacity-type",
    }
    for pod in (steady["template"]["spec"], cluster["headGroupSpec"]["template"]["spec"]):
        (term,) = _terms(pod)  # one term: all of it must hold
        assert {part["operator"] for part in term["matchExpressions"]} == {"NotIn"}
        assert len(term["matchExpressions"]) == len(on_spot)
    fixed = job_of(make_spec(workers=4), spot=True)["rayClusterSpec"]["workerGroupSpecs"]
    assert [(g["groupName"], g["minReplicas"], g["maxReplicas"]) for g in fixed] == [("gpu-spot", 4, 4)]


def _terms(pod: dict[str, Any]) -> list[dict[str, Any]]:
    affinity = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return affinity["nodeSelectorTerms"]


def test_kueue_admits_a_cluster_of_fixed_size():
    found = documents((READY / "flux1-dev-kueue.yaml").read_text())["RayJob"]
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu-queue"
    cluster = found["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 8


# What a spec asks for.


@pytest.mark.parametrize(
    ("workers", "options", "expected"),
    [
        ({"min": 2, "max": 6}, {}, (1, 1, 2, 6)),
        ({"min": 2}, {}, (1, 1, 2, 8)),
        ({"min": 20}, {}, (1, 1, 20, 20)),
        ({"min": 2}, {"max_workers": 4}, (1, 1, 2, 4)),
        (3, {}, (1, 1, 3, 3)),
        ({"min": 2, "max": 16}, {"gpus_per_pod": 8}, (8, 8, 1, 2)),
        ({"min": 1, "max": 9, "num_gpus": 0.5}, {}, (1, 2, 1, 5)),
        ({"min": 1, "max": 8, "num_gpus": 1 / 3}, {"gpus_per_pod": 2}, (2, 6, 1, 2)),
        ({"min": 1, "max": 4, "num_gpus": 2}, {}, (2, 1, 1, 4)),
        ({"min": 1, "max": 4, "num_gpus": 2}, {"gpus_per_pod": 4}, (4, 2, 1, 2)),
        ({"min": 1, "max": 4, "num_gpus": 0}, {}, (0, 1, 1, 4)),
    ],
)
def test_pods_hold_as_many_workers_as_fit_on_their_gpus(workers, options, expected):
    spec = make_spec(workers=workers)
    shape = shape_of(spec, Options(**options))
    assert (shape.gpus, shape.workers_per_pod, shape.min_pods, shape.max_pods) == expected
    (group,) = job_of(spec, **options)["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == expected[2:]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu", 0) == expected[0]
    offered, taken = int(group["rayStartParams"]["num-cpus"]), spec.workers.num_cpus
    if expected[0]:
        assert offered > shape.workers_per_pod * taken  # the GPUs are what bounds them
    else:
        assert offered // taken == shape.workers_per_pod


@pytest.mark.parametrize(
    ("num_cpus", "fit"), [(1, 1), (4, 1), (1.5, 1), (0.5, 2), (0.4, 2), (0.25, 4), (0.3, 3)]
)
def test_memory_of_a_pod_without_gpus_is_for_the_workers_that_ray_puts_there(num_cpus, fit):
    spec = make_spec(workers={"min": 1, "max": 4, "num_gpus": 0, "num_cpus": num_cpus})
    (group,) = job_of(spec)["rayClusterSpec"]["workerGroupSpecs"]
    assert int(int(group["rayStartParams"]["num-cpus"]) / num_cpus + 1e-9) == fit
    memory = quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
    assert memory > fit * weights_gib(spec)[0] * 2**30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"volumes": (Volume("data_v1", "/x"),)}, "volume is 'data_v1'; Kubernetes takes lowercase"),
        ({"volumes": (Volume("a", "/x"), Volume("b", "/x"))}, "two volumes are mounted at /x"),
        ({"volumes": (Volume("a", "/x/../y"),)}, "a plain absolute path"),
        ({"volumes": (Volume("a", "/etc"),)}, "hides /etc/overtone"),
        ({"volumes": (Volume("a", "/models"),)}, "hides /models"),
        ({"volumes": (Volume("a", "/dev/shm"),)}, "hides /dev/shm"),
        ({"volumes": (Volume("a", "/tmp"),)}, "hides /tmp/ray"),
        ({"volumes": (Volume("a", "/x", "10GB"),)}, "the size of a volume is '10GB'"),
        ({"volumes": (Volume("a", "/x", "1Gi"), Volume("a", "/y", "1Gi"))}, "given a size twice"),
        ({"namespace": "My_Team"}, "namespace is 'My_Team'"),
        ({"name": "7th"}, "begun by a letter"),
        ({"name": "a" * 58}, "at most 47 characters"),
        ({"name": "a" * 54, "kind": "cluster"}, "at most 53 characters"),
        ({"queue": "Team A"}, "queue is 'Team A'"),
        ({"s3_secret": "S3"}, "s3_secret is 'S3'"),
        ({"service_account": "a/b"}, "service_account is 'a/b'"),
        ({"cache": "My Claim"}, "cache is 'My Claim'"),
        ({"image": "over tone"}, "image is 'over tone'"),
        ({"image": "here:5000/over/tone:0.1:x"}, "image is 'here:5000/over/tone:0.1:x'"),
        ({"node_selector": {"gpu type": "x"}}, "node_selector is 'gpu type'"),
        ({"node_selector": {"a.b/gpu": "x y"}}, "node_selector is 'x y'"),
        ({"deadline_s": 2**31}, "deadline_s is 2147483648"),
    ],
)
def test_what_no_pod_would_come_of_is_refused(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        manifest(make_spec(), **options)


def test_claims_may_be_called_like_volumes_of_ours():
    volumes = (Volume("models", "/x"), Volume("spec", "/y"), Volume("data.v1", "/z"))
    for _, pod in pods(job_of(make_spec(), volumes=volumes)["rayClusterSpec"]):
        names = [volume["name"] for volume in pod["volumes"]]
        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"[a-z0-9-]{1,63}", name) for name in names)
        claims = {
            v["name"]: v["persistentVolumeClaim"]["claimName"]
            for v in pod["volumes"]
            if "persistentVolumeClaim" in v
        }
        mounted = {claims.get(m["name"]): m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert {"models": "/x", "spec": "/y", "data.v1": "/z"}.items() <= mounted.items()


def test_the_header_says_how_an_ended_job_is_run_again():
    assert "kubectl delete rayjob overtone-pictures && kubectl apply -f THIS_FILE" in manifest(make_spec())
    assert "delete rayjob" not in manifest(make_spec(), kind="cluster")


def crd_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "spec": {
            "names": {"kind": "RayJob"},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}],
        }
    }


def test_the_check_against_a_crd_finds_what_its_schema_lacks():
    text = {"type": "string"}
    schema = {
        "type": "object",
        "properties": {"spec": {"type": "object", "properties": {"entrypoint": text}}},
    }
    crd = crd_of(schema)
    usual = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x"}}
    assert against_crd(usual | {"spec": {"entrypoint": "x"}}, crd) == []
    assert against_crd(usual | {"spec": {"entrypoint": 3}}, crd) == [
        "spec.entrypoint: 3 is not of type 'string'"
    ]
    assert against_crd(usual | {"spec": {"entryPoint": "x"}}, crd) == [
        "spec.entryPoint: the schema has no such field"
    ]


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder of KubeRay's CRDs")
@pytest.mark.parametrize("name", NAMES)
def test_kuberays_own_schema_takes_the_ready_manifests(name):
    """The folder is helm-chart/kuberay-operator/crds of ray-project/kuberay."""
    crds = {}
    for path in sorted(Path(os.environ["KUBERAY_CRDS"]).glob("*.yaml")):
        crd = yaml.safe_load(path.read_text())
        crds[crd["spec"]["names"]["kind"]] = crd
    checked = [kind for kind in documents((READY / name).read_text()) if kind in crds]
    assert checked, "no document of a kind that is there"
    for kind in checked:
        assert against_crd(documents((READY / name).read_text())[kind], crds[kind]) == []


def test_a_worker_can_load_its_model():
    memory = {}
    for model in [*PARAMETERS_B, "someone/unknown"]:
        spec = make_spec(model=model)
        (group,) = job_of(spec)["rayClusterSpec"]["workerGroupSpecs"]
        memory[model] = quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
        assert memory[model] > weights_gib(spec)[0] * 2**30 + 4 * 2**30
    assert memory["black-forest-labs/FLUX.2-dev"] > memory["black-forest-labs/FLUX.2-klein-4B"]
    assert "a guess" in manifest(make_spec(model="someone/unknown"))
    single, double = (
        weights_gib(make_spec(model={"id": "Qwen/Qwen-Image", "dtype": dtype}))[0]
        for dtype in ("bfloat16", "float32")
    )
    assert double == 2 * single


def test_a_local_model_is_as_large_as_its_files(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.safetensors").write_bytes(bytes(2**20))
    (tmp_path / "README.md").write_bytes(bytes(2**20))
    assert weights_gib(make_spec(model=str(tmp_path))) == (2**-10, True)


@pytest.mark.parametrize(
    ("cache", "kind", "init"),
    [("node", "hostPath", 1), ("pod", "emptyDir", 0), ("models", "persistentVolumeClaim", 0)],
)
def test_weights_are_kept_where_asked(cache, kind, init):
    (group,) = job_of(make_spec(), cache=cache)["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (volume,) = pod["volumes"]
    assert kind in volume
    assert len(pod.get("initContainers", [])) == init
    (container,) = pod["containers"]
    (mount,) = container["volumeMounts"]
    assert {"name": "HF_HOME", "value": mount["mountPath"]} in container["env"]


def test_paths_that_no_pod_sees_are_refused(tmp_path):
    near = str(tmp_path / "prompts.parquet")
    with pytest.raises(UserError, match=r"prompts\.path: .* is on this machine.*--set prompts\.path=s3://"):
        manifest(make_spec(prompts=near))
    with pytest.raises(UserError, match=r"output\.path: out/here is on this machine"):
        manifest(make_spec(output="out/here"))
    with pytest.raises(
        UserError, match=r"output\.path: /opt/overtone/out"
    ):  # an image is no place for output
        manifest(make_spec(output=f"{IMAGE_FOLDER}/out"))
    with pytest.raises(UserError, match=r"model\.id: "):
        manifest(make_spec(model=str(tmp_path)))
    volumes = (Volume("disk", str(tmp_path)),)
    spec = make_spec(prompts=near, model=str(tmp_path), output=str(tmp_path / "out"))
    job = job_of(spec, volumes=volumes)
    for _, pod in pods(job["rayClusterSpec"]):
        assert {"name": "claim-0", "mountPath": str(tmp_path)} in pod["containers"][0]["volumeMounts"]
    assert manifest(make_spec(prompts=near), kind="cluster").count("RayCluster") == 1


def test_volumes_are_read_from_their_short_form():
    assert Volume.parse("disk:/data") == Volume("disk", "/data")
    assert Volume.parse("disk:/data:10Gi") == Volume("disk", "/data", "10Gi")
    for wrong in ("disk", "disk:data", ":/data", "a:/b:1Gi:x"):
        with pytest.raises(UserError, match="a volume is CLAIM:/mount"):
            Volume.parse(wrong)
    found = documents(manifest(make_spec(), volumes=(Volume("disk", "/data", "10Gi"),)))
    assert found["PersistentVolumeClaim"]["spec"]["resources"] == {"requests": {"storage": "10Gi"}}
    assert problems(found["PersistentVolumeClaim"]) == []


def test_options_are_read_from_a_command_line():
    given = {"image": None, "spot": False, "volumes": (), "node_selector": ("a=b=c", "d=")}
    assert options_from_text(given) == {"node_selector": {"a": "b=c", "d": ""}}
    assert options_from_text({"s3_secret": "none", "spot": True}) == {"s3_secret": None, "spot": True}
    assert options_from_text({"volumes": ("disk:/data",)}) == {"volumes": (Volume("disk", "/data"),)}
    with pytest.raises(UserError, match="a node selector is KEY=VALUE, not 'a'"):
        options_from_text({"node_selector": ("a",)})
    with pytest.raises(UserError, match="the node selector a is given twice"):
        options_from_text({"node_selector": ("a=b", "a=c")})


ASKED = [
    {},
    {"spot": True},
    {"spot": True, "queue": "q"},
    {"kind": "cluster", "queue": "q"},
    {"cache": "pod", "namespace": "data", "service_account": "writer", "s3_secret": None},
    {"cache": "models", "node_selector": {"gpu": "h100"}, "gpus_per_pod": 8},
]


@pytest.mark.parametrize("options", ASKED, ids=str)
@pytest.mark.parametrize("name", ["a" * 60, "My_Job.v2", "9"])
def test_kuberay_takes_whatever_is_asked_for(name, options):
    for document in documents(manifest(make_spec(name=name), **options)).values():
        assert problems(document) == []
        assert document["metadata"].get("namespace") == options.get("namespace")


def _set(document: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    for step in way:
        document = document[int(step)] if step.isdigit() else document[step]
    if value is None:
        del document[last]
    else:
        document[last] = value


WORKERS = "spec.rayClusterSpec.workerGroupSpecs.0"
CONTAINER = f"{WORKERS}.template.spec.containers.0"
BROKEN = [
    ("spec.entryPoint", "x", "entryPoint: unknown field"),
    ("spec.backoffLimit", "3", "backoffLimit: '3' is not a 32-bit integer"),
    ("spec.shutdownAfterJobFinishes", False, "needs shutdownAfterJobFinishes"),
    ("spec.rayClusterSpec.headGroupSpec", None, "headGroupSpec: missing"),
    ("spec.rayClusterSpec.rayVersion", "2.40.0", "token needs rayVersion 2.52"),
    (f"{WORKERS}.maxReplicas", 0, "minReplicas 1, maxReplicas 0"),
    (f"{WORKERS}.rayStartParams.num-gpus", 1, "is not str"),
    (f"{CONTAINER}.resources.limits.nvidia.com/gpu", None, "limit equal to its request"),
    (f"{CONTAINER}.resources.requests.memory", "900Gi", "above the limit"),
    (f"{CONTAINER}.volumeMounts", [{"name": "nothing", "mountPath": "/x"}], "which is no volume"),
    (f"{WORKERS}.template.spec.restartPolicy", "Always", "must be Never"),
    ("metadata.name", "Pictures", "is not a DNS-1035 label"),
    ("metadata.labels", {"kueue.x-k8s.io/queue-name": "q"}, "Kueue refuses"),
]


@pytest.mark.parametrize(("path", "value", "said"), BROKEN, ids=[path for path, _, _ in BROKEN])
def test_the_check_finds_what_kuberay_would_refuse(path, value, said):
    document = documents(manifest(make_spec()))["RayJob"]
    assert problems(document) == []
    broken = copy.deepcopy(document)
    if path.endswith("nvidia.com/gpu"):  # a key with dots
        del broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0][
            "resources"
        ]["limits"]["nvidia.com/gpu"]
    else:
        _set(broken, path, value)
    assert any(said in problem for problem in problems(broken)), problems(broken)


def test_words_that_are_booleans_to_kubernetes_stay_texts():
    """It reads YAML 1.1, as PyYAML does."""
    text = manifest(make_spec(), node_selector={"spot": "yes", "pool": "on", "zone": "010"}, namespace="off")
    job = documents(text)["RayJob"]
    worker = dict(pods(job["spec"]["rayClusterSpec"]))["gpu"]
    assert worker["nodeSelector"] == {"spot": "yes", "pool": "on", "zone": "010"}
    assert job["metadata"]["namespace"] == "off"


def test_comments_are_comments():
    text = manifest(make_spec())
    assert "      # No workers on the head: " in text
    assert "'#" not in text
    assert text.startswith("# A job: black-forest-labs/FLUX.1-dev, 1 to 8 workers, each with 1 GPU.\n")


# What it runs.

OVERTONE = """
import json, sys
from overtone.cluster import cli
print(json.dumps(sys.argv[1:]), file=sys.stderr)
given = cli.main.commands["run"].make_context("run", sys.argv[2:]).params  # fails on what `run` would refuse
cli.main(["plan", str(given["spec_path"]), "--json"])
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    """The environment of an S3 server with the prompts of the ready specs."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    environ = keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    client = boto3.client(
        "s3",
        endpoint_url=environ["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="my-bucket")
    table = io.BytesIO()
    pq.write_table(pa.table({"prompt": [f"a picture of {i}" for i in range(1000)]}), table)
    for key in ("prompts/a.parquet", "video-prompts/a.parquet"):
        client.put_object(Bucket="my-bucket", Key=key, Body=table.getvalue())
    yield environ
    server.stop()


JOBS = [name for name in NAMES if name != "cluster.yaml"]


@pytest.fixture(scope="module")
def run_entrypoint(bucket, tmp_path_factory) -> Callable[[str, str], subprocess.CompletedProcess]:
    """Runs (entrypoint, text of the mounted spec) as on the head, but for `plan` in place of `run`. Manifests
    that run the very same thing share one run."""

    @functools.cache
    def run(command: str, spec: str) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("head")
        (folder / "bin").mkdir()
        (folder / "mounted").mkdir()
        (folder / "mounted" / SPEC_FILE).write_text(spec.replace(IMAGE_FOLDER, str(ROOT)))
        (folder / "program.py").write_text(OVERTONE)
        program = folder / "bin" / "overtone"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/program.py "$@"\n')
        program.chmod(0o755)
        environ = os.environ | bucket | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
        command = command.replace(SPEC_FOLDER, f"{folder}/mounted")
        return subprocess.run(
            ["sh", "-c", command], env=environ, cwd=folder, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.parametrize("name", JOBS)
def test_the_entrypoint_finds_its_spec_and_plans_it(name, run_entrypoint):
    """A shell splits the entrypoint, `run` takes its arguments, and the spec in the ConfigMap is read and
    planned from the prompts it names."""
    found = documents((READY / name).read_text())
    shown = run_entrypoint(found["RayJob"]["spec"]["entrypoint"], found["ConfigMap"]["data"][SPEC_FILE])
    assert shown.returncode == 0, shown.stderr
    verb, path, *rest = json.loads(shown.stderr.splitlines()[0])
    assert (verb, path.endswith(f"/{SPEC_FILE}"), rest) == ("run", True, ["--address", "auto"])
    plan = json.loads(shown.stdout)
    assert plan["rows"] == (40 if name == "quickstart.yaml" else 1000)
    assert plan["shards"] >= 1
    assert plan["sampling"]["saving"] > 1


@pytest.mark.parametrize("name", ["quickstart", "flux1-dev", "wan2.1-t2v"])
def test_the_embedded_spec_is_the_job_with_its_workers_pinned(name, tmp_path):
    spec = load_spec(
        ROOT / "manifests" / f"{name}.yaml", ["output.path=s3://b/out", "prompts.path=s3://b/p/"]
    )
    path = tmp_path / "spec.yaml"
    path.write_text(documents(manifest(spec))["ConfigMap"]["data"][SPEC_FILE])
    embedded = load_spec(path, [])
    assert embedded == embedded_spec(spec, shape_of(spec, Options()))
    assert embedded.model_copy(update={"workers": spec.workers}) == spec
    assert embedded.workers.max is not None
    assert embedded.workers.num_gpus == (0 if name == "quickstart" else 1)


def test_a_pod_that_is_stopped_waits_for_its_actors(tmp_path):
    command = drain_command(30)
    assert subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0
    busy = f"if {ACTORS_LIVE}; then echo busy; else echo idle; fi".replace("/proc", str(tmp_path))

    def processes(*titles: str) -> str:
        for number, title in enumerate(titles):
            (tmp_path / str(number)).mkdir(exist_ok=True)
            (tmp_path / str(number) / "cmdline").write_text(title.replace(" ", "\0") + "\0")
        return subprocess.run(["sh", "-c", busy], capture_output=True, text=True, check=True).stdout.strip()

    assert processes("/bin/sh -c x", "ray::IDLE", "ray::DashboardAgent", "raylet ray::IDLE") == "idle"
    assert processes("ray::Runner.run_shard") == "busy"
    assert processes("ray::Runner") == "busy"


# The image.


def test_the_image_is_built_from_what_is_there():
    text = (ROOT / "manifests" / "Dockerfile").read_text()
    joined = re.sub(r"\\\n", " ", text)
    steps = [line.split(None, 1) for line in joined.splitlines() if line and not line.startswith("#")]
    copied = [rest.split()[:-1] for word, rest in steps if word == "COPY" and "--from" not in rest]
    for source in (source for sources in copied for source in sources):
        assert source == "README.md" or (ROOT / source).exists()
    ignored = (ROOT / "manifests" / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert let_in == {source for sources in copied for source in sources}
    assert [rest for word, rest in steps if word == "USER"][-1].split(":")[0] == "1000"
    for _, rest in steps:
        for command in re.findall(r"pip install ([^&;]*)", rest):
            assert "-c constraints.txt" in command or "--no-deps" in command
    arguments = {rest.split("=")[0] for word, rest in steps if word == "ARG"}
    assert {"PYTHON_VERSION", "TORCH_INDEX_URL", "EXTRAS"} == arguments
    extras = re.search(r'ARG EXTRAS="([^"]*)"', text).group(1).split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= set(project["optional-dependencies"])
