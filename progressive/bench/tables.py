"""A measurement, and what is shown of many: tables in Markdown, data for JSON. Measures nothing."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

from overtone.progressive.bench.cases import CASES, FULLRES, Case, chosen_settings, label
from overtone.progressive.checkpoints import describe
from overtone.progressive.compile import Compile
from overtone.progressive.cost import step_cost
from overtone.progressive.families import FAMILIES
from overtone.progressive.schedule import plan_sampling


@dataclass(frozen=True)
class Measurement:
    """One setting of one case. Seconds are of a whole denoising loop for `batch_size` rows."""

    case: str
    setting: str
    split: str
    """Steps @ latent grid of each stage."""
    batch_size: int
    compile: Compile
    seconds: float
    """Median of the repeats."""
    spread_s: float
    """Slowest minus fastest of the repeats."""
    rows_per_s: float
    saving: float
    """Over `fullres` at the same batch size and compile mode."""
    saving_over_plain: float
    """Over the case's first `fullres`, per row: uncompiled and one row at a time, unless told otherwise."""
    ideal: float
    """FLOPs of as many steps at full resolution over the plan's, text and attention included."""
    share_of_ideal: float
    """saving / ideal."""
    memory_gib: float
    """Most that the device held during the loop; on a CPU, the most that the process held so far."""


_COLUMNS: dict[str, Callable[[Measurement], str]] = {
    "case": lambda m: m.case,
    "setting": lambda m: m.setting,
    "steps @ grid": lambda m: m.split,
    "batch": lambda m: str(m.batch_size),
    "compile": lambda m: m.compile,
    "seconds": lambda m: f"{m.seconds:.2f} ± {m.spread_s / 2:.2f}",
    "rows/s": lambda m: f"{m.rows_per_s:.3g}",
    "saving": lambda m: f"{m.saving:.2f}x",
    "over plain": lambda m: f"{m.saving_over_plain:.2f}x",
    "ideal": lambda m: f"{m.ideal:.2f}x",
    "reached": lambda m: f"{m.share_of_ideal:.0%}",
    "GiB": lambda m: f"{m.memory_gib:.1f}",
}


def table(measured: Sequence[Measurement]) -> str:
    """Markdown, its columns padded so that a terminal shows it well too."""
    return markdown([list(_COLUMNS), *([cell(one) for cell in _COLUMNS.values()] for one in measured)])


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head, the columns padded so that a terminal shows it well too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |" for row in rows
    )


def expected(name: str, case: Case) -> list[tuple[str, str, str, float, float]]:
    """(case, setting, steps @ grid, cost in full-size steps, ideal saving) of `fullres`, the published
    settings and `AUTO`, from the model's schedule and configuration alone: no device, no weights."""
    checkpoint = describe(case.model).with_scheduler(**case.scheduler)
    sigmas = checkpoint.sigmas(case.num_steps, case.height_px, case.width_px)
    rows = []
    for setting in (FULLRES, *chosen_settings(case)):
        sampling, family = case.sampling(**setting), FAMILIES[checkpoint.family]
        cost = step_cost(checkpoint.transformer_class, checkpoint.transformer, family, sampling)
        plan = plan_sampling(sampling, family, sigmas, step_cost=cost)
        rows.append((name, label(setting), plan.split, plan.cost, plan.saving))
    return rows


def expected_table(names: Sequence[str]) -> str:
    """What is known of the table of `measure` before anything is measured, in Markdown."""
    rows = [["case", "setting", "steps @ grid", "full-size steps", "ideal"]]
    for name in names:
        for case, setting, split, cost, ideal in expected(name, CASES[name]):
            rows.append([case, setting, split, f"{cost:.1f}", f"{ideal:.2f}x"])
    return markdown(rows)


def report(measured: Sequence[Measurement], device: torch.device, dtype: str) -> dict[str, Any]:
    """All figures as data, with what they were measured on."""
    return measured_on(device, dtype) | {"measurements": [asdict(one) for one in measured]}


def measured_on(device: torch.device, dtype: str) -> dict[str, Any]:
    """The device's name, and the rest that figures depend on."""
    cuda = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": dtype,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }
