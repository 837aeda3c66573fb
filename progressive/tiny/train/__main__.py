"""`python -m overtone.progressive.tiny.train`."""

from overtone.progressive.tiny.train.command import main

main()
