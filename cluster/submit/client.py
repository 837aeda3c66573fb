"""Reaching a cluster's job server: which token opens it, what answers at an address, which jobs it has. Knows
nothing of specs, and imports ray only after the token is in place."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from overtone.jobs.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_TIMEOUT_S = 10.0
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


def statuses(client: JobSubmissionClient) -> dict[str, str]:
    """The state of every job that was submitted to the cluster, by submission id."""
    return {job.submission_id: str(job.status.value) for job in client.list_jobs() if job.submission_id}


def find_submission(client: JobSubmissionClient, job: str) -> str:
    """The submission id that `job` means: an id, or the start of one that only one job has; of a job's epochs
    the newest. UserError, which lists the ids, where it means none or several."""
    known = [key for key in statuses(client) if key.startswith("overtone-")]
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


def state_of(client: JobSubmissionClient, key: str) -> str:
    """A job's state in Ray's words: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    return str(client.get_job_status(key).value)
