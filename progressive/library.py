"""Every private name of torch and diffusers that this package touches, and why. Knows no family and no plan.

A release may change any of them without a word. This is the one file to compare with a new one, and
tests/test_progressive_library.py keeps them out of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor
from torch.utils import _python_dispatch, _pytree

RecompileLimit: type[Exception] = torch._dynamo.exc.FailOnRecompileLimitHit
"""torch raises it where whole graphs meet `let_torch_keep`'s limit; it has no public name."""


def execution_device(pipe: Any) -> torch.device:
    """`_execution_device`: where a pipeline computes, which `device` is not while it offloads."""
    return pipe._execution_device


def offloads(pipe: Any) -> bool:
    """`_all_hooks`: a pipeline that offloads keeps its hooks there and says so nowhere else."""
    return bool(getattr(pipe, "_all_hooks", None))


def source_of(pipe: Any) -> str:
    """`_name_or_path`: the hub name or folder that a pipeline was loaded from, "" where there is none."""
    return str(pipe.config.get("_name_or_path") or "")


def tell_num_timesteps(pipe: Any, num_steps: int) -> None:
    """`_num_timesteps`: what `num_timesteps` gives a callback, which asks for those of the whole schedule."""
    pipe._num_timesteps = num_steps


def interrupted(pipe: Any) -> bool:
    """`_interrupt`: how diffusers documents that a callback ends the loop; each call clears it."""
    return bool(getattr(pipe, "_interrupt", False))


def told_arguments(pipe: Any) -> dict[str, Any]:
    """`_guidance_scale` and the like: where a pipeline keeps arguments for callbacks to change."""
    return {
        name[1:]: value for name, value in vars(pipe).items() if name.startswith("_") and name[1:2] != "_"
    }


def adaptable_transformers(pipe: Any) -> list[str]:
    """`_lora_loadable_modules`: of the parts that a pipeline can load adapters into, its denoisers."""
    names = getattr(pipe, "_lora_loadable_modules", ())
    return [name for name in names if "transformer" in name and getattr(pipe, name, None) is not None]


def scheduler_state(scheduler: Any) -> str:
    """`_shift` and the like: what a scheduler keeps beside its configuration that `set_timesteps` reads."""
    counters = ("_step_index", "_begin_index", "num_inference_steps")  # these change as it steps
    plain = {
        name: value
        for name, value in vars(scheduler).items()
        if name not in counters and isinstance(value, str | int | float | None)
    }
    return repr((sorted(scheduler.config.items()), sorted(plain.items())))


def packs_latents(pipe: Any) -> bool:
    """`_pack_latents`: pipelines that take 2 x 2 cells as a token have this method; no setting says so."""
    return hasattr(pipe, "_pack_latents")


def pack_flux(pipeline_class: Any, latents: Tensor) -> Tensor:
    """`_pack_latents`: FLUX.1's own order of [B, C, H, W] as tokens, which training must share with it."""
    return pipeline_class._pack_latents(latents, *latents.shape)


def flux_positions(pipeline_class: Any, height: int, width: int, like: Tensor) -> Tensor:
    """`_prepare_latent_image_ids`: the positions of those tokens as FLUX.1's pipeline counts them."""
    return pipeline_class._prepare_latent_image_ids(1, height, width, like.device, like.dtype)


def is_guider(part: Any) -> bool:
    """Whether a component is one of diffusers' guiders, whose base class has no public name."""
    return isinstance(part, BaseGuidance)


def forgets_steps(guider: Any) -> bool:
    """`_start`, `_stop`: whether a guider does the same at every step, whatever came before."""
    plain = type(guider) is ClassifierFreeGuidance
    return not guider._enabled or (plain and (guider._start, guider._stop) == (0.0, 1.0))


def guides(guider: Any) -> bool:
    """`_enabled`: whether a guider runs a negative prompt; diffusers' pipelines ask it in the same way."""
    return bool(guider is not None and guider._enabled and guider.num_conditions > 1)


def splits_sequences(component: Any) -> bool:
    """`_parallel_config`: `enable_parallelism` leaves its setting there and has no public way to ask."""
    config = getattr(component, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None) is not None


def progress_bar(pipe: Any) -> dict[str, Any] | None:
    """`_progress_bar_config`: what `set_progress_bar_config` was called with; nothing reads it."""
    return getattr(pipe, "_progress_bar_config", None)


def restore_progress_bar(pipe: Any, config: dict[str, Any] | None) -> None:
    """`_progress_bar_config`: a pipeline that had none, as `progress_bar` found, must have none again."""
    if config is None:
        del pipe._progress_bar_config
    else:
        pipe.set_progress_bar_config(**config)


def reset_step_cache(component: Any, num_steps: int) -> None:
    """Make a step cache that the caller has enabled on this component forget what it remembers.

    `_reset_stateful_cache`: diffusers' own caches are emptied by nothing public. `_context_manager`: there
    cache-dit keeps its state, which persists on a transformer alone; a pipeline's begins afresh every call.
    """
    if getattr(component, "is_cache_enabled", False):
        component._reset_stateful_cache()
    if getattr(getattr(component, "_context_manager", None), "persistent_context", False):
        import cache_dit

        cache_dit.refresh_context(component, num_inference_steps=num_steps, verbose=False)


def block_classes(transformer: Any) -> list[str] | None:
    """`_repeated_blocks`: the class names of the blocks that diffusers itself compiles one by one."""
    return getattr(transformer, "_repeated_blocks", None)


def block_facts(block_class: type) -> Any:
    """`diffusers.hooks._helpers`: what its caches know of a block's results; ValueError for a new block."""
    return TransformerBlockRegistry.get(block_class)


def kept_in_float32(model: torch.nn.Module) -> tuple[str, ...]:
    """`_keep_in_fp32_modules`: the parts that loading a checkpoint in a narrower dtype leaves in float32."""
    kept: Any = getattr(model, "_keep_in_fp32_modules", None)
    return tuple(kept or ())


def named_tensors(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
    """`torch.utils._pytree`: the tensors of a call's arguments by path, however deep they lie."""
    leaves, _ = _pytree.tree_flatten_with_path(arguments)
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            yield _pytree.keystr(path), leaf


def leaves(nested: Any) -> tuple[list[tuple[str, Any]], Any]:
    """`torch.utils._pytree`: all that lies in nested lists, tuples and mappings, by path, and how it lies."""
    found, structure = _pytree.tree_flatten_with_path(nested)
    return [(_pytree.keystr(path), leaf) for path, leaf in found], structure


def nested(those: Sequence[Any], structure: Any) -> Any:
    """`torch.utils._pytree`: leaves put together as they lay."""
    return _pytree.tree_unflatten(those, structure)


def mapped(how: Callable[[Any], Any], nested: Any) -> Any:
    """`torch.utils._pytree`: each leaf changed."""
    return _pytree.tree_map(how, nested)


DispatchMode: Any = _python_dispatch.TorchDispatchMode
"""`torch.utils._python_dispatch`: a context in which every operation of torch asks it."""


def dispatch_mode() -> Any:
    """`torch.utils._python_dispatch`: the innermost such context; None where there is none."""
    return _python_dispatch._get_current_dispatch_mode()


def runs_hooks(model: torch.nn.Module) -> str | None:
    """The first part of a model at whose calls something else runs, None where there is none:
    `_forward_hooks` of torch's own, `_hf_hook` of accelerate's, `_diffusers_hook` of diffusers'."""
    for path, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)  # empty once there was a cache
        own = module._forward_hooks or module._forward_pre_hooks
        if own or hasattr(module, "_hf_hook") or (registry is not None and registry.hooks):
            return path or type(module).__name__
    return None


def choosable_attentions(model: torch.nn.Module) -> int:
    """`_attention_backend`: attentions that `set_attention_backend` reaches."""
    processors = (getattr(module, "processor", None) for module in model.modules())
    return sum(hasattr(processor, "_attention_backend") for processor in processors)


def choose_attention(model: Any, name: str) -> None:
    """`_AttentionBackendRegistry`: `set_attention_backend` changes it for all models of the process; undone
    here, for each attention of this one has been told by name."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        model.set_attention_backend(name)
    finally:
        _AttentionBackendRegistry.set_active_backend(before)


def attend(name: str, heads: Tensor, mask: Tensor | None) -> Tensor:
    """`attention_dispatch`: attention of [B, tokens, heads, D] with itself; what a kernel raises goes
    through."""
    return dispatch_attention_fn(heads, heads, heads, attn_mask=mask, backend=AttentionBackendName(name))


def attention_of(processor: Any) -> Any:
    """`_attention_backend`: what `set_attention_backend` leaves at each attention."""
    return getattr(processor, "_attention_backend", None)


def attention_of_all() -> Any:
    """`_AttentionBackendRegistry`: what attends where that is unset, in `attention_backend(...)` for one."""
    return _AttentionBackendRegistry.get_active_backend()[0]


def let_torch_keep(graphs: int, altogether: int) -> None:
    """`torch._dynamo.config`: raise the process's limits of graphs a function and of all graphs."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, graphs)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, altogether)


def let_vary(tensor: Tensor, axis: int) -> None:
    """`torch._dynamo`: compile for any length of this axis, unless the code asks for the one it has."""
    torch._dynamo.maybe_mark_dynamic(tensor, axis)


def graphs_compiled() -> int:
    """`torch._dynamo.utils.counters`: the number of graphs that this process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def lerp_all(those: Sequence[Tensor], towards: Sequence[Tensor], weight: float) -> None:
    """`torch._foreach_lerp_`: move many tensors in place by one launch, as torch's own optimizers do."""
    torch._foreach_lerp_(list(those), list(towards), weight)
