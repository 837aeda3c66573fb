"""A pipeline's transformer blocks compiled, each by itself. Knows no plan, no batch and no warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from overtone.progressive import library
from overtone.progressive.caches import repeated_blocks, transformers
from overtone.progressive.engine import Engine
from overtone.progressive.graphs import whole

Compile = Literal["off", "blocks", "max"]
"""`blocks`: inductor's defaults. `max`: with autotuning. Without CUDA graphs: they would hand one block's
output to the next call of the same block."""

COMPILE: tuple[Compile, ...] = get_args(Compile)
_GRAPHS_A_SHAPE = 16
"""Most graphs of one kind of block for one grid and batch size: with a mask and without, for the prompt and
the negative one, and for blocks that are called with other strides than the rest."""


def compile_blocks(engine: Engine, mode: Compile, *, shapes: int, backend: str | Any = "inductor") -> Blocks:
    """Compile the transformers' repeated blocks for `shapes` combinations of grid and batch size, each by
    itself. More of them than that are an error. Nothing is compiled until a shape is first met."""
    blocks = Blocks(engine.pipe, mode, backend)
    blocks.expect(shapes)
    return blocks


class Blocks:
    """The compiled blocks of a pipeline's transformers. Their own `forward` is replaced, for good."""

    def __init__(self, pipe: Any, mode: Compile, backend: str | Any = "inductor") -> None:
        """ValueError for a pipeline whose transformer names no repeated blocks."""
        self.graphs = 0
        """Compiled so far."""
        self._shapes: dict[str, list[list[tuple[int, ...]]]] | None = None
        self._axes: dict[str, set[int]] = {}
        if mode == "off":
            return
        found = {
            f"{number}.{path}": block
            for number, transformer in enumerate(transformers(pipe))
            for path, block in repeated_blocks(transformer).items()
        }
        if not found:
            raise ValueError(
                f"{type(pipe).__name__} cannot be compiled: its transformer has no list of blocks; "
                "use `compile: off`"
            )
        tuned = "max-autotune-no-cudagraphs" if mode == "max" and backend == "inductor" else None
        for name, block in found.items():
            # The block's own computation alone: hooks, of step caches for one, stay outside and uncompiled.
            compiled = torch.compile(
                block.forward, backend=backend, fullgraph=True, dynamic=False, mode=tuned
            )
            block.forward = self._forward(name, block.forward, compiled)

    def expect(self, shapes: int) -> None:
        """Let torch keep graphs for this many combinations of grid and batch size. Whole graphs make meeting
        the limit an error (`library.RecompileLimit`)."""
        library.let_torch_keep(_GRAPHS_A_SHAPE * shapes, altogether=4 * _GRAPHS_A_SHAPE * shapes)

    def _forward(
        self, name: str, plain: Callable[..., Any], compiled: Callable[..., Any]
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._shapes is not None:
                for path, tensor in library.named_tensors(args, kwargs):
                    self._shapes.setdefault(name + path, [[]])[-1].append(tuple(tensor.shape))
                return plain(*args, **kwargs)
            if self._axes:
                for path, tensor in library.named_tensors(args, kwargs):
                    for axis in self._axes.get(name + path, ()):
                        library.let_vary(tensor, axis)
            return whole(compiled, *args, **kwargs)

        return forward

    def learn_axes(self, calls: Sequence[Callable[[], Any]]) -> None:
        """Find the axes of the blocks' inputs that follow the text: those that differ between these calls,
        which run uncompiled and must differ in nothing but the length of their text."""
        seen: dict[str, list[list[tuple[int, ...]]]] = {}
        try:
            for call in calls:
                self._shapes = {}
                call()
                for key, shapes in self._shapes.items():
                    seen.setdefault(key, []).extend(shapes)
        finally:
            self._shapes = None
        for key, of_calls in seen.items():
            for same in zip(*of_calls, strict=False):  # the same use of the input in each call
                axes = {axis for axis, sizes in enumerate(zip(*same, strict=False)) if len(set(sizes)) > 1}
                self._axes.setdefault(key, set()).update(axes)
