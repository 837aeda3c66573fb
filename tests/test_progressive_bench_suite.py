"""The suite for a GPU: what it measures first, how it stays inside its budget, and that it goes on."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from fake_lab import serve_fakes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_progressive_bench import REAL, reduced

from overtone.progressive import bench
from overtone.progressive.bench.estimates import PRIORS, Estimates
from overtone.progressive.bench.lab import Lab
from overtone.progressive.bench.process import LabProcess, Outcome, Ready
from overtone.progressive.bench.records import CUT, Record, Records
from overtone.progressive.bench.sitting import Sitting
from overtone.progressive.bench.suite import AUTO, FULLRES, Line, Stack, baselines, suite
from overtone.progressive.bench.suite_command import Suites, add_suite, run_suite
from overtone.progressive.bench.timing import own_call

GPU = suite("gpu")
FLUX = [line for line in GPU if line.case == "flux1-dev"]


# What is measured.


def test_the_suite_begins_with_what_is_told_first_and_has_every_model():
    assert GPU[0].name == "flux1-dev: scales auto, delta 0.05; compile blocks, graphs; 1 row"
    assert {line.case for line in GPU} == set(REAL)
    assert len({line.name for line in GPU}) == len(GPU)
    first = {case: next(k for k, line in enumerate(GPU) if line.case == case) for case in REAL}
    assert max(first.values()) < len(GPU) / 3  # a short sitting says something of each
    for case in REAL:
        own = [line for line in GPU if line.case == case]
        assert {line.rows for line in own} == {1, 4, 8}
        assert {"none", "fp8"} <= {line.stack.quantize for line in own}
        assert {("off", False), ("off", True), ("blocks", False), ("blocks", True), ("max", False)} <= {
            (line.stack.compile, line.stack.graphs) for line in own
        }
        assert {"first_block", "taylorseer"} <= {line.setting.get("cache") for line in own}
    assert any("guidance_interval" in line.setting for line in GPU)


def test_every_line_has_a_name_of_its_own_and_a_cpu_no_graphs():
    assert len({line.name for line in GPU}) == len(GPU)
    assert not any(line.stack.graphs for line in suite("tiny"))


def test_what_a_line_is_compared_with_costs_as_much_as_the_ladder():
    plain, fewer = baselines(FLUX[0])
    assert (plain.own_call, fewer.own_call, plain.stack, plain.rows) == (True, True, Stack(), 1)
    assert (plain.work.cost, plain.work.ideal) == (50, 1)
    assert fewer.work.cost == pytest.approx(FLUX[0].work.cost, abs=0.5)
    guided = next(line for line in GPU if line.guided)
    assert all(line.guided for line in baselines(guided))
    assert baselines(guided)[0].work.flops == pytest.approx(2 * baselines(FLUX[0])[0].work.flops, rel=1)


def test_rows_and_guidance_multiply_work_and_shapes():
    one, four = (Line("qwen-image", AUTO, rows=rows).work for rows in (1, 4))
    assert four.flops == pytest.approx(4 * one.flops)
    whole = Line("qwen-image", AUTO, guided=True).work
    within = Line("qwen-image", AUTO | {"guidance_interval": (0.2, 0.8)}, guided=True).work
    assert whole.flops == pytest.approx(2 * one.flops)
    assert one.flops < within.flops < whole.flops
    assert within.grids > whole.grids == one.grids


# A sitting.


class FakeLab:
    """A device on its own clock: a line takes what `takes` says, a number or a reason why it cannot be."""

    def __init__(self, takes, *, device="a GPU", start_s=10.0, load_s=5.0):
        self.now, self._takes, self._name = 0.0, takes, device
        self._start_s, self._load_s = start_s, load_s
        self.ready, self.started, self.resident = None, False, None
        self.asked = []

    def start(self, limit_s):
        if not self.started:
            self.now, self.started = self.now + self._start_s, True
        self.ready = Ready(self._name, {"repeats": 2})

    def measure(self, line, limit_s):
        self.asked.append(line.name)
        begin, start_s = self.now, None if self.started else self._start_s
        self.start(limit_s)
        load_s = 0.0 if line.engine == self.resident else self._load_s
        takes = self._takes(line)
        took = self.now - begin + load_s + (2 * takes + 1 if isinstance(takes, float) else 1.0)
        if took > limit_s:
            self.now, self.started, self.resident = begin + limit_s, False, None
            return Outcome(limit_s, start_s, failed=f"{CUT} after {limit_s:.0f} s")
        self.now = begin + took
        if not isinstance(takes, float):
            self.resident = None
            return Outcome(took, start_s, failed=takes)
        self.resident = line.engine
        figures = SimpleNamespace(
            seconds=takes,
            spread_s=0.0,
            memory_gib=1.0,
            load_s=load_s,
            prepare_s=1.0,
            graphs=0,
            replays=0,
            denoise_share=None,
        )
        return Outcome(took, start_s, figures=figures)


def by_work(line):
    return line.work.flops / 400e12


def sit(lab, path, lines, budget_s, **named):
    sitting = Sitting(
        lab,
        Records(path),
        Estimates(PRIORS["cuda"]),
        budget_s=budget_s,
        repeats=2,
        clock=lambda: lab.now,
        **named,
    )
    return sitting.go(lines)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_short_sittings_add_up_to_the_whole_suite(tmp_path):
    path, left, sittings = tmp_path / "h100.jsonl", FLUX, 0
    while left:
        lab = FakeLab(by_work)
        left = sit(lab, path, FLUX, 300)
        assert lab.now <= 300
        sittings += 1
        assert sittings < 12
    assert sittings > 1
    counted = Counter(one["line"] for one in lines_of(path))
    assert all(counted[line.name] == 1 for line in FLUX)
    again = {line.name for line in baselines(FLUX[0])}
    assert {name for name, count in counted.items() if count > 1} == again  # the baselines, in each sitting
    lab = FakeLab(by_work)
    assert sit(lab, path, FLUX, 300) == []
    assert lab.asked == []
    page = path.with_suffix(".md").read_text()
    assert len(page.splitlines()) == 2 + 2 + len(FLUX) + 2


def test_a_line_is_compared_within_its_own_sitting(tmp_path):
    path = tmp_path / "h100.jsonl"
    for slower in (1.0, 2.0):
        sit(FakeLab(lambda line, slower=slower: slower * by_work(line)), path, FLUX, 150)
    compared = [one for one in lines_of(path) if "its own call" not in one["line"] and one["seconds"]]
    assert len(compared) > 4
    for one in compared:  # the fake's time follows the work alone, on the slow day, too
        assert one["over_plain"] == pytest.approx(50 / one["cost"])
        assert one["over_equal_cost"] == pytest.approx(1)
    assert len({one["seconds"] / one["cost"] / one["rows"] for one in compared}) > 1


def test_what_cannot_run_is_written_with_its_reason_and_the_suite_goes_on(tmp_path):
    def takes(line):
        if line.setting.get("cache"):
            return "ValueError: FluxPipeline cannot run with this cache"
        return "out of memory" if line.rows == 8 else by_work(line)

    path, lab = tmp_path / "h100.jsonl", FakeLab(takes)
    assert sit(lab, path, FLUX, 5000) == []
    written = {one["line"]: one for one in lines_of(path)}
    assert set(written) == {line.name for line in FLUX} | {line.name for line in baselines(FLUX[0])}
    for line in FLUX:
        reason = takes(line) if isinstance(takes(line), str) else ""
        assert (written[line.name]["failed"], bool(written[line.name]["seconds"])) == (reason, not reason)
    assert "not measured: out of memory" in path.with_suffix(".md").read_text()


def test_without_its_baseline_a_line_has_seconds_and_no_ratio(tmp_path):
    path, lab = tmp_path / "h100.jsonl", FakeLab(lambda line: "no" if line.own_call else by_work(line))
    sit(lab, path, FLUX[:1], 300)
    assert lab.asked == [line.name for line in baselines(FLUX[0])] + [FLUX[0].name]
    last = lines_of(path)[-1]
    assert (last["seconds"] > 0, last["over_plain"], last["over_equal_cost"]) == (True, None, None)


def test_a_line_that_hangs_is_cut_off_and_tried_again_when_there_is_time(tmp_path):
    slow = FLUX[0]

    def takes(line):
        return 300.0 if line.name == slow.name else by_work(line)

    path, lab = tmp_path / "h100.jsonl", FakeLab(takes)
    assert sit(lab, path, FLUX[:3], 900) == [slow]
    assert lab.now < 800  # the others had their time
    last = Records(path).latest("a GPU")[slow.name]
    assert last.failed.startswith(CUT)
    assert not last.done
    assert "cut off" in path.with_suffix(".md").read_text()
    lab = FakeLab(takes)
    assert sit(lab, path, FLUX[:3], 60) == [slow]  # no time for what is known to take longer
    assert lab.asked == []
    assert sit(FakeLab(takes), path, FLUX[:3], 1500) == []


def test_another_device_has_its_own_lines(tmp_path):
    path = tmp_path / "both.jsonl"
    for device in ("an H100", "an H200"):
        assert sit(FakeLab(by_work, device=device), path, FLUX[:2], 500) == []
    records = Records(path)
    assert set(records.latest("an H100")) == set(records.latest("an H200"))
    assert [line for line in path.with_suffix(".md").read_text().splitlines() if line.endswith(":")] == [
        "an H100:",
        "an H200:",
    ]


def test_without_skip_done_all_is_measured_again(tmp_path):
    path = tmp_path / "h100.jsonl"
    for seconds in (1.0, 2.0):
        sit(FakeLab(lambda line, seconds=seconds: seconds), path, FLUX[:2], 500, skip_done=False)
    assert Records(path).latest("a GPU")[FLUX[0].name].seconds == 2.0


@settings(deadline=None)
@given(
    budget_s=st.floats(30, 600),
    start_s=st.floats(1, 40),
    load_s=st.floats(0, 60),
    slow=st.lists(st.one_of(st.floats(0.01, 400.0), st.just("out of memory")), min_size=6, max_size=6),
)
def test_no_sitting_outlasts_its_budget(tmp_path_factory, budget_s, start_s, load_s, slow):
    path = tmp_path_factory.mktemp("bench") / "h100.jsonl"
    times = {line.name: takes for line, takes in zip((*baselines(FLUX[0]), *FLUX[:4]), slow, strict=True)}
    lab = FakeLab(lambda line: times[line.name], start_s=start_s, load_s=load_s)
    left = sit(lab, path, FLUX[:4], budget_s)
    assert lab.now <= budget_s + start_s  # a process that does not start is the lab's to end
    done = {name for name, one in Records(path).latest("a GPU").items() if one.done}
    assert {line.name for line in FLUX[:4]} - done == {line.name for line in left}


# What is kept.


def test_half_a_line_is_taken_away_and_another_file_refused(tmp_path):
    path = tmp_path / "h100.jsonl"
    sit(FakeLab(by_work), path, FLUX[:1], 300)
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    assert len(Records(path).all) == 3
    assert path.read_text() == whole
    path.write_text('{"figures": 3}\n')
    with pytest.raises(ValueError, match=r"h100\.jsonl holds no lines of a suite"):
        Records(path)


# A process.


def test_a_process_that_breaks_costs_one_line():
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["overtone.progressive.bench.process"])
    one, refused, broken, dies, hangs, large = (Line("tiny", FULLRES, rows=rows) for rows in range(1, 7))
    with LabProcess(serve_fakes, "fakes", context=forked) as lab:
        assert lab.start(300) is None
        assert lab.ready == Ready("a device", {"what": "fakes"})
        first = lab.measure(one, 200)
        assert (first.figures > 0, first.failed, first.start_s) == (True, "", None)
        assert lab.resident == one.engine
        assert lab.measure(refused, 200).failed == "ValueError: refused: a fake takes no two rows"
        assert lab.measure(large, 200).failed == "out of memory"
        assert lab.measure(one, 200).figures == first.figures  # the same process
        assert lab.measure(broken, 200).failed.startswith("RuntimeError: CUDA error")
        assert not lab.started
        again = lab.measure(one, 200)
        assert again.figures != first.figures
        assert again.start_s > 0
        assert lab.measure(dies, 200).failed == "its process ended with exit code 9"
        begin = time.monotonic()
        cut = lab.measure(hangs, 1)
        assert time.monotonic() - begin < 30
        assert cut.failed.startswith(CUT)
        assert lab.measure(one, 200).figures not in (first.figures, again.figures)


# A lab.


@pytest.mark.parametrize("name", REAL)
def test_the_own_call_of_every_pipeline_takes_as_many_steps(name):
    engine, case = reduced(name)
    guided = bool(case.guided)
    sampling = case.sampling(**(case.guided | FULLRES))
    text, calls = bench.random_text(engine, 8, 1, guided=guided), []
    engine.pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    own_call(engine, engine.plan(sampling), text, sampling)()
    together = name == "z-image"  # its prompts and negative ones go in one call
    assert len(calls) == case.num_steps * (2 if guided and not together else 1)


def short(**setting):
    return setting | {"num_steps": 4}


def test_lines_are_measured_and_an_engine_is_built_once_for_those_that_need_the_same():
    built = []

    def open_pipe(case, device, dtype):
        built.append(case.model)
        return bench.open_pipe(case, device, dtype)

    lab = Lab(torch.device("cpu"), torch.float32, repeats=1, open_pipe=open_pipe, backend="eager")
    first = lab.measure(Line("tiny", short(levels=1, delta=0.05), rows=2))
    second = lab.measure(Line("tiny", short(mode="fullres"), guided=True))
    assert (len(built), lab.resident) == (1, ("tiny", Stack()))
    assert first.load_s > 0 == second.load_s
    assert min(first.seconds, first.prepare_s, first.memory_gib, second.seconds) > 0
    with pytest.raises(ValueError, match="guidance_interval"):
        lab.measure(Line("tiny", short(mode="fullres", guidance_interval=(0.2, 0.8))))
    assert lab.resident is None  # nobody knows what a failure has left behind
    try:
        compiled = lab.measure(Line("tiny", short(levels=1, delta=0.05), Stack("blocks")))
        assert compiled.graphs >= 2
        assert compiled.load_s > 0
    finally:
        lab.empty()
        torch._dynamo.config.fail_on_recompile_limit_hit = False


def test_the_command_keeps_its_lines_and_says_what_is_left(tmp_path, capsys):
    path = tmp_path / "laptop.jsonl"
    one = "tiny: levels 1, delta 0.05; plain; 1 row"
    what = ["--suite", "tiny", "--device", "cpu", "--repeats", "1", "--to", str(path), "--only", one]
    bench.main([*what, "--budget", "100000"])
    plain, fewer, line = lines_of(path)
    assert [plain["line"], fewer["line"], line["line"]] == [
        "tiny: its own call; plain; 1 row",
        "tiny: its own call, 21 steps; plain; 1 row",
        one,
    ]
    assert plain["over_plain"] == pytest.approx(1)
    assert line["over_plain"] == pytest.approx(plain["seconds"] / line["seconds"])
    assert min(plain["seconds"], fewer["seconds"], line["memory_gib"]) > 0
    shown = capsys.readouterr()
    assert "all lines of the suite are there" in shown.out
    assert one in path.with_suffix(".md").read_text()
    assert "s left" in shown.err


def test_the_command_says_when_nothing_fits_into_the_budget(tmp_path, capsys):
    path = tmp_path / "laptop.jsonl"
    hangs = Line("tiny", {"levels": 1, "delta": 0.05})
    where = {"device": "a device", "sitting": "before", "total_s": 80_000.0}
    Records(path).add(Record(hangs.name, "tiny", "plain", 1, "", 1.0, 1.0, **where, failed=f"{CUT} at last"))
    suites = Suites(lambda name: [hangs], serve_fakes, ("fakes",))
    parser = argparse.ArgumentParser()
    add_suite(parser)
    given = parser.parse_args(["--suite", "tiny", "--to", str(path), "--skip-done", "--budget", "90000"])
    with pytest.raises(SystemExit) as ended:
        run_suite(parser, given, suites, "cpu")
    assert ended.value.code == 3
    assert "none of the 1 lines that are left fits into 90000 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "tiny"], "--suite needs --to FILE.jsonl"),
        (["--suite", "gpu", "--to", "x.jsonl"], "--suite gpu needs a GPU"),
        (["--suite", "tiny", "--to", "x.jsonl", "--steps", "3"], "--steps is not for --suite"),
        (["--suite", "tiny", "--to", "x.jsonl", "--only", "nothing"], "no line of the suite"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        bench.main([*arguments, "--device", "cpu"])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_plan_of_a_suite_needs_no_device(capsys):
    bench.main(["--suite", "gpu", "--plan", "--device", "cuda"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 + len(suite("gpu"))
    assert "| 17 @ 32x32 + 9 @ 54x54 + 5 @ 76x76 + 3 @ 96x96 + 16 @ 128x128 " in shown[2]


def test_a_record_that_was_cut_off_is_not_done():
    record = Record("a", "b", "plain", 1, "", 1.0, 1.0, "c", "d", 3.0, failed=f"{CUT} after 3 s")
    assert not record.done
