"""The stages of a row as a spec asks for them, without loading the model. Knows no prompts and no shards."""

from __future__ import annotations

from overtone.jobs.errors import SizeError, SpecError
from overtone.jobs.spec import JobSpec
from overtone.progressive.checkpoints import Checkpoint, describe, flow_shift_change
from overtone.progressive.cost import step_cost
from overtone.progressive.families import FAMILIES
from overtone.progressive.schedule import SamplingPlan, plan_sampling, size_of, steps_of


def checkpoint_of(spec: JobSpec) -> Checkpoint:
    """The model's published or stored settings; SpecError when they cannot be known offline."""
    try:
        checkpoint = describe(spec.model.id)
    except ValueError as error:
        raise SpecError(f"model.id: {error}") from error
    _check_adapters(spec, FAMILIES[checkpoint.family].transformers)
    return checkpoint


def _check_adapters(spec: JobSpec, transformers: tuple[str, ...]) -> None:
    """SpecError where an adapter does not say which of several transformers it is for, or names another."""
    for number, lora in enumerate(spec.model.loras):
        known = (*transformers, "both") if len(transformers) > 1 else (*transformers, None)
        if lora.transformer not in known:
            has = " and ".join(transformers)
            said = "unset" if lora.transformer is None else lora.transformer
            choices = ", ".join(name for name in known if name)
            raise SpecError(
                f"model.loras[{number}].transformer is {said}, and {spec.model.id} has {has}; "
                f"set it to one of: {choices}"
            )


def sampling_plan(
    spec: JobSpec, checkpoint: Checkpoint, *, height_px: int | None = None, width_px: int | None = None
) -> SamplingPlan:
    """The stages of one row, at the job's own size unless a row's is given. SizeError where the model cannot
    make that size, or not with these settings."""
    family = FAMILIES[checkpoint.family]
    sampling = spec.sampling
    height_px, width_px, num_frames = size_of(sampling, family, height_px, width_px)
    try:
        change = flow_shift_change(checkpoint.scheduler, sampling.flow_shift)
        sigmas = checkpoint.with_scheduler(**change).sigmas(
            steps_of(sampling, family, checkpoint.default_steps), height_px, width_px, num_frames
        )
        cost = step_cost(checkpoint.transformer_class, checkpoint.transformer, family, sampling)
        return plan_sampling(sampling, family, sigmas, height_px=height_px, width_px=width_px, step_cost=cost)
    except ValueError as error:
        raise SizeError(f"sampling: {error}") from error
