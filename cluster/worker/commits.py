"""The commit of a shard, in a thread beside the next shard: one part, created once. Knows no device.

    yield from commits.commit(attempt)      # begins it, once the one before has ended
    yield from commits.reap()               # reports those that have ended meanwhile
    yield from commits.flush()              # waits for all of them

The tour of a row's way ends in jobs/parts/build.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any

from overtone.cluster.dispatch import Event, ShardAlive, ShardCommitted
from overtone.cluster.faults import Failure, Verdict, first_line
from overtone.cluster.worker.attempt import Attempt, EncodedMedia
from overtone.jobs.errors import StoreError
from overtone.jobs.media import Kind
from overtone.jobs.parts import (
    AttemptFacts,
    Footer,
    Made,
    Part,
    Timing,
    build_part,
    create_part,
    write_derived,
)
from overtone.jobs.plan import JobPlan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store

PATIENCE_S = 600.0
"""How long a part is kept that the store does not take."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0

_log = logging.getLogger(__name__)
Guidance = Mapping[str, float | None]
"""`guidance_scale` and `true_cfg_scale` as an engine's pipeline gets them; empty where it does not tell."""


@dataclass(frozen=True)
class Pending:
    """A commit that is not reported yet."""

    attempt: Attempt
    future: Future[int]
    """Gives the number of rows that were made."""


class Commits:
    """Commits attempts, one at a time, and then writes their timings and rejects as tables.

    `facts` is what all attempts' parts say of their worker; each adds its own id and start.
    """

    def __init__(
        self,
        spec: JobSpec,
        job_plan: JobPlan | None,
        store: Store | None,
        facts: AttemptFacts,
        kind: Kind,
        guidance: Guidance,
    ) -> None:
        self._spec, self._job_plan, self._store = spec, job_plan, store
        self._facts, self._kind, self._guidance = facts, kind, guidance
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._deriver = ThreadPoolExecutor(1, thread_name_prefix="derive")
        self._pending: list[Pending] = []
        self._derived: Future[None] | None = None
        self._closing = threading.Event()
        self.recent_events: deque[Event] = deque(maxlen=8)
        """The last commits that were reported."""

    def commit(self, attempt: Attempt) -> Iterator[Event]:
        """Begin to commit what an attempt has made. One commit at a time: more would pile up pictures."""
        attempt.phase = "commit"
        while self._pending:
            yield from self._wait(attempt, self._pending[0].future)
            yield from self.reap()
        future = self._committer.submit(copy_context().run, self._commit, attempt)
        self._pending.append(Pending(attempt, future))

    def flush(self) -> Iterator[Event]:
        """Wait for all commits, and for their tables."""
        while self._pending:
            first = self._pending[0]
            yield from self._wait(first.attempt, first.future)
            if self._derived is not None:
                yield from self._wait(first.attempt, self._derived)
            yield from self.reap()

    def reap(self) -> Iterator[Event]:
        """Report the commits that have ended."""
        for pending in [pending for pending in self._pending if pending.future.done()]:
            self._pending.remove(pending)
            event = _outcome(pending)
            self.recent_events.append(event)
            yield event

    def alive(self) -> Iterator[ShardAlive]:
        """Report that the others continue."""
        for pending in self._pending:
            yield pending.attempt.alive()

    def _wait(self, attempt: Attempt, future: Future[Any]) -> Iterator[Event]:
        for event in attempt.wait(future):
            yield event
            yield from (other for other in self.alive() if other != event)

    def _commit(self, attempt: Attempt) -> int:
        """In a thread: build the part and create it, which leaves another attempt's as it is. Returns the
        number of rows that were made."""
        assert attempt.read is not None
        assert self._job_plan is not None
        assert self._store is not None
        before = len(attempt.timings)
        made = made_of(attempt, self._guidance)
        part = build_part(
            self._spec,
            self._job_plan,
            self._job_plan.shard(attempt.shard),
            attempt=replace(self._facts, id=attempt.id, started=attempt.started),
            made=made,
            rejects=attempt.rejects,
            passthrough=attempt.read.passthrough,
            first_row=attempt.read.first_row,
            timings=attempt.timings,
            kind=self._kind,
        )
        upload = self._create(part, attempt)
        once = part.footer.timings[before:]
        attempt.on_timings(once if upload is None else (*once, upload))
        if upload is not None:
            if self._derived is not None:
                wait([self._derived])  # one at a time: more would pile up where the store is slow
            self._derived = self._deriver.submit(copy_context().run, self._derive, part.footer, upload)
        _log.info(
            "%d rows and %d rejects in %.1f s%s",
            len(made),
            len(attempt.rejects),
            time.time() - attempt.started,
            ", and another attempt was first" if upload is None else "",
        )
        return len(made)

    def _create(self, part: Part, attempt: Attempt) -> Timing | None:
        """Create the part, again and again while the store fails: the part is encoded, and what was made on
        the device is not thrown away for a store's pause. StoreError where that takes too long."""
        assert self._store is not None
        begin, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return create_part(self._store, part)
            except StoreError as error:
                if time.monotonic() - begin > PATIENCE_S or self._closing.is_set():
                    raise
                if pause_s == FIRST_PAUSE_S:
                    _log.warning("the part is kept and tried again: %s", error)
                attempt.trouble = first_line(error)
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _derive(self, footer: Footer, upload: Timing) -> None:
        """In a thread, after the commit, so that what fails here costs no row: the end of the job makes it
        again from the part (`JobFolder.repair_derived`)."""
        assert self._store is not None
        try:
            write_derived(self._store, footer, [upload])
        except Exception:  # noqa: BLE001 - see above
            _log.warning("its timings are not written yet", exc_info=True)

    def close(self) -> None:
        """Finish the commits and their tables, and end the threads. What the store does not take now is left
        for another attempt."""
        self._closing.set()
        self._committer.shutdown(wait=True)
        self._deriver.shutdown(wait=True)


def _outcome(pending: Pending) -> Event:
    attempt, error = pending.attempt, pending.future.exception()
    if error is not None:
        return attempt.failed(Failure.of(error, "commit"))
    num_rejects = len(attempt.rejects)
    reasons = tuple(sorted(Counter(reject.error_class for reject in attempt.rejects).items()))
    num_rows = pending.future.result() + num_rejects
    return ShardCommitted(
        attempt.worker, attempt.shard, attempt.assignment.attempt, num_rows, num_rejects, reasons
    )


def made_of(attempt: Attempt, guidance: Guidance) -> list[Made]:
    """What an attempt has made, once its pictures are encoded. A row whose picture cannot be is rejected."""
    made: list[Made] = []
    encoded: dict[int, list[tuple[str, EncodedMedia]]] = {}  # of each batch
    for picture in attempt.pictures:
        row, sampling_plan = picture.row, picture.sampling_plan
        try:
            media = picture.encoding.result()
        except Exception as error:  # the row boundary again
            failure = Failure.of(error, "image_encode")
            if failure.verdict is not Verdict.REJECT_ROW:
                raise
            name, message, phase = failure.error_class, failure.message, failure.phase
            attempt.add_reject(row, name, message, phase, attempt.assignment.attempt)
            continue
        encoded.setdefault(picture.batch, []).append((row.row_id, media))
        made.append(
            Made(
                row=row,
                data=media.data,
                height_px=sampling_plan.height_px,
                width_px=sampling_plan.width_px,
                num_steps=sampling_plan.num_steps,
                stages=picture.stages,
                denoise_seconds=picture.denoise_seconds,
                latents=picture.latents,
                delta=sampling_plan.delta,
                guidance_scale=guidance.get("guidance_scale"),
                true_cfg_scale=guidance.get("true_cfg_scale"),
                prompt_truncated=picture.prompt_truncated,
            )
        )
    attempt.pictures.clear()
    for number, ended in encoded.items():
        attempt.timings += attempt.timings_of_encoding(number, ended)
    return made
