"""A measure of quality from its name, as a user types it. Loads what it needs, so that what is missing is
said before anything is drawn.

    judge, things          of the embedded model's pictures: how well they are drawn; what is in them
    clip, clip:FOLDER      CLIPScore, with weights that are on this machine
    module:function        any function of pictures and prompts
    spectrum               distance between sets: radial power spectrum and colours
    frechet:clip:FOLDER    distance between sets: of an encoder's features, CLIP's or those of
    frechet:module:function    any function of pictures
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from overtone.progressive.errors import ScorerError
from overtone.progressive.scoring.clip import Clip
from overtone.progressive.scoring.distances import Frechet, Spectrum
from overtone.progressive.scoring.judged import Drawing, Things
from overtone.progressive.scoring.measures import Scorer, SetDistance


def named(name: str, *, device: str = "cpu") -> Scorer | SetDistance:
    """The measure of that name, ready to be asked; encoders compute on `device`. ScorerError, in one
    sentence, for a name that is none, and for weights or functions that are not there."""
    kind, _, rest = name.partition(":")
    if name in _PLAIN:
        return _PLAIN[name]()
    if kind == "clip":
        return Clip(rest or None, device=device)
    if kind == "frechet" and rest:
        return Frechet(name, _encoder(rest, device))
    if rest:
        return _Function(name, _function(name))
    raise ScorerError(
        f"no scorer is named {name!r}; there are judge, things, clip, clip:FOLDER, module:function, "
        "spectrum, frechet:clip, frechet:clip:FOLDER and frechet:module:function"
    )


_PLAIN: dict[str, Callable[[], Scorer | SetDistance]] = {
    "judge": Drawing,
    "things": Things,
    "spectrum": Spectrum,
}


def _encoder(name: str, device: str) -> Callable[[Sequence[Image.Image]], Any]:
    kind, _, rest = name.partition(":")
    return Clip(rest or None, device=device).features if kind == "clip" else _function(name)


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        where = " (PYTHONPATH=. adds this folder)" if error.name == module.split(".")[0] else ""
        raise ScorerError(f"scorer {name!r}: there is no module {error.name!r}{where}") from error
    except AttributeError as error:
        raise ScorerError(f"scorer {name!r}: module {module!r} has no {attribute!r}") from error
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ScorerError(f"scorer {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ScorerError(f"scorer {name!r}: {attribute!r} is no function, but {type(function).__name__}")
    return function


@dataclass(frozen=True)
class _Function:
    """A function (pictures, prompts) -> one number a picture."""

    name: str
    function: Callable[[Sequence[Image.Image], Sequence[str]], Any]
    units: str = "its own"
    needs_prompt: bool = True

    def check(self, prompts: Sequence[str], sizes_px: Sequence[tuple[int, int]]) -> None:
        """Nothing is known of it before it is called."""

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[float]:
        """As the function says."""
        found = self.function(pictures, prompts)
        if np.ndim(found) != 1 if not hasattr(found, "shape") else len(found.shape) != 1:
            raise TypeError("it must return a flat list, array or tensor of numbers")
        return [float(value) for value in found]
