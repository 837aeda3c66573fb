"""Commands for jobs on a cluster: submit, stop and logs through its job server, manifest for Kubernetes. They
run no job in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from overtone.cluster.cli.command import command, server_option, set_option, spec_argument
from overtone.jobs.errors import JobError, UserError


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
    "Print what runs a job on Kubernetes or Slurm.",
    "overtone manifest job.yaml --image registry/overtone:0.1.0 | kubectl apply -f -",
    "overtone manifest job.yaml --for slurm --gpus-per-node 8 --time 12:00:00 | sbatch",
)
@spec_argument
@set_option()
@click.option(
    "--for",
    "scheduler",
    default="kubernetes",
    show_default=True,
    type=click.Choice(["kubernetes", "slurm"]),
    help="Objects for kubectl, or a script for sbatch.",
)
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
@click.option("--gpus-per-node", type=click.IntRange(1), help="Slurm: GPUs of a node. Default: 1.")
@click.option("--partition", help="Slurm's.")
@click.option("--account", help="Slurm's.")
@click.option("--time", help="Slurm's, of one turn; before it is up the job asks for another.")
def manifest(
    spec_path: Path,
    overrides: tuple[str, ...],
    scheduler: str,
    cluster: bool,
    gpus_per_node: int | None,
    partition: str | None,
    account: str | None,
    time: str | None,
    **options: Any,
) -> None:
    """Print the Kubernetes objects that run SPEC, `overtone manifest SPEC | kubectl apply -f -`, or the Slurm
    script that does, `overtone manifest SPEC --for slurm | sbatch`."""
    from overtone.cluster.kubernetes import Options, options_from_text, shape_of
    from overtone.cluster.kubernetes import manifest as write
    from overtone.cluster.slurm import slurm_script
    from overtone.jobs.spec import load_spec

    spec = load_spec(spec_path, overrides)
    asked = options_from_text(options)
    of_slurm = {"gpus_per_node": gpus_per_node, "partition": partition, "account": account, "time": time}
    if scheduler == "kubernetes":
        _refuse(of_slurm, "slurm")
        text = write(spec, kind="cluster" if cluster else "job", **asked)
    else:
        most = asked.pop("max_workers", None)
        _refuse(asked | {"cluster": cluster}, "kubernetes")
        shape = shape_of(spec, Options(gpus_per_pod=gpus_per_node or 1, max_workers=most))
        text = slurm_script(
            spec, spec_path, overrides, shape=shape, partition=partition, account=account, time=time
        )
    click.echo(text, nl=False)


def _refuse(given: dict[str, Any], scheduler: str) -> None:
    """UserError for an option that only the other scheduler has."""
    for key, value in given.items():
        if value not in (None, False):
            raise UserError(
                f"--{key.replace('_', '-')} is for {scheduler} alone; leave it out, or give --for {scheduler}"
            )
