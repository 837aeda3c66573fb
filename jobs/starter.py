"""A spec to begin with, for a model given by name: what is usual for its family is filled in, each line says
what it means. Knows the checkpoint table, loads nothing and writes nothing.

    starter("black-forest-labs/FLUX.1-dev", name="flux", prompts="prompts.csv", output="out/flux")
"""

from __future__ import annotations

import csv
import io
from typing import get_args

import yaml

from overtone.jobs.errors import SpecError
from overtone.jobs.words import counted
from overtone.progressive.checkpoints import Checkpoint, UnknownCheckpoint, describe, is_local_model
from overtone.progressive.families import FAMILIES, Family
from overtone.progressive.presets import FEW_STEPS, PRESETS
from overtone.progressive.settings import PresetName
from overtone.progressive.tiny import world

_COMMENT = 36
"""Column at which what stands after a value begins, where there is room."""
_END = "...\n"
"""What YAML puts after a value that stands alone."""
_EXAMPLES = (
    "a lighthouse on a basalt cliff at dusk, long exposure",
    "a bowl of ripe figs on a linen cloth, morning light",
    "a tram that turns a corner in the rain, seen from above",
    "a greenhouse full of ferns, mist on the glass",
    "a red fox asleep in tall grass, shallow depth of field",
    "a carpenter's bench with planes and shavings",
    "a harbour at night, lanterns mirrored in still water",
    "a paper crane on a chessboard, macro photograph",
)


def starter(
    model: str,
    *,
    name: str,
    prompts: str,
    output: str,
    preset: PresetName = "balanced",
    column: str | None = None,
) -> str:
    """The YAML text of a spec for a model by its hub name or folder, or for `tiny`.

    `column` names the table's column of prompts, where it is not `prompt`. SpecError for a model that is
    neither in the checkpoint table nor looks like a name of the hub, and for a folder that holds none.
    """
    checkpoint = _checkpoint(model)
    family = None if checkpoint is None else FAMILIES[checkpoint.family]
    lines = [
        "# All keys: `overtone schema`. What the job would do and need, and then the job itself:",
        f"#   overtone plan {name}.yaml --check",
        f"#   overtone run {name}.yaml",
        _line("model", model, _about(model, checkpoint)),
        *_prompts(prompts, column),
        "sampling:",
        *_sampling(model, checkpoint, family, preset),
        _line("shards", 256, "rows a file of the output, and the most that a death costs"),
        "workers:",
        _line("  min", 1, "asked for from the start"),
        _line("  # max", 8, "unset: as many as there is room for"),
        _line("  batch_size", "auto", "the fastest that fits, tried at the start"),
        *_output(output, family),
        _line("seed", 0, "of the job; a row's own column `seed` comes first"),
    ]
    return "\n".join(lines) + "\n"


def example_prompts(model: str) -> str:
    """A csv of a few rows, `row_id` and `prompt`: for the embedded model captions that it can draw."""
    prompts: tuple[str, ...] = _EXAMPLES
    if model == "tiny":
        prompts = tuple(world.caption(world.scene(seed)) for seed in world.held_out(len(_EXAMPLES)))
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(("row_id", "prompt"))
    rows.writerows((f"row-{number}", prompt) for number, prompt in enumerate(prompts))
    return out.getvalue()


def _checkpoint(model: str) -> Checkpoint | None:
    """None: a model of the hub that nothing here describes."""
    try:
        return describe(model)
    except UnknownCheckpoint as error:
        if model.count("/") == 1 and not is_local_model(model):
            return None
        raise SpecError(f"{model}: {error}") from error
    except ValueError as error:
        raise SpecError(f"{model}: {error}") from error


def _about(model: str, checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "not known here: its stages are planned once it is loaded"
    if model == "tiny":
        return "embedded: draws simple shapes, and nothing is downloaded"
    return checkpoint.pipeline_class if is_local_model(model) else "a private or gated one needs HF_TOKEN"


def _prompts(prompts: str, column: str | None) -> list[str]:
    if column is None:
        return [_line("prompts", prompts, "Parquet, csv or jsonl with a column `prompt`")]
    return ["prompts:", _line("  path", prompts), _line("  columns", {"prompt": column})]


def _sampling(
    model: str, checkpoint: Checkpoint | None, family: Family | None, preset: PresetName
) -> list[str]:
    if checkpoint is None or family is None:
        return [
            _line("  scales", "auto", "the ladder with the fewest FLOPs at this delta"),
            _line("  delta", 0.05, "error allowed per frequency at a change of grid"),
        ]
    lines = []
    steps = checkpoint.default_steps
    if steps is not None and steps < FEW_STEPS:
        lines += [
            _line("  mode", "fullres", f"made for {counted(steps, 'step')}: too few for coarse grids to pay"),
            _line("  num_steps", steps),
        ]
    elif family.name in PRESETS:
        chosen = PRESETS[family.name][preset]
        values = ", ".join(f"{key} {value}" for key, value in chosen.settings.items())
        lines += [_line("  preset", preset, f"{values}; others: {_others(preset)}")]
        if chosen.guidance is not None and family.guidance is not None:
            lines += [_line(f"  {family.guidance[0]}", chosen.guidance, "at which the preset was measured")]
    else:
        lines += [
            _line("  scales", "auto", "the ladder with the fewest FLOPs at this delta"),
            _line(
                "  delta", family.default_delta, "not measured for this family: `overtone tune` finds yours"
            ),
        ]
    if model == "tiny":
        return [*lines, _line("  min_scale", 0.5, "the smallest grid that this model was trained on")]
    return [
        *lines,
        _line("  height", family.default_height, "pixels; a row's own columns come first"),
        _line("  width", family.default_width),
    ]


def _others(preset: PresetName) -> str:
    return ", ".join(name for name in get_args(PresetName) if name != preset)


def _output(output: str, family: Family | None) -> list[str]:
    lines = ["output:", _line("  path", output, "a folder, or s3://my-bucket/prefix; one job a folder")]
    if family is not None and family.default_frames is not None:
        return [*lines, "  video:", _line("    fps", 16), _line("    crf", 18, "0 is lossless, 51 is worst")]
    return [*lines, "  image:", _line("    codec", "png", "lossless; webp and jpeg are smaller")]


def _line(key: str, value: object, comment: str = "") -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    line = f"{key}: {text.removesuffix(_END).strip()}"
    return f"{line:<{_COMMENT}} # {comment}" if comment else line
