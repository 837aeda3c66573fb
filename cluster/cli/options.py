"""TODO: cluster/cli/options.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

spec_argument = click.argument("spec_path", metavar="SPEC", type=click.Path(dir_okay=False, path_type=Path))
output_argument = click.argument("output", metavar="OUTPUT")

set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override one key of the spec, e.g. --set sampling.delta=0.1. Repeatable.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")


def store_options(command: Any) -> Any:
    command = click.option("--region", help="S3 region, where the environment does not say.")(command)
    return click.option("--endpoint-url", help="S3 endpoint, for stores other than AWS.")(command)


def address_option(command: Any) -> Any:
    return click.option(
        "--address",
        default="http://127.0.0.1:8265",
        show_default=True,
        envvar="RAY_API_SERVER_ADDRESS",
        show_envvar=True,
        help="The cluster's job server, which is Ray's dashboard.",
    )(command)
