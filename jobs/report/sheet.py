"""One PNG of the first pictures of a job, with their prompts. Knows parts, but not how they were made."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from overtone.jobs.media import still
from overtone.jobs.parts import part_format, read_footer, read_rows
from overtone.jobs.store import Store

_CAPTION_LINES = 3
_MARGIN_PX = 8
_FONT_PX = 11
_LINE_PX = 14
_CHARACTER_PX = 7  # a little more than most are wide
_JOINERS = "\u200c\u200d"  # not printable by themselves, but they shape the letters beside them


def first_pictures(store: Store, limit: int) -> Iterator[tuple[str, Image.Image]]:
    """(prompt, picture) of the first `limit` rows, in the order of the parts. The picture of a video is its
    first frame.

    It reads no more than that needs. VerifyError for a broken part, ValueError for a broken picture.
    """
    left = limit
    for info in store.list("data/"):
        if left <= 0 or not info.key.endswith((".parquet", ".tar")):
            continue
        format = part_format(info.key)
        with store.open(info.key) as file:
            footer = read_footer(file, format)
            file.seek(0)
            for row in read_rows(file, footer.kind, format, limit=left):
                yield row.prompt, still(row.data)
                left -= 1


def contact_sheet(pictures: list[tuple[str, Image.Image]], *, columns: int = 8, cell_px: int = 192) -> bytes:
    """The bytes of a PNG with a grid of pictures, each `cell_px` wide and with its caption below it."""
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    font = _font()
    heights = [max(1, round(cell_px * picture.height / picture.width)) for _, picture in pictures]
    cell_height_px = max(heights) + _CAPTION_LINES * _LINE_PX + _MARGIN_PX
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width_px = columns * (cell_px + _MARGIN_PX) + _MARGIN_PX
    sheet = Image.new("RGB", (width_px, rows * (cell_height_px + _MARGIN_PX) + _MARGIN_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for i, ((prompt, picture), height) in enumerate(zip(pictures, heights, strict=True)):
        x = _MARGIN_PX + (i % columns) * (cell_px + _MARGIN_PX)
        y = _MARGIN_PX + (i // columns) * (cell_height_px + _MARGIN_PX)
        sheet.paste(picture.resize((cell_px, height), Image.Resampling.LANCZOS), (x, y))
        _write(draw, (x, y + height + 2), _caption(prompt, max(10, cell_px // _CHARACTER_PX)), font)
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _caption(prompt: str, width: int) -> str:
    """The first lines of a prompt. What is no sign of its own, such as a control character, becomes a space:
    layout engines refuse some, which ones depends on their version."""
    plain = "".join(c if c.isprintable() or c in _JOINERS else " " for c in prompt[:1000])
    return "\n".join(textwrap.wrap(plain, width, max_lines=_CAPTION_LINES, placeholder=" ..."))


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, font: Any) -> None:
    """Draw a caption. A prompt is foreign text: what no layout engine takes is written in ASCII, so that no
    caption costs the sheet."""
    about: dict[str, Any] = {"fill": (60, 60, 60), "font": font, "spacing": 2}
    try:
        draw.multiline_text(place, text, **about)
    except (ValueError, OSError):
        draw.multiline_text(place, text.encode("ascii", "replace").decode(), **about)


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib, because Pillow's own font has no letters beyond ASCII."""
    found = find_spec("matplotlib")
    assert found is not None, "a dependency"
    path = Path(found.origin or "").parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), _FONT_PX)
