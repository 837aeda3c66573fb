"""`python -m overtone.cluster.simulate`."""

from overtone.cluster.simulate.command import main

main()
