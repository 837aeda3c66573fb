"""A worker's model, loaded as the spec says; and the sentence about a model that cannot be. Knows no shard.

    engine = load_engine(spec)

Whether a failure is the model's or the machine's decides what becomes of the job: a wrong name fails
everywhere, and one try is enough to know; a full disk is met on one machine, and another may do.
"""

from __future__ import annotations

import errno
import logging
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from overtone.cluster.faults import first_line
from overtone.cluster.worker.protocol import Engine
from overtone.jobs.errors import FingerprintMismatch, ModelError, SpecError, UserError
from overtone.jobs.plan import JobPlan, other_entry
from overtone.jobs.spec import JobSpec
from overtone.progressive.checkpoints import is_local_model
from overtone.progressive.families import edition_of
from overtone.progressive.schedule import SamplingPlan

_log = logging.getLogger(__name__)

_UNLOADABLE = (OSError, ValueError, LookupError, ImportError, AttributeError)
_ABOUT_THE_FILES = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM}
"""Numbers of OSErrors that speak of the model's files; others are about the disk or the machine."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}


def load_engine(spec: JobSpec) -> Engine:
    """The spec's model, resident on this process's device. ModelError where it cannot be loaded from
    anywhere; what may be this machine's trouble alone is raised as it is."""
    try:
        return _load(spec)
    except _UNLOADABLE as error:
        if _is_the_machines(error):
            raise
        raise _model_error(spec, error) from error


def _load(spec: JobSpec) -> Engine:
    # Imported here and not above: an engine that a caller brings may not need them.
    import diffusers
    import torch
    import transformers

    from overtone.progressive.pipelines import load

    diffusers.utils.logging.disable_progress_bar()  # this process is ours: its output is the job's log
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(spec.workers.threads or math.ceil(spec.workers.num_cpus))
    model = spec.model
    pipe = load(
        model.id,
        dtype=None if model.dtype == "auto" else model.dtype,
        revision=model.revision,
        variant=model.variant,
        trust_remote_code=model.trust_remote_code,
        loras=model.loras,
        offload=model.offload,
        quantize=model.quantize,
        attention=model.attention,
        family=_family(spec),
    )
    return engine_of(spec, pipe)


def engine_of(spec: JobSpec, pipe: Any) -> Engine:
    """An engine around a pipeline that is loaded, run as the spec's `workers` say."""
    from overtone.progressive.engine import Engine as PipelineEngine
    from overtone.progressive.graphs import GraphedEngine, capturer_for

    family, workers = _family(spec), spec.workers
    capturer = capturer_for(pipe.device) if workers.graphs == "auto" else None
    if workers.graphs == "auto" and capturer is None:
        _log.info("`graphs: auto` does nothing on a %s, where no step waits for launches", pipe.device.type)
    if workers.compile != "off":
        from overtone.progressive.compile import CompiledEngine

        where = workers.compile_cache_dir
        return CompiledEngine(pipe, family, mode=workers.compile, cache_dir=where, capturer=capturer)
    if capturer is not None:
        return GraphedEngine(pipe, family, capturer=capturer)
    return PipelineEngine(pipe, family)


def _family(spec: JobSpec) -> str | None:
    return None if spec.model.family == "auto" else spec.model.family


def loaded_commit(spec: JobSpec) -> str:
    """The hub's commit that the spec's model is loaded from on this machine, as the cache has it under the
    spec's revision; empty where the cache does not tell, and for models that are not from the hub."""
    model = spec.model
    if model.id.count("/") != 1 or is_local_model(model.id):
        return ""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # no name for the hub
        found = try_to_load_from_cache(model.id, "model_index.json", revision=model.revision)
        if isinstance(found, str) and _COMMIT.fullmatch(Path(found).parent.name):
            return Path(found).parent.name
    return ""


def usual_plan(engine: Engine, spec: JobSpec) -> SamplingPlan:
    """The sampling plan of rows that ask for nothing else. SpecError where the model refuses the spec's
    settings, for what is wrong with them is wrong with every row."""
    try:
        return engine.plan(spec.sampling)
    except ValueError as error:
        raise SpecError(f"`sampling` in the spec: {first_line(error)}") from error


def check_edition(engine: Engine, spec: JobSpec, job_plan: JobPlan) -> None:
    """FingerprintMismatch where an older version began the job and made samples of this family in another
    way. The job's fingerprint tells it already, but for a hub model whose family nobody knew before."""
    family, begun = engine.family, job_plan.edition
    edition = edition_of(family, spec.sampling)
    if edition > begun:
        raise FingerprintMismatch(
            f"the job was begun by an older version of overtone; {other_entry(family, begun, edition)}. "
            "Go on with the version that began it, or choose a new `output`"
        )


def _is_the_machines(error: Exception) -> bool:
    """Whether an error may be this machine's, or pass: its disk is full, or the hub is busy."""
    if isinstance(error, UserError):
        return True  # it says already what is wrong
    for one in _causes(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if status in _PASSING_STATUS:
            return True
    return isinstance(error, OSError) and error.errno not in _ABOUT_THE_FILES


def _model_error(spec: JobSpec, error: Exception) -> ModelError:
    model = spec.model.id
    kinds = {type(one).__name__ for one in _causes(error)}
    if not isinstance(error, OSError) or is_local_model(model) or Path(model).is_absolute():
        advice = "see the keys of `model` in the spec, and that what they name is whole and of this version"
    elif "GatedRepoError" in kinds:
        advice = f"accept its licence at https://huggingface.co/{model}, and give the workers HF_TOKEN"
    elif kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"}:
        advice = "see its name and revision; a private one needs HF_TOKEN where the workers run"
    else:
        advice = (
            "see its name, whether its licence is accepted and HF_TOKEN set where the workers run, and "
            "whether they reach https://huggingface.co or hold it in their cache"
        )
    return ModelError(f"the model {model} cannot be loaded: {advice} ({first_line(error, 300)})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, from the last to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
