"""Pipelines loaded and recognised: which family entry each runs on. Makes no samples."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline

from overtone.progressive import library
from overtone.progressive.caches import repeated_blocks, transformers
from overtone.progressive.checkpoints import without_weights
from overtone.progressive.families import FAMILIES, Family, conditioned, family_name
from overtone.progressive.settings import FRAMES
from overtone.progressive.tiny import FOLDER

Quantize = Literal["none", "int8", "fp8"]
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
    _check_quantize(quantize, device)
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


def load_adapters(pipe: Any, loras: Sequence[Any]) -> None:
    """Adapters in their order: objects or mappings with `id`, and, if need be, `weight_name`, `revision`,
    `scale` and `transformer`: `transformer`, `transformer_2` or `both`, of a pipeline that has two.

    ValueError for a key that there is not, and where it is not said which of two transformers is meant.
    """
    scales: dict[str, dict[str, float]] = {}
    for number, lora in enumerate(loras):
        values = dict(lora) if isinstance(lora, Mapping) else {key: getattr(lora, key, None) for key in _LORA}
        if unknown := sorted(map(str, set(values) - set(_LORA))):
            raise ValueError(
                f"loras[{number}] has {', '.join(unknown)}; the known keys are {', '.join(_LORA)}"
            )
        if not values.get("id"):
            raise ValueError(f"loras[{number}] has no id: a hub name, or a folder or .safetensors file")
        source, name, scale = str(values["id"]), f"lora_{number}", values.get("scale")
        extra = {key: values[key] for key in ("weight_name", "revision") if values.get(key)}
        for transformer in _targets(pipe, source, values.get("transformer")):
            second = {"load_into_transformer_2": True} if transformer == "transformer_2" else {}
            with warnings.catch_warnings():  # that there are several is what was asked for
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                pipe.load_lora_weights(source, adapter_name=name, use_safetensors=True, **extra, **second)
            scales.setdefault(transformer, {})[name] = 1.0 if scale is None else float(scale)
    if len(library.adaptable_transformers(pipe)) < 2 and scales:
        (strength,) = scales.values()
        pipe.set_adapters(list(strength), list(strength.values()))  # text encoders too
        return
    for transformer, strength in scales.items():
        getattr(pipe, transformer).set_adapters(list(strength), list(strength.values()))


_LORA = ("id", "weight_name", "revision", "scale", "transformer")


def _targets(pipe: Any, source: str, wanted: str | None) -> list[str]:
    """The transformers that an adapter is for."""
    known = library.adaptable_transformers(pipe) or ["transformer"]
    if wanted is None and len(known) == 1:
        return known
    if wanted == "both" and len(known) == 2:
        return known
    if wanted in known:
        return [wanted]
    choices = ", ".join([*known, "both"] if len(known) == 2 else known)
    what = "names no transformer" if wanted is None else f"is for {wanted}"
    raise ValueError(
        f"the adapter {source} {what}, and {type(pipe).__name__} has {' and '.join(known)}: "
        f"set its `transformer` to one of {choices}"
    )


def quantize_blocks(pipe: Any, quantize: Quantize) -> None:
    """Linear layers inside the transformers' blocks in low precision, in place; those around the blocks,
    which are few and sensitive, and adapters stay as they are.

    `int8`: weights with a scale a channel, activations in the model's dtype. `fp8`: weights and activations
    in float8 e4m3 with a scale a row.
    """
    if quantize == "none":
        return
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    # Unset, torchao changes inductor's settings for the whole process, and with them how long all that is
    # compiled afterwards takes; older versions also what precision float32 products have.
    config = (
        Int8WeightOnlyConfig(set_inductor_config=False)
        if quantize == "int8"
        else Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    )
    for transformer in transformers(pipe):
        for block in repeated_blocks(transformer).values():
            quantize_(block, config, filter_fn=_is_linear)


def _is_linear(module: torch.nn.Module, path: str) -> bool:
    return isinstance(module, torch.nn.Linear) and "lora_" not in path


def _check_quantize(quantize: Quantize, device: torch.device) -> None:
    """ImportError or ValueError that says what is missing."""
    if quantize == "none":
        return
    if quantize not in get_args(Quantize):
        raise ValueError(f"quantize is {quantize!r}; the known ones are {', '.join(get_args(Quantize))}")
    if importlib.util.find_spec("torchao") is None:
        raise ImportError(f"quantize: {quantize} needs torchao; install overtone[quantize]")
    if quantize == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ValueError(
            f"quantize: fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), which "
            f"{what} is not; use int8, or none"
        )


def set_attention(pipe: Any, attention: str | None, device: torch.device) -> None:
    """Let the transformers compute attention in this way of diffusers', after a try on `device`; None: in the
    way they do.

    ValueError where there is no such way, where the transformer cannot be told, where a package is missing,
    and where the try fails: on this device, in this dtype, with a mask where the family's prompts need one.
    """
    if attention is None:
        return
    for transformer in transformers(pipe):
        name = type(transformer).__name__
        if not library.choosable_attentions(transformer):
            raise ValueError(f"attention: {attention} cannot be set: the {name} does not let it be chosen")
        try:
            library.choose_attention(transformer, attention)
            size = int(transformer.config.get("attention_head_dim") or 64)
            # [B, tokens, heads, D]
            heads = torch.ones(1, 64, 1, size, dtype=transformer.dtype, device=device)
            library.attend(attention, heads, None)
            if _masks(pipe):
                library.attend(attention, heads, heads.new_ones(1, 1, 1, 64, dtype=torch.bool))
        except Exception as error:
            raise ValueError(
                f"attention: {attention} cannot be used by the {name} in {transformer.dtype} on {device}: "
                f"{str(error).strip().partition(chr(10))[0]}; choose another one, or leave it out"
            ) from error


def _masks(pipe: Any) -> bool:
    """Whether prompts of different lengths are told apart by a mask."""
    names = inspect.signature(transformers(pipe)[0].forward).parameters
    return any("mask" in name for name in names)


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
