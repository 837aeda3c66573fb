"""Commands that make a data set from this terminal: run and retry; and plan, which shows what a run would do.
Knows specs and summaries, not how a job is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from overtone.cluster.cli.command import (
    command,
    json_option,
    output_argument,
    quiet_option,
    ray_option,
    set_option,
    spec_argument,
    store_options,
)
from overtone.jobs.errors import UserError

if TYPE_CHECKING:
    from overtone.cluster.driver import Summary


@command(
    "Run a job, or finish what an earlier run of it left.",
    "overtone run job.yaml",
    "overtone run job.yaml --address auto --set workers.max=8",
)
@spec_argument
@set_option()
@ray_option
@quiet_option
def run(spec_path: Path, overrides: tuple[str, ...], address: str | None, quiet: bool) -> None:
    """Run the job in SPEC, or finish what an earlier run of it left."""
    from overtone.cluster.driver import run_job
    from overtone.jobs.sampling import notes_on
    from overtone.jobs.spec import load_spec
    from overtone.jobs.status import Progress

    spec = load_spec(spec_path, overrides)
    if not quiet:
        for note in notes_on(spec):
            click.echo(f"note: {note}", err=True)
    with Progress(enabled=not quiet) as progress:
        summary = run_job(spec, address=address, on_event=progress)
    _end(summary)


@command("Show what a job would do and need, before it runs.", "overtone plan job.yaml --check")
@spec_argument
@set_option()
@click.option(
    "--check",
    is_flag=True,
    help="Also read every row (sizes, rejects, names) and try the output with a few bytes, removed again.",
)
@json_option
def plan(spec_path: Path, overrides: tuple[str, ...], check: bool, as_json: bool) -> None:
    """Show what SPEC would do: shards, stages with their noise levels, saving, memory, disk, place."""
    from overtone.jobs.preview import preview
    from overtone.jobs.spec import load_spec

    shown = preview(load_spec(spec_path, overrides), check=check)
    click.echo(json.dumps(shown.as_dict(), indent=2) if as_json else shown.text())


@command(
    "Try the rejects of a finished job once more.",
    "overtone retry s3://my-bucket/flux-set --dry-run",
    "overtone retry s3://my-bucket/flux-set --set faults.row_timeout_s=600",
)
@output_argument
@set_option("Override a key that changes no sample, e.g. --set faults.row_deaths=4. Repeatable.")
@store_options
@ray_option
@click.option("--dry-run", is_flag=True, help="Only say what would be tried again.")
@quiet_option
def retry(
    output: str,
    overrides: tuple[str, ...],
    endpoint_url: str | None,
    region: str | None,
    address: str | None,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Try the rejects of the finished job in OUTPUT once more, or finish a retry that was begun.

    What is made is added to `data/`; what fails again stays in `rejects/`, with its newest reason.
    """
    if dry_run:
        from overtone.jobs.retry import preview

        click.echo(preview(output, overrides, endpoint_url=endpoint_url, region=region).text())
        return
    from overtone.cluster.driver import retry_job
    from overtone.jobs.status import Progress

    with Progress(enabled=not quiet) as progress:
        summary = retry_job(
            output, overrides, endpoint_url=endpoint_url, region=region, address=address, on_event=progress
        )
    _end(summary)


def _end(summary: Summary) -> None:
    """Print how a run ended; a mistake that ended it before it made anything is one line, as any other."""
    if isinstance(summary.error, UserError) and not (summary.rows or summary.rejects or summary.notes):
        raise summary.error
    click.echo(summary.text())
    click.get_current_context().exit(summary.exit_code)
