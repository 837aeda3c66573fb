"""The command that measures a model itself, whatever the job: the spectrum of its latents, or how far its
predictions on coarse grids are from its full ones. It loads the model; no Ray is started."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import click

from overtone.cluster.cli.command import command
from overtone.cluster.cli.saving import OutFile, save
from overtone.jobs.errors import UserError

_CONSISTENCY_ROWS = 16


@command(
    "Measure a model's latents, or how it agrees between grids.",
    "overtone calibrate --model Qwen/Qwen-Image --data pictures/ --to mine.json",
    "overtone calibrate --model Qwen/Qwen-Image --consistency --prompts captions.parquet --plot grids.png",
)
@click.option("--model", required=True, help="As in a spec: `tiny`, a hub name, or a diffusers folder.")
@click.option(
    "--data",
    multiple=True,
    type=click.Path(),
    help="Pictures or videos: a file, a folder, or Parquet with an `image` or `video` column. Repeatable. "
    "--consistency also reads their texts, from a column `prompt`, `caption` or `text`.",
)
@click.option("--height", type=int, help="Pixels that the pictures are fitted to. Default: the model's own.")
@click.option("--width", type=int, help="Pixels that the pictures are fitted to. Default: the model's own.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    help=f"Use at most this many pictures or prompts. With --consistency: {_CONSISTENCY_ROWS}.",
)
@click.option(
    "--to", "path", type=OutFile(), help="The JSON to write. Default: spectrum.json, or consistency.json."
)
@click.option("--plot", type=OutFile(), help="Also draw what was measured into this PNG.")
@click.option(
    "--consistency",
    is_flag=True,
    help="Measure how far the model's coarse predictions, and its autoencoder's latents of smaller pictures, "
    "are from the low band of its full ones.",
)
@click.option(
    "--prompts", help="With --consistency, in place of --data: measure on own samples of this table."
)
@click.option(
    "--scale", "scales", multiple=True, type=float, help="A grid to measure. Default: 0.25 0.5 0.75."
)
@click.option("--sigma", "sigmas", multiple=True, type=float, help="A noise level to measure. Repeatable.")
@click.option(
    "--guidance", type=click.FloatRange(0), help="Guidance of the predictions. Default: the model's."
)
@click.option("--frames", type=click.IntRange(1), help="Frames of own samples. Default: the model's.")
def calibrate(
    model: str,
    data: tuple[str, ...],
    height: int | None,
    width: int | None,
    limit: int | None,
    path: Path | None,
    plot: Path | None,
    consistency: bool,
    **only_consistency: Any,
) -> None:
    """Measure a model on real pictures, or on samples of its own.

    Without --consistency: fit the spectrum of its latents, which `sampling.spectrum` of a spec names. With
    it: compare its coarse predictions with its full ones, which `sampling.consistency` of a spec names."""
    path = path or OutFile().convert("consistency.json" if consistency else "spectrum.json", None, None)
    _check(data, consistency, only_consistency)
    try:
        if consistency:
            limit = limit or _CONSISTENCY_ROWS
            found, shown = _consistency(model, data, height, width, limit, **only_consistency)
        else:
            found, shown = _spectrum(model, data, height, width, limit)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    click.echo(shown)
    picture = BytesIO()
    if plot:
        found.plot(picture)
    save([(path, found.to_json()), *([(plot, picture.getvalue())] if plot else [])])
    click.echo(f"use it: `sampling: {{{'consistency' if consistency else 'spectrum'}: {path}}}`")


def _check(data: Iterable[str], consistency: bool, only_consistency: dict[str, Any]) -> None:
    """UserError for options that do not go together."""
    prompts = only_consistency["prompts"]
    if not consistency:
        odd = [
            f"--{name.rstrip('s') if name != 'prompts' else name}"
            for name, v in only_consistency.items()
            if v
        ]
        if odd:
            raise UserError(f"{odd[0]} is for --consistency alone; add that, or leave it out")
        if not data:
            raise UserError("--data is missing: the pictures to fit the spectrum to")
    elif bool(data) == bool(prompts):
        raise UserError(
            "--consistency takes either --data, the pictures to measure on, or --prompts, a table of prompts "
            "whose samples are measured on"
        )


def _spectrum(
    model: str, data: tuple[str, ...], height: int | None, width: int | None, limit: int | None
) -> tuple[Any, str]:
    from overtone.jobs.pictures import pictures
    from overtone.progressive.calibration import calibrate as fit
    from overtone.progressive.pipelines import load

    found = fit(load(model), pictures(data), height_px=height, width_px=width, limit=limit)
    return found, (
        f"A {found.amplitude:.6g}, beta {found.beta:.6g}, R2 {found.r2:.4f}, from {found.n:,} pictures"
    )


def _consistency(
    model: str,
    data: tuple[str, ...],
    height: int | None,
    width: int | None,
    limit: int,
    *,
    prompts: str | None,
    scales: tuple[float, ...],
    sigmas: tuple[float, ...],
    guidance: float | None,
    frames: int | None,
) -> tuple[Any, str]:
    from overtone.cluster.measure import sample_rows
    from overtone.jobs.pictures import captioned
    from overtone.jobs.spec import JobSpec
    from overtone.progressive.consistency import SCALES, SIGMAS, measure_consistency
    from overtone.progressive.engine import Engine, load
    from overtone.progressive.settings import Sampling

    texts: list[str] = []
    if prompts:  # a mistake in the table shows before the model is loaded
        table = JobSpec.model_validate({"model": model, "prompts": prompts, "output": "unused"})
        texts = [row.prompt for row in sample_rows(table, limit)]
    engine = Engine(load(model))
    sampling = Sampling(height=height, width=width, num_frames=frames)
    if guidance is not None:
        if engine.family.guidance is None:
            raise UserError(f"--guidance: {engine.family.name} takes none")
        sampling = sampling.model_copy(update={engine.family.guidance[0]: guidance})
    found = measure_consistency(
        engine,
        pictures=captioned(data) if data else None,
        prompts=texts,
        scales=scales or SCALES,
        sigmas=sigmas or SIGMAS,
        sampling=sampling,
        limit=limit,
        on_progress=lambda rows: click.echo(f"{rows} of at most {limit} rows measured", err=True),
    )
    return found, found.text()
