"""Commands that make a data set from this terminal: run and retry; and plan, which shows what a run would do.
Knows specs and summaries, not how a job is run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from overtone.cluster.cli.command import (
    json_option,
    main,
    output_argument,
    quiet_option,
    ray_option,
    set_option,
    spec_argument,
    store_options,
)


@main.command()
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
    click.echo(summary.text())
    click.get_current_context().exit(summary.exit_code)


@main.command()
@spec_argument
@set_option()
@json_option
def plan(spec_path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what SPEC would do: shards, stages with their noise levels, token-steps, predicted saving."""
    from overtone.jobs.preview import preview
    from overtone.jobs.spec import load_spec

    shown = preview(load_spec(spec_path, overrides))
    click.echo(json.dumps(shown.as_dict(), indent=2) if as_json else shown.text())


@main.command()
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
    click.echo(summary.text())
    click.get_current_context().exit(summary.exit_code)
