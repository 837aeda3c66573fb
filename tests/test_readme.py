"""The README of jobs says what the code says."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from overtone.cluster.cli import main
from overtone.jobs.columns import output_reference_markdown
from overtone.jobs.spec import spec_reference_markdown

README = (Path(__file__).parents[1] / "jobs" / "README.md").read_text()
BEGIN, END = "<!-- spec reference: begin -->\n", "<!-- spec reference: end -->"


def test_the_spec_reference_is_generated():
    shown = README[README.index(BEGIN) + len(BEGIN) : README.index(END)]
    assert shown.strip() == spec_reference_markdown().strip(), (
        "paste the output of `overtone schema --markdown` between the marks in jobs/README.md"
    )


def test_the_output_reference_is_generated():
    begin, end = "<!-- output reference: begin -->\n", "<!-- output reference: end -->"
    shown = README[README.index(begin) + len(begin) : README.index(end)]
    assert shown.strip() == output_reference_markdown().strip(), (
        "paste the output of `overtone schema --output` between the marks in jobs/README.md"
    )


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_explains_itself(name):
    command = main.commands[name]
    assert command.help, f"`overtone {name}` has no help text"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"`overtone {name} {parameter.opts[0]}` has no help text"
