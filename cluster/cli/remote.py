"""Commands for jobs on a cluster: submit, stop and logs through its job server, manifest for Kubernetes. They
run no job in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from overtone.cluster.cli.command import command, server_option, set_option, spec_argument
from overtone.jobs.errors import JobError


@command(
    "Run a job on a Ray cluster, without this terminal.",
    "overtone submit job.yaml --follow",
    "overtone submit job.yaml --address http://head:8265",
)
@spec_argument
@set_option()
@server_option
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
    from overtone.cluster.submit import submit as submit_job
    from overtone.jobs.spec import load_spec

    made = submit_job(load_spec(spec_path, overrides), address=address, working_dir=working_dir)
    click.echo(made.text())
    if following:
        _follow(made.id, address)


@command("End a submitted job.", "overtone stop overtone-quickstart")
@click.argument("job")
@server_option
def stop(job: str, address: str) -> None:
    """End a submitted JOB (its id, or the start of it). What it committed stays; submit resumes it."""
    from overtone.cluster.submit import stop as stop_job

    click.echo(f"{job}: {stop_job(job, address=address).lower()}")


@command("Show what a submitted job has printed.", "overtone logs overtone-quickstart --follow")
@click.argument("job")
@server_option
@click.option("--follow", "-f", "following", is_flag=True, help="Go on until the job ends.")
def logs(job: str, address: str, following: bool) -> None:
    """Show what a submitted JOB (its id, or the start of it) has printed."""
    from overtone.cluster.submit import logs as read_logs

    if following:
        _follow(job, address)
    else:
        click.echo(read_logs(job, address=address), nl=False)


def _follow(job: str, address: str) -> None:
    """Show a job's log until it ends; exit with 3 where it failed."""
    from overtone.cluster.submit import follow

    ended = follow(job, click.echo, address=address)
    click.echo(ended.text(), err=True)
    if not ended.ok:
        click.get_current_context().exit(JobError.exit_code)


@command(
    "Print the Kubernetes objects that run a job.",
    "overtone manifest job.yaml --image registry/overtone:0.1.0 | kubectl apply -f -",
)
@spec_argument
@set_option()
@click.option("--cluster", is_flag=True, help="A long-lived RayCluster for `submit` instead of a RayJob.")
@click.option("--image", help="The image of head and workers. Default: overtone:VERSION.")
@click.option("--name", help="Of the object. Default: overtone- and the spec's name.")
@click.option("--namespace", help="Default: the one kubectl is set to.")
@click.option("--gpus-per-pod", type=click.IntRange(1), help="GPUs of a worker pod. Default: 1.")
@click.option("--max-workers", type=click.IntRange(1), help="Where the spec has no workers.max. Default: 8.")
@click.option(
    "--spot", is_flag=True, help="Put workers above workers.min on spot nodes; with --queue all of them."
)
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
@click.option(
    "--deadline-s",
    type=click.IntRange(1, 2**31 - 1),
    help="End a try of the job after this long; new tries have it anew. Default: a week.",
)
def manifest(spec_path: Path, overrides: tuple[str, ...], cluster: bool, **options: Any) -> None:
    """Print the Kubernetes objects that run SPEC: `overtone manifest SPEC | kubectl apply -f -`."""
    from overtone.cluster.kubernetes import manifest as write
    from overtone.cluster.kubernetes import options_from_text
    from overtone.jobs.spec import load_spec

    asked = options_from_text(options)
    text = write(load_spec(spec_path, overrides), kind="cluster" if cluster else "job", **asked)
    click.echo(text, nl=False)
