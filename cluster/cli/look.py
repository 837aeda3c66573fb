"""Commands that look at a job from its folder alone: status, watch, verify, card, sheet, report. Also schema,
which describes specs and outputs. They know neither Ray nor models, but for `verify --remake`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from overtone.cluster.cli.command import command, json_option, output_argument, store_options
from overtone.cluster.cli.saving import OutFile, save
from overtone.jobs.errors import UserError, VerifyError

if TYPE_CHECKING:
    from overtone.jobs.store import Store
    from overtone.jobs.verify import VerifyReport


@command("Show how far a job is.", "overtone status out/quickstart")
@output_argument
@store_options
@json_option
def status(output: str, endpoint_url: str | None, region: str | None, as_json: bool) -> None:
    """Show how far the job in OUTPUT is, from its folder alone."""
    from overtone.jobs.status import status as read_status

    shown = read_status(output, endpoint_url=endpoint_url, region=region)
    click.echo(json.dumps(shown.as_dict(), indent=2) if as_json else shown.text())


@command("Show a job live, until it is done.", "overtone watch s3://my-bucket/flux-set --every 10")
@output_argument
@store_options
@click.option(
    "--every", "every_s", default=5.0, show_default=True, type=click.FloatRange(0.5), help="Seconds a look."
)
def watch(output: str, endpoint_url: str | None, region: str | None, every_s: float) -> None:
    """Show the job in OUTPUT live, from its folder alone, until it is done.

    On a terminal a view that redraws itself, elsewhere lines. Ctrl-C ends only this, with exit code 130.
    """
    from rich.console import Console

    from overtone.jobs.status import watch as show
    from overtone.jobs.store import open_store

    try:
        store = open_store(output, endpoint_url=endpoint_url, region=region)
        show(store, console=Console(), every_s=every_s)
    except KeyboardInterrupt:
        click.get_current_context().exit(130)


@command("Prove that every input row is there exactly once.", "overtone verify out/quickstart")
@output_argument
@store_options
@click.option("--repair", is_flag=True, help="Rebuild missing timings, rejects and card from the parts.")
@click.option("--no-decode", is_flag=True, help="Do not decode the images (much faster).")
@click.option("--allow-blank", is_flag=True, help="Pictures of one colour among others are as asked for.")
@click.option(
    "--remake",
    "remade",
    type=click.IntRange(1),
    metavar="N",
    help="Make N rows again from what is stored, spread over the job, and compare. Loads the model.",
)
@json_option
def verify(
    output: str,
    endpoint_url: str | None,
    region: str | None,
    repair: bool,
    no_decode: bool,
    allow_blank: bool,
    remade: int | None,
    as_json: bool,
) -> None:
    """Prove that every input row is in OUTPUT exactly once, in data or in rejects.

    The input files are listed anew, so that one that came later is named. A picture of one colour is a
    problem where at most one in four is such a picture.
    """
    from overtone.jobs.store import open_store
    from overtone.jobs.verify import verify as check

    report = check(
        output,
        endpoint_url=endpoint_url,
        region=region,
        repair=repair,
        decode=not no_decode,
        allow_blank=allow_blank,
    )
    if remade is not None:
        _remake(report, remade, open_store(output, endpoint_url=endpoint_url, region=region))
    click.echo(json.dumps(report.as_dict(), indent=2) if as_json else report.text())
    if not report.ok:
        click.get_current_context().exit(VerifyError.exit_code)


def _remake(report: VerifyReport, count: int, store: Store) -> None:
    """Add to a report what becomes of rows that are made again, as a worker would make them."""
    from overtone.cluster.worker import load_engine, remake
    from overtone.jobs.folder import JobFolder

    spec, job_plan = JobFolder(store).load()
    negatives = job_plan.files.gives("negative_prompt")
    found = remake(store, count, load_engine, job=spec, negatives=negatives)
    report.remarks += found.remarks()
    for key, row_id, how in found.wrong:
        report.add("remade_differs", key, f"row {row_id!r} {how}")


@command("Write the data set card of a finished job again.", "overtone card out/quickstart --print")
@output_argument
@store_options
@click.option("--print", "printing", is_flag=True, help="Print the card instead.")
def card(output: str, endpoint_url: str | None, region: str | None, printing: bool) -> None:
    """Write the data set card of a finished job again: README.md in OUTPUT, for people and for the Hub."""
    from overtone.jobs.report import CARD, contents, finished_job, write_card
    from overtone.jobs.report import card as card_text
    from overtone.jobs.store import open_store

    store = open_store(output, endpoint_url=endpoint_url, region=region)
    spec, plan = finished_job(store)
    if printing:
        click.echo(card_text(spec, plan, contents(store, plan)), nl=False)
    elif write_card(store, spec, plan):
        click.echo(f"card in {store.where(CARD)}")
    else:
        raise UserError(f"{store.where(CARD)} was written by somebody else; `--print` shows the card")


@command("Draw the first pictures of a job into one PNG.", "overtone sheet out/quickstart --rows 24")
@output_argument
@store_options
@click.option(
    "--to", "path", default="contact-sheet.png", show_default=True, type=OutFile(), help="The PNG to write."
)
@click.option(
    "--rows", default=48, show_default=True, type=click.IntRange(1), help="Pictures to show, at most."
)
def sheet(output: str, endpoint_url: str | None, region: str | None, path: Path, rows: int) -> None:
    """Draw the first pictures of OUTPUT with their prompts into one PNG."""
    from overtone.jobs.report import contact_sheet, first_pictures
    from overtone.jobs.store import open_store
    from overtone.jobs.words import counted

    pictures = list(first_pictures(open_store(output, endpoint_url=endpoint_url, region=region), rows))
    if not pictures:
        raise UserError(f"{output} holds no pictures yet; `overtone status {output}` shows how far it is")
    save([(path, contact_sheet(pictures))])
    click.echo(f"{counted(len(pictures), 'picture')} in {path}")


@command("Write one HTML file about a job.", "overtone report out/quickstart --to report.html")
@output_argument
@store_options
@click.option(
    "--to", "path", default="report.html", show_default=True, type=OutFile(), help="The HTML file to write."
)
@click.option(
    "--rows", default=48, show_default=True, type=click.IntRange(0, 1000), help="Pictures to show, at most."
)
def report(output: str, endpoint_url: str | None, region: str | None, path: Path, rows: int) -> None:
    """Tell all about the job in OUTPUT in one HTML file: pictures, speed, saving, rejects, spec.

    From its folder alone, at any moment. The file needs no network and no other file.
    """
    from overtone.jobs.report import report as make

    page = make(output, endpoint_url=endpoint_url, region=region, pictures=rows).encode()
    save([(path, page)])
    click.echo(f"report in {path} ({len(page) / 1e6:.1f} MB)")


@command("Print what a spec or an output may hold.", "overtone schema > job.schema.json")
@click.option("--markdown", is_flag=True, help="A table for each section instead of a JSON Schema.")
@click.option("--output", is_flag=True, help="The columns of an output instead, as Markdown.")
def schema(markdown: bool, output: bool) -> None:
    """Print the JSON Schema of a job spec, for editors (`# yaml-language-server: $schema=...`)."""
    from overtone.jobs.columns import output_reference_markdown
    from overtone.jobs.spec import spec_reference_markdown, spec_schema

    if output:
        click.echo(output_reference_markdown())
        return
    click.echo(spec_reference_markdown() if markdown else json.dumps(spec_schema(), indent=2))
