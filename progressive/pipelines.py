"""Pipelines loaded and recognised: which family entry each runs on. Makes no samples."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from overtone.progressive import library
from overtone.progressive.checkpoints import without_weights
from overtone.progressive.denoisers import (
    Quantize,
    check_quantize,
    load_adapters,
    quantize_blocks,
    set_attention,
)
from overtone.progressive.families import FAMILIES, Family, conditioned, family_name
from overtone.progressive.settings import FRAMES
from overtone.progressive.tiny import FOLDER

_FAMILY = "_overtone_family"
"""Attribute of a pipeline that keeps the family which `load` was called with, for `resolve` to find."""


def load(
    model_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    trust_remote_code: bool = False,
    loras: Sequence[Any] = (),
    offload: Literal["none", "model"] = "none",
    quantize: Quantize = "none",
    attention: str | None = None,
    family: str | None = None,
) -> Any:
    """A pipeline ready for `Engine`: "tiny" (embedded), a hub name or a folder in diffusers format.

    Only safetensors weights are read. `device` unset: CUDA if there is any, else the CPU. `dtype` unset or
    "auto": bfloat16 on GPUs that have it, else float32 (always float32 for "tiny"). `variant`: of weights in
    files called `*.VARIANT.safetensors`. `loras`: see `load_adapters`. `quantize`: see `quantize_blocks`.
    `attention`: see `set_attention`. `family`: see `Engine`.
    """
    if family not in (None, "auto") and family not in FAMILIES:
        raise ValueError(f"family is {family!r}; the known ones are {', '.join(FAMILIES)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_quantize(quantize, device)
    tiny = str(model_id) == "tiny"
    if dtype in (None, "auto"):
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if bf16 and not tiny else torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    source = FOLDER if tiny else model_id
    which = {"revision": revision} if revision else {}
    index = DiffusionPipeline.load_config(source, **which)
    if why := conditioned(str(index.get("_class_name"))):
        raise ValueError(f"{model_id}: {why}")
    # A part that the folder leaves out, whether the class calls it optional or not.
    left_out = [name for name, part in index.items() if isinstance(part, list | tuple) and part[:1] == [None]]
    if why := without_weights(source, variant):
        raise ValueError(why)
    pipe = DiffusionPipeline.from_pretrained(
        source,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        **which,
        **({"variant": variant} if variant else {}),
        **dict.fromkeys(left_out),
    )
    load_adapters(pipe, loras)
    if family not in (None, "auto"):
        setattr(pipe, _FAMILY, family)
    pipe.set_progress_bar_config(disable=True)
    if offload == "model" and device.type != "cpu":
        quantize_blocks(pipe, quantize)
        set_attention(pipe, attention, device)
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    pipe.to(device)
    quantize_blocks(pipe, quantize)
    set_attention(pipe, attention, device)
    return pipe


def resolve(pipe: Any, family: Family | str | None) -> Family:
    """The entry to run `pipe` on: the one given, or the one known from the pipeline; ValueError if none."""
    if isinstance(family, Family):
        return family
    if family in (None, "auto"):
        family = getattr(pipe, _FAMILY, None) or _recognise(pipe)
        if family == "generic":
            made = _generic(pipe)
            warnings.warn(
                f"{type(pipe).__name__} is not a family known here; it runs on the generic entry, with "
                "FLUX.1's spectrum (see `progressive.calibrate`) and text encoded at every stage",
                stacklevel=3,
            )
            return made
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; the known ones are {', '.join(FAMILIES)}")
    if family == "generic":
        return _generic(pipe)
    _check_needs(pipe, FAMILIES[family])
    FAMILIES[family].check_transformer(getattr(pipe.transformer, "config", {}))
    return FAMILIES[family]


def _check_needs(pipe: Any, family: Family) -> None:
    """ValueError for a package that the pipeline's module uses and has not found, else every row would meet
    a NameError."""
    homes = [sys.modules[c.__module__] for c in type(pipe).__mro__ if c.__name__ in family.pipelines]
    for name in family.needs:
        if not any(hasattr(home, name) for home in homes):
            raise ValueError(f"{type(pipe).__name__} needs the package {name}: pip install {name}")


def _recognise(pipe: Any) -> str:
    # A pipeline of its own that derives from a known one is called like it.
    names = (family_name(c.__name__, pipe.config) for c in type(pipe).__mro__)
    name = next((n for n in names if n != "generic"), "generic")
    source = library.source_of(pipe)
    if name == "flux1" and source:
        # The embedded model, or one that its training script has written elsewhere.
        folder = Path(source)
        if folder.resolve() == FOLDER.resolve() or (folder / "spectrum.json").is_file():
            return "tiny"
    return name


def unfit(pipeline: Any, *, has_transformer: bool) -> str | None:
    """Why no entry can be made for a class of pipelines, from its signatures alone; None where one can be."""
    takes = dict(inspect.signature(pipeline.__call__).parameters)
    parts = inspect.signature(pipeline.__init__).parameters.keys()
    if not has_transformer:
        return "it has no transformer"
    if "latents" not in takes:
        return "it takes no latents"
    if "audio_latents" in takes or "audio_vae" in parts:
        return "it makes sound beside the video, which every stage would begin anew"
    if {"image", "strength"} <= takes.keys():
        return (
            "it starts from a picture by itself; use the model's text-to-image pipeline, which makes the "
            "same with `sampling.strength`, or with a mask"
        )
    if "prior_token_ids" in takes:
        return "it draws tokens before its first step, which every stage would draw anew"
    if "num_latent_frames_per_chunk" in takes:
        return "it makes a video in chunks, each from noise of its own"
    needed = [name for name, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if beside := [name for name in needed if name not in ("self", "prompt")]:
        return f"it needs {', '.join(beside)} beside the prompt"
    return None


def _generic(pipe: Any) -> Family:
    """An entry for a pipeline that is not known, from what diffusers pipelines have in common."""
    defaults = {n: p.default for n, p in inspect.signature(pipe.__call__).parameters.items()}
    transformer: Any = getattr(pipe, "transformer", None)
    if why := unfit(type(pipe), has_transformer=transformer is not None):
        raise ValueError(f"{type(pipe).__name__} cannot run in stages: {why}")
    keys = [key for key in ("in_channels", "in_visual_dim") if key in transformer.config]
    if not keys:
        raise ValueError(
            f"{type(pipe).__name__} cannot run in stages: its transformer's configuration names no "
            "in_channels"
        )
    vae = getattr(getattr(pipe, "vae", None), "config", {})
    channels = vae.get("z_dim") or vae.get("latent_channels") or 0
    beside = transformer.config[keys[0]] - channels if channels else 0
    frames = [defaults[name] for name in FRAMES if name in defaults]
    packed = library.packs_latents(pipe)
    size = getattr(transformer.config, "patch_size", None) or 2
    patch = 2 if packed else int(size if isinstance(size, int) else size[-1])
    cell_px = getattr(pipe, "vae_scale_factor_spatial", None) or getattr(pipe, "vae_scale_factor", None) or 8
    per_latent = getattr(pipe, "vae_scale_factor_temporal", None) or 4
    guidance = ("true_cfg_scale", 1.0) if "true_cfg_scale" in defaults else ("guidance_scale", 1.0)
    by_part = library.is_guider(getattr(pipe, "guider", None))
    return replace(
        FAMILIES["generic"],
        pipelines=(type(pipe).__name__,),
        cell_px=int(cell_px),
        grid_multiple=patch,
        patch=patch,
        layout="tokens2x2" if packed else "grid",
        channels_per_latent=4 if packed else 1,
        channels_key=keys[0],
        # Zeros, where a picture to start from would be, and a mask.
        channels_beside=beside if beside in (1, channels + 1) else 0,
        default_height=defaults.get("height") or 1024,
        default_width=defaults.get("width") or 1024,
        default_steps=defaults.get("num_inference_steps") or 50,
        default_frames=next(filter(None, frames), None),
        frames_per_latent=int(per_latent) if frames else 1,
        guidance=guidance if "negative_prompt" in defaults and not by_part else None,
        guider="guider" if "negative_prompt" in defaults and by_part else None,
        negative_text=_negative_text(pipe, defaults),
        negative="given" if guidance[0] == "true_cfg_scale" else "always",
        # On, it takes the nearest of a list of sizes for the one that it is given.
        call={"use_resolution_binning": False} if "use_resolution_binning" in defaults else {},
    )


def _negative_text(pipe: Any, defaults: Mapping[str, Any]) -> str:
    """What the pipeline's call may run where no negative prompt is given: its default, or what its module
    names so. A trial (engine/trial.py) tells whether it does."""
    module = sys.modules.get(type(pipe).__module__)
    own = defaults.get("negative_prompt") or getattr(module, "DEFAULT_NEGATIVE_PROMPT", "")
    return own if isinstance(own, str) else ""
