"""An engine without a model, for tests: a picture is its seed's colour, and a prompt may ask for a disaster.

"!exit"            the process ends at once            "!raise"    RuntimeError
"!hang"            never comes back                    "!nan"      NaN latents, told by row
"!oom"             out of memory in a batch above 1    "!huge"     out of memory always
"!bug"             TypeError                           "!words"    the tokenizer raises
"!once PATH"       ends the process unless PATH exists, and creates it
"!until PATH"      ends the process unless PATH exists
"!slow SECONDS"    takes that long
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from overtone.jobs.spec import JobSpec
from overtone.progressive.cost import BY_TOKENS, StepCost
from overtone.progressive.families import FAMILIES
from overtone.progressive.schedule import SamplingPlan, plan_sampling
from overtone.progressive.settings import Sampling

CHANNELS = 4


class NotFinite(ValueError):
    """As `overtone.progressive.errors.NonFiniteLatents`, without torch."""

    def __init__(self, rows: Sequence[int], stage: int) -> None:
        super().__init__(f"latents of rows {list(rows)} are NaN")
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
    rows: int


def nothing(*_: Any) -> None:
    pass


@dataclass
class FakeEngine:
    """`step_s`: seconds a step takes. `fits`: rows that a batch may have, by the grid's height in cells.
    `on_encode`, `on_run` (also told the stage) and `on_decode`: told the prompts of each before it is done;
    `on_decode` is told how many."""

    step_s: float = 0.0
    fits: dict[int, int] = field(default_factory=dict)
    device: str = "cpu"
    family: Any = FAMILIES["tiny"]
    overlaps: bool = False
    alone: bool = False
    """Whether rows go through a stage one at a time."""
    on_encode: Callable[[tuple[str, ...]], None] = nothing
    on_run: Callable[[int, tuple[str, ...]], None] = nothing
    on_decode: Callable[[int], None] = nothing
    encoded: list[tuple[str, ...]] = field(default_factory=list)
    """Texts of each pass of the encoder, those that were known left out."""
    pictures: list[Any] = field(default_factory=list)
    """What rows of each batch start from (`progressive.pictures.Pictures`)."""
    runs: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    """Stage, counted from the last one, which is -1, and prompts of each batch."""

    @property
    def batches(self) -> list[tuple[str, ...]]:
        """Prompts of each batch on the full grid."""
        return [prompts for stage, prompts in self.runs if stage == -1]

    def row_by_row(self, sampling: Sampling) -> bool:
        return self.alone

    def plan(
        self, sampling: Sampling, *, height_px: int | None = None, width_px: int | None = None
    ) -> SamplingPlan:
        guided = (sampling.true_cfg_scale or 0) > 1
        self.family.check_guidance_interval(sampling, "always" if guided else "never")
        return plan_sampling(
            sampling,
            self.family,
            np.linspace(1, 0, (sampling.num_steps or 4) + 1).tolist(),
            height_px=height_px,
            width_px=width_px,
            step_cost=StepCost(BY_TOKENS.passes * (2 if guided else 1), BY_TOKENS.counts),
        )

    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        sampling: Sampling,
        *,
        known: MutableMapping[str, str] | None = None,
        pictures: Sequence[Any] | None = None,
    ) -> list[str]:
        if pictures is not None:
            self.pictures += pictures
        known = {} if known is None else known
        here = {prompt: known[prompt] for prompt in prompts if prompt in known}
        new = tuple(prompt for prompt in dict.fromkeys(prompts) if prompt not in here)
        if new:
            self.on_encode(new)
            self.encoded.append(new)
        if "!words" in prompts:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no such token")
        known.update(zip(new, new, strict=True))
        return list(prompts)

    def begin(
        self, plan: SamplingPlan, encoded: list[str], seeds: Sequence[int], sampling: Sampling
    ) -> FakeTrajectories:
        return FakeTrajectories(self, plan, encoded, list(seeds))

    def denoise(
        self, plan: SamplingPlan, encoded: list[str], seeds: Sequence[int], sampling: Sampling
    ) -> tuple[np.ndarray, list[Report]]:
        group, rows = self.begin(plan, encoded, seeds, sampling), range(len(seeds))
        reports = [report for index in range(len(plan.stages)) for report in group.run(index, rows)]
        return group.latents(rows), reports

    def decode(self, plan: SamplingPlan, latents: np.ndarray) -> list[Image.Image]:
        self.on_decode(len(latents))
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
        if what == "!until" and not Path(argument).exists():
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


class FakeTrajectories:
    """Rows on their way; each must go through the stages in order."""

    def __init__(self, engine: FakeEngine, plan: SamplingPlan, prompts: list[str], seeds: list[int]) -> None:
        self.engine, self.plan, self.prompts, self.seeds = engine, plan, prompts, seeds
        self.stage = [0] * len(seeds)

    def run(self, index: int, rows: Sequence[int]) -> list[Report]:
        stage, prompts = self.plan.stages[index], tuple(self.prompts[row] for row in rows)
        assert all(self.stage[row] == index for row in rows), f"{prompts} are not at stage {index}"
        self.engine.on_run(index - len(self.plan.stages), prompts)
        self.engine.runs.append((index - len(self.plan.stages), prompts))
        if index == 0:
            for prompt in prompts:
                self.engine._disaster(prompt, len(rows))
        if len(rows) > self.engine.fits.get(stage.height, len(rows)):
            raise MemoryError("out of memory")
        if bad := [row for row in rows if self.prompts[row] == "!nan"]:
            raise NotFinite(bad, index)
        grid = (stage.height, stage.width, stage.frames, stage.tokens)
        reports = []
        if index:
            sigma = stage.sigma_start
            reports.append(Report("expand", *grid, 0, 0.0, sigma, sigma, len(rows)))
        begin = time.perf_counter()
        time.sleep(self.engine.step_s * stage.steps)
        seconds, sigmas = time.perf_counter() - begin, (stage.sigma_start, stage.sigma_end)
        for row in rows:
            self.stage[row] += 1
        return [*reports, Report("denoise", *grid, stage.steps, seconds, *sigmas, len(rows))]

    def latents(self, rows: Sequence[int]) -> np.ndarray:
        full = self.plan.stages[-1]
        assert all(self.stage[row] == len(self.plan.stages) for row in rows)
        shape = (CHANNELS, full.height, full.width)
        drawn = [np.random.default_rng(self.seeds[row]).standard_normal(shape, np.float32) for row in rows]
        return np.stack(drawn)  # [B, C, H, W]


def started_at(pid: int | str) -> str:
    """When a process began, by the kernel's clock, which tells it from a later one of its number; "" where
    there is none."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def alive(pids: Path) -> list[int]:
    """The processes with an engine that are alive, of a folder that `Fakes` fills, and none that has got the
    number of a dead one."""
    return [int(path.name) for path in pids.iterdir() if started_at(path.name) == path.read_text()]


@dataclass(frozen=True)
class Fakes:
    """An engine factory: `run_job(spec, engine_factory=Fakes(step_s=0.01))`. Each engine leaves a file named
    after its process in `pids`, with `started_at` in it, for whoever wants to kill it."""

    step_s: float = 0.0
    pids: str | None = None
    family: str = "tiny"

    def __call__(self, spec: JobSpec) -> FakeEngine:
        if self.pids is not None:
            Path(self.pids, str(os.getpid())).write_text(started_at(os.getpid()))
        return FakeEngine(self.step_s, family=FAMILIES[self.family])
