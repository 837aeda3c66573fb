"""One attempt at one shard: its rows read, batched, made, encoded and committed. Knows no Ray.

    runner = Runner(spec, plan, store, engine, worker=3, epoch=7, node="a")
    for event in runner.attempt(assignment): ...     # events of overtone.cluster.dispatch, as they happen
    for event in runner.flush(): ...                 # wait for commits in the background
    made, rejects = Runner(spec, None, None, engine).make(rows)     # the same, of rows without a shard

Rows of one size make a group, which goes through the stages together: on each grid in batches of as many rows
as are best there, so that a coarse stage, whose rows are small, takes more at once. The calling thread does
nothing but generate. Reading the next shard, encoding pictures, committing the last shard and then writing
its timings go on in threads beside it; on a GPU, encoding the next group's prompts and decoding the last
batch too. What an exception means is decided by `cluster.faults` alone; a row that cannot be made becomes a
reject here, anything else ends the attempt with a `ShardFailed`.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, Literal
from uuid import uuid4

from overtone.cluster.dispatch import (
    Assignment,
    Event,
    RowsDone,
    RowsStarted,
    ShardAlive,
    ShardCommitted,
    ShardFailed,
    ShardGenerated,
    ShardReturned,
    WorkerDraining,
)
from overtone.cluster.faults import Failure, Verdict, first_line, verdict_for
from overtone.cluster.logs import about
from overtone.cluster.worker.attempt import (
    ALIVE_S,
    Attempt,
    Decoded,
    Failed,
    Group,
    Picture,
    Returned,
    reject_of,
)
from overtone.cluster.worker.batch_sizes import BatchSizes
from overtone.cluster.worker.pictures import ENCODERS, arrays
from overtone.cluster.worker.protocol import Compiles, Engine
from overtone.cluster.worker.texts import TEXTS, Inline, Texts
from overtone.jobs.errors import RowError, SizeError
from overtone.jobs.media import encode_media
from overtone.jobs.parts import (
    AttemptFacts,
    Footer,
    Made,
    StageTime,
    Timing,
    build_part,
    create_part,
    write_derived,
)
from overtone.jobs.plan import JobPlan
from overtone.jobs.prompts import ShardRows, read_shard
from overtone.jobs.retry import read_rejected
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.rows import Reject, Row
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store
from overtone.progressive.schedule import SamplingPlan, Stage

_log = logging.getLogger(__name__)


class Runner:
    """A resident engine and the threads around it. One attempt at a time.

    Args:
        plan, store: None for a runner that is only asked to `make` rows.
        worker: the dispatcher's number of this worker, for its events.
        label: its name in the timings.
        node: where it runs, for the timings.
        epoch: of the driver, for the attempts' names.
        retry: whose rows to make, instead of all rows of a shard.
        on_timings: told the timings of each batch, and of what is done once for a shard, from any thread.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: JobPlan | None,
        store: Store | None,
        engine: Engine,
        *,
        worker: int = 0,
        label: str | None = None,
        node: str = "",
        epoch: int = 0,
        retry: RetryPlan | None = None,
        on_timings: Callable[[Sequence[Timing]], None] = lambda timings: None,
    ) -> None:
        self.spec, self.plan, self.store, self.engine = spec, plan, store, engine
        self.worker, self.node, self.epoch, self.retry = worker, node, epoch, retry
        self.label = label or f"worker-{worker}"
        self._on_timings = on_timings
        self.draining = False
        """Set, from any thread or a signal's handler, to give the shard back after the batch in hand."""
        self._sizes = BatchSizes(spec.workers.batch_size, gpu=str(engine.device).startswith("cuda"))
        self.kind: Literal["image", "video"] = "video" if engine.family.default_frames else "image"
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._beside = {
            what: ThreadPoolExecutor(1, thread_name_prefix=what) if engine.overlaps else Inline()
            for what in ("text", "decode")
        }
        self._texts = Texts()
        self._texts_ahead: tuple[tuple[Row, ...], Future[tuple[Any, float, float]]] | None = None
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._deriver = ThreadPoolExecutor(1, thread_name_prefix="derive")
        self._derived: Future[None] | None = None
        self._ahead: tuple[int, Future[tuple[ShardRows, Timing, float]]] | None = None
        self._commits: list[tuple[Attempt, Future[tuple[int, list[Reject]]]]] = []
        self._told: deque[Event] = deque(maxlen=8)

    # The calls.

    def attempt(
        self, assignment: Assignment, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[Event]:
        """Make a shard. The last event about it is ShardGenerated (a later call tells of its commit),
        ShardCommitted, ShardReturned or ShardFailed; `cancelled` is asked between batches."""
        name = f"e{self.epoch}-w{self.worker}-s{assignment.shard}-a{assignment.attempt}-{uuid4().hex}"
        run = Attempt(assignment, name, cancelled)
        with about(run.shard, assignment.attempt):
            try:
                yield from self._attempt(run)
            except Returned:
                if self.draining:
                    yield WorkerDraining(self.worker)
                    yield from self.flush()
                _log.info("given back")
                yield ShardReturned(self.worker, run.shard, assignment.attempt)
            except Failed as failed:
                yield self._failed(run, failed.failure)
            except Exception as error:  # noqa: BLE001 - it becomes data: the dispatcher decides
                yield self._failed(run, Failure.of(error, run.phase))

    def make(self, rows: Sequence[Row]) -> tuple[list[Made], list[Reject]]:
        """Make rows that are no shard's; each ends in one of the lists. Raises what is not a row's fault."""
        run = Attempt(Assignment(shard=0, attempt=1), "", lambda: False)
        try:
            for _ in self._generate(run, rows):
                pass  # nobody waits for these events
        except Failed as failed:
            raise failed.__cause__ or failed from None
        return self._gather(run)

    def warm_up(self, plan: SamplingPlan) -> Iterator[None]:
        """Let an engine that compiles do so for every batch that rows with this plan can come in, a shape at
        a time; once it has, nothing is left to do."""
        if isinstance(self.engine, Compiles):
            full = plan.stages[-1]
            sizes = [self._sizes.possible(stage, full) for stage in plan.stages]
            for shape in self.engine.warm_each(plan, sizes, self.spec.sampling, search=self._sizes.grows):
                _log.info("%s", shape)
                yield

    def flush(self) -> Iterator[Event]:
        """Wait for the commits in the background and tell of them."""
        while self._commits:
            run, commit = self._commits[0]
            yield from self._wait(run, commit)
            if self._derived is not None:
                yield from self._wait(run, self._derived)
            yield from self._reap()

    def recall(self) -> list[Event]:
        """The last commits told of, for a driver that may have lost them with a call that it cancelled."""
        return list(self._told)

    def close(self) -> None:
        """Finish the commits in the background and end the threads."""
        pools = self._reader, *self._beside.values(), self._encoders, self._committer, self._deriver
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=pool is self._reader)

    # One attempt, in call order.

    def _attempt(self, run: Attempt) -> Iterator[Event]:
        assignment = run.assignment
        self._go_on(run)
        yield from self._read(run)
        assert run.read is not None
        yield from self._generate(run, self._without_quarantined(run, run.read))
        run.phase = "commit"
        while self._commits:  # one commit at a time: more would pile up pictures
            yield from self._wait(run, self._commits[0][1])
            yield from self._reap()
        commit = self._committer.submit(self._in_thread, run)
        self._commits.append((run, commit))
        if not assignment.commit_first and not self.draining:
            yield ShardGenerated(self.worker, run.shard, assignment.attempt)
        else:
            yield from self.flush()

    def _read(self, run: Attempt) -> Iterator[Event]:
        ahead, self._ahead = self._ahead, None
        reading = ahead[1] if ahead and ahead[0] == run.shard else self._start_reading(run.shard)
        yield from self._wait(run, reading)
        read, timing, begin = reading.result()
        run.read = read
        run.timings.append(replace(timing, start_s=begin - run.started))
        self._on_timings(run.timings)
        run.rejects += read.rejects
        if run.assignment.read_ahead is not None:
            self._ahead = (run.assignment.read_ahead, self._start_reading(run.assignment.read_ahead))

    def _start_reading(self, index: int) -> Future[tuple[ShardRows, Timing, float]]:
        def read() -> tuple[ShardRows, Timing, float]:
            assert self.plan is not None
            assert self.store is not None
            begin = time.time()
            shard = self.plan.shard(index)
            if self.retry is not None:
                rows = read_rejected(self.store, self.spec, self.plan, self.retry, index)
            else:
                rows = read_shard(self.spec, self.plan.files[shard.file], shard.first_row, shard.num_rows)
            return rows, Timing(None, "read", len(rows.rows), seconds=time.time() - begin), begin

        return self._reader.submit(read)

    def _without_quarantined(self, run: Attempt, read: ShardRows) -> list[Row]:
        known = {row.row_id: row for row in run.assignment.quarantined}
        for row in read.rows:
            if row.row_id in known:
                why = known[row.row_id]
                run.rejects.append(reject_of(row, why.error_class, why.message, "generate", why.deaths))
        return [row for row in read.rows if row.row_id not in known]

    def _generate(self, run: Attempt, rows: Sequence[Row]) -> Iterator[Event]:
        if self.spec.model.offload == "model" and not run.careful:
            yield self._alive(run)
            self._encode_all(run, rows)
        for group, plan, upcoming in self._groups(run, rows):
            yield from self._group(run, group, plan, upcoming)
        yield from self._decoded(run)

    def _groups(
        self, run: Attempt, rows: Sequence[Row]
    ) -> Iterator[tuple[list[Row], SamplingPlan, list[Row]]]:
        """(rows to make together, their stages, what most likely comes next): suspects first, each alone,
        then runs of one size in source order."""
        first = set(run.assignment.suspects)
        alone = [row for row in rows if row.row_id in first]
        sizes: dict[tuple[int | None, int | None], list[Row]] = {}
        for row in rows:
            if row.row_id not in first:
                sizes.setdefault((row.height, row.width), []).append(row)
        for row in alone:
            plan = self._plan(run, [row])
            if plan is not None:
                yield [row], plan, []
        for same in sizes.values():
            plan = self._plan(run, same)
            while plan is not None and same:
                count = 1 if run.assignment.isolate else self._sizes.group(plan)
                yield same[:count], plan, same[count : 2 * count] or self._next_shard(count)
                same = same[count:]

    def _next_shard(self, count: int) -> list[Row]:
        """The first rows of the next shard, as far as they are known."""
        if self._ahead is None or not self._ahead[1].done() or self._ahead[1].exception():
            return []
        return list(self._ahead[1].result()[0].rows[:count])

    def _plan(self, run: Attempt, rows: Sequence[Row]) -> SamplingPlan | None:
        """The stages of rows of one size; None, and the rows rejected, where the model cannot make it."""
        run.phase = "plan"
        try:
            return self.engine.plan(self.spec.sampling, height_px=rows[0].height, width_px=rows[0].width)
        except ValueError as error:
            self._reject(run, rows, SizeError(first_line(error)))
            return None

    def _group(
        self, run: Attempt, rows: list[Row], plan: SamplingPlan, upcoming: list[Row]
    ) -> Iterator[Event]:
        """Take rows through all stages; where their prompts cannot be encoded together, in smaller groups."""
        run.phase = "compile"
        try:  # before any of the rows is started: none is to blame for the time it takes
            for _ in self.warm_up(plan):
                yield self._alive(run)
        except Exception as error:
            if verdict_for(error) is not Verdict.HALVE_BATCH:
                raise
            self._reject(run, rows, error)  # not even one of them fits
            return
        todo = [rows]
        while todo:
            self._go_on(run)
            rows = todo.pop()
            yield from self._started(run, rows)
            try:
                group = self._begin(run, rows, plan, upcoming)
            except Exception as error:  # noqa: BLE001 - the row boundary: it becomes data
                ended, again = self._after(run, list(range(len(rows))), error)
                self._reject(run, [rows[index] for index in ended], error)
                yield from self._ended(run, [rows[index] for index in ended])
                todo += reversed([[rows[index] for index in some] for some in again])
                continue
            left = list(range(len(rows)))
            for index in range(len(plan.stages)):
                left = yield from self._stage(run, group, index, left)

    def _begin(self, run: Attempt, rows: list[Row], plan: SamplingPlan, upcoming: list[Row]) -> Group:
        """The group's prompts encoded, those that come next on their way, and its rows ready to go."""
        run.phase = "text_encode"
        ahead, self._texts_ahead = self._texts_ahead, None
        if ahead is not None and ahead[0] == tuple(rows):
            encoding = ahead[1]
        else:
            encoding = self._beside["text"].submit(self._text, rows)
        if self.engine.overlaps and upcoming and not run.careful:
            self._texts_ahead = tuple(upcoming), self._beside["text"].submit(self._text, upcoming)
        encoded, begin, seconds = encoding.result()
        timings = [self._timing(run, run.groups, "text_encode", rows, begin, seconds)]
        run.phase = "denoise"
        seeds = [row.seed for row in rows]
        trajectories = self.engine.begin(plan, encoded, seeds, self.spec.sampling)
        self._note(run, timings)
        run.groups += 1
        count = len(rows)
        return Group(run.groups - 1, rows, plan, trajectories, [[] for _ in rows], [0.0] * count)

    def _text(self, rows: Sequence[Row]) -> tuple[Any, float, float]:
        """(encoded prompts, when that began, seconds); in the one thread that uses `_texts`."""
        begin = time.time()
        prompts, negatives = [row.prompt for row in rows], [row.negative_prompt for row in rows]
        encoded = self.engine.encode(prompts, negatives, self.spec.sampling, known=self._texts)
        return encoded, begin, time.time() - begin

    def _encode_all(self, run: Attempt, rows: Sequence[Row]) -> None:
        """Where the model's parts take turns on the device, the text encoders have theirs once a shard."""
        self._texts.most = max(TEXTS, 2 * len(rows))
        try:
            _, begin, seconds = self._beside["text"].submit(self._text, rows).result()
        except Exception as error:  # noqa: BLE001 - met again, and judged, with the group that it comes from
            _log.info("the shard's prompts are encoded group by group: %s", first_line(error))
            return
        start_s = begin - run.started
        self._note(run, [Timing(None, "text_encode", len(rows), seconds=seconds, start_s=start_s)])

    def _stage(
        self, run: Attempt, group: Group, index: int, rows: list[int]
    ) -> Generator[Event, None, list[int]]:
        """Take rows of a group through a stage, in batches, or in ever smaller ones where that does not go.
        Returns the rows that are left; the others are rejected."""
        stage, full = group.plan.stages[index], group.plan.stages[-1]
        waiting, again, left = list(rows), list[list[int]](), list[int]()
        while waiting or again:
            self._go_on(run)
            if again:
                batch = again.pop()
            else:
                count = self._sizes.next(stage, full)
                batch, waiting = waiting[:count], waiting[count:]
            most = self._sizes.limit(stage, len(batch))
            if most < len(batch):  # its other half was found not to fit
                again.append(batch[most:])
                batch = batch[:most]
            yield from self._started(run, [group.rows[row] for row in batch])
            run.phase = "denoise"
            try:
                self._denoise(run, group, index, batch)
            except Exception as error:  # noqa: BLE001 - the row boundary: it becomes data
                ended, smaller = self._after(run, batch, error, stage)
                again += reversed(smaller)
                self._reject(run, [group.rows[row] for row in ended], error)
                yield from self._ended(run, [group.rows[row] for row in ended])
                continue
            left += batch
            if stage is full:
                yield from self._decode(run, group, batch)
            yield from self._reap()
        return sorted(left)

    def _denoise(self, run: Attempt, group: Group, index: int, batch: list[int]) -> None:
        then, timings, waiting = time.time(), list[Timing](), list(batch)
        for report in group.trajectories.run(index, batch):
            some = waiting[: report.rows]  # an engine may take fewer at once, in the same order
            grid = {"height": report.height, "width": report.width, "tokens": report.tokens}
            rows = [group.rows[row] for row in some]
            timing = self._timing(
                run, group.number, report.kind, rows, then, report.seconds, steps=report.steps, **grid
            )
            timings.append(timing)
            then += report.seconds
            share = report.seconds / report.rows
            for row in some:
                group.denoise_seconds[row] += share
            if report.kind == "denoise":
                waiting = waiting[report.rows :]
                self._sizes.done(group.plan.stages[index], report.rows, report.seconds)
                for row in some:
                    group.stages[row].append(StageTime(**grid, steps=report.steps, seconds=share))
        self._note(run, timings)

    def _decode(self, run: Attempt, group: Group, batch: list[int]) -> Iterator[Event]:
        """Start on a batch's pictures, once those of the batch before are there."""
        yield from self._decoded(run)
        future = self._beside["decode"].submit(self._media, group, batch)
        run.decoding = group, batch, future
        if run.careful or not self.engine.overlaps:
            yield from self._decoded(run)

    def _decoded(self, run: Attempt) -> Iterator[Event]:
        """Wait for the pictures that are being decoded, if any; fewer at a time where that does not go."""
        if run.decoding is None:
            return
        (group, batch, future), run.decoding = run.decoding, None
        todo = [batch]
        while todo:
            batch = todo.pop()
            run.phase = "vae_decode"
            yield from self._wait(run, future)
            try:
                self._keep(run, group, batch, future.result())
                ended = batch
            except Exception as error:  # noqa: BLE001 - the row boundary: it becomes data
                ended, again = self._after(run, batch, error)
                self._reject(run, [group.rows[row] for row in ended], error)
                todo += reversed(again)
            if todo:
                future = self._beside["decode"].submit(self._media, group, todo[-1])
            yield from self._ended(run, [group.rows[row] for row in ended])

    def _media(self, group: Group, batch: list[int]) -> Decoded:
        begin = time.time()
        latents = group.trajectories.latents(batch)
        media = self.engine.decode(group.plan, latents)
        assert len(media) == len(batch), f"{len(media)} pictures of {len(batch)} rows"
        kept = arrays(latents) if self.spec.output.latents else [None] * len(batch)
        return Decoded(media, kept, begin, time.time() - begin)

    def _keep(self, run: Attempt, group: Group, batch: list[int], decoded: Decoded) -> None:
        """Hand a batch's pictures to the threads that encode them."""
        full = group.plan.stages[-1]
        grid = {"height": full.height, "width": full.width, "tokens": full.tokens}
        rows = [group.rows[row] for row in batch]
        timing = self._timing(run, group.number, "vae_decode", rows, decoded.begin, decoded.seconds, **grid)
        self._note(run, [timing])
        for row, medium, latents in zip(batch, decoded.media, decoded.latents, strict=True):
            picture = Picture(
                row=group.rows[row],
                plan=group.plan,
                group=group.number,
                stages=tuple(group.stages[row]),
                denoise_seconds=group.denoise_seconds[row],
                latents=latents,
                encoding=self._encoders.submit(self._encode, medium),
            )
            run.pictures.append(picture)
        waiting = [picture.encoding for picture in run.pictures[: -2 * len(batch)]]
        if waiting:  # pictures not yet encoded are large: at most two batches of them
            wait(waiting)

    def _encode(self, medium: Any) -> tuple[bytes, float, float]:
        begin = time.time()
        return encode_media(medium, self.spec.output), begin, time.time()

    def _after(
        self, run: Attempt, batch: list[int], error: Exception, stage: Stage | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """What a batch's exception asks for: (rows to reject, batches to try again). `stage`: the one that it
        was in, whose batches are too large if there was not enough memory."""
        failure, half = Failure.of(error, run.phase), (len(batch) + 1) // 2
        if failure.verdict is Verdict.HALVE_BATCH:
            error.__traceback__ = None  # its frames hold the batch's tensors
            self._free_memory()
            if stage is not None and len(batch) > 1:
                half = self._sizes.failed(stage, len(batch))
                _log.warning(
                    "out of memory with %d rows on the %d x %d grid; %d a batch from now on",
                    *(len(batch), stage.height, stage.width, half),
                )
        elif failure.verdict is Verdict.REJECT_ROW:
            bad = [row for row in batch if row in getattr(error, "rows", ())]
            good = [row for row in batch if row not in bad]
            if bad:
                return bad, [good] if good else []
        else:
            raise Failed(failure) from error
        if len(batch) == 1:
            return batch, []
        return [], [batch[k : k + half] for k in range(0, len(batch), half)]

    def _reject(self, run: Attempt, rows: Iterable[Row], error: Exception) -> None:
        phase = error.phase if isinstance(error, RowError) else run.phase
        for row in rows:
            name, message = type(error).__name__, first_line(error)
            _log.info("row %r is rejected in %s: %s: %s", row.row_id, phase, name, message)
            run.rejects.append(reject_of(row, name, message, phase, run.assignment.attempt))

    def _in_thread(self, run: Attempt) -> tuple[int, list[Reject]]:
        with about(run.shard, run.assignment.attempt):
            return self._commit(run)

    def _commit(self, run: Attempt) -> tuple[int, list[Reject]]:
        """In a thread: (rows, rejects) of the part, which is ours unless another was there first."""
        assert run.read is not None
        assert self.plan is not None
        assert self.store is not None
        before = len(run.timings)
        made, rejects = self._gather(run)
        part = build_part(
            self.spec,
            self.plan,
            self.plan.shard(run.shard),
            attempt=AttemptFacts(
                id=run.id,
                worker=self.label,
                device=str(self.engine.device),
                node=self.node,
                started=run.started,
                retry=0 if self.retry is None else self.retry.number,
            ),
            made=made,
            rejects=rejects,
            passthrough=run.read.passthrough,
            first_row=run.read.first_row,
            timings=run.timings,
            kind=self.kind,
        )
        once = part.footer.timings[before:]
        upload = create_part(self.store, part)
        self._on_timings(once if upload is None else (*once, upload))
        if upload is not None:
            if self._derived is not None:
                wait([self._derived])  # one at a time: more would pile up where the store is slow
            self._derived = self._deriver.submit(self._derive, run, part.footer, upload)
        _log.info(
            "%d rows and %d rejects in %.1f s%s",
            len(made),
            len(rejects),
            time.time() - run.started,
            ", and another attempt was first" if upload is None else "",
        )
        return len(made) + len(rejects), rejects

    def _derive(self, run: Attempt, footer: Footer, upload: Timing) -> None:
        """In a thread, after the commit, so that what fails here costs no row: the end of the run makes it
        again from the part (`JobFolder.repair_derived`)."""
        assert self.store is not None
        with about(run.shard, run.assignment.attempt):
            try:
                write_derived(self.store, footer, [upload])
            except Exception:  # noqa: BLE001 - see above
                _log.warning("its timings are not written yet", exc_info=True)

    def _gather(self, run: Attempt) -> tuple[list[Made], list[Reject]]:
        """What an attempt made and rejected, once all its pictures are encoded."""
        made: list[Made] = []
        spans: dict[int, list[tuple[str, float, float]]] = {}
        rejects = list(run.rejects)
        for picture in run.pictures:
            row, plan = picture.row, picture.plan
            try:
                data, begin, end = picture.encoding.result()
            except Exception as error:  # the row boundary again
                failure = Failure.of(error, "image_encode")
                if failure.verdict is not Verdict.REJECT_ROW:
                    raise
                attempt = run.assignment.attempt
                rejects.append(reject_of(row, failure.error_class, failure.message, "image_encode", attempt))
                continue
            spans.setdefault(picture.group, []).append((row.row_id, begin, end))
            made.append(
                Made(
                    row=row,
                    data=data,
                    height_px=plan.height_px,
                    width_px=plan.width_px,
                    num_steps=plan.num_steps,
                    stages=picture.stages,
                    denoise_seconds=picture.denoise_seconds,
                    latents=picture.latents,
                    delta=plan.delta,
                )
            )
        run.pictures.clear()
        for group, span in spans.items():
            begin = min(begin for _, begin, _ in span)
            seconds = max(end for _, _, end in span) - begin
            ids = tuple(row_id for row_id, _, _ in span)
            start_s = begin - run.started
            run.timings.append(
                Timing(group, "image_encode", len(span), seconds=seconds, start_s=start_s, row_ids=ids)
            )
        return made, rejects

    # Between batches.

    def _started(self, run: Attempt, rows: Sequence[Row]) -> Iterator[Event]:
        """Name the rows that are in flight from now on: these, and those whose pictures are being decoded.
        Where they are the same as before, still say that the attempt goes on: what comes next takes time."""
        decoding = run.decoding[0].ids(run.decoding[1]) if run.decoding else ()
        ids = (*decoding, *(row.row_id for row in rows))
        if ids != run.named:
            run.named = ids
            yield RowsStarted(self.worker, run.shard, run.assignment.attempt, ids)
        else:
            yield self._alive(run)

    def _ended(self, run: Attempt, rows: Sequence[Row]) -> Iterator[Event]:
        if rows:
            ids = tuple(row.row_id for row in rows)
            run.named = tuple(row_id for row_id in run.named if row_id not in ids)
            yield RowsDone(self.worker, run.shard, run.assignment.attempt, ids)

    def _timing(
        self,
        run: Attempt,
        group: int,
        stage: str,
        rows: Sequence[Row],
        begin: float,
        seconds: float,
        **grid: int,
    ) -> Timing:
        """A line of the timings for some of a group's rows; `begin` in seconds since 1970."""
        ids = tuple(row.row_id for row in rows)
        start_s = begin - run.started  # below 0 where it began beside the shard before
        return Timing(group, stage, len(rows), seconds=seconds, start_s=start_s, row_ids=ids, **grid)

    def _note(self, run: Attempt, timings: Sequence[Timing]) -> None:
        run.timings += timings
        self._on_timings(timings)

    def _go_on(self, run: Attempt) -> None:
        if self.draining or run.cancelled():
            raise Returned

    def _alive(self, run: Attempt) -> ShardAlive:
        return ShardAlive(self.worker, run.shard, run.assignment.attempt)

    def _failed(self, run: Attempt, failure: Failure) -> ShardFailed:
        _log.warning("failed in %s: %s", failure.phase, failure.traceback.rstrip())
        return ShardFailed(self.worker, run.shard, run.assignment.attempt, failure)

    def _wait(self, run: Attempt, future: Future[Any]) -> Iterator[Event]:
        """Until a thread is done, saying now and then that this attempt, and the commits, go on."""
        while not wait([future], timeout=ALIVE_S).done:
            yield self._alive(run)
            yield from (self._alive(other) for other, _ in self._commits if other is not run)

    def _reap(self) -> Iterator[Event]:
        """Tell of the commits that have ended."""
        for run, commit in [entry for entry in self._commits if entry[1].done()]:
            self._commits.remove((run, commit))
            error = commit.exception()
            event: Event
            if error is not None:
                event = self._failed(run, Failure.of(error, "commit"))
            else:
                rows, rejects = commit.result()
                reasons = tuple(sorted(Counter(reject.error_class for reject in rejects).items()))
                event = ShardCommitted(
                    self.worker, run.shard, run.assignment.attempt, rows, len(rejects), reasons
                )
            self._told.append(event)
            yield event

    def _free_memory(self) -> None:
        gc.collect()
        if str(self.engine.device).startswith("cuda"):
            import torch

            torch.cuda.empty_cache()
