"""Commands that measure on this machine before a job runs: tune, estimate, calibrate. They load models, but
no Ray is started."""

from __future__ import annotations

import json
from pathlib import Path

import click

from overtone.cluster.cli.command import json_option, main, set_option, spec_argument
from overtone.jobs.errors import UserError


@main.command()
@spec_argument
@set_option()
@click.option("--rows", default=16, show_default=True, help="Prompts of the job to try, spread over it.")
@click.option("--batch-size", default=8, show_default=True, help="Rows denoised together.")
@click.option("--max-drop", default=1.0, show_default=True, help="Quality points that may be lost.")
@click.option("--delta", "deltas", type=float, multiple=True, help="Try these only. Repeatable.")
@click.option(
    "--only", multiple=True, help="Try fullres and settings named like this, '* fresh *' say. Repeatable."
)
@click.option("--to", "page", default="tune.html", show_default=True, help="The HTML report to write.")
@click.option("--fragment", default="tune.yaml", show_default=True, help="The choice, for the spec.")
@click.option("--sheet", "sheet_path", help="Also draw the first prompts at some settings into this PNG.")
@click.option("--show", multiple=True, help="A setting on that sheet. Repeatable. Default: fullres, choice.")
@json_option
def tune(
    spec_path: Path,
    overrides: tuple[str, ...],
    rows: int,
    batch_size: int,
    max_drop: float,
    deltas: tuple[float, ...],
    only: tuple[str, ...],
    page: str,
    fragment: str,
    sheet_path: str | None,
    show: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure on SPEC's own prompts, on this machine, which setting is the fastest at an acceptable loss."""
    from overtone.cluster.measure import tune_job
    from overtone.jobs.spec import load_spec

    tuning = tune_job(
        load_spec(spec_path, overrides),
        rows=rows,
        batch_size=batch_size,
        max_drop=max_drop,
        deltas=deltas,
        only=only,
        page=page,
        fragment=fragment,
        sheet=sheet_path,
        show=show,
        on_progress=lambda name, done, total: click.echo(f"batch {done + 1}/{total}  {name}", err=True),
    )
    click.echo(json.dumps(tuning.as_dict(), indent=2) if as_json else tuning.text())
    click.echo(f"report in {page}, choice in {fragment}", err=True)


@main.command()
@spec_argument
@set_option()
@click.option("--rows", default=8, show_default=True, help="Rows to time, at fullres and at SPEC's setting.")
@click.option("--workers", type=int, help="Workers of the job. Default: SPEC's `max`, or else its `min`.")
@click.option("--price", type=float, help="Of a GPU-hour, in any currency.")
@click.option("--profile", type=click.Path(path_type=Path), help="Use a saved profile: nothing is timed.")
@click.option("--save", type=click.Path(path_type=Path), help="Save the profile that was timed.")
@json_option
def estimate(
    spec_path: Path,
    overrides: tuple[str, ...],
    rows: int,
    workers: int | None,
    price: float | None,
    profile: Path | None,
    save: Path | None,
    as_json: bool,
) -> None:
    """Foretell SPEC's time and cost from a few rows timed on this machine."""
    from overtone.cluster.measure import Profile, load_and_time
    from overtone.cluster.measure import estimate as foretell
    from overtone.jobs.spec import load_spec

    spec = load_spec(spec_path, overrides)
    timed = Profile.load(profile) if profile else load_and_time(spec, rows)
    if save:
        timed.save(save)
    shown = foretell(spec, profile=timed, workers=workers, price=price)
    click.echo(json.dumps(shown.as_dict(), indent=2) if as_json else shown.text())


@main.command()
@click.option("--model", required=True, help="As in a spec: `tiny`, a hub name, or a diffusers folder.")
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(),
    help="Pictures or videos: a file, a folder, or Parquet with an `image` or `video` column. Repeatable.",
)
@click.option("--height", type=int, help="Pixels that the pictures are fitted to. Default: the model's own.")
@click.option("--width", type=int, help="Pixels that the pictures are fitted to. Default: the model's own.")
@click.option("--limit", type=click.IntRange(1), help="Use at most this many pictures.")
@click.option("--to", "path", default="spectrum.json", show_default=True, help="The JSON to write.")
@click.option("--plot", help="Also draw the spectrum and its fit into this PNG.")
def calibrate(
    model: str,
    data: tuple[str, ...],
    height: int | None,
    width: int | None,
    limit: int | None,
    path: str,
    plot: str | None,
) -> None:
    """Fit the latent spectrum of a model to real pictures: `sampling.spectrum` of a spec names the result."""
    from overtone.jobs.pictures import pictures
    from overtone.progressive.calibration import calibrate as fit
    from overtone.progressive.pipelines import load

    try:
        found = fit(load(model), pictures(data), height_px=height, width_px=width, limit=limit)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    found.save(path)
    if plot:
        found.plot(plot)
    click.echo(
        f"A {found.amplitude:.6g}, beta {found.beta:.6g}, R2 {found.r2:.4f}, from {found.n:,} pictures\n"
        f"use it: `sampling: {{spectrum: {path}}}`"
    )
