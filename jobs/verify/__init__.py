"""The proof that every input row is in an output exactly once. Trusts no driver."""

from __future__ import annotations

from overtone.jobs.verify.check import verify
from overtone.jobs.verify.found import VerifyReport

__all__ = [
    "VerifyReport",
    "verify",
]
