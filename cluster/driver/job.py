"""One run of a job, or of a retry of its rejects, from its spec to a summary. Knows specs, plans and folders,
but not how events become actions.

    summary = run_job(spec)                          # Ray is started here
    summary = run_job(spec, address="auto")          # on a cluster
    summary = retry_job("s3://bucket/run-7")         # tries once more the rows that were rejected

Every mistake of the user's is found before anything is written. The job's folder is the only state: however a
run ends, the next one continues it.

Next stop of the tour: cluster/driver/loop.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from overtone.cluster.driver.interrupts import Interrupts, stoppable
from overtone.cluster.driver.loop import DriverLoop
from overtone.cluster.driver.summary import Ending, Summary, conclude, summary_of
from overtone.jobs.errors import JobError, StoreError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import JobPlan, Work, make_plan
from overtone.jobs.preview import notes_on_negatives
from overtone.jobs.prompts import check_row_ids
from overtone.jobs.report import CARD, card_rows, write_card
from overtone.jobs.retry import find_rejects, job_to_retry, tolerating_rejects
from overtone.jobs.sampling import check_model
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
        on_event: called with how far the job is, a few times a second.
        engine_factory: makes a worker's engine from the spec, in the worker; None: the spec's model.

    Raises UserError for a spec, prompt table, size, store or folder that cannot be used, having written
    nothing; StoreError where the store cannot be reached. Everything after that ends in a Summary, Ctrl-C and
    SIGTERM too.
    """
    began = time.monotonic()
    with stoppable() as interrupts:
        check_model(spec)
        job_plan = make_plan(spec)
        folder = JobFolder(_store(spec))
        if not folder.exists() or folder.gives_way_to(job_plan):
            # Reads the row_id columns, so once a job, before anything is written.
            check_row_ids(spec, job_plan.files)
        folder.open(spec, job_plan, replace=True)
        job_plan = folder.plan()
        work: Work = job_plan
        if len(folder.finished()) == job_plan.num_shards:
            retry_plan = folder.unfinished_retry()
            if retry_plan is None:
                folder.repair_derived()
                ending = Ending()
                if card_rows(folder.store) is None:  # the run that finished the job ended before its card
                    ending.add_extra(CARD, lambda: write_card(folder.store, spec, job_plan))
                done = job_plan.num_shards
                summary = summary_of(spec, job_plan, job_plan, folder.store, began, done=done)
                return replace(summary, notes=tuple(ending.notes))
            spec, work = tolerating_rejects(spec), retry_plan
        summary = _drive(spec, job_plan, work, folder, began, address, on_event, engine_factory, interrupts)
        return replace(summary, notes=(*summary.notes, *notes_on_negatives(spec, job_plan)))


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
    """Try the rejects of a finished job once more, or continue a retry that was begun.

    The rows that can be made are committed in parts of their own beside the old ones; a row that fails again
    stays a reject, with its newest reason. Rows that killed workers are tried like all others.

    Args:
        output: the job's folder or s3:// URL.
        overrides: `key=value` of the job's spec, for keys that change no sample.

    The other arguments, and the errors, are those of `run_job`.
    """
    began = time.monotonic()
    with stoppable() as interrupts:
        store = open_store(output, endpoint_url=endpoint_url, region=region)
        spec, job_plan = job_to_retry(store, overrides)
        check_model(spec)
        folder = JobFolder(_store(spec))
        folder.repair_derived()
        rejects = find_rejects(folder, spec, job_plan)
        if not rejects.retry.num_shards:
            done = job_plan.num_shards
            summary = summary_of(spec, job_plan, job_plan, folder.store, began, done=done)
            return replace(summary, notes=(rejects.text(),))
        work = folder.begin_retry(rejects.retry)
        return _drive(spec, job_plan, work, folder, began, address, on_event, engine_factory, interrupts)


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


def _drive(
    spec: JobSpec,
    job_plan: JobPlan,
    work: Work,
    folder: JobFolder,
    began: float,
    address: str | None,
    on_event: Callable[[Snapshot], None],
    engine_factory: EngineFactory | None,
    interrupts: Interrupts,
) -> Summary:
    """Let the loop run until the work ends, and sum up. A driver that made nothing leaves no number."""
    loop = DriverLoop(spec, job_plan, work, folder, on_event)
    try:
        loop.go(address, engine_factory, interrupts)
    except KeyboardInterrupt:
        loop.ending.error = JobError("stopped")
    except JobError as error:
        loop.ending.error = error
    except StoreError as error:
        loop.ending.error = JobError(str(error))
    if loop.epoch is not None and not (loop.tally.rows or loop.tally.rejects):
        with suppress(StoreError):
            folder.drop_epoch(loop.epoch)
    return conclude(spec, job_plan, work, folder, loop.tally, loop.ending, began)
