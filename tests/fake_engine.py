"""An engine without a model, for tests: a picture is its seed's colour, and a prompt may ask for a disaster.

"!exit"            the process ends at once            "!raise"    RuntimeError
"!hang"            never comes back                    "!nan"      NaN latents, told by row
"!oom"             out of memory in a batch above 1    "!huge"     out of memory always
"!bug"             TypeError                           "!words"    the tokenizer raises
"!once PATH"       ends the process unless PATH exists, and creates it
"!slow SECONDS"    takes that long
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.spec import JobSpec
from progressive.families import FAMILIES
from progressive.schedule import SamplingPlan, plan_sampling
from progressive.settings import Sampling

CHANNELS = 4


class NotFinite(ValueError):
    """As `progressive.engine.NonFiniteLatents`, without torch."""

    def __init__(self, rows: Sequence[int], stage: int) -> None:
        super().__init__(f"latents of batch rows {list(rows)} are NaN")
        self.rows, self.stage = list(rows), stage


@dataclass(frozen=True)
class Report:
    kind: str
    height: int
    width: int
    frames: int
    tokens: int
    steps: int
    seconds: float
    sigma_start: float
    sigma_end: float


@dataclass
class FakeEngine:
    """`step_s`: seconds a step takes. `fits`: rows that a batch may have, by height in pixels."""

    step_s: float = 0.0
    fits: dict[int, int] = field(default_factory=dict)
    device: str = "cpu"
    family: Any = FAMILIES["tiny"]
    batches: list[tuple[str, ...]] = field(default_factory=list)

    def plan(
        self, sampling: Sampling, *, height_px: int | None = None, width_px: int | None = None
    ) -> SamplingPlan:
        sigmas = np.linspace(1, 0, (sampling.num_steps or 4) + 1).tolist()
        return plan_sampling(sampling, self.family, sigmas, height_px=height_px, width_px=width_px)

    def encode(
        self, prompts: Sequence[str], negatives: Sequence[str | None], sampling: Sampling
    ) -> list[str]:
        self.batches.append(tuple(prompts))
        if "!words" in prompts:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no such token")
        return list(prompts)

    def denoise(
        self, plan: SamplingPlan, encoded: list[str], seeds: Sequence[int], sampling: Sampling
    ) -> tuple[np.ndarray, list[Report]]:
        for prompt in encoded:
            self._disaster(prompt, len(encoded))
        if len(encoded) > self.fits.get(plan.height_px, len(encoded)):
            raise MemoryError("out of memory")
        if bad := [k for k, prompt in enumerate(encoded) if prompt == "!nan"]:
            raise NotFinite(bad, 0)
        reports = []
        for index, stage in enumerate(plan.stages):
            grid = (stage.height, stage.width, stage.frames, stage.tokens)
            if index:
                reports.append(Report("expand", *grid, 0, 0.0, stage.sigma_start, stage.sigma_start))
            begin = time.perf_counter()
            time.sleep(self.step_s * stage.steps)
            seconds = time.perf_counter() - begin
            reports.append(Report("denoise", *grid, stage.steps, seconds, stage.sigma_start, stage.sigma_end))
        full = plan.stages[-1]
        latents = [
            np.random.default_rng(seed).standard_normal((CHANNELS, full.height, full.width), np.float32)
            for seed in seeds
        ]
        return np.stack(latents), reports  # [B, C, H, W]

    def decode(self, plan: SamplingPlan, latents: np.ndarray) -> list[Image.Image]:
        colours = (128 + 40 * latents[:, :3, 0, 0]).clip(0, 255).astype(np.uint8)  # [B, 3]
        return [
            Image.new("RGB", (plan.width_px, plan.height_px), tuple(colour)) for colour in colours.tolist()
        ]

    def _disaster(self, prompt: str, rows: int) -> None:
        what, _, argument = prompt.partition(" ")
        if what == "!exit":
            os._exit(1)
        if what == "!once" and not Path(argument).exists():
            Path(argument).touch()
            os._exit(1)
        if what == "!raise":
            raise RuntimeError("this prompt raises")
        if what == "!bug":
            raise TypeError("no such argument")
        if what == "!hang":
            time.sleep(3600)
        if what == "!slow":
            time.sleep(float(argument))
        if what == "!huge" or (what == "!oom" and rows > 1):
            raise MemoryError("out of memory")


@dataclass(frozen=True)
class Fakes:
    """An engine factory: `run_job(spec, engine_factory=Fakes(step_s=0.01))`. Each engine leaves a file named
    after its process in `pids`, for whoever wants to kill it."""

    step_s: float = 0.0
    pids: str | None = None

    def __call__(self, spec: JobSpec) -> FakeEngine:
        if self.pids is not None:
            Path(self.pids, str(os.getpid())).touch()
        return FakeEngine(self.step_s)
