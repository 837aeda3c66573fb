"""The stages whose calls may take graphs, and why others may not. Knows no graph and no warm-up.

`GraphedRunner` wraps another `StageRunner`. Under `compile.CompiledRunner` it is the inner one: what is
captured is then the compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from overtone.progressive import library
from overtone.progressive.caches import keeps_text, transformers
from overtone.progressive.engine import PipelineCall, StageInput, StageRunner
from overtone.progressive.graphs.books import Graphs
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import Sampling


class GraphedRunner:
    """The runner of an engine whose transformer calls take graphs."""

    def __init__(self, call: PipelineCall, inner: StageRunner, graphs: Graphs) -> None:
        self._call, self._inner, self._graphs = call, inner, graphs

    def chunks(
        self, plan: SamplingPlan, index: int, rows: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """The inner runner's: a chunk of another size than usual has a graph of its own, or none."""
        return self._inner.chunks(plan, index, rows, sampling)

    def run(self, given: StageInput) -> torch.Tensor:
        """The inner runner's; without graphs, and that counted with its reason, where they cannot be. Where
        memory runs out, all graphs give theirs back first, for whoever tries again."""
        why = self.why_not(self._call.at_stage(given.sampling, given.plan, given.stage))
        if why is not None:
            self._graphs.note(why)
            return self._inner.run(given)
        try:
            with self._graphs.taken():
                return self._inner.run(given)
        except torch.OutOfMemoryError:
            self._graphs.clear()
            raise

    def why_not(self, sampling: Sampling) -> str | None:
        """Why no call of a stage may take a graph; None where calls may. Each of these runs Python at a call
        that a replay would leave out."""
        if self._call.offloads:
            return "the pipeline offloads its parts to main memory, where they lie elsewhere each time"
        if sampling.cache != "none":
            return f"the cache {sampling.cache} decides at each step what runs"
        if self._call.arguments(sampling).get("callback_on_step_end") is not None:
            return "a callback may change the model between two steps"
        for transformer in transformers(self._call.pipe):
            if keeps_text(transformer):
                return "keys and values of the text are kept from the first step on"
            part = library.runs_hooks(transformer)
            if part is not None:
                return f"something is hooked to {part} of the {type(transformer).__name__}"
        return None
