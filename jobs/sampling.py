"""The stages of a row as a spec asks for them, without loading the model. Knows no prompts and no shards.

What only the loaded pipeline knows is not guessed: `StagesUnknown` says so, and the job can still run.
"""

from __future__ import annotations

from dataclasses import replace

from overtone.jobs.errors import SizeError, SpecError, UserError
from overtone.jobs.guidance import guidance_of
from overtone.jobs.spec import JobSpec
from overtone.progressive.checkpoints import (
    Checkpoint,
    UnknownCheckpoint,
    UnknownSchedule,
    describe,
    family_of,
    flow_shift_change,
    is_local_model,
)
from overtone.progressive.cost import step_cost
from overtone.progressive.families import FAMILIES, Family, edition_of
from overtone.progressive.presets import FEW_STEPS, preset
from overtone.progressive.schedule import (
    SamplingPlan,
    grid_for,
    latent_frames,
    plan_sampling,
    size_of,
    steps_of,
)
from overtone.progressive.settings import MAGCACHE_MEASURED, SEACACHE_PIPELINES


class StagesUnknown(SpecError):
    """The model can be loaded, but its stages are known only then."""


def check_model(spec: JobSpec) -> None:
    """SpecError or SizeError where the model cannot make what the spec asks for, as far as that is known
    without loading it. The stages are planned as a check alone and the plan is thrown away, for each worker
    plans its rows itself. What a hub model without settings here can do, only the workers find out."""
    try:
        sampling_plan(spec, checkpoint_of(spec))
    except StagesUnknown:
        return
    except SpecError as error:
        hub = spec.model.id.count("/") == 1 and not is_local_model(spec.model.id)
        if not (hub and isinstance(error.__cause__, UnknownCheckpoint)):
            raise


def checkpoint_of(spec: JobSpec) -> Checkpoint:
    """The model's published or stored settings; SpecError when they cannot be known offline, StagesUnknown
    where `model.family` says at least what it is."""
    family = spec.model.family
    if family != "auto" and family not in FAMILIES:
        raise SpecError(f"model.family is {family!r}; the known ones are {', '.join(FAMILIES)}")
    try:
        checkpoint = describe(spec.model.id, revision=spec.model.revision)
    except UnknownCheckpoint as error:
        if family == "auto":
            raise SpecError(f"model.id: {error}") from error
        _check_adapters(spec, FAMILIES[family].transformers)
        _check_size(spec, FAMILIES[family])
        raise StagesUnknown(f"the configuration of {spec.model.id} is not on this machine") from error
    except ValueError as error:
        raise SpecError(f"model.id: {error}") from error
    checkpoint = checkpoint if family == "auto" else replace(checkpoint, family=family)
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
    make that size, or not with these settings; StagesUnknown where only the loaded model can tell."""
    family = FAMILIES[checkpoint.family]
    sampling = spec.sampling
    _check_size(spec, family, height_px, width_px)
    guidance = guidance_of(spec, family, checkpoint)
    try:
        family.check_guidance_interval(sampling, guidance.runs if guidance else "never")
    except ValueError as error:
        raise SpecError(f"sampling.{error}") from error
    if spec.pictured:
        try:
            family.check_pictures()
        except ValueError as error:
            raise SpecError(f"sampling: {error}") from error
    _check_cache(spec, checkpoint)
    if family.name == "generic":
        raise StagesUnknown(f"{checkpoint.pipeline_class} runs on the generic entry")
    height_px, width_px, num_frames = size_of(sampling, family, height_px, width_px)
    num_steps = steps_of(sampling, family, checkpoint.default_steps)
    try:
        change = flow_shift_change(checkpoint.scheduler, sampling.flow_shift)
        sigmas = checkpoint.with_scheduler(**change).sigmas(
            num_steps, height_px, width_px, num_frames, family.arguments(sampling, num_steps)
        )
        cost = step_cost(
            checkpoint.transformer_class,
            checkpoint.transformer,
            family,
            sampling,
            guided=guidance.runs if guidance else None,
        )
        return plan_sampling(sampling, family, sigmas, height_px=height_px, width_px=width_px, step_cost=cost)
    except UnknownSchedule as error:
        raise StagesUnknown(str(error)) from error
    except ValueError as error:
        raise SizeError(f"sampling: {error}") from error


def _check_cache(spec: JobSpec, checkpoint: Checkpoint) -> None:
    """SpecError where the model cannot have the spec's step cache, as far as its configuration tells."""
    sampling, made = spec.sampling, checkpoint.transformer_class
    blocks = checkpoint.transformer.get("num_layers", MAGCACHE_MEASURED[1])
    unmeasured = sampling.cache_ratios is None and (made, blocks) != MAGCACHE_MEASURED
    if sampling.cache == "magcache" and unmeasured:
        raise SpecError(
            f"sampling.cache: magcache has no measured ratios for {spec.model.id}; give `cache_ratios`, or "
            "use another cache"
        )
    known = checkpoint.family != "generic" and checkpoint.pipeline_class not in SEACACHE_PIPELINES
    if sampling.cache == "seacache" and known:
        raise SpecError(
            f"sampling.cache: seacache runs with {' and '.join(SEACACHE_PIPELINES)} alone, and "
            f"{spec.model.id} is a {checkpoint.pipeline_class}; use another cache"
        )


def _check_size(
    spec: JobSpec, family: Family, height_px: int | None = None, width_px: int | None = None
) -> None:
    """SizeError where no model of this family makes samples of that size; the generic entry's may."""
    if family.name == "generic":
        return
    height_px, width_px, num_frames = size_of(spec.sampling, family, height_px, width_px)
    try:
        grid_for(family, height_px, width_px)
        latent_frames(family, num_frames)
    except ValueError as error:
        raise SizeError(f"sampling: {error}") from error


def entry_of(spec: JobSpec) -> dict[str, int]:
    """{family: edition} where samples of these settings are made in another way than by the first edition of
    the family's entry; empty elsewhere, and for a hub model that nobody has told the family of."""
    told = spec.model.family
    name = family_of(spec.model.id) if told == "auto" else told
    edition = edition_of(FAMILIES[name], spec.sampling) if name in FAMILIES else 1
    return {str(name): edition} if edition > 1 else {}


def notes_on(spec: JobSpec) -> list[str]:
    """`better_settings` of a spec, as far as its stages are known; raises nothing."""
    try:
        checkpoint = checkpoint_of(spec)
        return better_settings(spec, checkpoint, sampling_plan(spec, checkpoint))
    except UserError:
        return []  # unknown here, or a mistake that the run itself will tell


def better_settings(spec: JobSpec, checkpoint: Checkpoint, plan: SamplingPlan) -> list[str]:
    """One sentence for each choice of steps that spoils samples, with the setting that does not. None about
    a preset as it is: its source says what its steps are worth."""
    name, sampling = spec.sampling.preset, spec.sampling.model_dump()
    as_preset = name is not None and not preset(name, checkpoint.family).changed(sampling)
    if len(plan.stages) == 1 or as_preset:
        return []
    last, notes = plan.stages[-1], []
    if plan.num_steps < FEW_STEPS:  # then no delta helps
        alone = ", and the full grid gets one of them" if last.steps == 1 else ""
        notes.append(
            f"num_steps is {plan.num_steps}{alone}: with fewer than {FEW_STEPS} steps each is long, and what "
            "a coarse grid gets wrong stays; set sampling.mode: fullres, or sampling.num_steps: "
            f"{FEW_STEPS} or more where the model was not distilled to few steps"
        )
    elif last.steps == 1:
        finer = _smaller_delta(spec, checkpoint, plan)
        notes.append(
            f"the full grid gets one step of {plan.num_steps}, from noise level {last.sigma_start:.2f}: all "
            "its details would come from that step; set "
            + (f"sampling.delta: {finer:g}, or " if finer else "")
            + "sampling.mode: fullres"
        )
    return notes


def _smaller_delta(spec: JobSpec, checkpoint: Checkpoint, plan: SamplingPlan) -> float | None:
    """The largest usual delta that leaves the full grid more than one step, where delta decides at all."""
    for delta in (0.2, 0.1, 0.05, 0.02, 0.01, 0.005):
        if delta < plan.delta and spec.sampling.transition_sigmas is None:
            sampling = spec.sampling.model_copy(update={"delta": delta})
            tried = sampling_plan(spec.model_copy(update={"sampling": sampling}), checkpoint)
            if tried.stages[-1].steps > 1:
                return delta
    return None
