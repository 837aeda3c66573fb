"""Pictures beside the device: one thread decodes a chunk's latents, others encode its files. Knows no stages.

    yield from pictures.submit_decode(attempt, batch, chunk)     # once those of the chunk before are there
    yield from pictures.collect_decoded(attempt)                 # the last ones

Where the engine does not overlap, the calling thread decodes, at once. The tour of a row's way continues in
worker/commits.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import get_ident
from typing import Any

import numpy as np

from overtone.cluster.dispatch import Event
from overtone.cluster.worker.attempt import Attempt, Batch, Decoded, Decoding, EncodedMedia, Picture
from overtone.cluster.worker.protocol import Engine
from overtone.cluster.worker.texts import executor_beside
from overtone.jobs.media import encode_media
from overtone.jobs.spec import Output
from overtone.progressive.errors import NonFinitePixels

ENCODERS = min(16, max(4, len(os.sched_getaffinity(0)) // 2 if hasattr(os, "sched_getaffinity") else 4))
"""Threads that encode pictures, at most: half the cores, for each keeps one busy
(`python -m overtone.cluster.bench.rate`), and the device's own thread needs one in time."""

Judge = Callable[[Attempt, list[int], Exception], tuple[list[int], list[list[int]]]]
"""Decides what a chunk's exception asks for: the rows to reject, and the chunks to try again."""


class Pictures:
    """Decodes and encodes what the device has denoised."""

    def __init__(self, output: Output, engine: Engine, judge: Judge) -> None:
        self._output, self._engine, self._judge = output, engine, judge
        self._decoder = executor_beside(engine, "decode")
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")

    def submit_decode(self, attempt: Attempt, batch: Batch, chunk: list[int]) -> Iterator[Event]:
        """Begin to decode a chunk's pictures, once those of the chunk before are there."""
        yield from self.collect_decoded(attempt)
        attempt.decoding = self._decoding(batch, chunk)
        if attempt.careful or not self._engine.overlaps:
            yield from self.collect_decoded(attempt)

    def collect_decoded(self, attempt: Attempt) -> Iterator[Event]:
        """Wait for the pictures that are being decoded, if any; where that fails, decode fewer at a time."""
        decoding, attempt.decoding = attempt.decoding, None
        if decoding is None:
            return
        batch, todo = decoding.batch, [decoding.chunk]
        while todo:
            chunk = todo.pop()
            attempt.phase = "vae_decode"
            yield from attempt.wait(decoding.future)
            try:
                self._submit_encode(attempt, batch, chunk, decoding.future.result())
                ended = chunk
            except Exception as error:  # noqa: BLE001 - the row boundary: it becomes data
                ended, again = self._judge(attempt, chunk, error)
                attempt.reject(batch.pick(ended), error)
                todo += reversed(again)
            if todo:
                decoding = self._decoding(batch, todo[-1])
            yield from attempt.end_rows(batch.pick(ended))

    def _decoding(self, batch: Batch, chunk: list[int]) -> Decoding:
        future: Future[Decoded] = self._decoder.submit(self._media_of, batch, chunk)
        return Decoding(batch, chunk, future)

    def _media_of(self, batch: Batch, chunk: list[int]) -> Decoded:
        """In the thread that decodes."""
        begin = time.time()
        latents = batch.trajectories.latents(chunk)
        try:
            media = self._engine.decode(batch.sampling_plan, latents)
        except NonFinitePixels as error:  # it counts the rows of the chunk, and the judge those of the batch
            raise NonFinitePixels([chunk[row] for row in error.rows]) from error
        assert len(media) == len(chunk), f"{len(media)} pictures of {len(chunk)} rows"
        kept = arrays(latents) if self._output.latents else [None] * len(chunk)
        return Decoded(media, kept, begin, time.time() - begin)

    def _submit_encode(self, attempt: Attempt, batch: Batch, chunk: list[int], decoded: Decoded) -> None:
        """Hand a chunk's pictures to the threads that encode them."""
        full = batch.sampling_plan.stages[-1]
        grid = {"height": full.height, "width": full.width, "tokens": full.tokens}
        ids, begin, seconds = batch.ids(chunk), decoded.begin, decoded.seconds
        attempt.record([attempt.timing(batch.number, "vae_decode", ids, begin, seconds, **grid)])
        for index, medium, latents in zip(chunk, decoded.media, decoded.latents, strict=True):
            picture = Picture(
                row=batch.rows[index],
                sampling_plan=batch.sampling_plan,
                batch=batch.number,
                stages=tuple(batch.stages[index]),
                denoise_seconds=batch.denoise_seconds[index],
                latents=latents,
                prompt_truncated=None if batch.truncated is None else batch.truncated[index],
                encoding=self._encoders.submit(self._encode, medium),
            )
            attempt.pictures.append(picture)
        waiting = [picture.encoding for picture in attempt.pictures[: -2 * len(chunk)]]
        if waiting:  # pictures not yet encoded are large: at most two chunks of them
            wait(waiting)

    def _encode(self, medium: Any) -> EncodedMedia:
        """In a thread that encodes."""
        begin = time.time()
        return EncodedMedia(encode_media(medium, self._output), begin, time.time(), get_ident())

    def close(self) -> None:
        self._decoder.shutdown(wait=True)
        self._encoders.shutdown(wait=True)


def arrays(latents: Any) -> list[np.ndarray | None]:
    """Each row's latents, [C, H, W] or [C, T, H, W], as float32 on the CPU."""
    if hasattr(latents, "detach"):
        latents = latents.detach().float().cpu().numpy()
    return list(np.asarray(latents, np.float32))
