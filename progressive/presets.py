"""Three settings for each family that go by a name, and where each is from. Knows no job and no model.

    preset("fast", "flux1").settings        # {"num_steps": 28, "scales": "auto", "delta": 0.05}
    preset("fast", "flux1").source          # why: measured here, or recommended where

`faithful` follows the full-resolution sample of the same seed, `balanced` is the usual one, and `fast` is the
cheapest that still is one to recommend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from overtone.progressive.checkpoints import describe
from overtone.progressive.settings import PresetName, Sampling


@dataclass(frozen=True)
class Preset:
    """Values of `Sampling`'s fields."""

    settings: Mapping[str, Any]
    """`num_steps`, the ladder as `levels` or `scales` and, where there is more than one rung, `delta`."""
    source: str
    """Where the values are from, and what is not known of them; the end of a sentence."""
    guidance: float | None = None
    """The guidance scale at which `source` measured; None: nothing was measured."""

    def filled(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings given, with this preset's for those that are unset or None. A ladder that is given,
        or its transitions, leaves no room for the preset's."""
        own = {key: value for key, value in given.items() if value is not None}
        fill = dict(self.settings)
        if own.keys() & _LADDER:
            fill = {key: value for key, value in fill.items() if key not in _LADDER}
        return dict(given) | fill | own

    def changed(self, given: Mapping[str, Any]) -> list[str]:
        """Names of this preset's settings that are otherwise in what is given, and of the mode and the
        transitions where they are not the usual ones, which it is for."""
        usual = {key: Sampling.model_fields[key].default for key in ("mode", "transition_sigmas")}
        meant = dict(self.settings) | usual
        return [key for key, value in meant.items() if given.get(key, usual.get(key)) != value]


FEW_STEPS = 10
"""Shorter schedules leave a coarse grid's mistakes too few steps to be mended in. Checkpoints that their
authors made for fewer have no presets."""

_LADDER = frozenset({"levels", "scales", "transition_sigmas"})


def preset(name: PresetName, family: str) -> Preset:
    """The preset of a family. ValueError that lists the families that have some."""
    if name not in get_args(PresetName):
        raise ValueError(f"{name!r} is no preset; choose one of {', '.join(get_args(PresetName))}")
    if family not in PRESETS:
        raise ValueError(
            f"there are no presets for the family {family}, only for {', '.join(sorted(PRESETS))}; "
            "set num_steps, scales and delta, and leave preset out"
        )
    return PRESETS[family][name]


def preset_for(name: PresetName, model_id: str, family: str = "auto") -> Preset:
    """The preset of a model by its name or folder; of `family` unless that is "auto". ValueError where the
    family is not known offline or has no presets, and where the authors made the model for few steps."""
    if family == "auto":
        checkpoint = describe(model_id)
        family = checkpoint.family
        if checkpoint.default_steps is not None and checkpoint.default_steps < FEW_STEPS:
            raise ValueError(
                f"{model_id} is made for {checkpoint.default_steps} steps, and the presets are for schedules "
                f"of {FEW_STEPS} and more; leave preset out, and take `mode: fullres` with so few steps"
            )
    return preset(name, family)


def _published(
    model: str, num_steps: int, deltas: tuple[float, float, float], fast_steps: int | None = None
) -> dict[str, Preset]:
    """Presets of a family whose quality nobody measured here, from the smallest, recommended and largest
    of its published deltas: the method's own settings for `model`, and for `fast` the automatic ladder, which
    is not the method's; with `fast_steps`, the number of the model's authors."""
    table = f"the method's published settings for {model}"
    steps = "" if fast_steps is None else f", with the {fast_steps} steps that the model's authors recommend"
    return {
        "faithful": Preset(
            {"num_steps": num_steps, "levels": 1, "delta": deltas[0]},
            f"the smallest delta among {table}; quality not measured here",
        ),
        "balanced": Preset(
            {"num_steps": num_steps, "levels": 1, "delta": deltas[1]},
            f"the recommended delta among {table}; quality not measured here",
        ),
        "fast": Preset(
            {"num_steps": fast_steps or num_steps, "scales": "auto", "delta": deltas[2]},
            f"the largest delta among {table}{steps}, on the automatic ladder; quality not measured here",
        ),
    }


_TINY_GUIDANCE = 3.0
_ON_TINY = f"measured at guidance {_TINY_GUIDANCE:g} by the judge, on 64 held-out prompts with 125 things: "
_ON_200 = f"measured at guidance {_TINY_GUIDANCE:g} by the judge, on 200 held-out prompts with 392 things: "

PRESETS: dict[str, dict[str, Preset]] = {
    "tiny": {
        "faithful": Preset(
            {"num_steps": 5, "levels": 0},
            f"{_ON_200}plain full resolution, 98.2 % of things right like 20 steps of it, 96.3 of their 96.7 "
            "points, and 32.6 dB to them; no ladder was found that comes as close for as little",
            _TINY_GUIDANCE,
        ),
        "balanced": Preset(
            {"num_steps": 8, "levels": 1, "delta": 0.4},
            f"{_ON_TINY}97.6 % of things right for 4.3 full-size steps, where four plain steps have 90.4 %",
            _TINY_GUIDANCE,
        ),
        "fast": Preset(
            {"num_steps": 6, "levels": 1, "delta": 0.45},
            f"{_ON_200}97.7 % of things right for 3.1 full-size steps, where three plain steps have 71.4 %",
            _TINY_GUIDANCE,
        ),
    },
    "flux1": _published("FLUX.1-dev", 50, (0.01, 0.05, 0.05), fast_steps=28),
    "flux2": _published("FLUX.2-klein-4B", 30, (0.05, 0.10, 0.10)),
    "qwen-image": _published("Qwen-Image", 30, (0.05, 0.20, 0.20)),
    "z-image": _published("Z-Image", 50, (0.01, 0.10, 0.10)),
    "wan2.1": _published("Wan 2.1 at flow shift 5", 50, (0.01, 0.05, 0.10)),
}
"""By family, then by name."""
