"""`python -m overtone.cluster.cli`, where no `overtone` is on the path."""

from overtone.cluster.cli.command import main

main(prog_name="overtone")
