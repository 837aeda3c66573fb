"""Hands a job to a Ray cluster through its Jobs API, so that the job outlives this terminal. Knows specs and
Ray's job server; nothing of shards, workers or pictures, and imports ray only after the token is in place."""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import yaml

from jobs.errors import UserError
from jobs.spec import JobSpec

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SPEC_NAME = "overtone-spec.yaml"
CONNECT_TIMEOUT_S = 10.0
WORKING_DIR_LIMIT_BYTES = 512 * 2**20
"""Ray refuses larger packages."""

SECRETS = (
    ".env",
    ".env.*",
    "*.env",
    ".envrc",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.jks",
    "*.keystore",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "*credential*",
    "*secret*",
    "*service-account*.json",
    "*service_account*.json",
    "auth_token",
    "kubeconfig*",
    ".netrc",
    ".npmrc",
    ".pypirc",
    ".git-credentials",
    ".aws",
    ".azure",
    ".gcloud",
    ".kube",
    ".ssh",
    ".docker",
    ".gnupg",
)
"""Names that never leave this machine, wherever in the tree, in any case: files, or whole folders."""

CLUTTER = (".git", ".venv", "venv", "node_modules", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
"""Names that no job needs; left out where the tree is not a git checkout that says so itself."""

ACTIVE = frozenset({"PENDING", "RUNNING"})


@dataclass(frozen=True)
class Token:
    """A Ray authentication token and where it was found, for error messages. Never printed."""

    value: str
    source: str

    def __repr__(self) -> str:
        return f"Token(from {self.source})"


def find_token(environ: Mapping[str, str], home: Path) -> Token | None:
    """The token that Ray itself would take: RAY_AUTH_TOKEN, the file named by RAY_AUTH_TOKEN_PATH, then
    ~/.ray/auth_token. None without any, or where RAY_AUTH_MODE turns authentication off.

    Raises UserError when RAY_AUTH_TOKEN_PATH names a file that gives no token: Ray would abort there.
    """
    if environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    if value := environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "the environment variable RAY_AUTH_TOKEN")
    if named := environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            value = Path(named).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"RAY_AUTH_TOKEN_PATH names {named}, which cannot be read: {error}") from error
        if not value:
            raise UserError(f"RAY_AUTH_TOKEN_PATH names {named}, which is empty")
        return Token(value, f"the file {named} (RAY_AUTH_TOKEN_PATH)")
    default = home / ".ray" / "auth_token"
    try:
        value = default.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return Token(value, f"the file {default}") if value else None


def use_token(environ: MutableMapping[str, str] | None = None, home: Path | None = None) -> Token | None:
    """Switch Ray to token authentication if there is a token. Call it before ray is imported: Ray reads the
    mode once, at import. Without a token nothing changes."""
    environ = os.environ if environ is None else environ
    token = find_token(environ, home or Path.home())
    if token is not None:
        environ["RAY_AUTH_MODE"] = "token"
    return token


# What a job is called.


def job_identity(spec: JobSpec) -> str:
    """Ten hex digits of what makes two submissions the same job: its samples, shards and output. Unlike the
    plan's fingerprint it reads no prompt file, which may be out of reach from here."""
    facts = {
        "samples": spec.samples(),
        "prompts": spec.prompts.model_dump(mode="json", include={"path", "format", "limit"}),
        "shards": spec.shards.model_dump(mode="json"),
        "output": anchored(spec).output.model_dump(mode="json", include={"path", "endpoint_url"}),
    }
    text = json.dumps(facts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def submission_prefix(spec: JobSpec) -> str:
    """`overtone-<name>-<identity>-e`; the epoch number follows."""
    name = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")[:32].rstrip("-") or "job"
    return f"overtone-{name}-{job_identity(spec)}-e"


def latest_epoch(prefix: str, submissions: Mapping[str, str]) -> int:
    """The highest epoch among submission ids that begin with `prefix`; 0 if there is none."""
    ends = (key[len(prefix) :] for key in submissions if key.startswith(prefix))
    return max((int(end) for end in ends if end.isdigit()), default=0)


# What is packed.


def anchored(spec: JobSpec) -> JobSpec:
    """The spec with a local output folder made absolute: on the cluster the current folder is another."""
    path = spec.output.path
    if "://" in path:
        return spec
    output = spec.output.model_copy(update={"path": str(Path(path).expanduser().resolve())})
    return spec.model_copy(update={"output": output})


def packed_spec(spec: JobSpec) -> str:
    """The spec as YAML that `load_spec` reads back to the same spec, wherever it lies."""
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def is_secret(path: str) -> bool:
    """Whether a path relative to the tree names a credential, or lies in a folder of credentials."""
    return _matches(path, SECRETS)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(
        fnmatch.fnmatchcase(part.lower(), pattern) for part in Path(path).parts for pattern in patterns
    )


def tree_files(root: Path) -> Iterator[str]:
    """Paths below `root` to pack, relative to it and sorted: in a git checkout what git tracks or would
    track, elsewhere everything but clutter; never a secret, never a link."""
    names = _git_files(root)
    if names is None:
        names = {str(path.relative_to(root)) for path in root.rglob("*")}
        names = {name for name in names if not _matches(name, CLUTTER)}
    for name in sorted(names):
        path = root / name
        if path.is_file() and not path.is_symlink() and not is_secret(name):
            yield name


def _git_files(root: Path) -> set[str] | None:
    """What git tracks or would track below `root`; None without git, or outside a checkout."""
    if shutil.which("git") is None:
        return None
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        return None
    return set(filter(None, os.fsdecode(listed.stdout).split("\0")))


def package(spec: JobSpec, tree: Path | None = None) -> bytes:
    """A zip of the spec and, where a tree is given, of its files. The same content gives the same bytes, so
    that Ray uploads it once."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        if tree is not None:
            for name in tree_files(tree):
                if name != SPEC_NAME:
                    _add(archive, name, (tree / name).read_bytes())
        _add(archive, SPEC_NAME, packed_spec(spec).encode())
    data = packed.getvalue()
    if len(data) > WORKING_DIR_LIMIT_BYTES:
        raise UserError(
            f"the working tree {tree} packs to {len(data) / 2**20:,.0f} MiB and Ray takes "
            f"{WORKING_DIR_LIMIT_BYTES // 2**20} MiB; name large files in .gitignore"
        )
    return data


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data)


def notes_on_paths(spec: JobSpec) -> tuple[str, ...]:
    """A sentence for each path in the spec that the cluster must see as this machine does."""
    paths = [("prompts", path) for path in spec.prompts.path]
    paths.append(("output", spec.output.path))
    if spec.model.id.startswith(("/", "./", "../", "~")):
        paths.append(("model", spec.model.id))
    return tuple(
        f"{what}: {path} is a path on the cluster's machines, not packed with the job; all must "
        "see it (a shared disk, or the image), otherwise use s3://"
        for what, path in paths
        if "://" not in path
    )


# The cluster.


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server at `address` (`http://host:8265`; `host:8265` is completed).

    Raises UserError when nothing answers there, or when it wants another token than ours.
    """
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"the address {address} is not the job server's; it looks like {DEFAULT_ADDRESS}, Ray's dashboard"
        )
    token = use_token()
    _answers(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80), url)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # The header goes along even where ray was imported before the mode was set.
    headers = {"Authorization": f"Bearer {token.value}"} if token else None
    try:
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # which would replace `url`
            return JobSubmissionClient(url, headers=headers)
    except AuthenticationError as error:
        raise UserError(_refused(url, token)) from error
    except (OSError, RuntimeError) as error:  # of `requests`, among others
        first = str(error).partition("\n")[0]
        raise UserError(f"{url} answers, but not as Ray's job server: {first}") from error


def _answers(host: str, port: int, url: str) -> None:
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at {url} ({error}); is that the Ray dashboard's address? On Kubernetes: "
            "kubectl port-forward service/CLUSTER-head-svc 8265:8265"
        ) from error


def _refused(url: str, token: Token | None) -> str:
    remedy = (
        "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, to the cluster's token. The machine that "
        "started the cluster has it in ~/.ray/auth_token (`ray get-auth-token` prints it); on Kubernetes: "
        "kubectl get secret CLUSTER -o jsonpath='{.data.auth_token}' | base64 -d"
    )
    if token is None:
        return f"{url} wants a token and none was found here. {remedy}"
    return f"{url} refused the token from {token.source}. {remedy}"


@contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@dataclass(frozen=True)
class Submission:
    """A job on a cluster. `attached`: it ran already, and this submission started nothing."""

    id: str
    address: str
    output: str
    endpoint_url: str | None
    attached: bool
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """What to do with it, for a terminal."""
        at = "" if self.address == DEFAULT_ADDRESS else f" --address {self.address}"
        endpoint = f" --endpoint-url {self.endpoint_url}" if self.endpoint_url else ""
        lines = [
            f"attached to {self.id}, which is running" if self.attached else f"submitted {self.id}",
            *(f"note: {note}" for note in self.notes),
            f"progress: overtone status {shlex.quote(self.output)}{endpoint}",
            f"log:      overtone logs {self.id} --follow{at}",
            f"end it:   overtone stop {self.id}{at}",
        ]
        return "\n".join(lines)


def entrypoint(tree: bool) -> str:
    """The shell command that the job server runs: the installed `overtone`, or the packed tree's."""
    program = ["python", "-m", "jobs.cli"] if tree else ["overtone"]
    return shlex.join([*program, "run", SPEC_NAME, "--address", "auto"])


def submit(spec: JobSpec, *, address: str = DEFAULT_ADDRESS, working_dir: Path | None = None) -> Submission:
    """Run `spec` on the cluster at `address`, detached. Submitting a job that is running there attaches to
    it; submitting one that ended runs it again under the next epoch number, which resumes it.

    Only the spec is packed; `working_dir` adds that tree, without credentials, for code that the cluster's
    image does not hold. Raises UserError for an unreachable cluster or a refused token.
    """
    spec = anchored(spec)
    if working_dir is not None and not working_dir.is_dir():
        raise UserError(f"--working-dir {working_dir} is not a folder")
    data = package(spec, working_dir)
    client = connect(address)
    with tempfile.TemporaryDirectory(prefix="overtone-") as folder:
        archive = Path(folder) / "job.zip"
        archive.write_bytes(data)
        return _submit(client, spec, archive, entrypoint(working_dir is not None))


def _submit(client: JobSubmissionClient, spec: JobSpec, archive: Path, command: str) -> Submission:
    prefix = submission_prefix(spec)
    notes = notes_on_paths(spec)

    def submission(key: str, attached: bool) -> Submission:
        output = spec.output
        return Submission(key, client.get_address(), output.path, output.endpoint_url, attached, notes)

    refusal: RuntimeError | None = None
    for pause_s in (0.0, 1.0, 2.0, 4.0, 8.0):
        # Again where another submission took the number in between, and where the server took nothing: a
        # cluster that has just started, or is very busy, has no agent yet to hand a job to.
        time.sleep(pause_s)
        known = _statuses(client)
        epoch = latest_epoch(prefix, known)
        if known.get(f"{prefix}{epoch}") in ACTIVE:
            return submission(f"{prefix}{epoch}", attached=True)
        key = f"{prefix}{epoch + 1}"
        try:
            client.submit_job(
                entrypoint=command,
                submission_id=key,
                runtime_env={"working_dir": str(archive)},
                metadata={"overtone_job": spec.name, "overtone_output": spec.output.path},
            )
        except RuntimeError as error:
            refusal = error
            continue
        return submission(key, attached=False)
    raise UserError(f"{client.get_address()} refused the job: {refusal}") from refusal


def _statuses(client: JobSubmissionClient) -> dict[str, str]:
    return {job.submission_id: str(job.status.value) for job in client.list_jobs() if job.submission_id}


def find_job(job: str, *, address: str = DEFAULT_ADDRESS) -> str:
    """The submission id that `job` means: an id, or the start of one that only one job has; of a job's epochs
    the newest. Raises UserError with the ids there are when it means none or several."""
    return _find(connect(address), job)


def _find(client: JobSubmissionClient, job: str) -> str:
    known = [key for key in _statuses(client) if key.startswith("overtone-")]
    if job in known:
        return job
    newest: dict[str, int] = {}
    for key in known:
        stem, _, epoch = key.rpartition("-e")
        if key.startswith(job) and epoch.isdigit():
            newest[stem] = max(newest.get(stem, 0), int(epoch))
    if len(newest) == 1:
        stem, number = newest.popitem()
        return f"{stem}-e{number}"
    what = "several jobs begin with" if newest else "no Overtone job is called"
    there = ", ".join(sorted(known)) or "none"
    raise UserError(f"{what} {job} at {client.get_address()}; there are: {there}")


def stop(job: str, *, address: str = DEFAULT_ADDRESS, wait_s: float = 60.0) -> str:
    """Ask a job to end; what it committed stays, and submitting it again resumes it. Returns the state it is
    in at the end of the wait: STOPPED, or what it had ended as before, or RUNNING if it takes longer."""
    client = connect(address)
    key = _find(client, job)
    client.stop_job(key)
    deadline = time.monotonic() + wait_s
    while (state := _state(client, key)) in ACTIVE and time.monotonic() < deadline:
        time.sleep(0.25)
    return state


def logs(job: str, *, address: str = DEFAULT_ADDRESS) -> str:
    """All that a job has printed so far."""
    client = connect(address)
    return client.get_job_logs(_find(client, job))


def _state(client: JobSubmissionClient, key: str) -> str:
    return str(client.get_job_status(key).value)


@dataclass(frozen=True)
class Followed:
    """How following a job ended. `state` is Ray's (RUNNING, SUCCEEDED, FAILED, STOPPED); `interrupted`: the
    user stopped looking and the job goes on."""

    id: str
    address: str
    state: str
    interrupted: bool
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the job succeeded, or was left running on purpose."""
        return self.interrupted or self.state == "SUCCEEDED"

    def text(self) -> str:
        """One line for a terminal."""
        if self.interrupted:
            at = "" if self.address == DEFAULT_ADDRESS else f" --address {self.address}"
            return (
                f"{self.id} goes on without this terminal; see it again with "
                f"`overtone logs {self.id} --follow{at}`, end it with `overtone stop {self.id}{at}`"
            )
        return f"{self.id}: {self.state.lower()}" + (f" ({self.message})" if self.message else "")


def follow(job: str, write: Callable[[str], object], *, address: str = DEFAULT_ADDRESS) -> Followed:
    """Give each line of a job's log to `write`, from the first one, until the job ends or the user presses
    Ctrl-C, which ends only the looking."""
    client = connect(address)
    key = _find(client, job)
    try:
        asyncio.run(_follow(client, key, write))
        state = _state(client, key)
    except KeyboardInterrupt:
        return Followed(key, client.get_address(), "RUNNING", interrupted=True)
    message = client.get_job_info(key).message or "" if state != "SUCCEEDED" else ""
    return Followed(
        key,
        client.get_address(),
        state,
        interrupted=False,
        message=message.splitlines()[0] if message else "",
    )


async def _follow(
    client: JobSubmissionClient,
    key: str,
    write: Callable[[str], object],
    *,
    pause_s: float = 0.5,
    lag_s: float = 3.0,
) -> None:
    """Until the job has ended. A stream that ends before that was cut on its way (a proxy's limit, say): the
    next one begins with the log's first character, so as many as were given out are passed over.

    After a cut it waits `pause_s`, twice that after each further one that gave nothing new, and then gives
    up; the log of a job that ends closes up to `lag_s` before its state changes.
    """
    seen, rest, futile = 0, "", 0

    def show(text: str) -> None:
        nonlocal seen, rest
        seen += len(text)
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            write(line)

    while True:
        behind, before = seen, seen
        reason = "the stream ends at once"
        try:
            async for chunk in _chunks(client, key):
                show(chunk[behind:])
                behind = max(0, behind - len(chunk))
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            reason = str(error)
        if await _ended(client, key, lag_s):
            break
        futile = 0 if seen > before else futile + 1
        if futile > _FUTILE_STREAMS:
            raise UserError(f"the log of {key} cannot be read any more: {reason}")
        await asyncio.sleep(pause_s * 2 ** max(futile - 1, 0))
    show(client.get_job_logs(key)[seen:])  # what came after the last stream was cut
    if rest:
        write(rest)


_FUTILE_STREAMS = 7  # of which the last waits for half a minute


async def _ended(client: JobSubmissionClient, key: str, lag_s: float) -> bool:
    deadline = time.monotonic() + lag_s
    while True:
        try:
            if _state(client, key) not in ACTIVE:
                return True
        except (RuntimeError, OSError):  # the job server does not answer now
            return False
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(0.1)


async def _chunks(client: JobSubmissionClient, key: str) -> AsyncIterator[str]:
    chunks: Any = client.tail_job_logs(key)
    async for chunk in chunks:
        yield chunk
