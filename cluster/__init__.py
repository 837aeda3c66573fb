"""Ray workers and the driver that hands shards to them."""
