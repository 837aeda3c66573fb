"""The dispatch benchmark runs real jobs: their parts are there, and its figures are those of the jobs."""

from __future__ import annotations

import json

from cluster import bench
from jobs.plan import make_plan


def test_every_commit_that_is_timed_leaves_a_part(tmp_path):
    taken = bench.commit_ms(tmp_path, shards=5)
    assert len(taken) == 5
    assert all(0 < ms < 60_000 for ms in taken)
    assert len(list((tmp_path / "out/data").glob("*.parquet"))) == 5


def test_a_job_of_noop_shards_has_one_row_a_shard(tmp_path):
    plan = make_plan(bench.noop_job(tmp_path, shards=7, workers=2))
    assert (plan.num_shards, plan.num_rows) == (7, 7)


def test_the_command_runs_jobs_through_ray(tmp_path, capsys):
    path = tmp_path / "bench.json"
    bench.main(["--shards", "20", "--workers", "1", "--commits", "2", "--json", str(path)])
    (run,) = json.loads(path.read_text())["runs"]
    assert (run["workers"], run["shards"]) == (1, 20)
    assert run["shards_per_s"] > 0
    assert run["driver_cpu_ms"] > 0
    assert run["driver_mib"] > run["growth_mib"]
    assert "a commit alone" in capsys.readouterr().out
