"""What a manifest says besides the spec: its kind, its image, its volumes. Knows no spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from overtone.jobs.errors import UserError

IMAGE = "overtone:0.1.0"
"""What `docker build -f manifests/Dockerfile -t overtone:0.1.0 .` makes."""
IMAGE_FOLDER = "/opt/overtone"
"""Where the image has the project: local paths of a spec may lie in it."""


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
    """New tries, each on a fresh cluster, after the job failed; each continues where the last one ended."""


def options_from_text(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `manifest` from a command line's: what was not given is left out, `volumes` are
    `CLAIM:/mount[:SIZE]`, `node_selector` are `KEY=VALUE`, an `s3_secret` called `none` is None."""
    options = {key: value for key, value in given.items() if value not in (None, (), False)}
    if "volumes" in options:
        options["volumes"] = tuple(Volume.parse(text) for text in options["volumes"])
    if "node_selector" in options:
        pairs = [text.partition("=") for text in options["node_selector"]]
        if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
            raise UserError(f"a node selector is KEY=VALUE, not {wrong[0]!r}")
        options["node_selector"] = {key: value for key, _, value in pairs}
    if options.get("s3_secret") == "none":
        options["s3_secret"] = None
    return options
