"""Commands that measure on this machine before a job runs: preview, tune, estimate. They load models, but no
Ray is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from overtone.cluster.cli.command import command, json_option, set_option, spec_argument
from overtone.cluster.cli.saving import OutFile, save
from overtone.jobs.errors import JobError

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

    from overtone.cluster.measure import Progress

_PICTURE_COLUMNS = 32
"""Width of a picture in a terminal, in characters."""


@command(
    "Find the cheapest setting at an acceptable loss.",
    "overtone tune job.yaml --rows 64 --max-drop 1 --to tune.html",
)
@spec_argument
@set_option()
@click.option(
    "--rows",
    default=32,
    show_default=True,
    type=click.IntRange(1),
    help="Prompts of the job to try, spread over it; few settings are drawn on all.",
)
@click.option(
    "--batch-size",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Rows denoised together, and timed as one.",
)
@click.option(
    "--max-drop",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0),
    help="What may be lost, in the scorer's units.",
)
@click.option(
    "--scorer",
    help="What says how good a picture is: judge, clip, clip:FOLDER, module:function, or fidelity, which is "
    "100 x the perceptual distance. Default: judge for the embedded model's captions, else fidelity.",
)
@click.option("--steps", type=click.IntRange(1), multiple=True, help="Try so many steps only. Repeatable.")
@click.option("--delta", "deltas", type=float, multiple=True, help="Try these only. Repeatable.")
@click.option(
    "--only",
    multiple=True,
    help="Try settings named like this, '*fresh noise*' say, and full resolution. Repeatable.",
)
@click.option("--exhaustive", is_flag=True, help="Draw every setting on all rows: what a search saves.")
@click.option(
    "--budget",
    "minutes",
    type=click.FloatRange(0, min_open=True),
    help="Minutes after which it ends with what it has, as Ctrl-C ends it.",
)
@click.option(
    "--to", "page", default="tune.html", show_default=True, type=OutFile(), help="The HTML report to write."
)
@click.option(
    "--fragment", default="tune.yaml", show_default=True, type=OutFile(), help="The choice, for the spec."
)
@click.option("--plot", "plot_path", type=OutFile(), help="Also draw loss against cost into this PNG.")
@click.option(
    "--sheet",
    "sheet_path",
    type=OutFile(),
    help="Also draw the first prompts at some settings into this PNG.",
)
@click.option("--show", multiple=True, help="A setting on that sheet. Repeatable. Default: fullres, choice.")
@json_option
def tune(
    spec_path: Path,
    overrides: tuple[str, ...],
    page: Path,
    fragment: Path,
    plot_path: Path | None,
    sheet_path: Path | None,
    show: tuple[str, ...],
    as_json: bool,
    **search: Any,
) -> None:
    """Search, on SPEC's own prompts and on this machine, the number of steps, ladder and delta that cost the
    least at an acceptable loss against full resolution with SPEC's own number of steps. That may be full
    resolution with fewer steps."""
    from overtone.cluster.measure import html, plot, sheet, tune_job
    from overtone.jobs.spec import load_spec

    spec = load_spec(spec_path, overrides)
    tuning = tune_job(spec, show=show, keep=page.parent, on_progress=_tell, **search)
    click.echo(json.dumps(tuning.as_dict(), indent=2) if as_json else tuning.text())
    save(
        [
            (fragment, tuning.fragment()),
            (page, html(tuning).encode()),
            *([(plot_path, plot(tuning))] if plot_path else []),
            *([(sheet_path, sheet(tuning, show))] if sheet_path else []),
        ]
    )
    click.echo(f"report in {page}, choice in {fragment}", err=True)
    if not tuning.complete:
        kept = f", kept in {tuning.kept}" if tuning.kept else ""
        click.echo(f"interrupted{kept}; the same command goes on from there", err=True)
        click.get_current_context().exit(JobError.exit_code)


def _tell(progress: Progress) -> None:
    click.echo(progress.text(), err=True)


@command("Make a few rows and look at them.", "overtone preview job.yaml --rows 8 --price 2.50")
@spec_argument
@set_option()
@click.option(
    "--rows",
    default=8,
    show_default=True,
    type=click.IntRange(1, 64),
    help="Rows to make, spread over the job's.",
)
@click.option(
    "--price", type=click.FloatRange(0), help="Of a GPU-hour (without GPUs: a CPU-hour), in any currency."
)
@click.option(
    "--to", "path", default="preview.html", show_default=True, type=OutFile(), help="The HTML page to write."
)
def preview(spec_path: Path, overrides: tuple[str, ...], rows: int, price: float | None, path: Path) -> None:
    """Make a few of SPEC's rows on this machine before the job is run: one page with their pictures, where
    their time went, and what the whole job would take. The terminal shows the pictures too, where
    textual-image is installed (the extra `preview`). No output folder is made."""
    from rich.console import Console

    from overtone.cluster.measure import preview_rows
    from overtone.jobs.spec import load_spec

    found = preview_rows(load_spec(spec_path, overrides), rows, price=price, on_progress=_tell)
    show_pictures(Console(), [(one.still, one.row.prompt) for one in found.shown])
    click.echo(found.text())
    save([(path, found.html())])
    click.echo(f"pictures in {path}", err=True)


@command("Foretell the time and cost of a job.", "overtone estimate job.yaml --workers 8 --price 2.50")
@spec_argument
@set_option()
@click.option(
    "--rows",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    help="Rows to time, at fullres and at SPEC's setting.",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Workers of the job. Default: SPEC's `max`, or else its `min`."
)
@click.option(
    "--price", type=click.FloatRange(0), help="Of a GPU-hour (without GPUs: a CPU-hour), in any currency."
)
@click.option(
    "--profile",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Use a saved profile: nothing is timed.",
)
@click.option("--save", "kept", type=OutFile(), help="Save the profile that was timed.")
@json_option
def estimate(
    spec_path: Path,
    overrides: tuple[str, ...],
    rows: int,
    workers: int | None,
    price: float | None,
    profile: Path | None,
    kept: Path | None,
    as_json: bool,
) -> None:
    """Foretell SPEC's time and cost from a few rows timed on this machine."""
    from overtone.cluster.measure import Profile, load_and_time
    from overtone.cluster.measure import estimate as foretell
    from overtone.jobs.spec import load_spec

    spec = load_spec(spec_path, overrides)
    keep = kept.parent if kept else Path()
    timed = Profile.load(profile) if profile else load_and_time(spec, rows, keep=keep, on_progress=_tell)
    shown = foretell(spec, profile=timed, workers=workers, price=price)
    click.echo(json.dumps(shown.as_dict(), indent=2) if as_json else shown.text())
    if kept:
        save([(kept, timed.to_json())])
    if timed.interrupted and not profile:
        click.echo("interrupted; the same command goes on from there", err=True)
        click.get_current_context().exit(JobError.exit_code)


def show_pictures(console: Console, pictures: Sequence[tuple[Image.Image, str]]) -> None:
    """Each with its caption, side by side: as pixels where the terminal can show them (kitty's protocol,
    Sixel), else as coloured half blocks; nothing where no terminal is looked at, and where textual-image is
    not installed."""
    if not console.is_terminal or find_spec("textual_image") is None:
        return
    from rich.columns import Columns
    from rich.console import Group
    from rich.text import Text

    width = min(_PICTURE_COLUMNS, console.width)
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
