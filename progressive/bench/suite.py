"""The benchmark's lines for a GPU, the most telling first. Measures nothing and knows no torch.

    for line in suite("gpu"): print(line.name, line.work.flops)

A line is one setting of one model, run in one way (`Stack`) on so many rows. What a line is compared with is
measured in the same sitting: the pipeline's own call with as many steps, and with as few as cost about what
the automatic ladder costs (`baselines`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, get_args

from overtone.progressive.bench.cases import AUTO, CASES, FULLRES, Case, label
from overtone.progressive.checkpoints import describe
from overtone.progressive.cost import step_cost
from overtone.progressive.families import FAMILIES
from overtone.progressive.schedule import SamplingPlan, plan_sampling
from overtone.progressive.settings import Sampling, StepCache

CACHES: tuple[StepCache, ...] = tuple(name for name in get_args(StepCache) if name != "none")
ONE_LEVEL: dict[str, Any] = {"levels": 1, "delta": 0.05}
INTERVAL = (0.2, 0.8)
"""Noise levels within which the suite's lines with an interval are guided."""
ROWS = (4, 8)
"""Rows at a time, beside one."""
ATTENTION = ("_native_cudnn", "_flash_3", "sage")
"""The library's back ends of attention, beside its own choice."""


@dataclass(frozen=True)
class Stack:
    """How a transformer is run: nothing here changes what is computed, but for last bits and precision."""

    compile: Literal["off", "blocks", "max"] = "off"
    graphs: bool = False
    """Its calls are captured and replayed."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    attention: str = ""
    """The library's name of a back end; empty: its own choice."""

    @property
    def label(self) -> str:
        """`plain`, or what is done to it: `compile blocks, graphs, fp8`."""
        said = [f"compile {self.compile}"] if self.compile != "off" else []
        said += ["graphs"] if self.graphs else []
        said += [self.quantize] if self.quantize != "none" else []
        said += [f"attention {self.attention}"] if self.attention else []
        return ", ".join(said) or "plain"


@dataclass(frozen=True)
class Work:
    """What a line computes, from its model's schedule and configuration alone."""

    split: str
    """Steps @ latent grid of each stage."""
    grids: int
    """Different grids, each once more where only some of its steps are guided: shapes of one transformer."""
    cost: float
    """Of one row, in full-size steps of the same model, guided where the line is."""
    ideal: float
    """Cost of as many steps at full size over this one."""
    flops: float
    """Of all rows together; image tokens where FLOPs are not known."""


@dataclass(frozen=True)
class Line:
    """One thing to measure."""

    case: str
    setting: dict[str, Any] = field(hash=False)
    """Fields of `Sampling`, but for the case's own."""
    stack: Stack = Stack()
    rows: int = 1
    guided: bool = False
    """A negative prompt runs, as `Case.guided` says."""
    own_call: bool = False
    """Not the engine but the pipeline's own call, as who knows nothing of overtone would make it."""

    @cached_property
    def name(self) -> str:
        """What tells it from other lines, on screen and in the file: `flux1-dev: scales auto, delta 0.05;
        compile blocks; 4 rows`."""
        said = label({key: value for key, value in self.setting.items() if key not in ("mode", "num_steps")})
        if "mode" in self.setting:
            said = ", ".join(filter(None, ("its own call" if self.own_call else "fullres", said)))
        if "num_steps" in self.setting:
            said += f", {self.setting['num_steps']} steps"
        rows = f"{self.rows} row" + "s" * (self.rows > 1)
        return "; ".join((f"{self.case}: {said}" + ", guided" * self.guided, self.stack.label, rows))

    @property
    def engine(self) -> tuple[str, Stack]:
        """Lines with the same one need no other engine: what was compiled or quantized stays so."""
        return self.case, self.stack

    @property
    def of(self) -> Case:
        """The model that it is about."""
        return CASES[self.case]

    @property
    def sampling(self) -> Sampling:
        """All settings of it."""
        return self.of.sampling(**((self.of.guided if self.guided else {}) | self.setting))

    @cached_property
    def work(self) -> Work:
        """ValueError for settings that the model refuses."""
        plan = _plan(self.of.model, self.sampling, tuple(self.of.scheduler.items()))
        row = plan.step_cost.step(plan.stages[-1].tokens) * plan.cost
        shapes = {(part.grid, bool(part.guided_steps)) for stage in plan.stages for part in stage.parts}
        return Work(plan.split, len(shapes), plan.cost, plan.saving, row * self.rows)


def baselines(line: Line) -> tuple[Line, Line]:
    """What the line is compared with, in the same sitting: the plain pipeline's own call, a row at a time,
    with as many steps, and with as few as cost about what the automatic ladder does."""
    return _own_calls(line.case, line.guided)


@cache
def _own_calls(case: str, guided: bool) -> tuple[Line, Line]:
    return (
        Line(case, FULLRES, guided=guided, own_call=True),
        Line(case, _fewer(case), guided=guided, own_call=True),
    )


def suite(name: str) -> list[Line]:
    """The lines of a suite, each once, the most telling first: `gpu` or `tiny`.

    Settings that a model refuses are among them: the refusal is the result.
    """
    lines: dict[str, Line] = {}
    for line in SUITES[name]():
        lines.setdefault(line.name, line)
    return list(lines.values())


def _gpu() -> Iterator[Line]:
    exact = Stack("blocks", graphs=True)
    fp8 = replace(exact, quantize="fp8")
    others = ("z-image", "flux2-klein-4b", "wan2.1-1.3b")
    yield from _headline("flux1-dev", exact)
    yield from _several_rows("flux1-dev", exact)
    yield from _headline("flux1-dev", fp8)
    yield from _headline("qwen-image", exact)
    yield from _best("flux1-dev", fp8)
    yield from _plainly("flux1-dev")
    yield from (Line("flux1-dev", AUTO, replace(exact, attention=name)) for name in ATTENTION)
    for case in others:
        yield from _headline(case, exact)
    for case in ("qwen-image", *others):
        yield from _headline(case, fp8)
        yield from _best(case, fp8)
    for case in ("qwen-image", *others):
        yield from _several_rows(case, exact)
        yield from _plainly(case)
    for case in ("qwen-image", "z-image", "wan2.1-1.3b"):
        yield from _guided(case, exact)
    for case in ("flux1-dev", "qwen-image", *others):
        yield Line(case, AUTO, Stack("max"))
        yield from (Line(case, setting) for setting in CASES[case].settings)


def _tiny() -> Iterator[Line]:
    """The same, as far as a CPU goes, which has no graphs."""
    yield from _plainly("tiny", graphs=False)
    yield from _guided("tiny", Stack())
    yield from _best("tiny", Stack())
    yield from _headline("tiny", Stack(quantize="int8"))
    yield from _headline("tiny", Stack("blocks"))


SUITES: dict[str, Callable[[], Iterator[Line]]] = {"gpu": _gpu, "tiny": _tiny}


def _headline(case: str, stack: Stack) -> Iterator[Line]:
    """The ladder, full resolution for about the ladder's cost, one level, full resolution."""
    for setting in (AUTO, _fewer(case), ONE_LEVEL, FULLRES):
        yield Line(case, setting, stack)


def _plainly(case: str, *, graphs: bool = True) -> Iterator[Line]:
    """The engine with nothing beside it, and with one thing alone."""
    for setting in (AUTO, ONE_LEVEL, FULLRES):
        yield Line(case, setting)
    if graphs:
        yield from (Line(case, AUTO, stack) for stack in (Stack(graphs=True), Stack("blocks")))
    yield from (Line(case, AUTO, rows=rows) for rows in ROWS)


def _several_rows(case: str, stack: Stack) -> Iterator[Line]:
    for setting in (AUTO, FULLRES):
        yield from (Line(case, setting, stack, rows) for rows in ROWS)


def _best(case: str, stack: Stack) -> Iterator[Line]:
    """The ladder with each step cache on top, a row at a time and then several."""
    for rows in (1, ROWS[0]):
        yield from (Line(case, AUTO | {"cache": cache}, stack, rows) for cache in CACHES)
    yield from (Line(case, AUTO, stack, rows) for rows in ROWS)


def _guided(case: str, stack: Stack) -> Iterator[Line]:
    interval = {"guidance_interval": INTERVAL}
    for setting in (AUTO, AUTO | interval, FULLRES, FULLRES | interval):
        yield Line(case, setting, stack, guided=True)


@cache
def _fewer(case: str) -> dict[str, Any]:
    """Full resolution with as many steps as cost about what the ladder's do."""
    return FULLRES | {"num_steps": max(1, round(Line(case, AUTO).work.cost))}


@cache
def _described(model: str, scheduler: tuple[tuple[str, Any], ...]) -> Any:
    return describe(model).with_scheduler(**dict(scheduler))


def _plan(model: str, sampling: Sampling, scheduler: tuple[tuple[str, Any], ...]) -> SamplingPlan:
    checkpoint = _described(model, scheduler)
    assert sampling.num_steps is not None
    assert sampling.height is not None
    assert sampling.width is not None
    family = FAMILIES[checkpoint.family]
    sigmas: Sequence[float] = checkpoint.sigmas(sampling.num_steps, sampling.height, sampling.width)
    cost = step_cost(checkpoint.transformer_class, checkpoint.transformer, family, sampling)
    return plan_sampling(sampling, family, sigmas, step_cost=cost)
