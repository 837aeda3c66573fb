"""Whole denoising loops timed, setting by setting, in turns. Knows no command line and shows nothing."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from overtone.progressive.bench.cases import FULLRES, Case, chosen_settings, label
from overtone.progressive.bench.models import random_text
from overtone.progressive.bench.tables import Measurement
from overtone.progressive.compile import COMPILE, Compile, compile_blocks
from overtone.progressive.engine import Encoded, Engine, text_arguments
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import Sampling


def measure(
    engine: Engine,
    name: str,
    case: Case,
    *,
    settings: Sequence[dict[str, Any]] | None = None,
    batch_sizes: Sequence[int] = (1,),
    compile: Sequence[Compile] = ("off",),
    repeats: int = 3,
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Time `fullres` and the settings (unset: the case's and `AUTO`), compiled and not, at each batch size.

    Each setting's grids first run two steps that do not count. The repeats of the settings take turns, so
    that a machine that slows down does so for all of them.
    """
    chosen = [FULLRES, *(chosen_settings(case) if settings is None else settings)]
    samplings = [case.sampling(**setting) for setting in chosen]
    plans = [engine.plan(sampling) for sampling in samplings]
    grids = {stage.grid for plan in plans for stage in plan.stages}
    modes = sorted(compile, key=COMPILE.index)  # what is compiled stays so
    measured: list[Measurement] = []
    for mode in modes:
        compile_blocks(engine, mode, shapes=len(grids) * len(batch_sizes))
        for rows in batch_sizes:
            text = random_text(engine, case.text_tokens, rows)
            seconds: list[list[float]] = [[] for _ in plans]
            memory = [0.0] * len(plans)
            for i, (plan, sampling) in enumerate(zip(plans, samplings, strict=True)):
                on_progress(f"{name}: {label(chosen[i])}, batch {rows}, compile {mode}: warming up")
                for _ in range(2):
                    engine.denoise(plan.one_step_each(), text, list(range(rows)), sampling)
            for repeat in range(repeats):
                for i, (plan, sampling) in enumerate(zip(plans, samplings, strict=True)):
                    on_progress(f"{name}: {label(chosen[i])}, batch {rows}, compile {mode}: {repeat + 1}")
                    took, held = timed(
                        engine.device, partial(engine.denoise, plan, text, list(range(rows)), sampling)
                    )
                    seconds[i].append(took)
                    memory[i] = max(memory[i], held)
            full = statistics.median(seconds[0])
            plain = measured[0].seconds / measured[0].batch_size if measured else full / rows
            for setting, plan, times, held in zip(chosen, plans, seconds, memory, strict=True):
                median = statistics.median(times)
                measured.append(
                    Measurement(
                        case=name,
                        setting=label(setting),
                        split=plan.split,
                        batch_size=rows,
                        compile=mode,
                        seconds=median,
                        spread_s=max(times) - min(times),
                        rows_per_s=rows / median,
                        saving=full / median,
                        saving_over_plain=plain * rows / median,
                        ideal=plan.saving,
                        share_of_ideal=full / median / plan.saving,
                        memory_gib=held,
                    )
                )
    return measured


def own_call(engine: Engine, plan: SamplingPlan, text: Encoded, sampling: Sampling) -> Callable[[], Any]:
    """The pipeline called as its own documentation does, with its own noise and its own scheduler."""
    call = engine.call
    arguments = call.size(plan.stages[-1].grid, plan.num_frames, plan.num_steps)
    arguments |= call.arguments(sampling) | text_arguments(call, text, sampling)
    seeds = range(len(text))

    def loop() -> None:
        generators = [torch.Generator(engine.device).manual_seed(seed) for seed in seeds]
        engine.pipe(**arguments, generator=generators)

    return loop


def timed(device: torch.device, loop: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, memory in GiB) of one loop; on a GPU by the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        loop()
        return time.perf_counter() - start, _peak_gib()
    torch.cuda.reset_peak_memory_stats(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    loop()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated(device) / 2**30


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
