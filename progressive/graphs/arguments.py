"""What a call is given: the key of its graph, and buffers that hold it for one. Knows no model and no graph.

A graph reads its inputs where they lay when it was captured, and whatever was no tensor is part of it. So a
call may take the graph of another one only if its tensors have the same shapes, strides and dtypes and all
the rest is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overtone.progressive import library

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""What may stand beside tensors: values that are equal where they are the same."""


class NotCapturable(Exception):
    """Why a call cannot have a graph, as a whole sentence without its end."""


@dataclass(frozen=True)
class Arguments:
    """One call's arguments, taken apart."""

    leaves: tuple[Any, ...]
    structure: Any
    """How they are nested."""
    tensors: tuple[Tensor, ...]
    """Those of the leaves that are tensors, in order."""
    shapes: tuple[Any, ...]
    """All that a graph depends on but `others`."""
    others: tuple[tuple[str, type, Any], ...]
    """(name, type, value) of the leaves that are no tensors: `True` is not 1 here."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Arguments:
        """NotCapturable for what is neither a tensor on `device` nor a plain value."""
        named, structure = library.leaves((args, kwargs))
        tensors, shapes, others = list[Tensor](), list[Any](), list[tuple[str, type, Any]]()
        for name, leaf in named:
            if type(leaf) is Tensor or type(leaf) is torch.nn.Parameter:
                if leaf.device != device:  # its value would become part of the graph
                    raise NotCapturable(f"the argument {name} lies on {leaf.device}, the model on {device}")
                tensors.append(leaf)
                shapes.append((name, tuple(leaf.shape), leaf.stride(), leaf.dtype))
            elif isinstance(leaf, _PLAIN):
                others.append((name, type(leaf), leaf))
            else:
                raise NotCapturable(f"the argument {name} is a {type(leaf).__name__}")
        leaves = tuple(leaf for _, leaf in named)
        return cls(leaves, structure, tuple(tensors), (structure, *shapes), tuple(others))

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's (args, kwargs) with these tensors in place of its own."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = library.nested(leaves, self.structure)
        return args, kwargs


def buffers(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each with memory of its own, laid out as it was, but dense."""
    return [tensor.clone(memory_format=torch.preserve_format) for tensor in tensors]


def fill(those: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy what a call was given into its graph's buffers."""
    for buffer, tensor in zip(those, tensors, strict=True):
        buffer.copy_(tensor)


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether these are equal bit for bit, but for the sign of zero and that NaN is NaN."""
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(one, other, strict=True)
    )
