"""An engine that makes nothing but the pace, and what it makes it of: pictures, a job. Measures nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from overtone.cluster.bench.noop import NoopEngine, NoopTrajectories
from overtone.jobs.spec import JobSpec
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import Sampling

_MODEL = "black-forest-labs/FLUX.1-schnell"  # its configuration is known offline; nothing of it is loaded


class PacedEngine(NoopEngine):
    """An engine whose pictures take as long as its rate says, and no CPU."""

    overlaps = True  # decodes beside the next batch, as on a GPU

    def __init__(self, pictures: Sequence[Image.Image], rate: float) -> None:
        self._pictures: Iterator[Image.Image] = cycle(pictures)
        self._rate = rate
        self.made_s = 0.0
        """In which it made pictures."""

    def begin(
        self, plan: SamplingPlan, encoded: list[str], seeds: Sequence[int], sampling: Sampling
    ) -> PacedTrajectories:
        return PacedTrajectories(self)

    def pace(self, rows: int) -> None:
        """Take the time of so many pictures."""
        time.sleep(rows / self._rate)
        self.made_s += rows / self._rate

    def decode(self, plan: SamplingPlan, latents: Any) -> list[Image.Image]:
        return list(islice(self._pictures, len(latents)))


class PacedTrajectories(NoopTrajectories):
    """Rows that take time and nothing else."""

    def __init__(self, engine: PacedEngine) -> None:
        self._engine = engine

    def run(self, index: int, rows: Sequence[int]) -> list[Any]:
        self._engine.pace(len(rows))
        return []


def smooth_noise(seed: int, side_px: int) -> Image.Image:
    """A picture whose amplitudes fall with frequency to the power of 1.5, and whose colours go together."""
    drawn = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(side_px) * side_px, np.fft.rfftfreq(side_px) * side_px
    frequency = np.hypot(rows[:, None], columns[None])
    frequency[0, 0] = 1.0
    shape = (3, *frequency.shape)
    spectrum = (drawn.standard_normal(shape) + 1j * drawn.standard_normal(shape)) / frequency**1.5
    planes = np.fft.irfft2(spectrum, s=(side_px, side_px))  # [3, H, W]
    planes = planes / planes.std()
    colours = np.array([[1.0, 0.9, 0.8], [0.2, 0.1, -0.3], [0.1, -0.2, 0.1]])  # light, then two of colour
    levels = 128 + 45 * np.einsum("phw,pc->hwc", planes, colours)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def paced_job(
    folder: Path, *, rows: int, shard_rows: int, side_px: int, output: str | None, endpoint_url: str | None
) -> JobSpec:
    """A job of `rows` rows in whole shards, and one shard more. Its prompt table is written to `folder`, and
    so is its output, unless told otherwise."""
    shards = max(1, -(-rows // shard_rows)) + 1
    prompts = [f"number {i}" for i in range(shards * shard_rows)]
    pq.write_table(pa.table({"prompt": prompts}), folder / "prompts.parquet")
    place = {"path": output or str(folder / "out")}
    return JobSpec.model_validate(
        {
            "name": "bench",
            "model": _MODEL,
            "prompts": str(folder / "prompts.parquet"),
            "sampling": {"mode": "fullres", "height": side_px, "width": side_px},
            "shards": shard_rows,
            "workers": {"count": 1, "num_gpus": 0, "batch_size": 8},
            "output": place if endpoint_url is None else place | {"endpoint_url": endpoint_url},
        }
    )
