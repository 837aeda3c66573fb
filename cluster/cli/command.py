"""The `overtone` command: parse, call one function, print. Nothing else prints or reads the environment."""

from __future__ import annotations

from typing import Any

import click

from overtone.cluster.cli import look, measure, remote, run
from overtone.jobs.errors import OvertoneError


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


for _command in (
    *(run.run, run.plan, run.retry),
    *(look.status, look.watch, look.verify, look.card, look.sheet, look.report, look.schema),
    *(measure.tune, measure.estimate, measure.calibrate),
    *(remote.submit, remote.stop, remote.logs, remote.manifest),
):
    main.add_command(_command)
