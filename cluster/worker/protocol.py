"""What a runner asks of an engine, as protocols: tests and benchmarks bring their own. Knows no torch."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import Sampling


class StageReport(Protocol):
    """What an engine reports of one stage of some rows; sizes in latent cells."""

    @property
    def kind(self) -> Literal["denoise", "expand"]: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def rows(self) -> int: ...


class Trajectories(Protocol):
    """Rows on their way through the stages, as `progressive.engine.Trajectories`."""

    def run(self, index: int, rows: Sequence[int]) -> Sequence[StageReport]: ...
    def latents(self, rows: Sequence[int]) -> Any: ...


class Engine(Protocol):
    """What a runner asks of `progressive.engine.Engine`; tests bring their own."""

    @property
    def device(self) -> Any: ...
    @property
    def family(self) -> Any: ...
    @property
    def overlaps(self) -> bool: ...
    def row_by_row(self, sampling: Sampling) -> bool: ...
    def plan(
        self, sampling: Sampling, *, height_px: int | None = None, width_px: int | None = None
    ) -> SamplingPlan: ...
    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        sampling: Sampling,
        *,
        known: MutableMapping[str, Any] | None = None,
    ) -> Any: ...
    def begin(
        self, plan: SamplingPlan, encoded: Any, seeds: Sequence[int], sampling: Sampling
    ) -> Trajectories: ...
    def denoise(
        self, plan: SamplingPlan, encoded: Any, seeds: Sequence[int], sampling: Sampling
    ) -> tuple[Any, Sequence[StageReport]]: ...
    def decode(self, plan: SamplingPlan, latents: Any) -> Sequence[Any]: ...


@runtime_checkable
class Compiles(Protocol):
    """An engine that compiles for the shapes it will meet, as `progressive.compile.CompiledEngine`."""

    def warm_each(
        self,
        plan: SamplingPlan,
        batch_sizes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        search: bool = False,
    ) -> Iterator[Any]: ...


@runtime_checkable
class Warmed(Protocol):
    """What such an engine says of one size of one stage, as `progressive.compile.WarmUp`."""

    @property
    def stage(self) -> Any: ...
    @property
    def rows(self) -> int: ...
    @property
    def rows_per_s(self) -> float: ...


class Meter(Protocol):
    """A device's memory in bytes."""

    def available(self) -> int:
        """What this process may have, with what it has."""

    def held(self) -> int:
        """What it has in tensors now."""

    def begin(self) -> None:
        """From now on the peak counts."""

    def peak(self) -> int:
        """Most that it had in tensors since."""


@runtime_checkable
class OwnDevice(Protocol):
    """An engine that tells itself what torch would be asked about its device."""

    @property
    def device_name(self) -> str: ...
    @property
    def meter(self) -> Meter: ...


@runtime_checkable
class Guided(Protocol):
    """An engine that tells how its pipeline is guided, as `progressive.engine.Engine`."""

    def guidance(self, sampling: Sampling) -> dict[str, float | None]: ...


def compile_for(engine: Engine, sampling_plan: SamplingPlan, rows: int, sampling: Sampling) -> None:
    """Let an engine that compiles do so for chunks of up to this many rows, where it has not yet."""
    if isinstance(engine, Compiles):
        for _ in engine.warm_each(sampling_plan, [(rows,)] * len(sampling_plan.stages), sampling):
            pass


def device_name(engine: Engine) -> str:
    """The kind of processor that an engine computes on, on which the last bits of a sample depend; empty
    where there is no torch, as in tests."""
    if isinstance(engine, OwnDevice):
        return engine.device_name
    torch = sys.modules.get("torch")
    if torch is None:
        return ""
    if str(engine.device).startswith("cuda"):
        return str(torch.cuda.get_device_name(engine.device))
    return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
