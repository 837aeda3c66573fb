"""The `overtone` command, the top of the house: it knows all packages, and no package knows it.

Importing the files of commands adds these to `main`.
"""

from overtone.cluster.cli import look, measure, remote, run  # noqa: F401
from overtone.cluster.cli.command import main

__all__ = ["main"]
