"""The known families by name, and which of them a pipeline belongs to. Knows no tensor.

A new family is one entry in families/images.py or families/videos.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from overtone.progressive.families.family import Family
from overtone.progressive.families.images import IMAGES
from overtone.progressive.families.videos import VIDEOS

FAMILIES: dict[str, Family] = {family.name: family for family in (*IMAGES, *VIDEOS)}


def family_name(pipeline_class: str, config: Mapping[str, Any]) -> str:
    """Key in `FAMILIES` of a pipeline's class name and configuration (model_index.json), or "generic".

    The embedded model is a FLUX.1 by class: whoever loads it says "tiny".
    """
    if pipeline_class == "WanPipeline":
        if config.get("expand_timesteps"):
            return "wan2.2-5b"
        return "wan2.1" if config.get("boundary_ratio") is None else "wan2.2"
    known = (f.name for f in FAMILIES.values() if f.name != "tiny" and pipeline_class in f.pipelines)
    return next(known, "generic")
