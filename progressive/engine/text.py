"""TODO: progressive/engine/text.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overtone.progressive.engine.call import Text

ENCODE_TOGETHER = 8  # prompts in one pass of the text encoders: bounds their memory, not the results


@dataclass(frozen=True)
class Encoded:
    """Encoded prompts, one a row. Rows with the same text share tensors."""

    positive: tuple[Text, ...]
    negative: tuple[Text | None, ...]
    """None where guidance runs no negative prompt."""

    def __post_init__(self) -> None:
        if len(self.positive) != len(self.negative):
            raise ValueError(f"{len(self.positive)} prompts but {len(self.negative)} negative ones")

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, rows: slice | Sequence[int]) -> Encoded:
        if isinstance(rows, slice):
            return Encoded(self.positive[rows], self.negative[rows])
        return Encoded(tuple(self.positive[i] for i in rows), tuple(self.negative[i] for i in rows))

    @classmethod
    def cat(cls, parts: Sequence[Encoded]) -> Encoded:
        """One after the other."""
        return cls(
            tuple(text for part in parts for text in part.positive),
            tuple(text for part in parts for text in part.negative),
        )
