"""A worker: one process with one resident engine, which makes and commits shards."""

from __future__ import annotations

from overtone.cluster.worker.actor import EngineFactory, Load, Ready, Worker, in_lists
from overtone.cluster.worker.batch_sizes import CPU_BATCH
from overtone.cluster.worker.model import engine_of, load_engine, loaded_commit, usual_plan
from overtone.cluster.worker.pictures import ENCODERS
from overtone.cluster.worker.protocol import Engine, compile_for
from overtone.cluster.worker.remaking import remake
from overtone.cluster.worker.runner import Runner
from overtone.cluster.worker.starts import encode_rows, sized

__all__ = [
    "CPU_BATCH",
    "ENCODERS",
    "Engine",
    "EngineFactory",
    "Load",
    "Ready",
    "Runner",
    "Worker",
    "compile_for",
    "encode_rows",
    "engine_of",
    "in_lists",
    "load_engine",
    "loaded_commit",
    "remake",
    "sized",
    "usual_plan",
]
