"""Pictures in a terminal, by textual-image: as pixels where it can show them (kitty's protocol, Sixel), else
as coloured half blocks. Knows no jobs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from PIL import Image
from rich.columns import Columns
from rich.console import Console, Group
from rich.text import Text

_COLUMNS = 32
"""Width of a picture, in characters."""


def show_pictures(console: Console, pictures: Sequence[tuple[Image.Image, str]]) -> None:
    """Each with its caption, side by side; nothing where no terminal is looked at, and where textual-image is
    not installed."""
    if not console.is_terminal or find_spec("textual_image") is None:
        return
    width = min(_COLUMNS, console.width)
    try:
        # Asks the terminal what it can show when it is imported.
        from textual_image.renderable import Image as Shown

        cells = [
            Group(Shown(picture, width=width), Text(caption, overflow="ellipsis", no_wrap=True))
            for picture, caption in pictures
        ]
        console.print(Columns(cells, width=width, padding=(1, 2)))
    except Exception as error:  # noqa: BLE001 - whatever a terminal answers, what was made is not lost with it
        console.print(f"this terminal shows no pictures ({type(error).__name__}: {error})", style="dim")
