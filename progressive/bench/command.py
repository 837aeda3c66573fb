"""How fast the denoising loop is: `python -m overtone.progressive.bench`.

Needs no Ray, no checkpoint, no network.

Builds the transformer of a published checkpoint at its real size from its configuration, with random
weights (time does not depend on their values) and random text embeddings of the right shape, and times
whole denoising loops, expansions included, through the same engine that the jobs use. Per setting:
seconds, saving over `fullres` with as many steps in the same process, the ideal (what the saving would be
if time followed the transformer's FLOPs, text and attention included), the share of that ideal reached, and
memory. `tiny` runs the embedded model, which also fits a CPU.

`--suite gpu --to FILE.jsonl` measures everything that a GPU has to tell, in as many sittings of `--budget`
seconds as it takes: `--skip-done` goes on. Its lines are in bench/suite.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from overtone.progressive.bench.cases import CASES, chosen_settings, label
from overtone.progressive.bench.models import open_pipe
from overtone.progressive.bench.process import serve
from overtone.progressive.bench.suite import suite
from overtone.progressive.bench.suite_command import Suites, add_suite, run_suite
from overtone.progressive.bench.tables import Measurement, expected_table, report, table
from overtone.progressive.bench.timing import measure
from overtone.progressive.compile import COMPILE
from overtone.progressive.engine import Engine


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m overtone.progressive.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--case", action="append", choices=[*CASES, "all"], help="repeatable; `all` is all but tiny"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the random transformers (default: bfloat16)")
    parser.add_argument("--batch-size", type=int, action="append", help="repeatable; default: 1")
    parser.add_argument("--compile", action="append", choices=COMPILE, help="repeatable; default: off")
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="beside fullres, only these settings, e.g. '*delta 0.05', or of a suite only these lines; "
        "repeatable",
    )
    parser.add_argument(
        "--repeats", type=int, help="timed loops of each setting (default: 3, of a suite's lines 2)"
    )
    parser.add_argument("--steps", type=int, help="instead of the case's own number of steps")
    parser.add_argument("--plan", action="store_true", help="measure nothing: what the ideal would be")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    add_suite(parser)
    given = parser.parse_args(arguments)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if given.suite is not None:
        repeats = given.repeats or 2
        cases = given.case if given.case and "all" not in given.case else CASES
        suites = Suites(
            lines=lambda name: [line for line in suite(name) if line.case in cases],
            serve=serve,
            arguments=(str(device), given.dtype, repeats),
            repeats=repeats,
            others=("steps", "batch_size", "compile", "json", "markdown"),
        )
        run_suite(parser, given, suites, str(device), only=given.only, plan=given.plan)
        return
    names = given.case or ["tiny"]
    if "all" in names:
        names = [name for name in CASES if name != "tiny"]
    if given.plan:
        print(expected_table(names))
        return
    if device.type == "cpu":
        real = [name for name in names if name != "tiny"]
        if real:
            parser.error(f"--case {real[0]} needs a GPU; a CPU runs --case tiny, or --plan")
    for name, pattern in product(names, given.only or ()):
        if not chosen_settings(CASES[name], [pattern]):
            known = "; ".join(map(label, chosen_settings(CASES[name])))
            parser.error(f"--only {pattern} names none of {name}'s settings: {known}")
    measured: list[Measurement] = []
    for name in names:
        case = CASES[name] if given.steps is None else replace(CASES[name], num_steps=given.steps)
        engine = Engine(open_pipe(case, device, getattr(torch, given.dtype)))
        measured += measure(
            engine,
            name,
            case,
            settings=chosen_settings(case, given.only),
            batch_sizes=given.batch_size or (1,),
            compile=given.compile or ("off",),
            repeats=given.repeats or 3,
            on_progress=lambda text: print(text, file=sys.stderr),
        )
        if given.json:  # after each case: the next one may not fit
            given.json.write_text(json.dumps(report(measured, device, given.dtype), indent=2) + "\n")
        if given.markdown:
            given.markdown.write_text(table(measured) + "\n")
        del engine  # the next model may need the room
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(table(measured))
