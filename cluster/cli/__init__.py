"""The `overtone` command, the top of the house: it knows all packages, and no package knows it.

Importing the files of commands adds these to `main`.
"""

from overtone.cluster.cli import calibrate, init, look, measure, remote, run  # noqa: F401
from overtone.cluster.cli.command import main

main.order = (
    *(
        "init",
        "plan",
        "preview",
        "estimate",
        "tune",
        "calibrate",
        "run",
        "status",
        "watch",
        "verify",
        "retry",
    ),
    *("report", "sheet", "card", "manifest", "submit", "logs", "stop", "schema"),
)

__all__ = ["main"]
