"""A training stage in time and on disk: its clock, its checkpoint, its log. Knows no loss and no model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overtone.progressive.tiny.train.settings import Settings


class Clock:
    """Iterates over training steps, giving the progress in [0, 1), until minutes or steps are spent.

    With `until`, seconds since the epoch, the minutes are those until then. Minutes, progress and warm-up
    count from `began`, which is not zero where a finished model is trained on.
    """

    def __init__(
        self, minutes: float, steps: int | None, checkpoint_s: float, until: float | None = None
    ) -> None:
        self.budget_s, self.steps, self.checkpoint_s, self.until = 60 * minutes, steps, checkpoint_s, until
        self.step, self.before_s = 0, 0.0
        self.began_step, self.began_s = 0, 0.0
        self._started = self._saved = time.monotonic()

    def resume(self, state: dict[str, Any]) -> None:
        """Count on from where `state` was taken."""
        self.step, self.before_s = state["step"], state["elapsed_s"]
        self.began_step, self.began_s = state["began_step"], state["began_s"]

    def state(self) -> dict[str, Any]:
        """As plain numbers, for `resume`."""
        return {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "began_step": self.began_step,
            "began_s": self.began_s,
        }

    @property
    def elapsed_s(self) -> float:
        """Training time of all runs together, seconds."""
        return self.before_s + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """The share of the minutes or steps that is spent, whichever is larger."""
        by_steps = (self.step - self.began_step) / self.steps if self.steps is not None else 0.0
        return max(by_steps, (self.elapsed_s - self.began_s) / self.budget_s)

    def __iter__(self) -> Iterator[float]:
        self._started = self._saved = time.monotonic()
        if self.until is not None:
            self.budget_s = self.before_s - self.began_s + max(1.0, self.until - time.time())
        while (progress := self.progress) < 1:
            yield progress
            self.step += 1

    def checkpoint_due(self) -> bool:
        """Whether `checkpoint_s` seconds have passed since this was last true."""
        due = time.monotonic() - self._saved >= self.checkpoint_s
        if due:
            self._saved = time.monotonic()
        return due


class Checkpoint:
    """A stage's file: its module, the optimizers and how far the clock is."""

    def __init__(
        self,
        file: Path,
        settings: Settings,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        clock: Clock,
        device: torch.device,
    ) -> None:
        self._file, self._settings, self._device = file, settings, device
        self._module, self._optimizers, self._clock = module, optimizers, clock

    def resume(self) -> dict[str, Any]:
        """Continue from the file, and return its contents; they are empty where no file exists.

        Of a stage that is done, the module alone is taken over, and of a restored one no optimizer.
        """
        if not self._file.exists():
            return {}
        state: dict[str, Any] = torch.load(self._file, map_location=self._device, weights_only=True)
        self._module.load_state_dict(state["model"])
        if not state.get("done"):
            if state["optimizers"] is not None:
                for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
            self._clock.resume(state)
        return state

    def save(self, *, done: bool = False, **more: Any) -> None:
        """Replace the file; `more` comes back from `resume`. `done`: there is nothing left to train."""
        state = {
            "model": self._module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "done": done,
            "settings": asdict(self._settings),
        }
        save(self._file, state | more | self._clock.state())


def set_lr(optimizer: torch.optim.Optimizer, peak: float, progress: float, clock: Clock, warmup: int) -> None:
    """Linear warm-up by steps, then cosine to zero by progress."""
    warm = min(1.0, (clock.step - clock.began_step + 1) / warmup)
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * 0.5 * (1 + math.cos(math.pi * progress))


def smooth(shown: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Running means, of which the newest value is a twentieth; a name's first value is its first mean."""
    return shown | {k: 0.95 * shown.get(k, v) + 0.05 * v for k, v in new.items()}


def save(file: Path, state: dict[str, Any]) -> None:
    """The state as a file that is whole or absent, however the process ends."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def write_json(file: Path, values: Any) -> None:
    """Indented, for people read these files too."""
    file.write_text(json.dumps(values, indent=2) + "\n")


def log(work: Path, stage: str, clock: Clock, values: dict[str, float]) -> None:
    """One line of JSON in the work folder's log and on the terminal, numbers to four digits."""
    line = {"stage": stage, "step": clock.step, "minutes": round(clock.elapsed_s / 60, 2)}
    line |= {k: float(f"{v:.4g}") for k, v in values.items()}
    with (work / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
