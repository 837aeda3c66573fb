"""The data set card of a finished job: README.md in its folder, for people, the Hugging Face Hub, `datasets`.
It is derived from spec, plan and parts, so it can be made again at any time. Knows no models.

    write_card(store, spec, job_plan)       # False: somebody else's README.md exists, and stays
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

import jinja2
import yaml

from overtone.jobs.columns import code, data_columns_markdown, source_columns
from overtone.jobs.errors import SizeError, SpecError, UserError
from overtone.jobs.folder import JobFolder
from overtone.jobs.media import media_extension
from overtone.jobs.plan import JobPlan
from overtone.jobs.report.card_contents import Contents, contents
from overtone.jobs.report.card_header import license_fields, metadata
from overtone.jobs.sampling import checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec, Lora
from overtone.jobs.store import NoSuchObject, Store
from overtone.jobs.words import counted, markdown_table

CARD = "README.md"
_SHOWN_FILES = 3


def write_card(store: Store, spec: JobSpec, job_plan: JobPlan) -> bool:
    """Write, or write again, the card of a job whose parts all exist. False: the existing README.md is
    somebody else's, and stays."""
    there = _header(store)
    if there is not None and "overtone" not in there:
        return False
    store.put(CARD, card(spec, job_plan, contents(store, job_plan)).encode(), content_type="text/markdown")
    return True


def finished_job(store: Store) -> tuple[JobSpec, JobPlan]:
    """The finished job in a folder. UserError where there is none, or it is not finished."""
    folder = JobFolder(store)
    spec, job_plan = folder.load()
    done = len(folder.finished())
    if done < job_plan.num_shards:
        raise UserError(
            f"{store.url} has {done:,} of {counted(job_plan.num_shards, 'shard')}, and a card counts the "
            "rows of all; run the job again to go on"
        )
    return spec, job_plan


def card_rows(store: Store) -> int | None:
    """The rows that the card in a folder promises; None where it holds no card of ours."""
    header = _header(store)
    try:
        return None if header is None else int(header["overtone"]["rows"])
    except (KeyError, TypeError, ValueError):
        return None


def _header(store: Store) -> dict[str, Any] | None:
    """The YAML at the beginning of README.md; {} where it has none, None where there is no such file."""
    try:
        text = store.read(CARD).decode(errors="replace")
    except NoSuchObject:
        return None
    if not text.startswith("---\n"):
        return {}
    try:
        header = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return header if isinstance(header, dict) else {}


def card(spec: JobSpec, job_plan: JobPlan, contents: Contents) -> str:
    """The text of README.md: a YAML header, then Markdown."""
    kind, format = contents.kind, spec.output.format
    samples = spec.samples()
    del samples["output"]["image" if kind == "video" else "video"]
    return _template().render(
        header=_yaml(metadata(spec, job_plan, contents)),
        name=spec.name,
        things="videos" if kind == "video" else "pictures",
        model=code(spec.model.id),
        version=version("overtone"),
        license=license_fields(spec) is not None,
        settings=_settings(spec, contents),
        stages=_stages(spec),
        samples=_yaml(_given(samples)),
        seed=spec.seed,
        input_rows=job_plan.num_rows,
        files=_files(job_plan),
        rows=contents.rows,
        parts=contents.parts,
        rejects=contents.rejects,
        truncated=contents.truncated,
        code=code,
        columns=data_columns_markdown(
            kind,
            latents=spec.output.latents,
            passthrough=job_plan.passthrough,
            sources=source_columns(spec),
            generation=job_plan.generation,
        ),
        format=format,
        field=media_extension(spec.output, kind) if format == "webdataset" else kind,
        latents=spec.output.latents,
    )


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("overtone.jobs"),
        autoescape=False,  # Markdown: what is foreign goes through `code`
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md")


def _settings(spec: JobSpec, contents: Contents) -> str:
    """A table of the model, the sizes, and what the job ran on."""
    model, sampling = spec.model, spec.sampling
    size = f"{sampling.height or 'its usual'} x {sampling.width or 'its usual'} pixels (height x width)"
    lines = {
        "model": code(model.id),
        "revision": code(model.revision) if model.revision else "none given: the newest at the time",
        "commit": ", ".join(code(commit) for commit in contents.commits if commit != model.revision),
        "variant": code(model.variant) if model.variant else "",
        "adapters": ", ".join(map(_adapter, model.loras)),
        "size": f"{size}, where a row does not say otherwise",
        "frames": str(sampling.num_frames or "") if contents.kind == "video" else "",
        "frames a second": str(spec.output.video.fps) if contents.kind == "video" else "",
        "seed": str(spec.seed),
        "made on": ", ".join(code(device) for device in contents.devices),
        "with": ", ".join(
            f"{name} {' and '.join(numbers)}" for name, numbers in sorted(contents.versions.items())
        ),
    }
    return markdown_table(("", ""), [line for line in lines.items() if line[1]])


def _adapter(lora: Lora) -> str:
    file = f" ({code(lora.weight_name)})" if lora.weight_name else ""
    revision = f" of revision {code(lora.revision)}" if lora.revision else ""
    whole = f"{code(lora.id)}{file}{revision} at {lora.scale:g}"
    if lora.transformer is None:
        return whole
    return f"{whole} in {'both transformers' if lora.transformer == 'both' else code(lora.transformer)}"


def _stages(spec: JobSpec) -> str:
    """The stages of a row of the job's own size; empty where they cannot be known without the model."""
    try:
        plan = sampling_plan(spec, checkpoint_of(spec))
    except (SpecError, SizeError):
        return ""
    header = ("stage", "grid (height x width)", "tokens", "steps", "noise from", "to")
    rows = [
        (
            str(i),
            f"{stage.height} x {stage.width}",
            f"{stage.tokens:,}",
            str(stage.last - stage.first),
            f"{stage.sigma_start:.4f}",
            f"{stage.sigma_end:.4f}",
        )
        for i, stage in enumerate(plan.stages)
    ]
    return markdown_table(header, rows)


def _files(job_plan: JobPlan) -> str:
    names = [job_plan.files[i].relpath for i in range(min(len(job_plan.files), _SHOWN_FILES))]
    more = f" and {len(job_plan.files) - len(names):,} more files" if len(job_plan.files) > len(names) else ""
    return ", ".join(map(code, names)) + more


def _given(value: Any) -> Any:
    """The value without what is unset, at any depth."""
    if not isinstance(value, dict):
        return value
    inner = {key: _given(item) for key, item in value.items()}
    return {key: item for key, item in inner.items() if item not in (None, {}, [])}
