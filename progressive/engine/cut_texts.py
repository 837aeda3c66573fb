"""Which prompts the tokenizers of a pipeline cut, seen while its own `encode_prompt` runs. Knows no encoders.

    with watching(pipe) as seen:
        pipe.encode_prompt(prompt=texts, ...)
    seen.cut(len(texts))            # [False, True, None]: by every encoder, or not known

A pipeline's limits are in its code: CLIP's 77 tokens, or `max_sequence_length` of the call, with or without a
chat template around the prompt. So nothing is reckoned here: its tokenizers are lent out for a moment as
look-alikes, which note what was left over when they cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def watching(pipe: Any) -> Iterator[Seen]:
    """Watch the tokenizers of a pipeline. It is changed in place and put back: give a copy where other
    threads use it."""
    seen = Seen()
    names = [name for name in vars(pipe) if name.startswith("tokenizer")]
    before = {name: vars(pipe)[name] for name in names if callable(vars(pipe)[name])}
    try:
        for name, tokenizer in before.items():
            # Not by `setattr`, which would write the class into the pipeline's configuration.
            vars(pipe)[name] = _LookAlike(tokenizer, seen.notes.setdefault(name, []))
        yield seen
    finally:
        vars(pipe).update(before)


class Seen:
    """What the tokenizers did."""

    def __init__(self) -> None:
        self.notes: dict[str, list[bool | None]] = {}
        """For each tokenizer, whether it cut each text that it was told to cut; None: it does not tell."""

    def cut(self, count: int) -> list[bool | None]:
        """Whether every tokenizer that was used cut each of `count` texts, given in one order to all. One
        that was not told to cut anything is left out, for it may serve a warning alone."""
        used = [notes for notes in self.notes.values() if notes]
        if not used or any(len(notes) != count for notes in used):
            return [None] * count
        return [_all(notes[i] for notes in used) for i in range(count)]


def _all(notes: Iterator[bool | None]) -> bool | None:
    known = list(notes)
    if False in known:
        return False
    return None if None in known else True


class _LookAlike:
    """A tokenizer that passes everything on, and notes what it cuts."""

    def __init__(self, tokenizer: Any, notes: list[bool | None]) -> None:
        object.__setattr__(self, "_tokenizer", tokenizer)
        object.__setattr__(self, "_notes", notes)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """For `isinstance`."""
        return type(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tokenizer, name, value)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self._noted(self._tokenizer(*args, **settings), settings)

    def apply_chat_template(self, *args: Any, **settings: Any) -> Any:
        return self._noted(self._tokenizer.apply_chat_template(*args, **settings), settings)

    def _noted(self, result: Any, settings: dict[str, Any]) -> Any:
        if settings.get("truncation"):
            encodings: Sequence[Any] | None = getattr(result, "encodings", None)
            if encodings:
                self._notes.extend(bool(encoding.overflowing) for encoding in encodings)
            elif not isinstance(result, str):  # a tokenizer that is written in Python keeps nothing left over
                self._notes.extend([None] * len(result["input_ids"]))
        return result
