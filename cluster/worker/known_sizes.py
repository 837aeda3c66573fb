"""Batch sizes that were found before, kept on a machine by model, GPU and grid. Makes no search.

    known = KnownSizes.of_job(spec, device="NVIDIA H100 80GB HBM3")
    known.rows(stage)           # what an earlier job found best on this grid; None: nobody has looked
    known.guess(stage)          # as many tokens as were best on the nearest grid that was looked at
    known.keep(stage, 4, {1: 0.5, 2: 0.8, 4: 0.9, 8: 0.9})

A size that ran out of memory is not kept: what others held at that moment says nothing of the next job.
Nothing here is needed: what cannot be read or written is searched for again.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from overtone.jobs.spec import JobSpec
from overtone.progressive.schedule import Stage

_log = logging.getLogger(__name__)
_STEP = ("guidance", "true_cfg", "cache")
"""How the settings are named that say what a step makes."""
_VERSION = 1
"""Of what the file holds; others are not read."""


@dataclass(frozen=True)
class Found:
    """What was found on one grid."""

    rows: int
    """The best size of a chunk."""
    tokens: int
    """Image tokens of a row."""
    rates: dict[str, float]
    """Rows a second of the sizes that were tried."""


class KnownSizes:
    """The file of one model on one kind of GPU."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """`about`: all that sizes depend on beside the grid; plain data for JSON."""
        text = json.dumps(about, sort_keys=True)
        name = re.sub(r"[^A-Za-z0-9.]+", "-", str(about.get("model", {}).get("id", "model")))[-60:]
        self._path = folder / f"{name.strip('-.')}-{sha256(text.encode()).hexdigest()[:12]}.json"
        self._about = json.loads(text)
        self._grids = self._read()
        self._silent = False

    @classmethod
    def of_job(cls, spec: JobSpec, device: str) -> KnownSizes:
        """What earlier jobs with the same model, run in the same way on the same kind of GPU, have found.
        `device`: the GPU's name."""
        workers, sampling = spec.workers.model_dump(mode="json"), spec.sampling.model_dump(mode="json")
        about = {
            "version": _VERSION,
            "device": device,
            "model": spec.model.model_dump(mode="json"),
            "share": workers["num_gpus"] or 1,
            "calls": {key: workers[key] for key in ("compile", "graphs") if key in workers},
            # Guidance doubles the rows of a call, a cache keeps some of them alone.
            "sampling": {key: value for key, value in sampling.items() if key.startswith(_STEP)},
        }
        return cls(folder_of(spec), about)

    def rows(self, stage: Stage) -> int | None:
        """The best size on a stage's grid."""
        found = self._grids.get(_name(stage))
        return None if found is None else found.rows

    def guess(self, stage: Stage) -> int | None:
        """Rows with as many tokens together as the best chunk on the grid that is nearest in tokens."""
        if not self._grids:
            return None
        nearest = min(
            self._grids.values(),
            key=lambda found: max(found.tokens, stage.tokens) / min(found.tokens, stage.tokens),
        )
        return max(1, nearest.rows * nearest.tokens // stage.tokens)

    def keep(self, stage: Stage, rows: int, rates: Mapping[int, float]) -> None:
        """Add what was found on a stage's grid to what the file has by now."""
        found = Found(rows, stage.tokens, {str(size): rate for size, rate in sorted(rates.items())})
        self._grids[_name(stage)] = found
        self._grids = self._read() | {_name(stage): found}
        data = {"about": self._about, "grids": {name: asdict(one) for name, one in self._grids.items()}}
        hidden = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            hidden.write_text(json.dumps(data, indent=1) + "\n")
            hidden.replace(self._path)  # whole, for the other workers of this machine
        except OSError as error:
            if not self._silent:
                _log.info("batch sizes are not kept for later jobs: %s", error)
            self._silent = True

    def _read(self) -> dict[str, Found]:
        try:
            data = json.loads(self._path.read_text())
            if data["about"] != self._about:
                return {}
            return {name: Found(**one) for name, one in data["grids"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.info("batch sizes of earlier jobs cannot be read from %s: %s", self._path, error)
            return {}


def folder_of(spec: JobSpec) -> Path:
    """Where the sizes are kept: as the spec says, or among the user's caches."""
    given = spec.workers.batch_cache_dir
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "overtone" / "batches"


def _name(stage: Stage) -> str:
    return f"{stage.height}x{stage.width}x{stage.frames}"
