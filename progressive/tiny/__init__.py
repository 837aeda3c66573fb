"""The embedded model: a small FLUX.1-like pipeline that draws the picture world. Loading this loads no torch.

`path()` is a folder in diffusers format; `DiffusionPipeline.from_pretrained(path())` needs no network.
README.md beside this file is the model card.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["FOLDER", "MAX_SEQUENCE_LENGTH", "path"]
FOLDER = Path(__file__).parent / "model"
"""Where it lies, or will once it is trained."""
MAX_SEQUENCE_LENGTH = 20
"""Text tokens that the model was trained with: give it to the pipeline's call as `max_sequence_length`."""


def path() -> Path:
    """Folder of the model. FileNotFoundError if this installation came without it."""
    if not (FOLDER / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{FOLDER} has no model; make it with `python -m overtone.progressive.tiny.train`"
        )
    return FOLDER
