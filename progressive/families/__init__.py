"""What the engine must know of each family of models. No torch."""

from __future__ import annotations

from overtone.progressive.families.family import FLUX1_VAE, WAN21_VAE, Family, Guided, Layout
from overtone.progressive.families.known import (
    EDITION,
    FAMILIES,
    MEASURED_SPECTRA,
    conditioned,
    edition_of,
    family_name,
)

__all__ = [
    "EDITION",
    "FAMILIES",
    "FLUX1_VAE",
    "MEASURED_SPECTRA",
    "WAN21_VAE",
    "Family",
    "Guided",
    "Layout",
    "conditioned",
    "edition_of",
    "family_name",
]
