"""CLIPScore, and CLIP's features of pictures, with weights that are on this machine: nothing is downloaded.

Hessel et al. 2021, equation 1, without its factor of 2.5: max(100 cos(image, text), 0), as torchmetrics has
it. torchmetrics 1.9 cannot take what transformers 5 gives as features, so the cosine is taken here; a test
holds it to the library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from overtone.progressive.errors import ScorerError

USUAL = "openai/clip-vit-large-patch14"
"""Looked for among the models that were downloaded before, where no folder is given."""
_BATCH = 16


class Clip:
    """A CLIP model and its processor, in float32."""

    units = "CLIPScore, points of 100"
    needs_prompt = True

    def __init__(self, folder: str | None = None, *, device: str = "cpu") -> None:
        """Load a folder as transformers saves it, or `USUAL`. ScorerError where there are no such weights."""
        import torch
        from transformers import CLIPModel, CLIPProcessor

        self.name = "clip" if folder is None else f"clip:{folder}"
        place = folder or USUAL
        try:
            self._model = _loaded(CLIPModel, place, dtype=torch.float32)
            self._processor = _loaded(CLIPProcessor, place)
        except (OSError, ValueError) as error:
            raise ScorerError(
                f"scorer {self.name!r}: no CLIP weights at {place!r} on this machine; give a folder "
                f"that has them as clip:FOLDER, or fetch some first (`hf download {USUAL}`)"
            ) from error
        self._device = torch.device(device)
        self._model.to(self._device).eval()

    def check(self, prompts: Sequence[str], sizes_px: Sequence[tuple[int, int]]) -> None:
        """It takes any prompt and size; of a prompt only as many words as the model reads, usually 77
        tokens."""

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One number in [0, 100] a picture."""
        texts = self._texts(prompts)
        cosines = np.einsum("nd,nd->n", _unit(self.features(pictures)), _unit(texts))
        return np.maximum(100 * cosines, 0.0).tolist()

    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """The projected image features, float64 [N, D]."""
        inputs = (
            self._processor(images=list(some), return_tensors="pt")["pixel_values"]
            for some in _batches(pictures)
        )
        return self._encoded(self._model.get_image_features, ({"pixel_values": one} for one in inputs))

    def _texts(self, prompts: Sequence[str]) -> np.ndarray:
        length = self._model.config.text_config.max_position_embeddings
        inputs = (
            self._processor(
                text=list(some), return_tensors="pt", padding=True, truncation=True, max_length=length
            )
            for some in _batches(prompts)
        )
        return self._encoded(self._model.get_text_features, inputs)

    def _encoded(self, encode: Any, inputs: Any) -> np.ndarray:
        import torch

        found = []
        with torch.inference_mode():
            for batch in inputs:
                given = encode(**{name: value.to(self._device) for name, value in batch.items()})
                # transformers 4 gives the features themselves, 5 an output that holds them.
                found.append(getattr(given, "pooler_output", given).double().cpu().numpy())
        return np.concatenate(found)


def _loaded(kind: Any, place: str, **how: Any) -> Any:
    return kind.from_pretrained(place, local_files_only=True, **how)


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _batches(all_of_them: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for first in range(0, len(all_of_them), _BATCH):
        yield all_of_them[first : first + _BATCH]
