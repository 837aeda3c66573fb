"""Makes quickstart.parquet: `python manifests/make_quickstart.py`. 40 captions that no training scene has."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from progressive.tiny import world

NUM_ROWS = 40


def table(num_rows: int = NUM_ROWS) -> pa.Table:
    """Prompts with row_ids; `scene`, the seed of the exact picture, passes through a job untouched."""
    seeds = world.held_out(num_rows)
    return pa.table(
        {
            "row_id": [f"scene-{i:02d}" for i in range(num_rows)],
            "prompt": [world.caption(world.scene(seed)) for seed in seeds],
            "scene": pa.array(seeds, pa.int64()),
        }
    )


if __name__ == "__main__":
    pq.write_table(table(), Path(__file__).parent / "quickstart.parquet")
