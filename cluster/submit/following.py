"""A submitted job's log, line by line until the job ends. Knows Ray's log streams, which may be cut, and no
specs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp

from overtone.cluster.submit.client import ACTIVE, DEFAULT_ADDRESS, connect, find_submission, state_of
from overtone.jobs.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


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
    key = find_submission(client, job)
    try:
        asyncio.run(_follow(client, key, write))
        state = state_of(client, key)
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
            if state_of(client, key) not in ACTIVE:
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
