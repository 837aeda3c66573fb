"""`python -m overtone.cluster.simulate`: simulates a job and prints its figures. Knows nothing of how."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from overtone.cluster.simulate.simulation import Simulation
from overtone.cluster.simulate.world import Result, World

DESCRIPTION = "A job of any size in simulated time: the driver's own dispatcher, no Ray."


def table(world: World, result: Result) -> Table:
    """The figures for people."""
    rows = {
        "shards": f"{world.shards:,} on {world.workers:,} workers",
        "makespan": f"{result.makespan_s / 3600:,.2f} h simulated",
        "ideal": f"{result.ideal_s / 3600:,.2f} h ({result.efficiency:.1%} reached)",
        "events": f"{result.events:,} ({result.events / max(1, world.shards):.1f} a shard)",
        "dispatcher": f"{result.event_us:.1f} us an event, {result.tick_us:,.0f} us a tick: "
        f"{result.driver_load:.2%} of a core at this pace",
        "memory": f"{result.peak_mib:,.0f} MiB, grown by {result.grown_mib:,.0f} MiB",
        "shards with an object": f"{result.most_tracked:,} at most",
        "attempts": f"{result.attempts:,} ({result.attempts - world.shards:,} more than shards), "
        f"at most {result.most_attempts} of one shard",
        "copies at the end": f"{result.copies:,}",
        "made whole, and another's part was there": f"{result.lost_races:,}",
        "deaths, machines taken, store failures": f"{result.deaths:,}, {result.preemptions:,}, "
        f"{result.store_failures:,}",
        "places given up": f"{result.retired:,}",
        "poison rows, rejects": f"{result.poison:,}, {result.rejects:,}",
        "every shard has one part": "; ".join(result.checks) or "yes",
        "the simulation": f"{result.cpu_s:,.0f} CPU seconds, "
        f"{result.events / max(1e-9, result.cpu_s):,.0f} events a CPU second",
    }
    shown = Table(show_header=False)
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exit code 1 where the outcome is wrong."""
    parser = argparse.ArgumentParser(prog="python -m overtone.cluster.simulate", description=DESCRIPTION)
    for setting in fields(World):
        kind = int if isinstance(setting.default, int) else float
        name = f"--{setting.name.replace('_', '-')}"
        parser.add_argument(name, type=kind, default=setting.default, help=f"default: {setting.default:g}")
    parser.add_argument("--no-copies", action="store_true", help="without straggler copies")
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = vars(parser.parse_args(arguments))
    path, copies = given.pop("json"), not given.pop("no_copies")
    world = World(**given)
    result = Simulation(world, copies=copies).run(on_tick=_Progress())
    Console().print(table(world, result))
    if path is not None:
        figures = {"world": asdict(world), "copies": copies, "result": asdict(result)}
        path.write_text(json.dumps(figures, indent=2) + "\n")
    if result.checks:
        raise SystemExit(1)


class _Progress:
    """A line on stderr now and then."""

    def __init__(self) -> None:
        self._printed = time.monotonic()

    def __call__(self, simulation: Simulation) -> None:
        if time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            print(
                f"{simulation.now / 3600:.2f} h, {simulation.dispatcher.left:,} shards left", file=sys.stderr
            )
