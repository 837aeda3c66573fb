"""`python -m overtone.progressive.bench`."""

from overtone.progressive.bench.command import main

main()
