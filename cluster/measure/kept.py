"""What a search has measured so far, on disk, so that one that was interrupted goes on where it ended. Knows
files, and nothing of what is measured.

A folder beside the report, named after all that a measurement depends on, holds one file for each batch at
each setting. Other prompts, another model or another device have another folder. It goes when the search is
done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from overtone.cluster.measure.settings import Setting
from overtone.cluster.measure.trial import Measured

_PLAIN = ("rows", "seconds", "values", "scores", "right", "asked")


class Kept:
    """The folder. `folder` None: nothing is kept. Where nothing can be written, nothing is kept either: a
    measurement is worth more than its copy."""

    def __init__(self, folder: Path | None, about: Any) -> None:
        digest = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        self.path = None if folder is None else folder / f"tune-{digest}.partial"

    def load(self, number: int, setting: Setting) -> tuple[Measured, list[Any]] | None:
        """A batch at a setting, with the media that were kept with it; None: it was not measured, or its file
        is damaged."""
        if self.path is None:
            return None
        try:
            with np.load(self._file(number, setting), allow_pickle=False) as found:
                plain = json.loads(str(found["plain"]))
                stills = [_medium(found[name]) for name in _names(found.files, "still")]
                media = [_medium(found[name]) for name in _names(found.files, "media")]
            return Measured(**plain, stills=stills), media
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
            return None

    def save(self, number: int, setting: Setting, measured: Measured, media: Sequence[Any] = ()) -> None:
        """Remember a batch at a setting, and these media of it, whole."""
        if self.path is None:
            return
        plain = {name: getattr(measured, name) for name in _PLAIN}
        arrays = {f"still-{k:04}": np.asarray(one) for k, one in enumerate(measured.stills)}
        arrays |= {f"media-{k:04}": np.asarray(one) for k, one in enumerate(media)}
        hidden = self.path / f".{uuid4().hex}.npz"
        try:
            self.path.mkdir(exist_ok=True)
            with hidden.open("wb") as file:
                np.savez_compressed(file, plain=np.array(json.dumps(plain)), **arrays)  # type: ignore[arg-type]
            hidden.replace(self._file(number, setting))
        except OSError:
            self.path = None

    def remove(self) -> None:
        """Forget all of it: the search is done."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, number: int, setting: Setting) -> Path:
        assert self.path is not None
        text = json.dumps([setting.name, setting.sampling.model_dump(mode="json")], sort_keys=True)
        return self.path / f"{number:04}-{sha256(text.encode()).hexdigest()[:12]}.npz"


def _names(names: Sequence[str], kind: str) -> list[str]:
    return sorted(name for name in names if name.startswith(f"{kind}-"))


def _medium(pixels: np.ndarray) -> Any:
    """A picture, or the frames of a video as they were."""
    return Image.fromarray(pixels) if pixels.ndim == 3 else pixels
