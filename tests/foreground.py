"""Processes started as a shell starts them in the foreground."""

from __future__ import annotations

import signal


def interruptible() -> None:
    """A `preexec_fn`: Ctrl-C reaches the process, even where whoever started this test ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
