"""The Kubernetes objects that run a spec, as YAML."""

from __future__ import annotations

from overtone.cluster.kubernetes.documents import manifest
from overtone.cluster.kubernetes.options import IMAGE_FOLDER, Volume, options_from_text

__all__ = [
    "IMAGE_FOLDER",
    "Volume",
    "manifest",
    "options_from_text",
]
