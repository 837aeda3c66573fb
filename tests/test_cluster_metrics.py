"""What a job tells Prometheus, scraped from a real Ray; the Grafana dashboard; what a worker logs."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import fake_engine
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.cloudpickle
from fake_engine import Fakes
from prometheus_client.parser import text_string_to_metric_families

from overtone.cluster import logs
from overtone.cluster.driver import run_job
from overtone.cluster.metrics import METRICS, MOST_VALUES, OTHER, WORKERS, JobMetrics
from overtone.jobs.spec import JobSpec

pytestmark = pytest.mark.ray

DASHBOARD = Path(__file__).parents[1] / "manifests" / "grafana" / "overtone.json"
EXPORTED = {metric.exported: metric for metric in METRICS}


@pytest.fixture(scope="module")
def cluster():
    """A Ray whose processes report every second, and where its metrics and logs are."""
    ray.init(
        include_dashboard=False,
        num_cpus=2,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    ray.cloudpickle.register_pickle_by_value(fake_engine)
    [node] = ray.nodes()
    yield SimpleNamespace(
        url=f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics",
        logs=Path(ray._private.worker._global_node.get_logs_dir_path()),
    )
    ray.cloudpickle.unregister_pickle_by_value(fake_engine)
    ray.shutdown()


def job(folder: Path, name: str, prompts: list[str]) -> JobSpec:
    table = pa.table({"row_id": [f"r{k:02}" for k in range(len(prompts))], "prompt": prompts})
    pq.write_table(table, folder / f"{name}.parquet")
    return JobSpec.model_validate(
        {
            "name": name,
            "model": "tests/fake",
            "prompts": str(folder / f"{name}.parquet"),
            "sampling": {"height": 64, "width": 64, "num_steps": 4},
            "shards": 4,
            "output": str(folder / name),
            "workers": {"count": 1, "batch_size": 2},  # an idle one would copy the slow shard
        }
    )


def scrape(url: str, name: str) -> dict[str, dict[tuple[str, ...], float]]:
    """The job's metrics now: name -> values of its own tags but the job's -> value, summed over processes."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("job") == name:
                tags = EXPORTED[sample.name].tags[1:]  # KeyError: a name that the code does not know
                found[sample.name][tuple(sample.labels[tag] for tag in tags)] += sample.value
    return found


def until(url: str, name: str, condition, seconds: float = 120.0):
    """What is scraped as soon as it satisfies the condition."""
    deadline = time.monotonic() + seconds
    while True:
        found = scrape(url, name)
        if condition(found):
            return found
        assert time.monotonic() < deadline, {key: dict(values) for key, values in found.items()}
        time.sleep(0.2)


@pytest.fixture(scope="module")
def ran(cluster, tmp_path_factory):
    """A job with a row that raises and one that takes long: scraped on its way and at its end."""
    folder = tmp_path_factory.mktemp("ran")
    prompts = [f"prompt {k}" for k in range(16)]
    prompts[3], prompts[14] = "!raise", "!slow 6"
    spec = job(folder, "scraped", prompts)
    ended = []
    driver = threading.Thread(target=lambda: ended.append(run_job(spec, engine_factory=Fakes(0.02))))
    driver.start()
    underway = until(
        cluster.url,
        "scraped",
        lambda now: now["ray_overtone_generated_rows_total"] and now["ray_overtone_rows_total"],
    )
    driver.join()
    [summary] = ended
    assert summary.exit_code == 0, summary.text()
    finished = until(
        cluster.url, "scraped", lambda now: now["ray_overtone_rows_total"].get(()) == summary.rows
    )
    return SimpleNamespace(spec=spec, summary=summary, underway=underway, finished=finished)


def test_a_running_job_shows_its_queue_and_its_workers(ran):
    shards = ran.underway["ray_overtone_shards"]
    assert set(shards) == {("waiting",), ("running",), ("done",)}
    assert shards["running",] >= 1
    assert sum(shards.values()) == 4
    assert sum(ran.underway["ray_overtone_workers"].values()) == 1
    assert {grid for _, grid in ran.underway["ray_overtone_batch_rows"]} == {"4x4", "8x8"}
    assert all(rows >= 1 for rows in ran.underway["ray_overtone_batch_rows"].values())


def test_the_numbers_of_a_job_are_what_it_made(ran):
    finished, summary = ran.finished, ran.summary
    assert finished["ray_overtone_rows_total"] == {(): 15}
    assert summary.rows == 15
    assert finished["ray_overtone_rejects_total"] == {("RuntimeError",): 1}
    assert sum(finished["ray_overtone_generated_rows_total"].values()) == 15
    assert not finished["ray_overtone_retries_total"]
    assert not finished["ray_overtone_workers_lost_total"]


def test_what_went_wrong_on_the_way_is_counted(cluster, tmp_path):
    spec = job(tmp_path, "mended", ["plain", f"!once {tmp_path}/once", "plain", "plain"])
    summary = run_job(spec, engine_factory=Fakes())
    assert (summary.rows, summary.workers_lost) == (4, 1)
    found = until(cluster.url, "mended", lambda now: now["ray_overtone_rows_total"].get(()) == 4)
    assert found["ray_overtone_retries_total"] == {(): 1}
    assert found["ray_overtone_workers_lost_total"] == {(): 1}
    text = worker_log(cluster)
    assert re.search(
        r"job=mended worker=\d shard=0 attempt=2 overtone\.cluster\.worker\.commits: 4 rows and 0 rejects",
        text,
    )


def test_the_seconds_of_each_stage_are_those_of_the_timings(ran):
    told: dict[tuple[str, str], float] = defaultdict(float)
    for (_, stage, grid), seconds in ran.finished["ray_overtone_stage_seconds_total"].items():
        told[stage, grid] += seconds
    written: dict[tuple[str, str], float] = defaultdict(float)
    for path in Path(ran.spec.output.path, "timings").glob("*.parquet"):
        for line in pq.read_table(path).to_pylist():
            grid = f"{line['height']}x{line['width']}" if line["height"] is not None else ""
            if line["seconds"]:  # the expansions of an engine without a model take none
                written[line["stage"], grid] += line["seconds"]
    stages = {stage for stage, _ in told}
    assert stages == {stage for stage, _ in written}
    assert {"read", "text_encode", "denoise", "vae_decode", "image_encode", "part_write"} <= stages
    assert len({grid for stage, grid in told if stage == "denoise"}) == 2
    for key, seconds in written.items():
        if key[0] != "upload":  # which is measured around more
            assert told[key] == pytest.approx(seconds), key


def test_a_job_that_ended_has_no_queue_and_no_workers(ran, cluster):
    def idle(now):
        shards, workers = now["ray_overtone_shards"], now["ray_overtone_workers"]
        return not shards.get(("running",)) and not any(workers.values())

    assert until(cluster.url, "scraped", idle)["ray_overtone_shards"].get(("done",), 4) == 4


def worker_log(cluster) -> str:
    """What the workers logged: Ray keeps it with its own logs, a file for each process."""
    return "".join(path.read_text() for path in cluster.logs.glob("worker-*.err"))


def test_every_line_of_a_worker_says_which_job_shard_and_attempt_it_is_about(ran, cluster):
    text = worker_log(cluster)
    about = r"job=scraped worker=\d shard=(\d) attempt=1 overtone\.cluster\.worker\."
    assert sorted(re.findall(about + r"commits: \d rows and \d rejects in", text)) == ["0", "1", "2", "3"]
    rejected = "attempt: row 'r03' is rejected in denoise: RuntimeError: this prompt raises"
    assert re.findall(about + rejected, text) == ["0"]
    assert not re.search("job=scraped .* shard=-", text)


def test_threads_log_about_their_own_attempt():
    out = io.StringIO()
    handler = logs.write_to(out, job="j", worker=3)
    logger = logging.getLogger("overtone.cluster.somewhere")
    try:
        logger.info("before")
        with logs.about(7, 2):
            other = threading.Thread(target=lambda: logger.info("elsewhere"))
            other.start()
            other.join()
            with logs.about(6, 1):
                logger.info("inner")
            logger.info("outer")
            logging.getLogger("somebody.elses").info("not wanted")
            logging.getLogger("somebody.elses").warning("wanted")
    finally:
        logging.getLogger().removeHandler(handler)
    lines = [re.sub(r"^.*? (INFO|WARNING) ", "", line) for line in out.getvalue().splitlines()]
    assert lines == [
        "job=j worker=3 shard=- attempt=- overtone.cluster.somewhere: before",
        "job=j worker=3 shard=- attempt=- overtone.cluster.somewhere: elsewhere",
        "job=j worker=3 shard=6 attempt=1 overtone.cluster.somewhere: inner",
        "job=j worker=3 shard=7 attempt=2 overtone.cluster.somewhere: outer",
        "job=j worker=3 shard=7 attempt=2 somebody.elses: wanted",
    ]


def test_a_tag_takes_few_values_whatever_happens(cluster):
    metrics = JobMetrics("many")
    rejects = {f"Error{k}": 2 for k in range(100)}
    shown = {"rows": 0, "retries": 0, "workers_lost": 0, "shards": {}, "workers": {}}
    metrics.show(rejects=rejects, **shown)
    metrics.show(rejects=rejects | {"Error99": 5}, **shown)
    found = until(cluster.url, "many", lambda now: sum(now["ray_overtone_rejects_total"].values()) == 203)[
        "ray_overtone_rejects_total"
    ]
    assert len(found) == MOST_VALUES + 1
    assert found[OTHER,] == 2 * (100 - MOST_VALUES) + 3


# The dashboard.


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(DASHBOARD.read_text())


def expressions(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_only_for_metrics_and_tags_that_the_code_exports(dashboard):
    asked = set()
    for expression in [*expressions(dashboard), dashboard["templating"]["list"][1]["definition"]]:
        names = re.findall(r"\bray_\w+", expression)
        assert names, expression
        asked |= set(names)
        known = {tag for name in names for tag in EXPORTED[name].tags}
        tags = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", expression))
        for listed in re.findall(r"\b(?:by|ignoring)\s*\(([^)]*)\)", expression):
            tags |= set(re.split(r",\s*", listed))
        assert tags <= known, expression
        assert expression.count("(") == expression.count(")")
        counters = {name for name in names if EXPORTED[name].kind == "counter"}
        for name in counters - {"ray_overtone_rows_total"}:  # which one panel shows as it is
            assert re.search(rf"(rate|increase)\({name}\{{[^}}]*\}}\[\$__rate_interval\]\)", expression), name
    assert asked == set(EXPORTED)  # and nothing is exported that nobody can see


def test_the_legends_name_tags_that_the_query_keeps(dashboard):
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            kept = {tag for by in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for tag in by.split(", ")}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, target


def test_the_dashboard_has_the_form_that_grafana_imports(dashboard):
    assert isinstance(dashboard["schemaVersion"], int)
    assert "id" not in dashboard  # a number of one Grafana's data base
    assert dashboard["uid"]
    assert dashboard["title"] == "Overtone"
    datasource, jobs = dashboard["templating"]["list"]
    assert (datasource["type"], datasource["query"], datasource["name"]) == (
        "datasource",
        "prometheus",
        "datasource",
    )
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert jobs["datasource"] == source
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 8
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["datasource"] == source
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        references = [target["refId"] for target in panel["targets"]]
        assert references == ["A", "B", "C"][: len(references)]
        assert all(target["datasource"] == source for target in panel["targets"])
    custom = {panel["title"]: panel["fieldConfig"]["defaults"].get("custom") for panel in panels}
    stacked = {title for title, how in custom.items() if how and how["stacking"]["mode"] == "normal"}
    assert "Where workers' time goes" in stacked
    assert WORKERS.exported in " ".join(expressions(dashboard))
