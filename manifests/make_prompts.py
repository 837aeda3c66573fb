"""Makes the prompt tables beside it, captions of no training scene: `python manifests/make_prompts.py`."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from overtone.progressive.tiny import world

QUICKSTART_ROWS = 40
HELD_OUT_ROWS = 500


def table(num_rows: int, skip: int = 0) -> pa.Table:
    """Prompts with row_ids; `scene`, the seed of the exact picture, passes through a job untouched."""
    seeds = world.held_out(num_rows, skip)
    digits = len(str(num_rows - 1))
    return pa.table(
        {
            "row_id": [f"scene-{i:0{digits}d}" for i in range(num_rows)],
            "prompt": [world.caption(world.scene(seed)) for seed in seeds],
            "scene": pa.array(seeds, pa.int64()),
        }
    )


if __name__ == "__main__":
    here = Path(__file__).parent
    pq.write_table(table(QUICKSTART_ROWS), here / "quickstart.parquet")
    pq.write_table(table(HELD_OUT_ROWS, skip=QUICKSTART_ROWS), here / "held-out.parquet", compression="zstd")
