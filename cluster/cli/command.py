"""The `overtone` command and the options that its commands share. Knows no command: each file beside this one
adds its own to `main` by `command`.

A command parses, calls one function and prints what it returns. Below it only `jobs.status` prints too: its
progress and its live view. The environment is read by `--address` of submitted jobs, by `cluster.submit` for
Ray's token, and by the libraries for S3 and the Hub; `cluster.driver`, `cluster.fleet` and
`progressive.compile` set variables that Ray and torch read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from overtone.cluster.logs import quiet_imports
from overtone.jobs.errors import OvertoneError


class _Commands(click.Group):
    """Turns the errors that a user can meet into one line and an exit code, and lists the commands in the
    order of work."""

    order: tuple[str, ...] = ()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.order, *sorted(set(self.commands) - set(self.order))]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OvertoneError as error:
            click.echo(f"overtone: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:  # `run` and `retry` end by themselves before it comes this far
            click.echo("overtone: interrupted", err=True)
            ctx.exit(130)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExample:\n  overtone init tiny --example-prompts && overtone run job.yaml",
)
@click.version_option(package_name="overtone")
def main() -> None:
    """Make image and video data sets with diffusion transformers, progressively and exactly once.

    Exit codes: 0 done; 2 a mistake to correct in what was given; 3 the job ended early, by Ctrl-C too, and
    the same command goes on; 4 `verify` found the output wrong; 130 Ctrl-C ended a command that only looks.

    Tab completes commands, options, spec keys and folders after this line in ~/.bashrc, ~/.zshrc (with
    zsh_source), or ~/.config/fish/config.fish (with fish_source, and piped into `source`):

    \b
      eval "$(_OVERTONE_COMPLETE=bash_source overtone)"
    """
    quiet_imports()


def command(summary: str, *examples: str) -> Callable[[Any], Any]:
    """A command of `main`: its line in the list of all, and examples for the end of its own page."""
    epilog = "\b\nExample:\n" + "\n".join(f"  {line}" for line in examples)
    return main.command(short_help=summary, epilog=epilog)


def _folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]


def _keys(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`section.key=` of a spec that begin so."""
    from overtone.jobs.spec import JobSpec

    keys = []
    for name, field in JobSpec.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        keys += [f"{name}.{key}=" for key in inner] if inner else [f"{name}="]
    return [CompletionItem(key) for key in keys if key.startswith(incomplete)]


spec_argument = click.argument("spec_path", metavar="SPEC", type=click.Path(dir_okay=False, path_type=Path))
output_argument = click.argument("output", metavar="OUTPUT", shell_complete=_folders)
json_option = click.option("--json", "as_json", is_flag=True, help="Print data instead of text.")
quiet_option = click.option("--quiet", is_flag=True, help="Print only the summary and errors.")
ray_option = click.option(
    "--address", help="A Ray cluster to run on, e.g. `auto`. Default: Ray is started here."
)
server_option = click.option(
    "--address",
    default="http://127.0.0.1:8265",
    show_default=True,
    envvar="RAY_API_SERVER_ADDRESS",
    show_envvar=True,
    help="The cluster's job server, which is Ray's dashboard.",
)


def set_option(
    help: str = "Override one key of the spec, e.g. --set sampling.delta=0.1. Repeatable.",
) -> Callable[[Any], Any]:
    """`--set KEY=VALUE`."""
    return click.option(
        "--set", "overrides", metavar="KEY=VALUE", multiple=True, shell_complete=_keys, help=help
    )


def store_options(command: Any) -> Any:
    """`--endpoint-url` and `--region` of the store that OUTPUT names."""
    command = click.option("--region", help="S3 region, where the environment does not say.")(command)
    return click.option("--endpoint-url", help="S3 endpoint, for stores other than AWS.")(command)
