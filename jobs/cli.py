"""The `overtone` command: parse, call one function, print. Nothing else prints or reads the environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from jobs.errors import JobError, OvertoneError, UserError, VerifyError


class _Commands(click.Group):
    """Turns the errors that a user can meet into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OvertoneError as error:
            click.echo(f"overtone: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="overtone")
def main() -> None:
    """Make image and video data sets with diffusion transformers, progressively and exactly once.

    Exit codes: 0 done; 2 a mistake in what was given; 3 the job ended early and can be resumed by the
    same command; 4 `verify` found the output wrong.
    """


_spec_argument = click.argument("spec_path", metavar="SPEC", type=click.Path(dir_okay=False, path_type=Path))
_output_argument = click.argument("output", metavar="OUTPUT")
_set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override one key of the spec, e.g. --set sampling.delta=0.1. Repeatable.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")


def _store_options(command: Any) -> Any:
    command = click.option("--region", help="S3 region, where the environment does not say.")(command)
    return click.option("--endpoint-url", help="S3 endpoint, for stores other than AWS.")(command)


@main.command()
@_spec_argument
@_set_option
@click.option("--address", help="A Ray cluster to run on, e.g. `auto`. Default: Ray is started here.")
@click.option("--quiet", is_flag=True, help="Print only the summary and errors.")
def run(spec_path: Path, overrides: tuple[str, ...], address: str | None, quiet: bool) -> None:
    """Run the job in SPEC, or finish what an earlier run of it left."""
    from cluster.driver import run_job
    from jobs.progress import Progress
    from jobs.spec import load_spec

    spec = load_spec(spec_path, overrides)
    with Progress(enabled=not quiet) as progress:
        summary = run_job(spec, address=address, on_event=progress)
    click.echo(summary.text())
    ctx = click.get_current_context()
    ctx.exit(summary.exit_code)


@main.command()
@_spec_argument
@_set_option
@_json_option
def plan(spec_path: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what SPEC would do: shards, stages with their noise levels, token-steps, predicted saving."""
    from jobs.preview import preview
    from jobs.spec import load_spec

    shown = preview(load_spec(spec_path, overrides))
    click.echo(json.dumps(shown.as_dict(), indent=2) if as_json else shown.text())


@main.command()
@_output_argument
@_store_options
@_json_option
def status(output: str, endpoint_url: str | None, region: str | None, as_json: bool) -> None:
    """Show how far the job in OUTPUT is, from its folder alone."""
    from jobs.status import status as read_status

    shown = read_status(output, endpoint_url=endpoint_url, region=region)
    click.echo(json.dumps(shown.as_dict(), indent=2) if as_json else shown.text())


@main.command()
@_output_argument
@_store_options
@click.option(
    "--every", "every_s", default=5.0, show_default=True, type=click.FloatRange(0.5), help="Seconds a look."
)
def watch(output: str, endpoint_url: str | None, region: str | None, every_s: float) -> None:
    """Show the job in OUTPUT live, from its folder alone, until it is done.

    On a terminal a view that redraws itself, elsewhere lines. Ctrl-C ends only this, with exit code 130.
    """
    from rich.console import Console

    from jobs.store import open_store
    from jobs.watch import watch as show

    try:
        store = open_store(output, endpoint_url=endpoint_url, region=region)
        show(store, console=Console(), every_s=every_s)
    except KeyboardInterrupt:
        click.get_current_context().exit(130)


@main.command()
@_output_argument
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a key that changes no sample, e.g. --set faults.row_deaths=4. Repeatable.",
)
@_store_options
@click.option("--address", help="A Ray cluster to run on, e.g. `auto`. Default: Ray is started here.")
@click.option("--dry-run", is_flag=True, help="Only say what would be tried again.")
@click.option("--quiet", is_flag=True, help="Print only the summary and errors.")
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
        from jobs.retry import preview

        click.echo(preview(output, overrides, endpoint_url=endpoint_url, region=region).text())
        return
    from cluster.driver import retry_job
    from jobs.progress import Progress

    with Progress(enabled=not quiet) as progress:
        summary = retry_job(
            output, overrides, endpoint_url=endpoint_url, region=region, address=address, on_event=progress
        )
    click.echo(summary.text())
    click.get_current_context().exit(summary.exit_code)


@main.command()
@_output_argument
@_store_options
@click.option("--repair", is_flag=True, help="Rebuild missing timings, rejects and card from the parts.")
@click.option("--no-decode", is_flag=True, help="Do not decode the images (much faster).")
@_json_option
def verify(
    output: str, endpoint_url: str | None, region: str | None, repair: bool, no_decode: bool, as_json: bool
) -> None:
    """Prove that every input row is in OUTPUT exactly once, in data or in rejects."""
    from jobs.verify import verify as check

    report = check(output, endpoint_url=endpoint_url, region=region, repair=repair, decode=not no_decode)
    click.echo(json.dumps(report.as_dict(), indent=2) if as_json else report.text())
    if not report.ok:
        click.get_current_context().exit(VerifyError.exit_code)


@main.command()
@_output_argument
@_store_options
@click.option("--print", "printing", is_flag=True, help="Print the card instead.")
def card(output: str, endpoint_url: str | None, region: str | None, printing: bool) -> None:
    """Write the data set card of a finished job again: README.md in OUTPUT, for people and for the Hub."""
    from jobs.card import CARD, contents, finished_job, write_card
    from jobs.card import card as card_text
    from jobs.store import open_store

    store = open_store(output, endpoint_url=endpoint_url, region=region)
    spec, plan = finished_job(store)
    if printing:
        click.echo(card_text(spec, plan, contents(store, plan)), nl=False)
    elif write_card(store, spec, plan):
        click.echo(f"card in {store.where(CARD)}")
    else:
        raise UserError(f"{store.where(CARD)} was written by somebody else; `--print` shows the card")


@main.command()
@_output_argument
@_store_options
@click.option("--to", "path", default="contact-sheet.png", show_default=True, help="The PNG to write.")
@click.option("--rows", default=48, show_default=True, help="Pictures to show, at most.")
def sheet(output: str, endpoint_url: str | None, region: str | None, path: str, rows: int) -> None:
    """Draw the first pictures of OUTPUT with their prompts into one PNG."""
    from jobs.sheet import contact_sheet, first_pictures
    from jobs.store import open_store

    pictures = list(first_pictures(open_store(output, endpoint_url=endpoint_url, region=region), rows))
    if not pictures:
        raise UserError(f"{output} holds no pictures yet; `overtone status {output}` shows how far it is")
    Path(path).write_bytes(contact_sheet(pictures))
    click.echo(f"{len(pictures)} pictures in {path}")


@main.command()
@_output_argument
@_store_options
@click.option("--to", "path", default="report.html", show_default=True, help="The HTML file to write.")
@click.option(
    "--rows", default=48, show_default=True, type=click.IntRange(0, 1000), help="Pictures to show, at most."
)
def report(output: str, endpoint_url: str | None, region: str | None, path: str, rows: int) -> None:
    """Tell all about the job in OUTPUT in one HTML file: pictures, speed, saving, rejects, spec.

    From its folder alone, at any moment. The file needs no network and no other file.
    """
    from jobs.report import report as make

    page = make(output, endpoint_url=endpoint_url, region=region, pictures=rows).encode()
    Path(path).write_bytes(page)
    click.echo(f"report in {path} ({len(page) / 1e6:.1f} MB)")


@main.command()
@_spec_argument
@_set_option
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
@_json_option
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
    from cluster.tune import DELTAS, named_like, sample_rows, sweep, tiny_judge
    from cluster.tune import tune as compare
    from cluster.worker import load_engine
    from jobs.spec import load_spec

    spec = load_spec(spec_path, overrides)
    settings = named_like(sweep(spec.sampling, deltas=deltas or DELTAS), only)
    names = [setting.name for setting in settings]
    if unknown := sorted(set(show) - set(names)):
        raise UserError(f"--show: no setting is named {unknown[0]!r}; there are: {'; '.join(names)}")
    chosen = sample_rows(spec, rows)
    tuning = compare(
        spec,
        load_engine(spec),
        rows=chosen,
        batch_size=batch_size,
        max_drop=max_drop,
        settings=settings,
        judge=tiny_judge(spec, chosen),
        on_progress=lambda name, done, total: click.echo(f"batch {done + 1}/{total}  {name}", err=True),
    )
    Path(page).write_text(tuning.html())
    Path(fragment).write_text(tuning.fragment())
    if sheet_path:
        Path(sheet_path).write_bytes(tuning.sheet(show))
    click.echo(json.dumps(tuning.as_dict(), indent=2) if as_json else tuning.text())
    click.echo(f"report in {page}, choice in {fragment}", err=True)


@main.command()
@_spec_argument
@_set_option
@click.option("--rows", default=8, show_default=True, help="Rows to time, at fullres and at SPEC's setting.")
@click.option("--workers", type=int, help="Workers of the job. Default: SPEC's `max`, or else its `min`.")
@click.option("--price", type=float, help="Of a GPU-hour, in any currency.")
@click.option("--profile", type=click.Path(path_type=Path), help="Use a saved profile: nothing is timed.")
@click.option("--save", type=click.Path(path_type=Path), help="Save the profile that was timed.")
@_json_option
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
    from cluster.estimate import Profile, load_and_time
    from cluster.estimate import estimate as foretell
    from jobs.spec import load_spec

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
    from jobs.pictures import pictures
    from progressive.engine import load
    from progressive.spectrum import calibrate as fit

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


def _address_option(command: Any) -> Any:
    return click.option(
        "--address",
        default="http://127.0.0.1:8265",
        show_default=True,
        envvar="RAY_API_SERVER_ADDRESS",
        show_envvar=True,
        help="The cluster's job server, which is Ray's dashboard.",
    )(command)


def _follow(job: str, address: str) -> None:
    """Show a job's log until it ends; exit with 3 where it failed."""
    from cluster.submit import follow

    ended = follow(job, click.echo, address=address)
    click.echo(ended.text(), err=True)
    if not ended.ok:
        click.get_current_context().exit(JobError.exit_code)


@main.command()
@_spec_argument
@_set_option
@_address_option
@click.option("--follow", "-f", "following", is_flag=True, help="Show the job's log; Ctrl-C ends only that.")
@click.option(
    "--working-dir",
    type=click.Path(path_type=Path),
    help="Pack this tree too, for code that the cluster's image lacks. Credentials are left out.",
)
def submit(
    spec_path: Path, overrides: tuple[str, ...], address: str, following: bool, working_dir: Path | None
) -> None:
    """Run the job in SPEC on a Ray cluster, without this terminal.

    Submitting a job that runs there attaches to it; submitting one that ended goes on where it ended.
    """
    from cluster.submit import submit as submit_job
    from jobs.spec import load_spec

    made = submit_job(load_spec(spec_path, overrides), address=address, working_dir=working_dir)
    click.echo(made.text())
    if following:
        _follow(made.id, address)


@main.command()
@click.argument("job")
@_address_option
def stop(job: str, address: str) -> None:
    """End a submitted JOB (its id, or the start of it). What it committed stays; submit resumes it."""
    from cluster.submit import stop as stop_job

    click.echo(f"{job}: {stop_job(job, address=address).lower()}")


@main.command()
@click.argument("job")
@_address_option
@click.option("--follow", "-f", "following", is_flag=True, help="Go on until the job ends.")
def logs(job: str, address: str, following: bool) -> None:
    """Show what a submitted JOB (its id, or the start of it) has printed."""
    from cluster.submit import logs as read_logs

    if following:
        _follow(job, address)
    else:
        click.echo(read_logs(job, address=address), nl=False)


@main.command()
@_spec_argument
@_set_option
@click.option("--cluster", is_flag=True, help="A long-lived RayCluster for `submit` instead of a RayJob.")
@click.option("--image", help="The image of head and workers. Default: overtone:VERSION.")
@click.option("--name", help="Of the object. Default: overtone- and the spec's name.")
@click.option("--namespace", help="Default: the one kubectl is set to.")
@click.option("--gpus-per-pod", type=click.IntRange(1), help="GPUs of a worker pod. Default: 1.")
@click.option("--max-workers", type=click.IntRange(1), help="Where the spec has no workers.max. Default: 8.")
@click.option("--spot", is_flag=True, help="Put the workers above workers.min on spot nodes.")
@click.option("--queue", help="Kueue's LocalQueue that admits it.")
@click.option("--s3-secret", help="Secret with S3 credentials, or `none`. Default: overtone-s3.")
@click.option("--service-account", help="Of head and workers, e.g. one that may use the bucket.")
@click.option(
    "--cache", help="Where weights are kept: `node` (default), `pod`, or a ReadWriteMany claim's name."
)
@click.option(
    "--volume",
    "volumes",
    metavar="CLAIM:/MOUNT[:SIZE]",
    multiple=True,
    help="Mount a claim on head and workers; with a size, print the claim too. Repeatable.",
)
@click.option(
    "--node-selector", metavar="KEY=VALUE", multiple=True, help="Label of the workers' nodes. Repeatable."
)
@click.option("--deadline-s", type=click.IntRange(1), help="End the job after this long. Default: a week.")
def manifest(spec_path: Path, overrides: tuple[str, ...], cluster: bool, **options: Any) -> None:
    """Print the Kubernetes objects that run SPEC: `overtone manifest SPEC | kubectl apply -f -`."""
    from cluster.manifest import manifest as write
    from cluster.manifest import options_from_text
    from jobs.spec import load_spec

    asked = options_from_text(options)
    text = write(load_spec(spec_path, overrides), kind="cluster" if cluster else "job", **asked)
    click.echo(text, nl=False)


@main.command()
@click.option("--markdown", is_flag=True, help="A table for each section instead of a JSON Schema.")
@click.option("--output", is_flag=True, help="The columns of an output instead, as Markdown.")
def schema(markdown: bool, output: bool) -> None:
    """Print the JSON Schema of a job spec, for editors (`# yaml-language-server: $schema=...`)."""
    from jobs.columns import output_reference_markdown
    from jobs.spec import spec_reference_markdown, spec_schema

    if output:
        click.echo(output_reference_markdown())
        return
    click.echo(spec_reference_markdown() if markdown else json.dumps(spec_schema(), indent=2))


if __name__ == "__main__":
    sys.exit(main())
