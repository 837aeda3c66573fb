"""What a job would do, from the spec and Parquet footers alone: shards, stages, token-steps, saving, memory,
guidance, disk and place. Loads neither torch nor ray; knows nothing of how long anything takes.

    preview(spec)                   # reads no rows, but for the names of a small table
    preview(spec, check=True)       # reads every row, and tries the output's store with a few bytes
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from overtone.jobs.errors import UserError
from overtone.jobs.guidance import Guidance, guidance_of
from overtone.jobs.needs import NEW, Needs, needs_of, try_output
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import check_row_ids
from overtone.jobs.row_check import RowCheck, check_rows, names_told_soon
from overtone.jobs.sampling import StagesUnknown, better_settings, checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec
from overtone.jobs.words import counted
from overtone.progressive.checkpoints import Checkpoint
from overtone.progressive.families import FAMILIES, MEASURED_SPECTRA
from overtone.progressive.presets import preset
from overtone.progressive.schedule import SamplingPlan


def preview(spec: JobSpec, *, check: bool = False) -> Preview:
    """Plan a job without starting it. UserError for whatever `run` would refuse: a spec, prompt table, size
    or output that cannot be used.

    `check` also reads every row and tries whether the output's store is safe; without it, rows are read only
    for their names, and only where the table is small.
    """
    checkpoint, stages, unknown = None, None, None
    try:
        checkpoint = checkpoint_of(spec)
        stages = sampling_plan(spec, checkpoint)
    except StagesUnknown as error:
        unknown = f"{error}: the stages are known once the model is loaded"
    family = FAMILIES[checkpoint.family if checkpoint else spec.model.family]
    job_plan = make_plan(spec)
    needs = needs_of(spec, job_plan, family, checkpoint)
    rows = check_rows(spec, job_plan, checkpoint) if check else None
    named = needs.state != NEW or not job_plan.files.gives("row_id")  # a job that was begun has passed
    if rows is not None:
        try_output(spec)
        if stages is not None and needs.size_bytes is not None and not rows.unplanned:
            own = job_plan.num_rows * stages.height_px * stages.width_px
            needs = replace(needs, size_bytes=round(needs.size_bytes * rows.pixels / own))
    elif not named and names_told_soon(job_plan):
        check_row_ids(spec, job_plan.files)
        named = True
    guidance = guidance_of(spec, family, checkpoint)
    notes = better_settings(spec, checkpoint, stages) if checkpoint and stages else []
    notes += _on_negatives(guidance, job_plan)
    alone = _by_spectrum_alone(spec, checkpoint) if checkpoint and stages else None
    return Preview(
        spec=spec,
        job=job_plan,
        family=family.name,
        sampling=stages,
        by_spectrum_alone=alone,
        unknown=unknown,
        guidance=guidance,
        notes=tuple(notes),
        needs=needs,
        rows=rows,
        named=named or check,
    )


def notes_on_negatives(spec: JobSpec, job_plan: JobPlan) -> list[str]:
    """A sentence where the table has negative prompts and the settings run none of them, as far as that is
    known without loading the model; raises nothing."""
    try:
        checkpoint = checkpoint_of(spec)
    except UserError:
        return []
    return _on_negatives(guidance_of(spec, FAMILIES[checkpoint.family], checkpoint), job_plan)


def _on_negatives(guidance: Guidance | None, job_plan: JobPlan) -> list[str]:
    said = guidance.without_effect() if guidance and job_plan.files.gives("negative_prompt") else None
    return [] if said is None else [said]


@dataclass(frozen=True)
class Preview:
    """A job before it runs: `job` is its shards, `sampling` the stages of a row at the job's own size."""

    spec: JobSpec
    job: JobPlan
    family: str
    """Key of `FAMILIES`."""
    sampling: SamplingPlan | None
    """None where only the loaded model knows."""
    by_spectrum_alone: SamplingPlan | None
    """The stages without the measured consistency; None where none is given, or it decides nothing."""
    unknown: str | None
    """Why it is None."""
    guidance: Guidance | None
    """None where only the loaded model knows."""
    notes: tuple[str, ...]
    """Settings that spoil samples, each with a better one."""
    needs: Needs
    rows: RowCheck | None
    """None: they were not read."""
    named: bool
    """Known: no two rows have one name."""

    @property
    def preset_source(self) -> str | None:
        """Where the preset's settings are from, and which of them the spec has otherwise; None: no preset."""
        sampling = self.spec.sampling
        if sampling.preset is None:
            return None
        chosen = preset(sampling.preset, self.family)
        own = chosen.changed(sampling.model_dump())
        told = f"; the spec itself says otherwise of {', '.join(own)}" if own else ""
        scale = None if self.guidance is None else self.guidance.applied
        if chosen.guidance is not None and scale != chosen.guidance:
            here = "runs none" if scale is None else f"is at {scale:g}"
            told += f"; this job {here}, and how good its pictures are was not measured"
        return chosen.source + told

    @property
    def stand_in(self) -> bool:
        """Whether the transitions follow a spectrum that was fitted on another model's latents."""
        return self.spec.sampling.spectrum is None and self.family not in MEASURED_SPECTRA

    @property
    def job_token_steps(self) -> int | None:
        """Of all samples, or at the job's own size where the rows were not read; None: not known."""
        if self.rows is not None:
            return self.rows.token_steps
        return None if self.sampling is None else self.job.num_rows * self.sampling.token_steps

    def as_dict(self) -> dict[str, Any]:
        """The same as `text`, as data."""
        return {
            "name": self.spec.name,
            "model": self.spec.model.id,
            "family": self.family,
            "fingerprint": self.job.fingerprint,
            "files": len(self.job.files),
            "rows": self.job.num_rows,
            "shards": self.job.num_shards,
            "sampling": None if self.sampling is None else self.sampling.as_dict(),
            "sampling_unknown": self.unknown,
            "job_token_steps": self.job_token_steps,
            "guidance": None if self.guidance is None else self.guidance.as_dict(),
            "notes": list(self.notes),
            "preset": self.spec.sampling.preset,
            "preset_source": self.preset_source,
            "stand_in_spectrum": self.stand_in,
            "split_by_spectrum_alone": self.by_spectrum_alone and self.by_spectrum_alone.split,
            "row_ids_checked": self.named,
            "needs": self.needs.as_dict(),
            "rows_checked": None if self.rows is None else self.rows.as_dict(),
        }

    def text(self) -> str:
        """A dozen lines for a terminal."""
        model = f"model {self.spec.model.id} ({self.family})"
        if self.sampling is None:
            stages = [model, "", f"stages      {self.unknown}"]
        else:
            stages = [
                f"{model}, {_settings(self.sampling)}",
                *self._preset_lines(),
                "",
                *_stages(self.sampling),
            ]
        found = (
            "known once the model is loaded" if self.guidance is None else self.guidance.line(self.sampling)
        )
        lines = [
            f"{self.spec.name}: {counted(self.job.num_rows, self.job.unit)} in "
            f"{counted(self.job.num_shards, 'shard')} from {counted(len(self.job.files), 'file')}",
            *stages,
            "",
            f"guidance    {found}",
            *self._picture_lines(),
            *(f"note        {note}" for note in self.notes),
            *self.needs.lines(),
            *self._row_lines(),
            *self._spectrum_lines(),
            *self._consistency_lines(),
        ]
        return "\n".join(lines)

    def _picture_lines(self) -> list[str]:
        """Where rows start that start from pictures."""
        if not self.spec.pictured:
            return []
        where = "each row from its picture"
        if self.sampling is not None:
            plan = self.sampling
            where += f", at step {plan.start} of {plan.num_steps} (noise level {plan.sigmas[plan.start]:.2f})"
        asked = self.spec.sampling.height or self.spec.sampling.width
        size = "" if asked else "; where a row gives no size, the stages are those of its picture's"
        return [f"start       {where}; no picture was read{size}"]

    def _row_lines(self) -> list[str]:
        """What was found in the rows, or what was not looked for in them."""
        if self.rows is not None:
            return ["", *self.rows.lines()]
        unknown = ["which are rejected"]
        if self.job.files.gives("height", "width"):
            unknown.append("the sizes that they ask for themselves")
        if self.job.files.gives("num_images"):
            unknown.append("how many rows they become")
        if not self.named:
            unknown.append("whether two have one row_id")
        return [f"rows        not read; `overtone plan SPEC --check` tells {', '.join(unknown)}"]

    def _spectrum_lines(self) -> list[str]:
        if not self.stand_in or (self.sampling is not None and len(self.sampling.stages) == 1):
            return []
        return [
            f"spectrum    a stand-in: none was measured for {self.family}, so the same delta may cost more "
            "or less here; `overtone calibrate` measures it"
        ]

    def _preset_lines(self) -> list[str]:
        source = self.preset_source
        return [] if source is None else [f"preset {self.spec.sampling.preset}: {source}"]

    def _consistency_lines(self) -> list[str]:
        alone = self.by_spectrum_alone
        if alone is None or self.sampling is None:
            return []
        measured = self.spec.sampling.consistency or ()
        scales = ", ".join(f"{scale:g}" for scale in sorted({row[0] for row in measured}))
        same = "the same stages" if alone.split == self.sampling.split else alone.split
        return [f"consistency measured at scales {scales}; by the spectrum alone: {same}"]


def _by_spectrum_alone(spec: JobSpec, checkpoint: Checkpoint) -> SamplingPlan | None:
    if not spec.sampling.consistency or spec.sampling.mode == "fullres":
        return None
    alone = spec.sampling.model_copy(update={"consistency": None})
    return sampling_plan(spec.model_copy(update={"sampling": alone}), checkpoint)


def _cost_lines(plan: SamplingPlan) -> list[str]:
    """What a row costs, and the plain setting that costs as much: who saves could also take fewer steps."""
    unit: str = plan.step_cost.counts
    if plan.step_cost.counts == "FLOPs":
        unit += f", {plan.step_cost.text_tokens:,} tokens of text included"
    else:
        unit += " alone, since this transformer's FLOPs are not known here"
    lines = [
        f"cost a row: {plan.cost:.1f} full-size steps of {plan.steps} (by {unit}); "
        f"predicted speed-up {plan.saving:.2f}x over {counted(plan.steps, 'step')} at full resolution"
    ]
    if len(plan.stages) > 1:
        equal = counted(max(1, round(plan.cost)), "step")
        lines.append(f"for the same cost: plain full resolution with {equal} (`mode: fullres`); try both")
    return lines


def _settings(stages: SamplingPlan) -> str:
    frames = f", {stages.num_frames} frames" if stages.num_frames else ""
    order = "" if stages.height_px == stages.width_px else " (height x width)"
    return (
        f"{stages.height_px}x{stages.width_px} px{order}{frames}, {stages.mode}, delta {stages.delta:g}, "
        f"{counted(stages.num_steps, 'step')}"
    )


def _stages(plan: SamplingPlan) -> list[str]:
    lines = [f"{'stage':>5}  {'grid':>9}  {'tokens':>8}  {'steps':>5}  {'sigma from':>10}  {'to':>6}"]
    lines += [
        f"{i:>5}  {f'{stage.height}x{stage.width}':>9}  {stage.tokens:>8,}  "
        f"{stage.steps:>5}  "
        f"{stage.sigma_start:>10.4f}  {stage.sigma_end:>6.4f}"
        for i, stage in enumerate(plan.stages)
    ]
    return [*lines, "", *_cost_lines(plan)]
