"""What goes wrong while samples are made. Loads no torch, so that any process can name and unpickle it."""

from __future__ import annotations

from collections.abc import Sequence


class NonFiniteLatents(ValueError):
    """Rows whose latents are NaN or infinite at the end of a stage."""

    def __init__(self, rows: Sequence[int], stage: int) -> None:
        super().__init__(
            f"latents of rows {list(rows)} are NaN or infinite after stage {stage}; "
            "a wider dtype (bfloat16 or float32), or other guidance, usually helps"
        )
        self.rows = list(rows)
        """Indices in what was given to `denoise` or `begin`."""
        self.stage = stage
        """Index in the plan's stages."""

    def __reduce__(self) -> tuple[type[NonFiniteLatents], tuple[list[int], int]]:
        return type(self), (self.rows, self.stage)


class NonFinitePixels(ValueError):
    """Rows whose latents are finite, but whose decoded pixels are NaN or infinite."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(
            f"pixels of rows {list(rows)} are NaN or infinite after the VAE, though their latents are "
            "finite; decode in a wider dtype (`dtype: bfloat16` or `float32`)"
        )
        self.rows = list(rows)
        """Indices in what was given to `decode`."""

    def __reduce__(self) -> tuple[type[NonFinitePixels], tuple[list[int]]]:
        return type(self), (self.rows,)


class Recompiled(RuntimeError):
    """A shape was met that no warm-up had seen, or more of them than torch was told to expect."""


class ScorerError(ValueError):
    """A scorer that is not there, or that did not give one finite number a picture; the message names the
    scorer and the row, or says what to give instead."""
