"""What is known of a model by its name or folder alone. Never asks the network."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from overtone.progressive import tiny
from overtone.progressive.checkpoints.checkpoint import CONFIGURATION, Checkpoint, read_folder, read_json
from overtone.progressive.checkpoints.published import PUBLISHED
from overtone.progressive.formulas import Spectrum


class UnknownCheckpoint(ValueError):
    """Nothing on this machine says what a model of this name is."""


def describe(model_id: str, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint called `model_id`: "tiny", a published hub name, one whose configuration is in this
    machine's cache of the hub, or a folder in diffusers format.

    UnknownCheckpoint for any other name; ValueError for a folder that is no flow-matching pipeline.
    """
    if model_id == "tiny":
        return replace(read_folder(tiny.FOLDER), family="tiny")
    if model_id in PUBLISHED:
        return PUBLISHED[model_id]
    folder = Path(model_id).expanduser()
    if folder.is_dir() or is_local_model(model_id):
        return read_folder(folder)
    if cached := _cached(model_id, revision):
        return replace(read_folder(cached), source=f"https://huggingface.co/{model_id}")
    raise UnknownCheckpoint(
        f"{model_id!r} is no checkpoint known offline; give `tiny`, a folder in diffusers format, one of "
        + ", ".join(sorted(PUBLISHED))
        + f"; or, for another one of the hub, set model.family, or load its files first (`hf download "
        f"{model_id}`)"
    )


def family_of(model_id: str) -> str | None:
    """Key in `FAMILIES` of a published model, or of the folder in diffusers format at this path; None for
    any other. Not of what the hub's cache holds: a machine that has it must say the same as one that has
    not."""
    if model_id == "tiny":
        return "tiny"
    if model_id in PUBLISHED:
        return PUBLISHED[model_id].family
    try:
        return read_folder(Path(model_id).expanduser()).family
    except ValueError:
        return None


def _cached(model_id: str, revision: str | None) -> Path | None:
    """The folder of the hub's cache that holds this model's configuration, where one holds all of it."""
    from huggingface_hub import try_to_load_from_cache  # slow to import, and for such names alone
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(model_id, name, revision=revision) for name in CONFIGURATION]
    except HFValidationError:
        return None
    return Path(str(found[0])).parent if all(isinstance(path, str) for path in found) else None


def is_local_model(model_id: str) -> bool:
    """Whether a model, or a LoRA, is written as a path of this machine rather than as a name. Looks at
    no disk."""
    return model_id.startswith(("/", "./", "../", "~")) or model_id in (".", "..")


def without_weights(model_id: str | Path, variant: str | None) -> str | None:
    """Why a folder of this machine has not all the weights of a variant; None: it has them, or is no such
    folder. `variant` None: the weights in files without one, which also stand in where a part has no other.
    """
    parts: dict[str, set[str]] = {}  # "" for files without a variant
    for path in sorted(Path(model_id).expanduser().glob("*/*.safetensors")):
        named = _VARIANT.match(path.name)
        parts.setdefault(path.parent.name, set()).add(named[1] if named else "")
    found = sorted({name for names in parts.values() for name in names if name})
    if variant is not None and parts and variant not in found:
        unset = ["unset"] if any("" in names for names in parts.values()) else []
        return (
            f"{model_id} has no weights of the variant {variant}; `variant` may be {', '.join(found + unset)}"
        )
    for part, names in parts.items():
        if not names & {"", variant}:
            only = f"weights of the variant {', '.join(sorted(names))} alone"
            return f"{model_id} has {only}, in its {part}; set `variant`"
    return None


_VARIANT = re.compile(r"[^.]+\.([A-Za-z0-9_]+?)(?:-\d+-of-\d+)?\.safetensors$")


def spectrum_profile(path: str | Path) -> Spectrum:
    """The (A, beta) that `progressive.calibrate` saved to a JSON file. ValueError that names the file."""
    values = read_json(Path(path))
    try:
        return Spectrum(float(values["amplitude"]), float(values["beta"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a saved spectrum: {error!r}") from error


@dataclass(frozen=True)
class License:
    """Under which terms weights are published, as a model card's header has it."""

    id: str
    """The Hub's identifier; `other` for terms of the publisher's own."""
    name: str | None = None
    """Of such terms."""
    link: str | None = None


def license_of(model_id: str) -> License | None:
    """The licence of a model's weights; None where it is not known here."""
    return _LICENSES.get(model_id)


_APACHE = License("apache-2.0")

_LICENSES: dict[str, License] = {
    "tiny": _APACHE,
    "black-forest-labs/FLUX.1-dev": License(
        "other",
        "flux-1-dev-non-commercial-license",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    ),
    "black-forest-labs/FLUX.1-schnell": _APACHE,
    "black-forest-labs/FLUX.2-klein-4B": _APACHE,
    "black-forest-labs/FLUX.2-klein-base-4B": _APACHE,
    "Qwen/Qwen-Image": _APACHE,
    "Tongyi-MAI/Z-Image-Turbo": _APACHE,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _APACHE,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _APACHE,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _APACHE,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _APACHE,
    "stabilityai/stable-diffusion-3.5-large": License(
        "other",
        "stabilityai-ai-community",
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-large/blob/main/LICENSE.md",
    ),
}
"""Where the terms are well known; the others are left out, for a licence must not be guessed."""
