"""The Kubernetes objects that run a spec, as YAML."""

from __future__ import annotations

from overtone.cluster.kubernetes.documents import manifest
from overtone.cluster.kubernetes.options import IMAGE_FOLDER, Options, Volume, options_from_text
from overtone.cluster.kubernetes.shape import Shape, shape_of

__all__ = [
    "IMAGE_FOLDER",
    "Options",
    "Shape",
    "Volume",
    "manifest",
    "options_from_text",
    "shape_of",
]
