"""`overtone init`: a spec to begin with. Light: it looks the model up and loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from overtone.cluster.cli.command import command
from overtone.cluster.cli.saving import OutFile, save
from overtone.jobs.errors import UserError
from overtone.progressive.settings import PresetName


@command(
    "Write a spec to begin with.",
    "overtone init tiny --example-prompts && overtone run job.yaml",
    "overtone init black-forest-labs/FLUX.1-dev --prompts s3://my-bucket/captions/ --output s3://my-bucket/flux",
)
@click.argument("model")
@click.option(
    "--to", "path", default="job.yaml", show_default=True, type=OutFile(), help="The spec to write."
)
@click.option(
    "--prompts", help="Table of prompts: a file, folder, glob or URL. Default: prompts.csv beside it."
)
@click.option("--column", help="The table's column of prompts, where it is not called `prompt`.")
@click.option(
    "--output", help="Folder or s3://bucket/prefix of the data set. Default: out/ and the spec's name."
)
@click.option(
    "--preset",
    default="balanced",
    show_default=True,
    type=click.Choice(get_args(PresetName)),
    help="Steps and ladder by name, where the model's family has presets.",
)
@click.option(
    "--example-prompts", is_flag=True, help="Also write a prompts.csv of eight rows beside the spec."
)
def init(
    model: str,
    path: Path,
    prompts: str | None,
    column: str | None,
    output: str | None,
    preset: PresetName,
    example_prompts: bool,
) -> None:
    """Write a commented spec for MODEL: `tiny`, a name of the Hugging Face hub, or a diffusers folder."""
    from overtone.jobs.starter import example_prompts as examples
    from overtone.jobs.starter import starter

    table = path.parent / "prompts.csv"
    if example_prompts and (prompts or column):
        raise UserError("--example-prompts writes a table of its own; leave --prompts and --column out")
    for made in (path, *([table] if example_prompts else [])):
        if made.exists():
            raise UserError(f"{made} is there already, and is left alone; name another spec with --to")
    text = starter(
        model,
        name=path.stem,
        prompts=prompts or table.name,
        output=output or f"out/{path.stem}",
        preset=preset,
        column=column,
    )
    save([(path, text), *([(table, examples(model))] if example_prompts else [])])
    click.echo(f"wrote {path}" + (f" and {table}" if example_prompts else ""), err=True)
    if not (prompts or table.exists()):
        click.echo(f"put your prompts into {table}, or name them in {path}", err=True)
    click.echo(f"next: overtone plan {path} --check", err=True)
