"""A simulated job: the dispatcher keeps its promises with hundreds of workers, in bounded state and work."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest

from overtone.cluster import simulate
from overtone.cluster.dispatch import Done
from overtone.cluster.simulate.simulation import Simulation
from overtone.cluster.simulate.world import World

FAULTS = World(
    shards=5000,
    workers=200,
    straggler_chance=0.004,
    death_chance=2e-3,
    failure_chance=2e-3,
    poison_share=1e-3,
    node_hours=5.0,
)


def test_every_shard_is_committed_once_whatever_fails():
    tracked = []
    simulation = Simulation(FAULTS)
    result = simulation.run(on_tick=lambda s: tracked.append(s.dispatcher.tracked))
    assert simulation.end == Done()
    assert result.checks == []
    assert set(simulation.parts) == {1}
    assert 0 < min(simulation.attempts)
    assert result.attempts == sum(simulation.attempts)
    # Each of these happened, and not a good row was lost to it.
    assert result.deaths > 30
    assert result.preemptions > 5
    assert result.store_failures > 2
    assert result.retired == FAULTS.workers_per_node
    assert result.rejects == result.poison == 5
    # What is done twice is bounded by what went wrong and by the stragglers at the end.
    causes = result.deaths + result.preemptions + result.store_failures
    assert result.attempts <= FAULTS.shards + 3 * causes + result.copies
    assert result.most_attempts <= 12
    # A worker runs one shard, commits one and has one reserved; what failed waits.
    assert max(tracked) <= 3 * FAULTS.workers + causes
    assert result.makespan_s >= result.ideal_s - FAULTS.start_s


def test_copies_end_a_job_earlier_and_lose_nothing():
    world = World(shards=400, workers=40, straggler_chance=0.02, straggler_factor=30.0, broken_nodes=0)
    alone, copied = (Simulation(world, copies=copies).run() for copies in (False, True))
    assert alone.checks == copied.checks == []
    assert alone.copies == 0
    assert 0 < copied.copies < 2 * world.workers
    assert copied.makespan_s < alone.makespan_s / 2


def test_the_same_seed_is_the_same_job():
    first, second = (Simulation(World(shards=300, workers=20)).run() for _ in range(2))
    assert (first.makespan_s, first.events) == (second.makespan_s, second.events)


def test_work_an_event_does_not_grow_with_the_number_of_workers():
    """Lines of the dispatcher run an event, deaths and waiting places included."""

    def lines(workers: int) -> float:
        counts = Counter()

        def trace(frame, event, argument):
            if "cluster/dispatch/" not in frame.f_code.co_filename:
                return None
            counts[event] += 1
            return trace

        world = World(shards=10 * workers, workers=workers, death_chance=0.05, node_hours=2.0, tick_s=30.0)
        simulation = Simulation(world)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            result = simulation.run()
        finally:
            sys.settrace(before)
        assert result.checks == []
        return counts["line"] / result.events

    assert lines(240) < 1.3 * lines(40)


def test_a_job_that_does_not_end_is_an_error():
    with pytest.raises(RuntimeError, match="does not end within 100 s"):
        Simulation(World(shards=300, workers=2)).run(limit_s=100)


def test_the_command_prints_the_figures(tmp_path, capsys):
    path = tmp_path / "figures.json"
    simulate.main(["--shards", "200", "--workers", "16", "--broken-nodes", "0", "--json", str(path)])
    figures = json.loads(path.read_text())
    assert figures["world"]["shards"] == 200
    assert figures["result"]["events"] >= 5 * 200
    assert figures["result"]["checks"] == []
    shown = capsys.readouterr().out
    assert "200 on 16 workers" in shown
    assert "every shard has one part" in shown


def test_the_help_of_the_command_says_what_it_does(capsys):
    with pytest.raises(SystemExit):
        simulate.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "A job of any size in simulated time" in shown
    assert "--straggler-factor" in shown
