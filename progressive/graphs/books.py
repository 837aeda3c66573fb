"""Which calls of a pipeline's transformers have a graph, and why others have none. Knows no plan and no rows.

    graphs = Graphs(pipe, Recorder())
    with graphs.taken():          # one stage: its calls are captured, and replayed where they can be
        pipe(...)
    graphs.counts, graphs.refusals

The first call of a kind runs as it is; the second runs, is captured and tried: a graph stays only if its
first replay gives what the call gave. From then on every such call copies its tensors into the graph's
buffers, replays it and gives copies of its results, so that a caller can keep them. Outside of `taken`, and
wherever something has changed that a graph would not see, calls run as they are.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from overtone.progressive import library
from overtone.progressive.caches import transformers
from overtone.progressive.graphs.arguments import Arguments, NotCapturable, buffers, fill, same
from overtone.progressive.graphs.capture import Captured, Capturer
from overtone.progressive.graphs.state import state_of

MOST = 256
"""Graphs at one time: each also holds some memory that nobody counts."""
KINDS = 8
"""Calls of one stage and one shape that may differ in what is no tensor: passes of guidance, say."""
_MET = 4096
"""Calls that are remembered after they came once."""

_log = logging.getLogger(__name__)


@dataclass
class Counts:
    """Calls of the transformers within `Graphs.taken`, each of which is one of the first three."""

    plain: int = 0
    """Ran as they are."""
    captures: int = 0
    """Ran as they are, and gave a graph."""
    replays: int = 0
    dropped: int = 0
    """Graphs that are no more: to make room, or since the model has changed."""


class Graphs:
    """The graphs of a pipeline's transformers, whose `forward` is replaced for good."""

    def __init__(self, pipe: Any, capturer: Capturer, *, limit_bytes: int | None = None) -> None:
        """`limit_bytes`: the most memory that all graphs together may hold; the least recently used ones make
        room. Unset: a quarter of a GPU's memory, any amount elsewhere."""
        self.counts = Counts()
        self.refusals: Counter[str] = Counter()
        """Why calls, or stages, ran as they are; how many."""
        self._capturer = capturer
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        """By (transformer, shapes, what is no tensor)."""
        self._refused: dict[Any, str] = {}
        """By the first one, two or all three of these."""
        self._met: OrderedDict[Any, None] = OrderedDict()
        self._kinds: dict[Any, list[Any]] = {}
        self._states: dict[int, Any] = {}
        self._taken, self._allowed = False, True
        self._transformers = transformers(pipe)
        self._limit = _memory(self._transformers) // 4 if limit_bytes is None else limit_bytes
        for number, transformer in enumerate(self._transformers):
            transformer.forward = self._forward(number, transformer, transformer.forward)

    @property
    def kept(self) -> int:
        """Graphs that there are now."""
        return len(self._graphs)

    @property
    def held_bytes(self) -> int:
        """Memory that all graphs hold, their buffers included."""
        own = (tensor.nbytes for graph in self._graphs.values() for tensor in graph.inputs)
        return sum(own) + self._capturer.held_bytes

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within it, which is one stage, calls take graphs. Those of a model that has been changed since, by
        an adapter or another attention, are dropped first."""
        for number, transformer in enumerate(self._transformers):
            state = state_of(transformer)
            if self._states.setdefault(number, state) != state:
                self._states[number] = state
                self._drop([key for key in self._graphs if key[0] == number])
                self._refused = {key: why for key, why in self._refused.items() if key[0] != number}
        self._kinds.clear()
        self._taken = self._allowed
        try:
            yield
        finally:
            self._taken = False

    @contextmanager
    def left(self) -> Iterator[None]:
        """Within it `taken` takes nothing: calls run as they are."""
        before, self._allowed = self._allowed, False
        try:
            yield
        finally:
            self._allowed = before

    def note(self, why: str) -> None:
        """Count a call, or a stage, that runs as it is; the first time it is logged."""
        self.refusals[why] += 1
        if self.refusals[why] == 1:
            _log.info("runs without a graph: %s", why)

    def clear(self) -> None:
        """Drop all graphs, and give their memory back."""
        self._drop(list(self._graphs))
        self._capturer.renew()

    def _drop(self, keys: Sequence[Any]) -> None:
        for key in keys:
            del self._graphs[key]
        self.counts.dropped += len(keys)

    def _forward(self, number: int, transformer: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._taken:
                return plain(*args, **kwargs)
            try:
                call = Arguments.of(args, kwargs, transformer.device)
                key = number, call.shapes, call.others
                self._check(key)
            except NotCapturable as why:
                self.note(str(why))
                self.counts.plain += 1
                return plain(*args, **kwargs)
            graph = self._graphs.get(key)
            if graph is not None:
                self._graphs.move_to_end(key)
                self.counts.replays += 1
                return graph(call.tensors)
            if key in self._met:
                return self._capture(key, plain, call)
            self._met[key] = None
            if len(self._met) > _MET:
                self._met.popitem(last=False)
            self.counts.plain += 1
            return plain(*args, **kwargs)

        return forward

    def _check(self, key: tuple[Any, ...]) -> None:
        """NotCapturable for calls that were refused before, and for those that are never the same twice."""
        if torch.is_grad_enabled():
            raise NotCapturable("gradients are switched on")
        for length in (1, 2, 3):
            if key[:length] in self._refused:
                raise NotCapturable(self._refused[key[:length]])
        kinds = self._kinds.setdefault(key[:2], [])
        if key[2] not in kinds:
            kinds.append(key[2])
        if len(kinds) > KINDS:
            names = sorted({one[0] for kind in kinds[1:] for one in set(kind) - set(kinds[0])})
            self._drop([one for one in self._graphs if one[:2] == key[:2]])
            self._refuse(key[:2], f"{', '.join(names)} is no tensor, and another one at each call")

    def _refuse(self, key: Any, why: str) -> NoReturn:
        self._refused[key] = why
        raise NotCapturable(why)

    def _capture(self, key: tuple[Any, ...], plain: Callable[..., Any], call: Arguments) -> Any:
        """Run the call, and keep a graph of it if that can be."""
        inputs = buffers(call.tensors)
        args, kwargs = call.with_tensors(inputs)
        results = plain(*args, **kwargs)
        try:
            graph = self._graph(key, lambda: _tensors(plain(*args, **kwargs)), inputs, call, results)
        except NotCapturable as why:
            self.note(str(why))
            self.counts.plain += 1
            return results
        self.counts.captures += 1
        return graph.results()

    def _graph(
        self,
        key: tuple[Any, ...],
        run: Callable[[], Sequence[Tensor]],
        inputs: list[Tensor],
        call: Arguments,
        results: Any,
    ) -> _Graph:
        """The call's graph, tried and in the books. NotCapturable with the reason why there is none."""
        if not same(inputs, call.tensors):
            self._refuse(key[:1], "the transformer changes what it is given")
        alone = not self._graphs
        try:
            captured = self._capturer.capture(run)
            replayed = captured.replay()
        except NotCapturable as why:
            self._refuse(key[:2], str(why))
        except torch.OutOfMemoryError:
            self.clear()
            self._refuse(key, "there is no memory for its graph")
        except RuntimeError as error:  # a call that a graph cannot have; what was begun stays begun
            self.clear()
            self._refuse(key[:1], f"capturing failed: {str(error).strip().partition(chr(10))[0]}")
        if not same(replayed, _tensors(results)):
            self._refuse(key[:1], "a replay gives something else than the call does")
        graph = _Graph(captured, inputs, replayed, *library.leaves(results))
        self._graphs[key] = graph
        self._make_room(key, alone)
        return graph

    def _make_room(self, key: tuple[Any, ...], alone: bool) -> None:
        while len(self._graphs) > MOST or (self.held_bytes > self._limit and len(self._graphs) > 1):
            self._drop([next(iter(self._graphs))])
        if self.held_bytes > self._limit:  # graphs share memory, which is back when all of them are gone
            held = self.held_bytes
            self.clear()
            if alone:
                self._refuse(
                    key, f"its graph takes {held / 2**20:.0f} MiB, all may have {self._limit / 2**20:.0f}"
                )


class _Graph:
    """One captured call."""

    def __init__(
        self,
        captured: Captured,
        inputs: list[Tensor],
        replayed: Sequence[Tensor],
        leaves: Sequence[tuple[str, Any]],
        structure: Any,
    ) -> None:
        self.inputs = inputs
        self._captured, self._replayed, self._structure = captured, replayed, structure
        self._others = [None if isinstance(leaf, Tensor) else (leaf,) for _, leaf in leaves]

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        fill(self.inputs, tensors)
        self._replayed = self._captured.replay()
        return self.results()

    def results(self) -> Any:
        """The last replay's results as the call nests them; copies, for the next replay writes over them."""
        made = iter(self._replayed)
        leaves = [next(made).clone() if other is None else other[0] for other in self._others]
        return library.nested(leaves, self._structure)


def _tensors(results: Any) -> list[Tensor]:
    return [tensor for _, tensor in library.named_tensors(results)]


def _memory(models: Sequence[Any]) -> int:
    """Bytes of the device that the models are on; of no end but on a GPU."""
    device = models[0].device if models else torch.device("cpu")
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else sys.maxsize
