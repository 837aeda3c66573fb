"""Captured calls: bit for bit what the calls give, the books of them, and every reason against one.

On a CPU the graphs are tapes of torch's operations, which run none of the model's Python again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipes
import torch

from overtone.progressive.compile import CompiledEngine
from overtone.progressive.engine import Engine
from overtone.progressive.graphs import Captured, Counts, GraphedEngine, Graphs, Recorder
from overtone.progressive.settings import Sampling

Tensor = torch.Tensor


def sampling_of(family: str, **fields: Any) -> Sampling:
    """Guided where the family can be; six steps on two grids."""
    guided = {"true_cfg_scale": 3.0} if family in ("flux1", "qwen-image") else {}
    video = {"num_frames": 5} if family.startswith("wan") else {}
    base = {"height": 64, "width": 96, "num_steps": 6, "transition_sigmas": (0.8,)}
    return Sampling(**(base | guided | video | fields))


def made(engine: Engine, sampling: Sampling, *rows: int, first_seed: int = 0) -> Tensor:
    """Latents of some of two rows, whose prompts differ in length."""
    plan = engine.plan(sampling)
    prompts = [tiny_pipes.PROMPTS[row] for row in rows]
    encoded = engine.encode(prompts, ["a small circle"] * len(rows), sampling)
    return engine.denoise(plan, encoded, [first_seed + row for row in rows], sampling)[0]


@pytest.mark.parametrize(
    ("family", "graphs", "calls"),
    [
        # Both passes of guidance take the same graph where texts are of one length.
        ("flux1", 2, 12),
        ("flux2", 2, 12),
        ("qwen-image", 4, 12),
        ("z-image", 2, 6),  # both passes in one call
        ("wan2.1", 2, 12),
        ("wan2.2", 3, 12),
        ("sd3", 2, 6),
    ],
)
def test_a_replay_is_the_call_bit_for_bit(family, graphs, calls):
    pipe, sampling = tiny_pipes.BUILDERS[family](), sampling_of(family)
    plain = made(Engine(pipe), sampling, 0, 1)
    other = made(Engine(pipe), sampling, 0, 1, first_seed=7)
    engine = GraphedEngine(pipe, capturer=Recorder())
    assert torch.equal(made(engine, sampling, 0, 1), plain)
    assert engine.graphs.counts == Counts(plain=graphs, captures=graphs, replays=calls - 2 * graphs)
    assert torch.equal(made(engine, sampling, 0, 1, first_seed=7), other)  # by the same graphs
    assert engine.graphs.counts == Counts(graphs, graphs, 2 * calls - 2 * graphs)
    assert engine.graphs.kept == graphs
    assert not engine.graphs.refusals


def test_a_warm_engine_captures_nothing_in_a_batch():
    pipe, sampling = tiny_pipes.flux1(), sampling_of("flux1")
    plain = made(Engine(pipe), sampling, 0, 1)
    engine = GraphedEngine(pipe, capturer=Recorder())
    plan = engine.plan(sampling)
    done = engine.warm(plan, [(1, 2), (2,)], sampling)
    assert [(one.stage.grid, one.rows, one.captures) for one in done] == [
        (plan.stages[0].grid, 1, 1),
        (plan.stages[0].grid, 2, 1),
        (plan.stages[1].grid, 2, 1),
    ]
    assert engine.warm(plan, [(1, 2), (2,)], sampling) == []
    assert engine.sizes(plan, 0, sampling) == (1, 2)
    before = engine.graphs.counts.captures, engine.graphs.counts.plain
    assert torch.equal(made(engine, sampling, 0, 1), plain)
    assert (engine.graphs.counts.captures, engine.graphs.counts.plain) == before
    with pytest.raises(ValueError, match="graphs need a CUDA device"):
        GraphedEngine(tiny_pipes.flux1())


@pytest.fixture
def _own_torch_compile() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_own_torch_compile")
def test_compiled_blocks_are_captured_as_they_are():
    """And texts of new lengths, which are compiled for, are captured when they come."""
    pipe, sampling = tiny_pipes.BUILDERS["qwen-image"](), sampling_of("qwen-image", mode="fullres")
    compiled = CompiledEngine(pipe, backend="eager", capturer=(recorder := Recorder()))
    plan = compiled.plan(sampling)
    (done,) = compiled.warm(plan, [(2,)], sampling)
    assert done.graphs > 0
    assert done.captures > 0
    graphs, unique = compiled.graphs, torch._dynamo.utils.counters["stats"]
    assert graphs is not None
    before = unique["unique_graphs"], graphs.counts.captures
    with graphs.left():
        plain = made(compiled, sampling, 0, 1)
    assert graphs.counts.captures == before[1]
    assert torch.equal(made(compiled, sampling, 0, 1), plain)
    assert graphs.counts.captures == before[1] + 2  # the prompts' lengths, and the negative ones'
    assert torch.equal(made(compiled, sampling, 0, 1), plain)
    assert graphs.counts.captures == before[1] + 2
    assert unique["unique_graphs"] == before[0]
    assert not graphs.refusals
    assert recorder.held_bytes > 0


# The books, on a transformer of one line.


class Transformer(torch.nn.Module):
    def __init__(self, does: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
        self.device = self.weight.device
        self.calls = 0
        self.does = does

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.does(self, *args, **kwargs)


def graphed(
    does: Callable[..., Any] = lambda self, x, **_: x * self.weight,
    capturer: Any = None,
    limit_bytes: int | None = None,
) -> tuple[Transformer, Graphs]:
    transformer = Transformer(does)
    pipe = SimpleNamespace(components={"transformer": transformer})
    return transformer, Graphs(pipe, capturer or Recorder(), limit_bytes=limit_bytes)


def calls(graphs: Graphs, transformer: Transformer, *inputs: Any, **kwargs: Any) -> list[Any]:
    """One stage of calls."""
    with torch.no_grad(), graphs.taken():
        return [transformer(one, **kwargs) for one in inputs]


def rows(count: int) -> Tensor:
    return torch.arange(4.0 * count).reshape(count, 4)


def test_results_are_copies_and_the_inputs_are_too():
    transformer, graphs = graphed()
    given = [rows(2) + k for k in range(5)]
    found = calls(graphs, transformer, *given)
    assert graphs.counts == Counts(plain=1, captures=1, replays=3)
    assert transformer.calls == 3  # the first, the second, and the second as it was captured
    for x, result in zip(given, found, strict=True):
        assert torch.equal(result, x * 2)
    assert len({result.data_ptr() for result in found}) == 5
    transformer.weight.fill_(3.0)  # in place: a graph reads weights where they lie
    assert torch.equal(calls(graphs, transformer, given[0])[0], given[0] * 3)
    assert graphs.counts.replays == 4


def test_calls_take_the_graph_of_their_own_shape_dtype_strides_and_values():
    def scaled(self: Any, x: Tensor, scale: float = 1.0, flag: Any = None) -> Any:
        return {"x": x * scale, "flag": flag}

    transformer, graphs = graphed(scaled)
    kinds: list[tuple[Tensor, dict[str, Any]]] = [
        (rows(2), {}),
        (rows(3), {}),
        (rows(2).double(), {}),
        (rows(4).reshape(4, 4).T[:2], {}),
        (rows(1).expand(2, 4), {}),
        (rows(2), {"scale": 2.0}),
        (rows(2), {"scale": 2.0, "flag": 1}),
        (rows(2), {"scale": 2.0, "flag": True}),
    ]
    for _ in range(3):
        for x, kwargs in kinds:
            (found,) = calls(graphs, transformer, x, **kwargs)
            assert torch.equal(found["x"], x * kwargs.get("scale", 1.0))
            assert found["flag"] is kwargs.get("flag")
    assert graphs.kept == len(kinds)
    assert graphs.counts == Counts(len(kinds), len(kinds), len(kinds))


def test_outside_of_a_stage_nothing_is_captured():
    transformer, graphs = graphed()
    with torch.no_grad():
        for _ in range(3):
            transformer(rows(1))
    with graphs.left():
        calls(graphs, transformer, rows(1), rows(1), rows(1))
    assert graphs.counts == Counts()


def test_the_least_recently_used_graphs_make_room():
    transformer, graphs = graphed()
    calls(graphs, transformer, rows(1), rows(1))
    one = graphs.held_bytes  # more rows take as many times as much
    transformer, graphs = graphed(limit_bytes=4 * one)
    calls(graphs, transformer, rows(1), rows(1), rows(2), rows(2))
    assert (graphs.kept, graphs.counts.dropped) == (2, 0)
    calls(graphs, transformer, rows(1))  # so that two rows are what was not used for longest
    calls(graphs, transformer, rows(3), rows(3))
    assert (graphs.kept, graphs.counts.dropped) == (2, 1)
    assert graphs.held_bytes == 4 * one
    before = graphs.counts.captures
    calls(graphs, transformer, rows(1), rows(3))
    assert graphs.counts.captures == before
    calls(graphs, transformer, rows(2))  # known from before, so it is captured at once, and one row goes
    assert graphs.counts.captures == before + 1
    assert graphs.held_bytes <= 4 * one
    assert not graphs.refusals
    found = calls(graphs, transformer, rows(5), rows(5), rows(5))
    assert torch.equal(found[1], rows(5) * 2)
    assert graphs.kept == 0  # nothing else was left to make room
    found = calls(graphs, transformer, rows(5), rows(5))
    assert [reason for reason in graphs.refusals if reason.startswith("its graph takes")]


class Pool(Recorder):
    """Gives nothing back before all is gone, as the memory that CUDA graphs share."""

    most = 0

    @property
    def held_bytes(self) -> int:
        self.most = max(self.most, super().held_bytes)
        return self.most

    def renew(self) -> None:
        super().renew()
        self.most = 0


def test_memory_that_graphs_share_is_given_back_all_at_once():
    transformer, graphs = graphed(capturer=Pool(), limit_bytes=600)
    for count in (1, 2, 3, 4, 5, 6, 7):
        for x in (rows(count),) * 3:
            assert torch.equal(calls(graphs, transformer, x)[0], x * 2)
        assert graphs.held_bytes <= 600
    assert graphs.counts.dropped > 0
    assert not graphs.refusals  # each of them fits by itself


# Why a call has no graph.


def in_place(self: Any, x: Tensor) -> Tensor:
    return x.add_(1)


def waits(self: Any, x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 3 else x


def masks(self: Any, x: Tensor) -> Tensor:
    return x[x > 1]


def counts(self: Any, x: Tensor) -> Tensor:
    return x * self.calls


@pytest.mark.parametrize(
    ("does", "why"),
    [
        (in_place, "the transformer changes what it is given"),
        (waits, "the call waits for a value of a tensor (_local_scalar_dense)"),
        (masks, "the call waits for a value of a tensor (index)"),
        (counts, "a replay gives something else than the call does"),
    ],
)
def test_a_call_that_a_replay_would_not_repeat_runs_as_it_is(does, why):
    transformer, graphs = graphed(does)
    calls(graphs, transformer, *(rows(2) for _ in range(4)))
    assert graphs.counts == Counts(plain=4)
    assert graphs.refusals == {why: 3}  # the first call needs no reason
    twin = Transformer(does)
    twin.calls = transformer.calls
    assert torch.equal(calls(graphs, transformer, rows(2))[0], twin(rows(2)))


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        (object(), "the argument [1]['other'] is a object"),
        (torch.empty(1, device="meta"), "the argument [1]['other'] lies on meta, the model on cpu"),
    ],
)
def test_an_argument_that_has_no_key_is_named(argument, why):
    transformer, graphs = graphed()
    calls(graphs, transformer, rows(1), rows(1), other=argument)
    assert graphs.counts == Counts(plain=2)
    assert graphs.refusals == {why: 2}


def test_a_value_that_is_another_one_at_each_call_gets_no_graphs():
    transformer, graphs = graphed()
    for _ in range(3):
        with torch.no_grad(), graphs.taken():
            for step in range(12):
                assert torch.equal(transformer(rows(1), timestep=step / 12), rows(1) * 2)
    assert graphs.kept == 0
    assert graphs.counts == Counts(plain=36)
    assert graphs.refusals == {"[1]['timestep'] is no tensor, and another one at each call": 28}


class Fails(Recorder):
    """`error` is raised by the first capture."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def capture(self, run: Callable[[], Sequence[Tensor]]) -> Captured:
        error, self.error = self.error, None
        if error is not None:
            run()
            raise error
        return super().capture(run)


def test_an_error_of_a_capture_ends_capturing_and_nothing_else():
    transformer, graphs = graphed(capturer=Fails(RuntimeError("operation not permitted\nwhen capturing")))
    found = calls(graphs, transformer, *(rows(2) for _ in range(3)), rows(3), rows(3))
    assert torch.equal(found[1], rows(2) * 2)
    assert graphs.counts == Counts(plain=5)
    assert graphs.refusals == {"capturing failed: operation not permitted": 4}


def test_where_there_is_no_memory_for_a_graph_the_others_go_and_may_come_again():
    transformer, graphs = graphed(capturer=(capturer := Fails(torch.OutOfMemoryError("none"))))
    capturer.error, error = None, capturer.error
    calls(graphs, transformer, rows(1), rows(1))
    capturer.error = error
    calls(graphs, transformer, rows(2), rows(2), rows(2))
    assert (graphs.kept, graphs.counts.dropped) == (0, 1)
    assert graphs.refusals == {"there is no memory for its graph": 2}
    calls(graphs, transformer, rows(1), rows(1))
    assert graphs.kept == 1


def test_a_model_that_was_changed_gets_new_graphs():
    pipe, sampling = tiny_pipes.flux1(), sampling_of("flux1")
    engine, graphs = (found := GraphedEngine(pipe, capturer=Recorder())), found.graphs
    attention = pipe.transformer.transformer_blocks[0].attn
    before = made(engine, sampling, 0)
    assert (graphs.kept, graphs.counts.dropped) == (2, 0)

    def now() -> Tensor:
        """Without graphs, and by them; the graphs of before are gone."""
        dropped = graphs.counts.dropped
        with graphs.left():
            wanted = made(engine, sampling, 0)
        assert torch.equal(made(engine, sampling, 0), wanted)
        assert graphs.counts.dropped == dropped + 2
        return wanted

    attention.to_q.weight = torch.nn.Parameter(attention.to_q.weight * 2)  # elsewhere in memory
    assert not torch.equal(now(), before)

    class Zero:
        def __call__(self, attention: Any, hidden_states: Tensor, text: Tensor, *_: Any) -> Any:
            return hidden_states * 0, text * 0

    attention.processor = Zero()
    now()
    pipe.transformer.add_adapter(lora_config())
    layer = pipe.transformer.single_transformer_blocks[0].attn.to_q
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    adapted = now()
    layer.scaling["default"] = 0.0
    assert not torch.equal(now(), adapted)


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["single_transformer_blocks.0.attn.to_q"])


def test_stages_in_which_python_decides_run_without_graphs():
    engine = GraphedEngine(pipe := tiny_pipes.flux1(layers=2), capturer=Recorder())

    def reasons(sampling: Sampling) -> set[str]:
        engine.graphs.refusals.clear()
        made(engine, sampling, 0)
        return set(engine.graphs.refusals)

    sampling = sampling_of("flux1")
    cached = sampling_of("flux1", cache="first_block")
    assert reasons(cached) == {"the cache first_block decides at each step what runs"}
    called = sampling_of("flux1", call_kwargs={"callback_on_step_end": lambda *_: {}})
    assert reasons(called) == {"a callback may change the model between two steps"}
    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(lambda *_: None)
    hooked = "something is hooked to transformer_blocks.1 of the FluxTransformer2DModel"
    assert reasons(sampling) == {hooked}
    handle.remove()
    assert engine.graphs.counts == Counts()
    assert reasons(sampling) == set()  # a cache that was taken away leaves nothing
    assert engine.graphs.kept == 2
