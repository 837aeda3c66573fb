"""The job spec: its sections, how it is read from YAML, and what is said about a wrong one."""

from __future__ import annotations

from overtone.jobs.spec.fields import is_url
from overtone.jobs.spec.job import JobSpec
from overtone.jobs.spec.load import load_spec, with_overrides
from overtone.jobs.spec.reference import spec_reference_markdown, spec_schema
from overtone.jobs.spec.sections import Lora, Output
from overtone.jobs.spec.table import COLUMNS, PICTURES

__all__ = [
    "COLUMNS",
    "PICTURES",
    "JobSpec",
    "Lora",
    "Output",
    "is_url",
    "load_spec",
    "spec_reference_markdown",
    "spec_schema",
    "with_overrides",
]
