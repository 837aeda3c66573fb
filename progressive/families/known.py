"""The known families by name, and which of them a pipeline belongs to. Knows no tensor.

A new family is one entry in families/images.py or families/videos.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from overtone.progressive.families.family import Family
from overtone.progressive.families.images import IMAGES
from overtone.progressive.families.videos import VIDEOS

if TYPE_CHECKING:
    from overtone.progressive.settings import Sampling

FAMILIES: dict[str, Family] = {family.name: family for family in (*IMAGES, *VIDEOS)}

MEASURED_SPECTRA = frozenset({"flux1", "z-image", "chroma", "lumina2", "longcat-image", "tiny"}) | frozenset(
    {"wan2.1", "wan2.2", "skyreels-v2"}
)
"""Families whose spectrum was fitted on latents of the VAE that they have: FLUX.1's, Wan 2.1's, the embedded
model's. That of any other is a stand-in."""

EDITION = 1 + max(len(family.changes) for family in FAMILIES.values())
"""The newest edition of any family's entry."""

_CONDITIONED = re.compile(
    r"Control|Img2Img|I2I|Image2Image|ImageToImage|Inpaint|Kontext|Edit(?!or)|Layered|Fill|Redux|Upscal|Upsampl"
    r"|ImageToVideo|Image2Video|I2V|VideoToVideo|V2V|VACE|(?<!Easy)Animate|Condition|TextToWorld|VideoToWorld"
)


def conditioned(pipeline_class: str) -> str | None:
    """Why a pipeline cannot make samples of prompts alone, in a sentence, where its class's name tells; None
    where it does not. A name that does not tell is found out when the model is loaded (engine/trial.py)."""
    if any(pipeline_class in family.pipelines for family in FAMILIES.values()):
        return None
    found = _CONDITIONED.search(pipeline_class)
    if found is None:
        return None
    if found[0] in ("Img2Img", "Inpaint"):
        return (
            f"{pipeline_class} starts from a picture by itself, which stages cannot; use the model's "
            "text-to-image pipeline, which makes the same with `sampling.strength`, or with a mask"
        )
    return (
        f"{pipeline_class} is a pipeline for more than a prompt ({found[0]}), such as a picture to start "
        "from or to keep to, which a table of prompts does not give; use the model's text-to-image or "
        "text-to-video pipeline"
    )


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


def edition_of(family: Family, sampling: Sampling) -> int:
    """Which edition of the entry samples of these settings are made by: 1, and one more for each of its
    `changes`, where such settings feel it."""
    felt = {
        "qwen-image": sampling.true_cfg_scale is None,
        "ideogram4": sampling.mode != "fullres" or sampling.num_steps in (12, 20),
    }
    return 1 + len(family.changes) * felt.get(family.name, True)
