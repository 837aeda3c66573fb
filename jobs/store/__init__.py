"""Stores: a local folder or an S3 prefix with an atomic create-if-absent."""

from __future__ import annotations

from overtone.jobs.store.base import NoSuchObject, ObjectInfo, Store, StoreConfig
from overtone.jobs.store.open import open_store, probed

__all__ = [
    "NoSuchObject",
    "ObjectInfo",
    "Store",
    "StoreConfig",
    "open_store",
    "probed",
]
