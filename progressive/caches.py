"""Step caches: most of the transformer left out at steps that change little. Knows no plan and no grids.

The library's own caches, switched on anew for every stage: what they remember is of another grid. Its first
steps run whole, the last of which is where the cache begins to remember.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.cache_utils import CacheMixin

from overtone.progressive import library
from overtone.progressive.schedule import Stage
from overtone.progressive.settings import MAGCACHE_MEASURED, NO_CACHE, Sampling
from overtone.progressive.staged import StageScheduler

THRESHOLDS = {"first_block": 0.05, "magcache": 0.06, "seacache": 0.25}
INTERVAL = 3
ORDER = 1
MAX_SKIP = {"magcache": 3, "seacache": 2}
_ONE_CALL = ("ZImagePipeline",)
"""Pipelines that do not name their calls of the transformer for a cache, but make only one a step."""
_TEXT_APART = {"NucleusMoEImageTransformerBlock"}
"""Blocks in which the text never changes, as far as the library's TextKVCache knows them."""
_LAST = ("proj_out", "all_final_layer")
"""Where a transformer ends, by the names that the library uses."""


def transformers(pipe: Any) -> list[Any]:
    """The denoisers of a pipeline; Wan 2.2 and Ideogram 4 have two."""
    named = (module for name, module in pipe.components.items() if "transformer" in name)
    return [module for module in named if isinstance(module, torch.nn.Module)]


def repeated_blocks(transformer: Any) -> dict[str, Any]:
    """The modules that a transformer is stacked from, by path: as the library lists them, else all in its
    lists of modules."""
    names = library.block_classes(transformer)
    lists = {name for name, child in transformer.named_children() if isinstance(child, torch.nn.ModuleList)}
    found = {}
    for path, module in transformer.named_modules():
        above, _, index = path.rpartition(".")
        if type(module).__name__ in names if names else index and above in lists:
            found[path] = module
    return found


def row_by_row(sampling: Sampling) -> bool:
    """Whether rows must go through the transformer alone: some caches decide by the mean over their batch,
    and a row must not depend on the rows that happen to be with it."""
    return sampling.cache in ("first_block", "seacache")


def at_grid(sampling: Sampling, stage: Stage, full: tuple[int, int]) -> Sampling:
    """The settings as they are for a stage, of which the `full` grid is known: without a cache where that is
    for the full-size stage alone."""
    if sampling.cache_stages == "full" and stage.grid != full:
        return sampling.model_copy(update=NO_CACHE)
    return sampling


def check_cache(pipe: Any, sampling: Sampling) -> None:
    """ValueError where the pipeline cannot run with the cache that `sampling` asks for."""
    if sampling.cache == "none":
        return
    for transformer in transformers(pipe):
        why = _why_not(pipe, transformer, sampling)
        if why:
            raise ValueError(
                f"{type(pipe).__name__} cannot run with cache {sampling.cache}: {why}; use `cache: none`"
            )


def _why_not(pipe: Any, transformer: Any, sampling: Sampling) -> str | None:
    name, cache = type(transformer).__name__, sampling.cache
    if cache == "seacache" and "num_inference_steps" not in _told(pipe):
        return "it does not tell a cache at which noise level it is (Wan does)"
    if cache == "magcache" and len(transformers(pipe)) > 1:
        return "it has two transformers, each of which would count its steps by itself"
    if cache == "magcache" and _ratios(transformer, sampling) is None:
        return f"nobody has measured the ratios of its {name}; give `cache_ratios`"
    if type(pipe).__name__ not in _ONE_CALL and "cache_context" not in inspect.getsource(type(pipe).__call__):
        return "it does not tell a cache which of its calls is which"
    if getattr(transformer, "is_cache_enabled", False):
        return f"its {name} has a cache enabled already (`disable_cache` takes it away)"
    blocks = repeated_blocks(transformer)
    if len(blocks) < 2:
        return f"its {name} has fewer than two blocks"
    if cache == "taylorseer":
        return None if _ends(transformer) else f"its {name} has no final layer known here"
    try:
        known = [library.block_facts(type(block)) for block in blocks.values()]
    except ValueError:
        return f"the installed diffusers does not know the blocks of its {name}"
    if any("hidden_states" not in inspect.signature(type(b).forward).parameters for b in blocks.values()):
        return f"the installed diffusers does not know how the blocks of its {name} are called"
    if len({block.return_encoder_hidden_states_index is None for block in known}) > 1:
        return f"the blocks at the two ends of its {name} return different things (`taylorseer` can)"
    return None


def _ends(transformer: Any) -> list[str]:
    """The final layer, by path."""
    paths = []
    for name in _LAST:
        last = getattr(transformer, name, None)
        if isinstance(last, torch.nn.ModuleDict):
            paths += [f"{name}.{key}" for key in last]
        elif last is not None:
            paths.append(name)
    return paths


def _told(pipe: Any) -> str:
    """What a pipeline tells a cache at each call, as its source has it."""
    source = inspect.getsource(type(pipe).__call__)
    return source.partition("cache_context_kwargs = {")[2].partition("}")[0]


def _ratios(transformer: Any, sampling: Sampling) -> tuple[float, ...] | None:
    if sampling.cache_ratios is not None:
        return sampling.cache_ratios
    if (type(transformer).__name__, transformer.config.get("num_layers")) == MAGCACHE_MEASURED:
        return tuple(FLUX_MAG_RATIOS.tolist())
    return None


@contextmanager
def step_cache(
    pipe: Any, sampling: Sampling, scheduler: StageScheduler, part: Stage, num_steps: int
) -> Iterator[None]:
    """Within it, which is one call of the pipeline for some of `num_steps` steps, its transformers have the
    cache that `sampling` asks for."""
    with ExitStack() as stack:
        if sampling.cache == "none":
            for transformer in filter(keeps_text, transformers(pipe)):
                CacheMixin.enable_cache(transformer, TextKVCacheConfig())
                stack.callback(CacheMixin.disable_cache, transformer)
            yield
            return

        def enable() -> None:
            for transformer in transformers(pipe):
                if not isinstance(transformer, CacheMixin):  # Z-Image's can be cached, but does not say so
                    transformer.is_cache_enabled = False
                CacheMixin.enable_cache(transformer, _config(transformer, sampling, part, num_steps))
                stack.callback(CacheMixin.disable_cache, transformer)
                if type(pipe).__name__ in _ONE_CALL:
                    stack.enter_context(CacheMixin.cache_context(transformer, "step"))

        first = sampling.cache_warmup_steps if sampling.cache == "first_block" else 1
        if first == 1:
            enable()
        else:  # the step at which it is on for the first time runs whole: there is nothing to compare with
            at = scheduler.done + first - 1
            scheduler.on_step = lambda done: enable() if done == at else None
        yield


def keeps_text(transformer: Any) -> bool:
    """Whether the text's keys and values are the same at every step, so that the library can compute them
    once a call: bit for bit what it computes each time. A cache that the caller has enabled stays."""
    kinds = {type(block).__name__ for block in repeated_blocks(transformer).values()}
    return bool(kinds & _TEXT_APART) and not getattr(transformer, "is_cache_enabled", False)


def _config(transformer: Any, sampling: Sampling, part: Stage, num_steps: int) -> Any:
    """The library's settings for a cache that lasts for the steps of `part`."""
    threshold = sampling.cache_threshold
    if threshold is None:
        threshold = THRESHOLDS.get(sampling.cache)
    skip = sampling.cache_max_skip or MAX_SKIP.get(sampling.cache)
    if sampling.cache == "first_block":
        return FirstBlockCacheConfig(threshold=threshold)
    if sampling.cache == "magcache":
        ratios = _ratios(transformer, sampling)
        assert ratios is not None, "a plan has refused it"
        return MagCacheConfig(
            threshold=threshold,
            max_skip_steps=skip,
            # As many as the first steps are: the library rounds this fraction of the steps.
            retention_ratio=sampling.cache_warmup_steps / part.steps,
            num_inference_steps=part.steps,
            mag_ratios=_at_steps(ratios, num_steps)[part.first : part.last],
        )
    if sampling.cache == "seacache":
        first = sampling.cache_warmup_steps
        return SeaCacheConfig(threshold=threshold, retention_steps=first, max_consecutive_cached=skip)
    # The output of the whole transformer is what is extrapolated: that leaves out all blocks, and keeps one
    # small tensor an order where keeping every block's would take gigabytes.
    return TaylorSeerCacheConfig(
        cache_interval=sampling.cache_interval or INTERVAL,
        disable_cache_before_step=sampling.cache_warmup_steps,
        max_order=ORDER if sampling.cache_order is None else sampling.cache_order,
        taylor_factors_dtype=torch.float32,
        skip_predict_identifiers=[re.escape(path) for path in repeated_blocks(transformer)],
        cache_identifiers=[re.escape(path) for path in _ends(transformer)],
    )


def _at_steps(ratios: Sequence[float], num_steps: int) -> list[float]:
    """One ratio for each of `num_steps` steps, the nearest of those that were measured."""
    last = max(num_steps - 1, 1)
    return [ratios[round(step * (len(ratios) - 1) / last)] for step in range(num_steps)]
