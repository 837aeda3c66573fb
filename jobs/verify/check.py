"""The proof that every input row is in the output exactly once, in data or in rejects. Trusts no driver.

One pass over the input runs beside one pass over the parts, a few shards at a time. The memory that it takes
does not grow with the job, except for eight bytes a row, by which rows that exist twice are found. A shard's
part must have each of its input rows, made or rejected, and a retry's part each reject of the part before it.
It follows that each row is made in one part, or is a reject of the newest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from os import cpu_count

from overtone.jobs.errors import StoreError, UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import expected_row_ids, file_changes
from overtone.jobs.report import CARD, card_rows, write_card
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store, open_store
from overtone.jobs.verify.found import Blanks, Checked, VerifyReport
from overtone.jobs.verify.names import Seen, There, name_duplicates
from overtone.jobs.verify.shard import Checker
from overtone.jobs.words import counted

_SHARDS_AT_ONCE = 8
"""Many, for stores that answer slowly; each holds a few pictures and its row_ids."""


def verify(
    url: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    repair: bool = False,
    decode: bool = True,
    allow_blank: bool = False,
    on_part: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check the whole output of a job against its input. UserError where there is no job.

    `repair` writes missing or wrong timings, rejects and card again, from the parts; it changes nothing under
    `data/`. `allow_blank`: pictures of one colour are what was asked for, however few they are (`Blanks`).
    `on_part(done, of)` is called after each part.
    """
    store = open_store(url, endpoint_url=endpoint_url, region=region)
    spec, job_plan = JobFolder(store).load()
    report = verify_job(
        store,
        spec,
        job_plan,
        expected_row_ids(spec, job_plan.files, job_plan.shard_rows),
        repair=repair,
        decode=decode,
        allow_blank=allow_blank,
        on_part=on_part,
    )
    _check_input(spec, job_plan, report)
    return report


def verify_job(
    store: Store,
    spec: JobSpec,
    job_plan: JobPlan,
    expected: Iterable[tuple[int, list[str]]],
    *,
    repair: bool = False,
    decode: bool = True,
    allow_blank: bool = False,
    on_part: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """`verify` for a job that the caller holds. `expected` gives (shard, row_ids) in shard order, and may
    give a shard in several pieces."""
    report = VerifyReport(store.url, shards_total=job_plan.num_shards, decoded=decode)
    there = There(store, job_plan, spec.output.format, report)
    seen, blanks = Seen(), Blanks()
    with (
        ThreadPoolExecutor(cpu_count() or 1, "decode") as decoders,
        ThreadPoolExecutor(_SHARDS_AT_ONCE, "shard") as pool,
    ):
        checker = Checker(store, spec, job_plan, there, decoders, repair=repair, decode=decode)
        for done, checked in enumerate(_in_order(pool, checker, _by_shard(expected, job_plan, report)), 1):
            checked.add_to(report)
            seen.add(checked.row_ids)
            blanks.add(checked.blank)
            if on_part is not None:
                on_part(done, job_plan.num_shards)
    blanks.report(report, allow=allow_blank)
    twice = seen.twice()
    if len(twice):
        name_duplicates(store, spec, job_plan, there, twice, report)
    if there.parts[0].all() and not report.retry_parts_left and not report.num_problems:
        _check_card(store, spec, job_plan, report, repair=repair)
    return report


def _in_order(
    pool: ThreadPoolExecutor, checker: Checker, shards: Iterable[tuple[int, list[str] | None]]
) -> Iterator[Checked]:
    """`pool.map`, which takes no more shards ahead than the pool works on."""
    running: deque[Future[Checked]] = deque()
    for index, row_ids in shards:
        running.append(pool.submit(checker.check, index, row_ids))
        if len(running) > _SHARDS_AT_ONCE:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _by_shard(
    expected: Iterable[tuple[int, list[str]]], job_plan: JobPlan, report: VerifyReport
) -> Iterator[tuple[int, list[str] | None]]:
    """(shard, its row_ids) for every shard in order; None where the input cannot be read any more."""
    following = 0
    try:
        for index, pieces in groupby(expected, key=itemgetter(0)):
            assert index >= following, "the expected rows come in shard order"
            for skipped in range(following, index):
                yield skipped, []
            row_ids = [row_id for _, piece in pieces for row_id in piece]
            report.rows_expected += len(row_ids)
            yield index, row_ids
            following = index + 1
        problem = None
    except (UserError, StoreError) as error:
        problem = error
    if problem is not None:
        report.add("unreadable_input", "input", f"{problem}; the parts from {following} on lack this check")
    for index in range(following, job_plan.num_shards):
        yield index, None if problem is not None else []


def _check_input(spec: JobSpec, job_plan: JobPlan, report: VerifyReport) -> None:
    """List the input files anew: each that the plan does not have, or has otherwise, is a problem. Nobody
    else would notice, for a driver and its workers know the plan's files alone."""
    try:
        now = make_plan(spec)
    except (UserError, StoreError) as error:
        if not report.num_problems["unreadable_input"]:
            report.add("unreadable_input", "input", f"{error}; so it is not known which files are new")
        return
    for line in file_changes(job_plan.files, now.files):
        report.add("changed_input", "input", line)


def _check_card(
    store: Store, spec: JobSpec, job_plan: JobPlan, report: VerifyReport, *, repair: bool
) -> None:
    """A job needs no card, but an existing one must count right, because readers refuse data of another
    length."""
    promised = card_rows(store)
    if promised == report.rows:
        return
    if repair:
        report.wrote_card = write_card(store, spec, job_plan)
    elif promised is not None:
        report.add("wrong_derived", CARD, f"promises {counted(promised, 'row')}, there are {report.rows:,}")
