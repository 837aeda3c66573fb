"""The `overtone` command, the top of the house: it knows all packages, and no package knows it."""

from overtone.cluster.cli.command import main

__all__ = ["main"]
