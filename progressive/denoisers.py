"""What a job asks of a pipeline's denoisers once they are loaded: adapters, low precision, a way to compute
attention. Knows no families."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from overtone.progressive import library
from overtone.progressive.caches import repeated_blocks, transformers

Quantize = Literal["none", "int8", "fp8"]


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


def check_quantize(quantize: Quantize, device: torch.device) -> None:
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
