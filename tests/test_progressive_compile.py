"""Compiled blocks on tiny models: nothing compiles after warm-up, and nothing falls back unseen."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_pipes
import torch

from overtone.progressive.compile import CompiledEngine, compile_blocks
from overtone.progressive.engine import Engine, TextsOf, WarmedEngine, WarmUp
from overtone.progressive.errors import Recompiled
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling


@pytest.fixture(autouse=True)
def _own_torch_compile() -> Iterator[None]:
    """Graphs and limits of torch are the process's: each test has its own."""
    config: Any = torch._dynamo.config
    before = config.recompile_limit, config.accumulated_recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    config.recompile_limit, config.accumulated_recompile_limit = before


def graphs() -> int:
    """Compiled by this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def five_grids(**fields: Any) -> Sampling:
    base: dict[str, Any] = {
        "height": 160,
        "width": 160,
        "num_steps": 10,
        "call_kwargs": {"max_sequence_length": 16},
    }
    ladder = {"scales": (0.2, 0.4, 0.6, 0.8, 1.0), "transition_sigmas": (0.95, 0.9, 0.8, 0.6)}
    return Sampling(**(base | ladder | fields))


def words(engine: Engine, sampling: Sampling, *lengths: int) -> Any:
    return engine.encode([" ".join(["a"] * n) for n in lengths], [None] * len(lengths), sampling)


def test_nothing_compiles_after_the_warm_up_of_five_grids_and_two_batch_sizes():
    pipe = tiny_pipes.flux1(layers=2)
    pipe.transformer.single_transformer_blocks = torch.nn.ModuleList()  # one kind of block is quicker
    sampling = five_grids()
    plain = Engine(pipe)
    plan = plain.plan(sampling)
    assert len({stage.grid for stage in plan.stages}) == 5
    encoded, seeds = words(plain, sampling, 1, 2, 3), [5, 6, 7]
    expected, _ = plain.denoise(plan, encoded, seeds, sampling)

    engine = CompiledEngine(pipe, backend="eager")
    done = engine.warm(plan, [(1, 4)] * 5, sampling)
    # A graph for each of five grids and two batch sizes, however many blocks there are.
    assert [(w.stage.grid, w.rows, w.graphs) for w in done] == [
        (stage.grid, rows, 1) for stage in plan.stages for rows in (1, 4)
    ]
    assert all(w.rows_per_s > 0 and w.seconds > 0 for w in done)
    assert engine.warm(plan, [(1, 4)] * 5, sampling) == []
    before = graphs()
    latents, reports = engine.denoise(plan, encoded, seeds, sampling)
    assert latents.shape == expected.shape
    assert torch.allclose(latents, expected, atol=1e-4)
    assert [report.rows for report in reports] == [3] * 9
    many, reports = engine.denoise(plan, words(engine, sampling, *range(1, 10)), list(range(9)), sampling)
    assert len(many) == 9
    ran = [report.rows for report in reports if report.kind == "denoise"]
    assert ran == [4, 4, 1] * 5
    assert graphs() == before


def test_all_blocks_of_a_kind_share_one_graph_a_shape():
    """FLUX.1 has two kinds, of which the second's first block is called with other strides than the rest; how
    many blocks there are of each changes nothing."""
    pipe = tiny_pipes.flux1(layers=3)
    singles = pipe.transformer.single_transformer_blocks
    singles.extend(copy.deepcopy(singles[0]) for _ in range(3))
    engine = CompiledEngine(pipe, backend="eager")
    sampling = five_grids(height=64, width=64, scales=(0.5, 1.0), transition_sigmas=(0.8,))
    done = engine.warm(engine.plan(sampling), [(1,), (1,)], sampling)
    assert [one.graphs for one in done] == [3, 3]


class Paced(WarmedEngine):
    """Takes no time to get ready; `paces`: rows a second by batch size, of which larger ones do not fit."""

    def __init__(self, pipe: Any, paces: dict[int, float]) -> None:
        super().__init__(pipe)
        self.paces, self.ready = paces, set[tuple[Stage, int]]()
        self.tried: list[int] = []

    def sizes(self, plan: SamplingPlan, index: int, sampling: Sampling) -> tuple[int, ...]:
        return tuple(sorted(rows for stage, rows in self.ready if stage == plan.stages[index]))

    def _warm_one(
        self, plan: SamplingPlan, stage: Stage, rows: int, sampling: Sampling, texts: TextsOf
    ) -> WarmUp:
        self.tried.append(rows)
        if rows not in self.paces:
            raise MemoryError("out of memory")
        self.ready.add((stage, rows))
        return WarmUp(stage, rows, 0, 0.0, self.paces[rows])


def test_a_search_goes_on_where_it_was_and_ends_once():
    sampling = five_grids(mode="fullres", scales=None, transition_sigmas=None)
    engine = Paced(tiny_pipes.flux1(), {1: 1.0, 2: 1.9, 4: 1.91, 8: 9.0})
    plan, sizes = engine.plan(sampling), [(1, 2, 4, 8, 16)]
    engine.warm(plan, [(1,)], sampling, search=True)  # what the first batch comes in
    assert engine.tried == [1]
    engine.warm(plan, sizes, sampling, search=True)
    assert engine.tried == [1, 2, 4]  # which is not worth it over two rows
    engine.warm(plan, sizes, sampling, search=True)
    assert engine.tried == [1, 2, 4]
    engine.warm(plan, sizes, sampling)  # whoever asks for them by number gets them
    assert engine.tried == [1, 2, 4, 8, 16]
    engine.warm(plan, sizes, sampling)
    assert engine.tried == [1, 2, 4, 8, 16]  # and what did not fit is not tried again
    with pytest.raises(MemoryError):
        Paced(tiny_pipes.flux1(), {}).warm(plan, [(4,)], sampling)


def test_a_plan_that_is_not_warm_is_an_error_and_compiles_nothing():
    engine = CompiledEngine(tiny_pipes.flux1(), backend="eager")
    warm = five_grids(mode="fullres", scales=None, transition_sigmas=None, height=64, width=64)
    engine.warm(engine.plan(warm), [(1,)], warm)
    other = warm.model_copy(update={"height": 96})
    before = graphs()
    with pytest.raises(Recompiled, match=r"96 x 64 px\); call `warm`"):
        engine.denoise(engine.plan(other), words(engine, other, 1), [0], other)
    # And past the engine's own books: what is not compiled is not compiled on the way.
    engine.runner.add(engine.plan(other).stages[-1], other, 1)
    with pytest.raises(Recompiled, match="no warm-up had seen"):
        engine.denoise(engine.plan(other), words(engine, other, 1), [0], other)
    assert graphs() == before


def test_more_shapes_than_expected_are_an_error():
    """And no log line: torch's own answer is to go on uncompiled."""
    pipe = tiny_pipes.flux1()
    engine = Engine(pipe)
    sampling = five_grids(scales=(0.5, 1.0), transition_sigmas=(0.8,))
    torch._dynamo.config.recompile_limit = 1
    blocks = compile_blocks(engine, "blocks", shapes=0, backend="eager")
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        engine.denoise(engine.plan(sampling), words(engine, sampling, 1), [0], sampling)
    blocks.expect(2)
    engine.denoise(engine.plan(sampling), words(engine, sampling, 1), [0], sampling)


LONG = pytest.mark.chaos  # a quarter of a minute each, and of the same kind as the first


@pytest.mark.parametrize(
    "family", ["qwen-image", pytest.param("z-image", marks=LONG), pytest.param("wan2.2", marks=LONG)]
)
def test_no_text_length_compiles_anything_after_the_warm_up(family):
    """Guided, with texts of every length, alike and not, and both of Wan's transformers."""
    pipe = tiny_pipes.BUILDERS[family]()
    guidance = {"true_cfg_scale": 3.0} if family == "qwen-image" else {"guidance_scale": 3.0}
    video = {"num_frames": 5} if family.startswith("wan") else {}
    sampling = Sampling(height=64, width=96, num_steps=5, transition_sigmas=(0.8,), **guidance, **video)
    lengths = [(1, 1), (2, 70), (90, 90), (150, 1)]
    plain = Engine(pipe)
    plan = plain.plan(sampling)
    texts = [words(plain, sampling, *pair) for pair in lengths]
    expected = [plain.denoise(plan, text, [1, 2], sampling)[0] for text in texts]
    engine = CompiledEngine(pipe, backend="eager")
    done = engine.warm(plan, [(2,)] * 2, sampling)
    assert done[0].graphs > 0
    before = graphs()
    for text, wanted in zip(texts, expected, strict=True):
        assert torch.allclose(engine.denoise(plan, text, [1, 2], sampling)[0], wanted, atol=1e-3)
    alone, _ = engine.denoise(plan, texts[1][1:], [2], sampling)  # filled up to two
    assert torch.allclose(alone[0], expected[1][1], atol=1e-3)
    assert graphs() == before


@pytest.mark.parametrize("cache", ["first_block", "taylorseer"])
def test_a_step_cache_on_compiled_blocks_leaves_out_the_same_steps_and_compiles_nothing(cache):
    pipe = tiny_pipes.flux1(layers=2)
    pipe.transformer.single_transformer_blocks = torch.nn.ModuleList()
    ladder = {"scales": (0.5, 1.0), "transition_sigmas": (0.8,)}
    sampling = five_grids(height=64, width=64, cache=cache, **ladder)
    plain = Engine(pipe)
    plan = plain.plan(sampling)
    encoded = words(plain, sampling, 1, 2)
    expected, _ = plain.denoise(plan, encoded, [1, 2], sampling)
    engine = CompiledEngine(pipe, backend="eager")
    done = engine.warm(plan, [(1, 2)] * 2, sampling)
    # first_block takes rows one at a time: there is nothing to compile for two.
    assert [w.rows for w in done] == ([1, 1] if cache == "first_block" else [1, 2, 1, 2])
    before = graphs()
    latents, _ = engine.denoise(plan, encoded, [1, 2], sampling)
    assert torch.allclose(latents, expected, atol=1e-4)
    assert graphs() == before
