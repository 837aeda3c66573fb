"""What the engine must know of each family of models. No torch."""

from __future__ import annotations

from overtone.progressive.families.family import FLUX1_VAE, WAN21_VAE, Family, Guided, Layout
from overtone.progressive.families.known import FAMILIES, family_name

__all__ = ["FAMILIES", "FLUX1_VAE", "WAN21_VAE", "Family", "Guided", "Layout", "family_name"]
