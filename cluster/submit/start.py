"""Hands a job to a Ray cluster through its Jobs API, so that the job outlives this terminal. Knows specs and
Ray's job server; nothing of shards, workers or pictures, and imports ray only after the token is in place."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overtone.cluster.submit.client import (
    ACTIVE,
    DEFAULT_ADDRESS,
    connect,
    find_submission,
    state_of,
    statuses,
)
from overtone.cluster.submit.package import SPEC_NAME, anchored, notes_on_paths, package, withheld
from overtone.jobs.errors import UserError
from overtone.jobs.spec import JobSpec

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


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
        return _submit(client, spec, archive, entrypoint(working_dir is not None), _notes(spec, working_dir))


def stop(job: str, *, address: str = DEFAULT_ADDRESS, wait_s: float = 60.0) -> str:
    """Ask a job to end; what it committed stays, and submitting it again resumes it. Returns the state it is
    in at the end of the wait: STOPPED, or what it had ended as before, or RUNNING if it takes longer."""
    client = connect(address)
    key = find_submission(client, job)
    client.stop_job(key)
    deadline = time.monotonic() + wait_s
    while (state := state_of(client, key)) in ACTIVE and time.monotonic() < deadline:
        time.sleep(0.25)
    return state


def logs(job: str, *, address: str = DEFAULT_ADDRESS) -> str:
    """All that a job has printed so far."""
    client = connect(address)
    return client.get_job_logs(find_submission(client, job))


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


def _submit(
    client: JobSubmissionClient, spec: JobSpec, archive: Path, command: str, notes: tuple[str, ...]
) -> Submission:
    prefix = submission_prefix(spec)

    def submission(key: str, attached: bool) -> Submission:
        output = spec.output
        return Submission(key, client.get_address(), output.path, output.endpoint_url, attached, notes)

    refusal: RuntimeError | None = None
    for pause_s in (0.0, 1.0, 2.0, 4.0, 8.0):
        # Again where another submission took the number in between, and where the server took nothing: a
        # cluster that has just started, or is very busy, has no agent yet to hand a job to.
        time.sleep(pause_s)
        known = statuses(client)
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


def _notes(spec: JobSpec, working_dir: Path | None) -> tuple[str, ...]:
    """What the user should know of what was sent and of what was not."""
    kept = [] if working_dir is None else withheld(working_dir)
    if not kept:
        return notes_on_paths(spec)
    shown = ", ".join(kept[:5]) + (f" and {len(kept) - 5} more" if len(kept) > 5 else "")
    return (*notes_on_paths(spec), f"not sent, since a credential may be in it: {shown}")


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


def entrypoint(tree: bool) -> str:
    """The shell command that the job server runs: the installed `overtone`, or the packed tree's."""
    program = ["python", "-m", "overtone.cluster.cli"] if tree else ["overtone"]
    return shlex.join([*program, "run", SPEC_NAME, "--address", "auto"])
