"""TODO: cluster/worker/texts.py."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

TEXTS = 64
"""Encoded prompts that are remembered, for those that come again. FLUX.1's take 4 MB each."""


class Texts(OrderedDict[str, Any]):
    """The encoded prompts that were used last, `most` of them."""

    most = TEXTS

    def __getitem__(self, text: str) -> Any:
        self.move_to_end(text)
        return super().__getitem__(text)

    def __setitem__(self, text: str, encoded: Any) -> None:
        super().__setitem__(text, encoded)
        while len(self) > self.most:
            self.popitem(last=False)


class Inline(Executor):
    """Runs what is submitted at once, in the thread that submits it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - raised again by the future's `result`
            future.set_exception(error)
        return future
