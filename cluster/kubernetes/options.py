"""What a manifest says besides the spec: its kind, its image, its volumes. Knows no spec."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from overtone.jobs.errors import UserError

IMAGE = "overtone:0.1.0"
"""What `docker build -f manifests/Dockerfile -t overtone:0.1.0 .` makes."""
IMAGE_FOLDER = "/opt/overtone"
"""Where the image has the project: local paths of a spec may lie in it."""


# What names may be: RFC 1123 and 1035 as Kubernetes reads them.
_LABEL = (
    r"[a-z0-9]([-a-z0-9]*[a-z0-9])?",
    "lowercase letters, digits and, between them, `-`",
)
_LABEL_1035 = (r"[a-z]([-a-z0-9]*[a-z0-9])?", "lowercase letters, digits and `-`, begun by a letter")
_SUBDOMAIN = (rf"{_LABEL[0]}(\.{_LABEL[0]})*", "lowercase letters, digits, `-` and `.`")
_LABEL_VALUE = (r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", "letters, digits, `-`, `_` and `.`")
_QUANTITY = (r"0*[1-9][0-9]*(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?", "a number with a unit such as 100Gi")
_IMAGE = (
    r"[a-z0-9][a-z0-9._-]*(:[0-9]+)?(/[a-z0-9._-]+)*(:\w[\w.-]{0,127})?(@[a-z0-9]+:[0-9a-f]{32,})?",
    "an image's name as the cluster pulls it",
)
_TAKEN = ("/etc/overtone", "/opt/venv", "/models", "/dev/shm", "/tmp/ray", "/proc", "/sys")
"""Folders that the pods have already: the spec, the program, the cache of weights (`cache`), Ray's, the
system's."""


def _check(what: str, text: str | None, rule: tuple[str, str], longest: int) -> None:
    pattern, words = rule
    if text is None or (len(text) <= longest and re.fullmatch(pattern, text, re.ASCII)):
        return
    raise UserError(f"{what} is {text!r}; Kubernetes takes {words}, at most {longest} characters")


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
    """Put all workers above `workers.min` on spot nodes; with a `queue`, all of them."""
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
    """A try of the job is ended after this many seconds; each new try (`backoff_limit`) has them anew."""
    ttl_s: int = 600
    """The cluster is removed this many seconds after the job's end."""
    backoff_limit: int = 3
    """New tries, each on a fresh cluster, after the job failed; each continues where the last one ended."""

    def __post_init__(self) -> None:
        """UserError for what Kubernetes or KubeRay would refuse, or take and never run."""
        longest = 47 if self.kind == "job" else 53  # KubeRay's own, which leave room for what it appends
        _check("name", self.name, _LABEL_1035, longest)
        _check("namespace", self.namespace, _LABEL, 63)
        _check("queue", self.queue, _SUBDOMAIN, 63)  # it becomes a label's value
        _check("s3_secret", self.s3_secret, _SUBDOMAIN, 253)
        _check("hub_secret", self.hub_secret, _SUBDOMAIN, 253)
        _check("service_account", self.service_account, _SUBDOMAIN, 253)
        _check("cache", self.cache, _SUBDOMAIN, 253)
        _check("image", self.image, _IMAGE, 4096)
        for volume in self.volumes:
            _check("volume", volume.claim, _SUBDOMAIN, 253)
            _check("the size of a volume", volume.size, _QUANTITY, 63)
        for key, value in self.node_selector.items():
            _check("node_selector", key.rpartition("/")[2], _LABEL_VALUE, 63)
            _check("node_selector", key.rpartition("/")[0] or None, _SUBDOMAIN, 253)
            _check("node_selector", value or None, _LABEL_VALUE, 63)
        for key in ("deadline_s", "ttl_s", "backoff_limit"):
            if not 0 <= (value := getattr(self, key)) < 2**31:
                raise UserError(f"{key} is {value}; Kubernetes takes a whole number below {2**31}")
        self._check_mounts()

    def _check_mounts(self) -> None:
        paths = [volume.mount_path for volume in self.volumes]
        for path in paths:
            if path != posixpath.normpath(path) or ":" in path:
                raise UserError(f"a volume's folder is a plain absolute path, not {path!r}")
            taken = next((own for own in _TAKEN if f"{own}/".startswith(f"{path.rstrip('/')}/")), None)
            if taken is not None:
                raise UserError(f"a volume at {path} hides {taken}, which the pods need")
            if paths.count(path) > 1:
                raise UserError(f"two volumes are mounted at {path}; give each a folder of its own")
        made = [volume.claim for volume in self.volumes if volume.size]
        if twice := [claim for claim in made if made.count(claim) > 1]:
            raise UserError(f"the claim {twice[0]} is given a size twice; give it once")


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
        keys = [key for key, _, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"the node selector {twice[0]} is given twice; a node has one value of a label")
        options["node_selector"] = {key: value for key, _, value in pairs}
    if options.get("s3_secret") == "none":
        options["s3_secret"] = None
    return options
