"""A lab without a device, for a process: what becomes of a line is said by its number of rows."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

from overtone.progressive.bench.process import Ready, answer
from overtone.progressive.bench.suite import Line


def serve_fakes(connection: Connection, what: str) -> None:
    answer(connection, Ready("a device", {"what": what}), measure)


def measure(line: Line) -> int:
    match line.rows:
        case 2:
            raise ValueError("refused: a fake takes no two rows\nand more")
        case 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case 4:
            os._exit(9)
        case 5:
            time.sleep(3600)
        case 6:
            raise MemoryError("CUDA out of memory. Tried to allocate 3 GiB")
    return os.getpid()
