"""An engine whose transformer blocks are compiled once a shape, and never in a batch."""

from __future__ import annotations

from overtone.progressive.compile.blocks import COMPILE, Compile, compile_blocks
from overtone.progressive.compile.engine import CompiledEngine

__all__ = [
    "COMPILE",
    "Compile",
    "CompiledEngine",
    "compile_blocks",
]
