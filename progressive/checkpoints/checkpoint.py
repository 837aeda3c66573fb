"""One checkpoint as its configuration files describe it, read without torch: classes, configurations and the
noise schedule that the pipeline will run. Knows no weights and no other checkpoint.

    describe("black-forest-labs/FLUX.1-dev").sigmas(50, 1024, 1024)     # 51 noise levels, the last 0

A published one (published.py) states facts as the checkpoint's own configuration files give them. Values that
could not be compared with such a file are named in `Checkpoint.unverified`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from overtone.progressive.checkpoints.sigmas import (
    CALLS,
    SCHEDULES,
    Asked,
    Config,
    UnknownSchedule,
    image_tokens,
)
from overtone.progressive.families import FAMILIES, conditioned, family_name
from overtone.progressive.schedule import latent_frames


@dataclass(frozen=True)
class Checkpoint:
    """What a model's configuration files say, as far as a plan or a benchmark needs it."""

    family: str
    """Key of `progressive.families.FAMILIES`."""
    pipeline_class: str
    transformer_class: str
    scheduler_class: str
    """The three classes' names in diffusers."""
    transformer: Config
    """Arguments of the transformer class."""
    scheduler: Config
    """Arguments of the scheduler class; what is left out is the class's default."""
    source: str
    """Where the values are from."""
    default_steps: int | None = None
    """Steps that the model's authors recommend; None where the files do not tell."""
    pipeline: Config = field(default_factory=dict)
    """Plain values of model_index.json, such as `boundary_ratio`."""
    unverified: tuple[str, ...] = ()
    """Names of values taken from elsewhere than a copy of the checkpoint's own file."""

    def with_scheduler(self, **changes: Any) -> Checkpoint:
        """The same checkpoint under other scheduler settings, such as `flow_shift=5.0` for Wan."""
        return replace(self, scheduler=self.scheduler | changes)

    def sigmas(
        self,
        num_steps: int,
        height_px: int,
        width_px: int,
        num_frames: int | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> list[float]:
        """The pipeline's full-resolution schedule: num_steps + 1 noise levels, falling, the last 0.

        Equal to what the diffusers scheduler holds after the pipeline's `set_timesteps`, to float32.
        `call`: the other arguments of the pipeline's call. ValueError for what cannot be made;
        UnknownSchedule where it can, but at which noise levels only the loaded pipeline knows.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
        call = call or {}
        if own := {"sigmas", "timesteps"} & call.keys():
            raise UnknownSchedule(f"call_kwargs sets the schedule itself ({', '.join(sorted(own))})")
        family = FAMILIES[self.family]
        asks = next((CALLS[name] for name in (self.pipeline_class, *family.pipelines) if name in CALLS), None)
        if asks is None:
            raise UnknownSchedule(f"{self.pipeline_class} is not a family known here")
        if self.scheduler_class not in SCHEDULES:
            known = ", ".join(sorted(SCHEDULES))
            raise UnknownSchedule(f"scheduler is {self.scheduler_class}; schedules are known for {known}")
        asked = Asked(
            scheduler=self.scheduler,
            pipeline=self.pipeline,
            num_steps=num_steps,
            height_px=height_px,
            width_px=width_px,
            tokens=image_tokens(family, height_px, width_px),
            frames=latent_frames(family, num_frames),
            transformer=self.transformer,
            call=call,
        )
        sigmas, mu = asks(asked)
        return [float(s) for s in SCHEDULES[self.scheduler_class](self.scheduler, num_steps, sigmas, mu)]


CONFIGURATION = ("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json")
"""The files of a folder in diffusers format that `read_folder` reads."""


def read_folder(folder: Path) -> Checkpoint:
    """The checkpoint in a folder in diffusers format. ValueError for any other folder, and for one whose
    scheduler is not flow-matching."""
    index = read_json(folder / "model_index.json")
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    classes = {}
    for name in ("transformer", "scheduler"):
        if len(parts.get(name, ())) != 2 or not parts[name][1]:
            raise ValueError(
                f"{folder / 'model_index.json'} names no {name}; only diffusion transformers work"
            )
        classes[name] = str(parts[name][1])
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    pipeline_class = str(index.get("_class_name"))
    if why := conditioned(pipeline_class):
        raise ValueError(f"{folder}: {why}")
    pipeline = {
        k: v for k, v in index.items() if not k.startswith("_") and (k not in parts or k == "sample_sigmas")
    }
    if not classes["scheduler"].startswith("FlowMatch") and not scheduler.get("use_flow_sigmas"):
        raise ValueError(
            f"{folder} has a {classes['scheduler']} that is not flow-matching; only flow-matching models work"
        )
    family = family_name(pipeline_class, pipeline)
    if family == "flux1" and (folder / "spectrum.json").is_file():
        family = "tiny"  # an embedded model that its training script wrote elsewhere
    transformer = _public(read_json(folder / "transformer" / "config.json"))
    FAMILIES[family].check_transformer(transformer)
    return Checkpoint(
        family=family,
        pipeline_class=pipeline_class,
        transformer_class=classes["transformer"],
        scheduler_class=classes["scheduler"],
        transformer=transformer,
        scheduler=_public(scheduler),
        source=str(folder),
        pipeline=pipeline,
    )


def read_json(path: Path) -> Config:
    """The object in a JSON file. ValueError that names the file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def _public(config: Config) -> Config:
    return {key: value for key, value in config.items() if not key.startswith("_")}
