"""`--suite` of a benchmark's command line: one sitting, or what it would measure. Times nothing itself."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil

from overtone.progressive.bench.estimates import PRIORS, Estimates
from overtone.progressive.bench.process import LabProcess
from overtone.progressive.bench.records import Record, Records, denoising_table, over_own_calls
from overtone.progressive.bench.sitting import Sitting
from overtone.progressive.bench.suite import Line, baselines
from overtone.progressive.bench.tables import markdown


@dataclass(frozen=True)
class Suites:
    """The suites `gpu` and `tiny` of one benchmark."""

    lines: Callable[[str], list[Line]]
    """Of the suite with this name, the most telling first."""
    serve: Callable[..., None]
    """Runs in the process that measures: (connection, *arguments)."""
    arguments: tuple[Any, ...]
    repeats: int = 1
    """Loops that it times of each line."""
    bases: Callable[[Line], Sequence[Line]] = baselines
    compare: Callable[[Record, Sequence[Record | None]], Record] = over_own_calls
    table: Callable[[Iterable[Record]], str] = denoising_table
    others: tuple[str, ...] = ()
    """Options of the command that are not for a suite."""


def add_suite(parser: argparse.ArgumentParser) -> None:
    """What a benchmark's command takes for a suite."""
    group = parser.add_argument_group(
        "suite", "all lines of a suite, the most telling first, as far as a budget goes"
    )
    group.add_argument(
        "--suite", choices=("gpu", "tiny"), help="`tiny` is the embedded model's, and fits a CPU"
    )
    group.add_argument("--to", metavar="FILE.jsonl", help="a line for each line; FILE.md gets the table")
    group.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="(default: 540)")
    group.add_argument(
        "--skip-done", action="store_true", help="go on with the lines that the file does not have yet"
    )


def run_suite(
    parser: argparse.ArgumentParser,
    given: argparse.Namespace,
    suites: Suites,
    device: str,
    *,
    only: Sequence[str] | None = None,
    plan: bool = False,
) -> None:
    """Measure what the budget allows of the lines whose names match, and say what is left; or, of a `plan`,
    what there is. Exits with 3 where the same command goes on."""
    lines, kind = _chosen(parser, given, suites, only), device.partition(":")[0]
    if plan:
        of = "cuda" if given.suite == "gpu" else kind
        print(_plan(lines, Estimates(PRIORS[of]), suites.repeats))
        return
    if kind == "cpu" and given.suite == "gpu":
        parser.error("--suite gpu needs a GPU; a CPU runs --suite tiny, or --suite gpu --plan")
    if given.to is None:
        parser.error("--suite needs --to FILE.jsonl, where each line is kept when it is known")
    try:
        records = Records(Path(given.to), suites.table)
    except ValueError as error:
        parser.error(str(error))
    with LabProcess(suites.serve, *suites.arguments) as lab:
        sitting = Sitting(
            lab,
            records,
            Estimates(PRIORS[kind]),
            budget_s=given.budget,
            spent_s=time.time() - psutil.Process().create_time(),
            repeats=suites.repeats,
            skip_done=given.skip_done,
            bases=suites.bases,
            compare=suites.compare,
            on_progress=lambda text: print(text, file=sys.stderr, flush=True),
        )
        try:
            left = sitting.go(lines)
        except RuntimeError as error:
            sys.exit(f"{parser.prog}: {error}")
        except KeyboardInterrupt:
            print("interrupted; what was measured is kept", file=sys.stderr)
            sys.exit(3)
    print(records.tables())
    if left and not sitting.tried:
        print(
            f"none of the {len(left)} lines that are left fits into {given.budget:.0f} s; give more --budget"
        )
        sys.exit(3)
    if left:
        print(f"{len(left)} of {len(lines)} lines are left; the same command with --skip-done goes on")
        sys.exit(3)
    print("all lines of the suite are there")


def _chosen(
    parser: argparse.ArgumentParser, given: argparse.Namespace, suites: Suites, only: Sequence[str] | None
) -> list[Line]:
    for name in suites.others:
        if getattr(given, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is not for --suite, whose lines say it themselves")
    lines = suites.lines(given.suite)
    if only:
        lines = [line for line in lines if any(fnmatchcase(line.name, pattern) for pattern in only)]
    if not lines:
        parser.error("no line of the suite has such a name; --plan shows them all")
    return lines


def _plan(lines: Sequence[Line], estimates: Estimates, repeats: int) -> str:
    """What would be measured, and how long that takes as far as is known beforehand."""
    rows = [["line", "steps @ grid", "full-size steps", "ideal", "about"]]
    resident = None
    for line in lines:
        seconds = estimates.seconds([line], started=True, resident=resident, repeats=repeats)
        resident, work = line.engine, line.work
        rows.append([line.name, work.split, f"{work.cost:.1f}", f"{work.ideal:.2f}x", f"{seconds:.0f} s"])
    return markdown(rows)
