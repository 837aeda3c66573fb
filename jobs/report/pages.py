"""One self-contained HTML page: a template, charts as inline SVG, pictures as data URIs. Knows no jobs.

    page("overtone.jobs", "report.html", title="...", chart=svg(figure, "stages"), picture=data_uri(image))

A page fetches nothing and runs nothing: `templates/page.html` forbids both by its content security policy.
"""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

COARSE_TO_FULL = tuple(f"grid-{i}" for i in range(6))
"""Names of colours from pale to strong, for the grids of a job."""

_NAMES = (
    *("text", "faint", "accent", "text_encode", "expand", "vae_decode", "waiting"),
    *("read", "image_encode", "part_write", "upload", *COARSE_TO_FULL),
)

_STAND_INS = {name: f"#fe{i:02x}fe" for i, name in enumerate(_NAMES)}

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and set in the page's font
    "font.size": 9,
    "text.color": _STAND_INS["text"],
    "axes.labelcolor": _STAND_INS["text"],
    "axes.edgecolor": _STAND_INS["faint"],
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "grid.color": _STAND_INS["faint"],
    "grid.linewidth": 0.5,
    "xtick.color": _STAND_INS["faint"],
    "ytick.color": _STAND_INS["faint"],
    "xtick.labelcolor": _STAND_INS["text"],
    "ytick.labelcolor": _STAND_INS["text"],
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def colour(name: str) -> str:
    """A colour for matplotlib that follows the page's, which is light or dark as its reader has it. KeyError
    for a name that `templates/page.html` does not define as `--name`."""
    return _STAND_INS[name]


def style() -> Any:
    """Context manager for drawing: the fonts, lines and colours of a page's charts."""
    return rc_context(_STYLE)


def svg(figure: Figure, label: str) -> Markup:
    """A figure as an inline SVG element. The same figure gives the same bytes. `label` tells those who cannot
    see it what it shows, and is unique on the page."""
    out = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": label}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # other figures on the page have groups of the same names
    for name, stand_in in _STAND_INS.items():
        text = text.replace(to_hex(stand_in), f"var(--{name})")
    return Markup(text.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(label), 1))


def data_uri(picture: Image.Image, side_px: int) -> str:
    """A picture as the value of `src`. It is made smaller, so that its longer side has at most `side_px`
    pixels."""
    small = picture.convert("RGB")
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def page(package: str, template: str, **values: Any) -> str:
    """A page from a package's template, which extends `page.html`. Every value that is no Markup is
    escaped."""
    loaders = [jinja2.PackageLoader(name) for name in dict.fromkeys((package, "overtone.jobs"))]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
