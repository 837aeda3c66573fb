"""Rows, shards, parts and stores: everything about a job that needs neither torch nor ray."""

from __future__ import annotations
