"""An engine whose transformer blocks are compiled once a shape, and never in a batch."""

from __future__ import annotations

from overtone.progressive.compile.blocks import COMPILE, Compile, compile_blocks
from overtone.progressive.compile.engine import CompiledEngine
from overtone.progressive.compile.runner import CompiledRunner

__all__ = [
    "COMPILE",
    "Compile",
    "CompiledEngine",
    "CompiledRunner",
    "compile_blocks",
]
