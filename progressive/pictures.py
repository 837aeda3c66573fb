"""The picture and the mask that a sample starts from, in pixels. Knows no latents and no files.

Pictures come in many kinds, and what a VAE takes is one of them: `upright` makes 8-bit RGB of all, and a
`Pictures` fitted to a sample's size is what the engine encodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from PIL import Image, ImageOps

from overtone.progressive.settings import Fit

_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of grey pictures with 16 bits, which it would make white instead of scaling them."""
_ODD = 0.02
"""A mask's sides may be in another ratio than its picture's by this share: that of rounding."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """What one row starts from."""

    image: Image.Image
    """RGB, whatever was given."""
    mask: Image.Image | None = None
    """Grey, of the picture's size: white is made anew and black is kept. None: all may change. A transparent
    place counts as white. ValueError where its sides are not in the picture's ratio."""

    def __post_init__(self) -> None:
        image, mask = upright(self.image), self.mask
        object.__setattr__(self, "image", image)
        if mask is None:
            return
        mask = upright(mask).convert("L")
        ratio = (mask.width * image.height) / (mask.height * image.width)
        if abs(ratio - 1) > _ODD:
            raise ValueError(
                f"the mask has {mask.width}x{mask.height} px and the picture {image.width}x{image.height}: "
                "their sides must be in the same ratio"
            )
        object.__setattr__(self, "mask", _resized(mask, image.size))

    def fitted(self, height_px: int, width_px: int, fit: Fit | None = None) -> Pictures:
        """Both at this size; `fit` as in `Sampling.fit`, None for `cover`. Where padding surrounds the
        picture, a mask is white there."""
        size = width_px, height_px
        if self.image.size == size:
            return self
        mask = self.mask and _fitted(self.mask, size, fit or "cover", around=255)
        return Pictures(_fitted(self.image, size, fit or "cover", around=(127, 127, 127)), mask)


def upright(picture: Any) -> Image.Image:
    """Any picture of Pillow's as RGB of 8 bits: turned as its EXIF says, its first frame, transparent places
    over white, 16 bits scaled. ValueError for what is no picture, or one of fractions."""
    if not isinstance(picture, Image.Image):
        raise ValueError(f"a picture is a {type(picture).__name__}; give one of PIL's")
    if picture.mode == "F":
        raise ValueError("the picture holds fractions, whose range nobody knows; give one of 8 or 16 bits")
    turned = ImageOps.exif_transpose(picture)
    if turned.mode == "RGB":
        return turned
    if turned.mode in _DEEP:
        levels = np.clip(np.asarray(turned).astype(np.int64), 0, 65535)
        turned = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if turned.has_transparency_data:
        over = turned.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        turned = Image.alpha_composite(white, over)
    return turned.convert("RGB")


def _fitted(picture: Image.Image, size: tuple[int, int], fit: Fit, around: Any) -> Image.Image:
    if fit == "stretch":
        return _resized(picture, size)
    if fit == "cover":
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    assert fit == "pad", f"fit is {fit!r}, none of {get_args(Fit)}"
    return ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color=around)


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
