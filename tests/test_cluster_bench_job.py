"""A job against a plain loop: every picture of both is made, and the figures are theirs."""

from __future__ import annotations

import json

import pytest

from overtone.cluster.bench import jobs as bench_job

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    short = {"--rows": 3, "--rounds": 1, "--steps": 4, "--workers": 1, "--batch-size": 2, "--json": path}
    short["--setting"] = "scales: auto"
    bench_job.main([str(part) for pair in short.items() for part in pair])
    return json.loads(path.read_text())


def test_each_takes_its_turn_and_makes_every_picture(figures):
    (loop,) = figures["plain"]
    assert (loop["batch_size"], loop["rows"], len(loop["images_per_s"])) == (2, 3, 1)
    (job,) = figures["jobs"]
    assert (job["setting"], job["rows"], len(job["images_per_s"])) == ("scales: auto", 3, 1)


def test_ratios_are_over_the_plain_loop_and_shares_over_the_plans_saving(figures):
    (plain,) = figures["plain"][0]["images_per_s"]
    (job,) = figures["jobs"]
    assert job["ideal"] > 1.1
    assert job["ratios"] == [pytest.approx(job["images_per_s"][0] / plain)]
    assert job["share_of_ideal"] == pytest.approx(job["ratio"] / job["ideal"])
    assert 0 < job["denoise_share"] < 1
