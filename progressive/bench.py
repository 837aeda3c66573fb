"""How fast the denoising loop is: `python -m progressive.bench`. Needs no Ray, no checkpoint, no network.

Builds the transformer of a published checkpoint at its real size from its configuration, with random
weights (time does not depend on their values) and random text embeddings of the right shape, and times
whole denoising loops, expansions included, through the same engine that the jobs use. Per setting:
seconds, saving over `fullres` in the same process, the token-step ideal (what the saving would be if a
step cost the same per token on every grid; attention makes coarse steps cheaper than that), the share of
that ideal reached, and memory. `tiny` runs the embedded model, which also fits a CPU.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from fnmatch import fnmatchcase
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

from progressive.checkpoints import Checkpoint, describe
from progressive.compile import COMPILE, Compile, compile_blocks
from progressive.engine import Encoded, Engine, load
from progressive.families import FAMILIES
from progressive.schedule import SamplingPlan, plan_sampling
from progressive.settings import Sampling


@dataclass(frozen=True)
class Case:
    """One published model at its published size."""

    model: str
    height_px: int
    width_px: int
    num_frames: int | None
    num_steps: int
    settings: tuple[dict[str, Any], ...]
    """The published settings of the method for this model."""
    text_tokens: int = 512
    """What the pipeline pads prompts to; 128, a long caption, where it does not pad."""
    call: dict[str, Any] = field(default_factory=dict)
    """Sampling settings. Guidance that doubles the forward passes is off: it changes no ratio."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Where the published rows use another schedule than the checkpoint's."""

    def sampling(self, **setting: Any) -> Sampling:
        """The case's sampling with the fields of one setting."""
        return Sampling(
            num_steps=self.num_steps,
            height=self.height_px,
            width=self.width_px,
            num_frames=self.num_frames,
            **self.call,
            **setting,
        )


def _levels(*pairs: tuple[int, float]) -> tuple[dict[str, Any], ...]:
    return tuple({"levels": levels, "delta": delta} for levels, delta in pairs)


CASES: dict[str, Case] = {
    "flux1-dev": Case(
        "black-forest-labs/FLUX.1-dev", 1024, 1024, None, 50, _levels((1, 0.01), (1, 0.05), (2, 0.01))
    ),
    "flux2-klein-4b": Case(
        "black-forest-labs/FLUX.2-klein-4B",
        1024,
        1024,
        None,
        30,
        _levels((1, 0.05), (1, 0.10)),
        call={"guidance_scale": 1.0},
    ),
    "z-image": Case(
        "Tongyi-MAI/Z-Image",
        1024,
        1024,
        None,
        50,
        _levels((1, 0.01), (1, 0.05), (1, 0.10)),
        text_tokens=128,
        call={"guidance_scale": 0.0},
    ),
    "qwen-image": Case(
        "Qwen/Qwen-Image",
        1024,
        1024,
        None,
        30,
        _levels((1, 0.05), (1, 0.10), (1, 0.20)),
        text_tokens=128,
        call={"true_cfg_scale": 1.0},
    ),
    "wan2.1-1.3b": Case(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        480,
        832,
        81,
        50,
        _levels((1, 0.01), (1, 0.02), (1, 0.05), (1, 0.10)),
        call={"guidance_scale": 1.0},
        scheduler={"flow_shift": 5.0},
    ),
    "tiny": Case(
        "tiny",
        256,
        256,
        None,
        30,
        _levels((1, 0.01), (1, 0.05)),
        text_tokens=32,
        call={"true_cfg_scale": 1.0},
    ),
}
AUTO: dict[str, Any] = {"scales": "auto", "delta": 0.05}
FULLRES: dict[str, Any] = {"mode": "fullres"}


@dataclass(frozen=True)
class Measurement:
    """One setting of one case. Seconds are of a whole denoising loop for `batch_size` rows."""

    case: str
    setting: str
    split: str
    """Steps @ latent grid of each stage."""
    batch_size: int
    compile: Compile
    seconds: float
    """Median of the repeats."""
    spread_s: float
    """Slowest minus fastest of the repeats."""
    rows_per_s: float
    saving: float
    """Over `fullres` at the same batch size and compile mode."""
    saving_over_plain: float
    """Over the case's first `fullres`, per row: uncompiled and one row at a time, unless told otherwise."""
    ideal: float
    """Full-resolution token-steps over the plan's."""
    share_of_ideal: float
    """saving / ideal; above 1 where attention makes coarse steps cheaper than their tokens."""
    memory_gib: float
    """Most that the device held during the loop; on a CPU, the most that the process held so far."""


# ---------------------------------------------------------------------------------------------- building


def build(
    checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0
) -> Any:
    """The checkpoint's pipeline with a random transformer and neither VAE nor text encoder: it can denoise
    from embeddings, and that is all. The weights are made on the device, so no copy passes through memory."""
    transformer = random_transformer(checkpoint, torch.device(device), dtype, seed)
    scheduler = getattr(diffusers, checkpoint.scheduler_class).from_config(checkpoint.scheduler)
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
    parameters = inspect.signature(pipeline_class).parameters.values()
    absent = {p.name: None for p in parameters if p.default is p.empty}
    given = {"transformer": transformer, "scheduler": scheduler} | checkpoint.pipeline
    if checkpoint.family == "flux2":  # its pipeline reads the VAE's statistics even where nothing is decoded
        given["vae"] = _smallest_vae(checkpoint.transformer["in_channels"] // 4).to(device)
    pipe = pipeline_class(**(absent | given))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _smallest_vae(channels: int) -> Any:
    sizes: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 4, "layers_per_block": 1}
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        **sizes,
    )


def random_transformer(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> torch.nn.Module:
    """The checkpoint's transformer from its configuration, its weights small random numbers."""
    model = empty_transformer(checkpoint)
    generator = torch.Generator(device).manual_seed(seed)
    in_float32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # As when such a checkpoint is loaded in `dtype`: some parts stay in float32.
            keep = any(part in f"{path}.{name}".split(".") for part in in_float32)
            values = torch.empty(parameter.shape, device=device, dtype=torch.float32 if keep else dtype)
            # Small enough for activations to stay finite through sixty residual blocks.
            values.normal_(0, 0.02, generator=generator)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    return model.to(device).eval()


def empty_transformer(checkpoint: Checkpoint) -> torch.nn.Module:
    """The same without weights: parameters on no device, buffers, which hold real values, as they are."""
    with init_empty_weights():
        return getattr(diffusers, checkpoint.transformer_class)(**checkpoint.transformer)


def random_text(engine: Engine, tokens: int, rows: int, seed: int = 0) -> Encoded:
    """Embeddings of `rows` prompts that nobody wrote, in the shapes that the family's transformer takes."""
    config = engine.pipe.transformer.config
    width = next(
        config[key]
        for key in ("joint_attention_dim", "cap_feat_dim", "text_dim", "context_in_dim")
        if config.get(key)
    )
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (tokens, width)}
    if "pooled_prompt_embeds" in (engine.family.text or ()):
        shapes["pooled_prompt_embeds"] = (config["pooled_projection_dim"],)
    generator = torch.Generator(engine.device).manual_seed(seed)
    dtype = engine.pipe.transformer.dtype
    texts = tuple(
        {
            name: torch.randn(shape, generator=generator, device=engine.device, dtype=dtype)
            for name, shape in shapes.items()
        }
        for _ in range(rows)
    )
    return Encoded(texts, (None,) * rows)


def open_case(case: Case, device: torch.device, dtype: torch.dtype) -> Engine:
    """An engine for the case: the embedded model itself, or the published one with random weights."""
    if case.model == "tiny":
        return Engine(load("tiny", device=device))
    checkpoint = describe(case.model).with_scheduler(**case.scheduler)
    return Engine(build(checkpoint, device, dtype))


# --------------------------------------------------------------------------------------------- measuring


def measure(
    engine: Engine,
    name: str,
    case: Case,
    *,
    settings: Sequence[dict[str, Any]] | None = None,
    batch_sizes: Sequence[int] = (1,),
    compile: Sequence[Compile] = ("off",),
    repeats: int = 3,
    on_progress: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Time `fullres` and the settings (unset: the case's and `AUTO`), compiled and not, at each batch size.

    Each setting's grids first run two steps that do not count. The repeats of the settings take turns, so
    that a machine that slows down does so for all of them.
    """
    chosen = [FULLRES, *(_chosen(case) if settings is None else settings)]
    samplings = [case.sampling(**setting) for setting in chosen]
    plans = [engine.plan(sampling) for sampling in samplings]
    grids = {stage.grid for plan in plans for stage in plan.stages}
    modes = sorted(compile, key=COMPILE.index)  # what is compiled stays so
    measured: list[Measurement] = []
    for mode in modes:
        compile_blocks(engine, mode, shapes=len(grids) * len(batch_sizes))
        for rows in batch_sizes:
            text = random_text(engine, case.text_tokens, rows)
            seconds: list[list[float]] = [[] for _ in plans]
            memory = [0.0] * len(plans)
            for i, (plan, sampling) in enumerate(zip(plans, samplings, strict=True)):
                on_progress(f"{name}: {_label(chosen[i])}, batch {rows}, compile {mode}: warming up")
                for _ in range(2):
                    engine.denoise(plan.one_step_each(), text, list(range(rows)), sampling)
            for repeat in range(repeats):
                for i, (plan, sampling) in enumerate(zip(plans, samplings, strict=True)):
                    on_progress(f"{name}: {_label(chosen[i])}, batch {rows}, compile {mode}: {repeat + 1}")
                    took, held = _timed(engine, plan, text, rows, sampling)
                    seconds[i].append(took)
                    memory[i] = max(memory[i], held)
            full = statistics.median(seconds[0])
            plain = measured[0].seconds / measured[0].batch_size if measured else full / rows
            for setting, plan, times, held in zip(chosen, plans, seconds, memory, strict=True):
                median = statistics.median(times)
                measured.append(
                    Measurement(
                        case=name,
                        setting=_label(setting),
                        split=plan.split,
                        batch_size=rows,
                        compile=mode,
                        seconds=median,
                        spread_s=max(times) - min(times),
                        rows_per_s=rows / median,
                        saving=full / median,
                        saving_over_plain=plain * rows / median,
                        ideal=plan.saving,
                        share_of_ideal=full / median / plan.saving,
                        memory_gib=held,
                    )
                )
    return measured


def _chosen(case: Case, patterns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The case's settings and `AUTO`, or those of them whose names match."""
    every = [*case.settings, AUTO]
    if patterns is None:
        return every
    return [one for one in every if any(fnmatchcase(_label(one), pattern) for pattern in patterns)]


def _timed(
    engine: Engine, plan: SamplingPlan, text: Encoded, rows: int, sampling: Sampling
) -> tuple[float, float]:
    """(seconds, memory in GiB) of one loop; on a GPU by the device's own clock."""
    seeds = list(range(rows))
    if engine.device.type != "cuda":
        start = time.perf_counter()
        engine.denoise(plan, text, seeds, sampling)
        return time.perf_counter() - start, _peak_gib()
    torch.cuda.reset_peak_memory_stats(engine.device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    engine.denoise(plan, text, seeds, sampling)
    end.record()
    torch.cuda.synchronize(engine.device)
    return begin.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated(engine.device) / 2**30


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _label(setting: dict[str, Any]) -> str:
    if setting == FULLRES:
        return "fullres"
    return ", ".join(f"{key} {value}" for key, value in setting.items())


# ----------------------------------------------------------------------------------------------- showing

_COLUMNS: dict[str, Callable[[Measurement], str]] = {
    "case": lambda m: m.case,
    "setting": lambda m: m.setting,
    "steps @ grid": lambda m: m.split,
    "batch": lambda m: str(m.batch_size),
    "compile": lambda m: m.compile,
    "seconds": lambda m: f"{m.seconds:.2f} ± {m.spread_s / 2:.2f}",
    "rows/s": lambda m: f"{m.rows_per_s:.3g}",
    "saving": lambda m: f"{m.saving:.2f}x",
    "over plain": lambda m: f"{m.saving_over_plain:.2f}x",
    "ideal": lambda m: f"{m.ideal:.2f}x",
    "reached": lambda m: f"{m.share_of_ideal:.0%}",
    "GiB": lambda m: f"{m.memory_gib:.1f}",
}


def table(measured: Sequence[Measurement]) -> str:
    """Markdown, its columns padded so that a terminal shows it well too."""
    return _markdown([list(_COLUMNS), *([cell(one) for cell in _COLUMNS.values()] for one in measured)])


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))} |" for row in rows
    )


def expected(name: str, case: Case) -> list[tuple[str, str, str, float]]:
    """(case, setting, steps @ grid, token-step ideal) of `fullres`, the published settings and `AUTO`, from
    the model's schedule alone: no device, no weights."""
    checkpoint = describe(case.model).with_scheduler(**case.scheduler)
    sigmas = checkpoint.sigmas(case.num_steps, case.height_px, case.width_px)
    rows = []
    for setting in (FULLRES, *_chosen(case)):
        plan = plan_sampling(case.sampling(**setting), FAMILIES[checkpoint.family], sigmas)
        rows.append((name, _label(setting), plan.split, plan.saving))
    return rows


def expected_table(names: Sequence[str]) -> str:
    """What is known of the table of `measure` before anything is measured, in Markdown."""
    rows = [["case", "setting", "steps @ grid", "ideal"]]
    for name in names:
        rows += [[*known, f"{ideal:.2f}x"] for *known, ideal in expected(name, CASES[name])]
    return _markdown(rows)


def report(measured: Sequence[Measurement], device: torch.device, dtype: str) -> dict[str, Any]:
    """All figures as data, with what they were measured on."""
    cuda = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": dtype,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "measurements": [asdict(one) for one in measured],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m progressive.bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", action="append", choices=[*CASES, "all"], help="repeatable; `all` is all but tiny"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the random transformers (default: bfloat16)")
    parser.add_argument("--batch-size", type=int, action="append", help="repeatable; default: 1")
    parser.add_argument("--compile", action="append", choices=COMPILE, help="repeatable; default: off")
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="beside fullres, only these settings, e.g. '*delta 0.05'; repeatable",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed loops of each setting (default: 3)")
    parser.add_argument("--steps", type=int, help="instead of the case's own number of steps")
    parser.add_argument("--plan", action="store_true", help="measure nothing: what the ideal would be")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    given = parser.parse_args(arguments)
    names = given.case or ["tiny"]
    if "all" in names:
        names = [name for name in CASES if name != "tiny"]
    if given.plan:
        print(expected_table(names))
        return
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        real = [name for name in names if name != "tiny"]
        if real:
            parser.error(f"--case {real[0]} needs a GPU; a CPU runs --case tiny, or --plan")
    for name, pattern in product(names, given.only or ()):
        if not _chosen(CASES[name], [pattern]):
            known = "; ".join(map(_label, _chosen(CASES[name])))
            parser.error(f"--only {pattern} names none of {name}'s settings: {known}")
    measured: list[Measurement] = []
    for name in names:
        case = CASES[name] if given.steps is None else replace(CASES[name], num_steps=given.steps)
        engine = open_case(case, device, getattr(torch, given.dtype))
        measured += measure(
            engine,
            name,
            case,
            settings=_chosen(case, given.only),
            batch_sizes=given.batch_size or (1,),
            compile=given.compile or ("off",),
            repeats=given.repeats,
            on_progress=lambda text: print(text, file=sys.stderr),
        )
        if given.json:  # after each case: the next one may not fit
            given.json.write_text(json.dumps(report(measured, device, given.dtype), indent=2) + "\n")
        if given.markdown:
            given.markdown.write_text(table(measured) + "\n")
        del engine  # the next model may need the room
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(table(measured))


if __name__ == "__main__":
    main()
