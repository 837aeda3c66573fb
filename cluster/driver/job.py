"""TODO: cluster/driver/job.py."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from overtone.cluster.driver.loop import Run
from overtone.cluster.driver.summary import Summary, summary_of
from overtone.jobs.errors import JobError, SpecError, StoreError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import check_row_ids
from overtone.jobs.report import card_rows, write_card
from overtone.jobs.retry import bearing_rejects, find_rejects, retry_plan
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.sampling import checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec
from overtone.jobs.status import Snapshot
from overtone.jobs.store import Store, open_store, probed

if TYPE_CHECKING:
    from overtone.cluster.worker import EngineFactory


def run_job(
    spec: JobSpec,
    *,
    address: str | None = None,
    on_event: Callable[[Snapshot], None] = lambda snapshot: None,
    engine_factory: EngineFactory | None = None,
) -> Summary:
    """Run a job, or what earlier runs and retries of it left, to its end.

    Args:
        address: of a Ray cluster, as `ray.init` takes it; None: Ray is started on this machine, unless this
            process is connected to one already.
        on_event: told how far the job is, a few times a second.
        engine_factory: makes a worker's engine from the spec, in the worker; None: the spec's model.

    Raises UserError for a spec, prompt table, size, store or folder that cannot be used, having written
    nothing; StoreError where the store cannot be reached. Everything after that ends in a Summary, Ctrl-C and
    SIGTERM too.
    """
    began = time.monotonic()
    _check_model(spec)
    plan = make_plan(spec)
    folder = JobFolder(_store(spec))
    if not folder.exists():
        check_row_ids(spec, plan.files)  # reads the row_id columns, so once a job, before anything is written
    folder.open(spec, plan)
    retry = None
    if len(folder.finished()) == plan.num_shards:
        retry = folder.unfinished_retry()
        if retry is None:
            folder.repair_derived()
            if card_rows(folder.store) is None:  # the run that finished the job ended before its card
                write_card(folder.store, spec, plan)
            return summary_of(spec, plan, folder.store, began, done=plan.num_shards)
        spec = bearing_rejects(spec)
    return _run(spec, plan, folder, retry, began, address, on_event, engine_factory)


def retry_job(
    output: str,
    overrides: Sequence[str] = (),
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    address: str | None = None,
    on_event: Callable[[Snapshot], None] = lambda snapshot: None,
    engine_factory: EngineFactory | None = None,
) -> Summary:
    """Try the rejects of a finished job once more, or go on with a retry that was begun.

    What is made is committed in parts of its own beside the old ones; what fails again stays a reject, with
    its newest reason. Rows that killed workers are tried like all others.

    Args:
        output: the job's folder or s3:// URL.
        overrides: `key=value` of the job's spec, of what does not change samples.

    The others, and what is raised, are those of `run_job`.
    """
    began = time.monotonic()
    spec, plan = retry_plan(open_store(output, endpoint_url=endpoint_url, region=region), overrides)
    _check_model(spec)
    folder = JobFolder(_store(spec))
    folder.repair_derived()
    found = find_rejects(folder, spec, plan)
    if not found.retry.num_shards:
        summary = summary_of(spec, plan, folder.store, began, done=plan.num_shards)
        return replace(summary, notes=(found.text(),))
    retry = folder.begin_retry(found.retry)
    return _run(spec, plan, folder, retry, began, address, on_event, engine_factory)


def _store(spec: JobSpec) -> Store:
    output = spec.output
    return probed(
        open_store(
            output.path,
            endpoint_url=output.endpoint_url,
            region=output.region,
            retries=spec.faults.store_retries,
            unsafe_overwrite=output.unsafe_overwrite,
        )
    )


def _run(
    spec: JobSpec,
    plan: JobPlan,
    folder: JobFolder,
    retry: RetryPlan | None,
    began: float,
    address: str | None,
    on_event: Callable[[Snapshot], None],
    engine_factory: EngineFactory | None,
) -> Summary:
    epoch = folder.take_epoch(f"{socket.gethostname()}:{os.getpid()}")
    with suppress(StoreError):  # tidiness: not worth a job, nor a right that its writers do not need
        folder.store.sweep()
    # Only now: the driver before may have committed until it saw the new epoch.
    run = Run(spec, plan, folder, retry, epoch, on_event)
    with _interrupts() as interrupted:
        try:
            run.go(address, engine_factory, interrupted)
        except KeyboardInterrupt:
            run.error = JobError("stopped")
    return run.summary(began)


def _check_model(spec: JobSpec) -> None:
    """SpecError or SizeError where the model cannot make what the spec asks for, as far as is known without
    loading it: what a hub model that we have no settings of can do, only its workers find out."""
    try:
        checkpoint = checkpoint_of(spec)
    except SpecError:
        if spec.model.id.count("/") == 1 and not spec.model.id.startswith((".", "/", "~")):
            return
        raise
    sampling_plan(spec, checkpoint)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C, and SIGTERM as `overtone stop` and Kubernetes send it, end the run.

    The exception ends whatever waits; where it falls into a callback of somebody else's and is lost there,
    the event still says so.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
