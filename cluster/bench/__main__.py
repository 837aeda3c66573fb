"""`python -m overtone.cluster.bench`."""

from overtone.cluster.bench.shards import main

main()
