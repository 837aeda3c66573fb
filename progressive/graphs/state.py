"""What a graph does not see of a model that it was captured of, to compare. Knows no graph.

A graph has a model's weights where they lay, and its code, scales of adapters and kind of attention as they
were. Whoever changes one of these between two calls means the second to be another one.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from overtone.progressive import library


def state_of(model: torch.nn.Module) -> list[Any]:
    """Equal to what this gave before if the model's graphs still do what its calls do; a few milliseconds."""
    state: list[Any] = [
        torch.get_float32_matmul_precision(),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu")),
        library.attention_of_all(),
    ]
    for module in model.modules():
        state += _of_part(module)
    for tensor in chain(model.parameters(), model.buffers()):
        state.append(tensor.data_ptr() if _plain(tensor) else _Itself(tensor))
    return state


def _of_part(module: Any) -> list[Any]:
    """Of a part its code, where that has been replaced, its kind of attention and its adapters."""
    own = vars(module)
    state = [own.get("forward"), module.training]
    processor = getattr(module, "processor", None)
    if processor is not None:
        state += [_Itself(processor), library.attention_of(processor)]
    if isinstance(own.get("scaling"), dict):
        state.append(_adapters(module))
    return state


def _adapters(layer: Any) -> tuple[Any, ...]:
    """Of a layer with adapters, by their public names in peft."""
    names = "active_adapters", "disable_adapters", "merged_adapters"
    found = (getattr(layer, name, None) for name in names)
    return dict(layer.scaling), *(list(one) if isinstance(one, list | tuple) else one for one in found)


def _plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


class _Itself:
    """Equal to itself alone, and not gone before the comparison: quantised weights have no one address."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._thing is other._thing

    __hash__ = object.__hash__
