"""What a call does on the device recorded once and done again: CUDA graphs, and a stand-in for a CPU.

    captured = capturer.capture(run)     # run() -> tensors, always from the same buffers
    captured.replay()                    # the same tensors, written anew

`CudaGraphs` records the kernels that a call launches, `Recorder` the operations of torch that it makes.
Neither runs the call's Python again: what a value of Python decides stays as it was decided. So `Recorder`
shows on a CPU what a CUDA graph would get wrong, and its results are the call's own, bit for bit.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from overtone.progressive import library
from overtone.progressive.graphs.arguments import NotCapturable

Run = Callable[[], Sequence[Tensor]]
"""A call from fixed buffers, which gives its tensors."""

_ASKS = re.compile(r"^(_local_scalar_dense|nonzero|equal|masked_select|repeat_interleave)$|unique")
"""Operations of torch that need a value before they can go on, which no graph of kernels can have."""


class Captured(Protocol):
    """One recorded call."""

    def replay(self) -> Sequence[Tensor]:
        """Do it again. The tensors are the same ones each time; another graph's replay may change them."""


class Capturer(Protocol):
    """A way to record calls."""

    def capture(self, run: Run) -> Captured:
        """Record a call that has run before. NotCapturable, or an error of torch's, where that fails; after
        one of torch's nothing more should be captured."""

    @property
    def held_bytes(self) -> int:
        """Memory that what was captured holds beside its results."""

    def renew(self) -> None:
        """Everything captured is gone: give its memory back."""


def capturer_for(device: torch.device) -> Capturer | None:
    """CUDA graphs on a CUDA device; None elsewhere, where nothing waits for a launch."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """Graphs of one CUDA device, which share a pool of memory: they run one after the other, on one stream,
    and each one's results are copied before the next one runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._held = 0

    def capture(self, run: Run) -> Captured:
        """By `torch.cuda.graph`, after a run on the stream that it is captured on."""
        before = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(before)
        try:
            with torch.cuda.stream(self._stream), Watch() as watch:
                run()
            before.wait_stream(self._stream)
            # Other threads encode texts and decode pictures: what they ask of the device is not captured, and
            # no error either.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                held = torch.cuda.memory_reserved(
                    self._device
                )  # what is asked for from here on is the pool's
                results = list(run())
                self._held += max(0, torch.cuda.memory_reserved(self._device) - held)
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own
        return _CudaGraph(graph, results, watch.outside)

    @property
    def held_bytes(self) -> int:
        """What the pool has asked for since it was begun; a graph that is dropped leaves room in it."""
        return self._held

    def renew(self) -> None:
        """A pool is given back once no graph is left of it."""
        self._pool, self._held = torch.cuda.graph_pool_handle(), 0
        torch.cuda.empty_cache()


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, results: list[Tensor], outside: list[Tensor]) -> None:
        self._graph, self._results = graph, results
        self._outside = outside  # read where they lie: they must not go before the graph does

    def replay(self) -> Sequence[Tensor]:
        self._graph.replay()
        return self._results


class Watch(library.DispatchMode):  # type: ignore[misc]
    """Within it, the tensors from outside that operations read are kept: of tables that a model keeps for
    some shapes only, say, which a graph reads where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[Tensor] = []
        self._known: dict[int, weakref.ref[Tensor]] = {}  # results must not be kept: they are gigabytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.made(func, args, kwargs or {})

    def made(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Let an operation run, and take note of it."""
        self.outside += self._new(args, kwargs)
        results = func(*args, **kwargs)
        self._new(results)
        return results

    def _new(self, *those: Any) -> list[Tensor]:
        """The tensors among these that were not known before."""
        found = []
        for _, tensor in library.named_tensors(*those):
            known = self._known.get(id(tensor))
            if known is None or known() is not tensor:  # ids come again once a tensor is gone
                self._known[id(tensor)] = weakref.ref(tensor)
                found.append(tensor)
        return found


def whole(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `call`, which torch has compiled, as one operation of what is being captured: compiled code is not
    the same code where its operations are watched."""
    watching = library.dispatch_mode()
    if not isinstance(watching, Watch):
        return call(*args, **kwargs)
    watching.__exit__(None, None, None)  # left, not only set aside: torch looks whether one was entered
    try:
        return watching.made(call, args, kwargs)
    finally:
        watching.__enter__()


class Recorder:
    """The stand-in for CUDA graphs, on any device: a tape of torch's operations, played again from the
    buffers that it was recorded from."""

    def __init__(self) -> None:
        self._tapes: list[weakref.ref[_Tape]] = []

    def capture(self, run: Run) -> Captured:
        """NotCapturable where the call waits for a value of a tensor."""
        with _Tape() as tape:
            tape.results = list(run())
        self._tapes.append(weakref.ref(tape))
        return tape

    @property
    def held_bytes(self) -> int:
        """What the operations of all tapes that are left gave."""
        tapes = [tape for tape in (reference() for reference in self._tapes) if tape is not None]
        return sum(tape.size_bytes for tape in tapes)

    def renew(self) -> None:
        """Tapes hold memory of their own alone."""
        self._tapes.clear()


class _Tape(Watch):
    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []
        self._made: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def made(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        name = getattr(getattr(func, "overloadpacket", None), "__name__", "")
        rest = (tensor for _, tensor in library.named_tensors(args[1:]))
        masks = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in rest)
        if masks or _ASKS.search(name):
            raise NotCapturable(f"the call waits for a value of a tensor ({name})")
        results = super().made(func, args, kwargs)
        self._made.append((func, args, kwargs, results))
        return results

    @property
    def size_bytes(self) -> int:
        made = {id(t): t for *_, results in self._made for _, t in library.named_tensors(results)}
        return sum(tensor.nbytes for tensor in made.values())

    def replay(self) -> Sequence[Tensor]:
        now: dict[int, Tensor] = {}

        def current(leaf: Any) -> Any:
            return now.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        for func, args, kwargs, results in self._made:
            again = func(*library.mapped(current, args), **library.mapped(current, kwargs))
            made = (tensor for _, tensor in library.named_tensors(again))
            for (_, before), tensor in zip(library.named_tensors(results), made, strict=True):
                now[id(before)] = tensor
        for result in self.results:
            result.copy_(current(result))
        return self.results
