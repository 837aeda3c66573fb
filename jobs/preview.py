"""What a job would do, from the spec and Parquet footers alone: shards, stages, saving, guidance.
Loads neither torch nor ray; knows nothing of how long anything takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.sampling import StagesUnknown, better_settings, checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec
from overtone.progressive.checkpoints import Checkpoint
from overtone.progressive.families import FAMILIES, Guided
from overtone.progressive.schedule import SamplingPlan


def preview(spec: JobSpec) -> Preview:
    """Plan a job without starting it. UserError for a spec, prompt table or size that cannot be used."""
    checkpoint, plan, unknown = None, None, None
    try:
        checkpoint = checkpoint_of(spec)
        plan = sampling_plan(spec, checkpoint)
    except StagesUnknown as error:
        unknown = f"{error}: the stages are known once the model is loaded"
    notes = better_settings(spec, checkpoint, plan) if checkpoint and plan else []
    return Preview(spec, make_plan(spec), checkpoint, plan, unknown, tuple(notes))


@dataclass(frozen=True)
class Preview:
    """A job before it runs: `job` is its shards, `sampling` the stages of a row at the job's own size."""

    spec: JobSpec
    job: JobPlan
    checkpoint: Checkpoint | None
    """None where the model's configuration is not on this machine."""
    sampling: SamplingPlan | None
    """None where only the loaded model knows."""
    unknown: str | None = None
    """Why it is None."""
    notes: tuple[str, ...] = ()
    """Settings that spoil samples, and better ones."""

    @property
    def family(self) -> str:
        """Key of `FAMILIES`."""
        return self.checkpoint.family if self.checkpoint else self.spec.model.family

    def as_dict(self) -> dict[str, Any]:
        """The same as `text`, as data."""
        plan = self.sampling
        return {
            "name": self.spec.name,
            "model": self.spec.model.id,
            "family": self.family,
            "fingerprint": self.job.fingerprint,
            "files": len(self.job.files),
            "rows": self.job.num_rows,
            "shards": self.job.num_shards,
            "sampling": plan and plan.as_dict(),
            "sampling_unknown": self.unknown,
            "guidance": self.guidance(),
            "notes": list(self.notes),
            "job_token_steps": plan and self.job.num_rows * plan.token_steps,
        }

    def text(self) -> str:
        """A dozen lines for a terminal."""
        plan = self.sampling
        lines = [
            f"{self.spec.name}: {_count(self.job.num_rows, 'row')} in {_count(self.job.num_shards, 'shard')} "
            f"from {_count(len(self.job.files), 'file')}",
        ]
        model = f"model {self.spec.model.id} ({self.family})"
        if plan is None:
            lines += [model, "", self.unknown or ""]
        else:
            lines += [f"{model}, {_settings(plan)}", "", *_stages(plan)]
        lines += [self._guidance_line(), *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)

    def guidance(self) -> dict[str, Any] | None:
        """Whether rows run a negative prompt, by which argument, and what that costs; None: not known."""
        family = FAMILIES[self.family] if self.family in FAMILIES else None
        if family is None or family.name == "generic":
            return None
        runs: Guided = "never"
        of_class = self.checkpoint.pipeline_class if self.checkpoint else None
        if of_class not in family.without_negative:
            distilled = bool(self.checkpoint and self.checkpoint.pipeline.get("is_distilled"))
            runs = family.guided(self.spec.sampling, family.guidance_default, distilled=distilled)
        name, above = family.guidance or (None, None)
        asked = name and getattr(self.spec.sampling, name, None)
        return {
            "runs": runs,
            "argument": name,
            "scale": family.guidance_default if asked is None else asked,
            "off": above,
            "passes_per_step": {"never": 1, "given": None, "always": 2}[runs],
        }

    def _guidance_line(self) -> str:
        found = self.guidance()
        if found is None:
            return "guidance: known once the model is loaded"
        if self.family == "ideogram4":
            return "guidance: a second transformer runs without the text at each step"
        asked = f"{found['argument']} {found['scale']:g}" if found["scale"] is not None else found["argument"]
        if found["runs"] == "never":
            return "guidance: no negative prompt runs; one pass of the transformer a step"
        if found["runs"] == "given":
            return (
                f"guidance: {asked} runs a negative prompt where a row has one, at two passes of the "
                "transformer a step; other rows take one"
            )
        return (
            f"guidance: {asked} runs a negative prompt (the empty one where a row has none): two passes of "
            f"the transformer a step, about twice the time of {found['argument']} {found['off']:g}"
        )


def _settings(plan: SamplingPlan) -> str:
    frames = f", {plan.num_frames} frames" if plan.num_frames else ""
    return (
        f"{plan.width_px}x{plan.height_px} px{frames}, {plan.mode}, delta {plan.delta:g}, "
        f"{plan.num_steps} steps"
    )


def _stages(plan: SamplingPlan) -> list[str]:
    lines = [f"{'stage':>5}  {'grid':>9}  {'tokens':>8}  {'steps':>5}  {'sigma from':>10}  {'to':>6}"]
    lines += [
        f"{i:>5}  {f'{stage.height}x{stage.width}':>9}  {stage.tokens:>8,}  "
        f"{stage.last - stage.first:>5}  "
        f"{stage.sigma_start:>10.4f}  {stage.sigma_end:>6.4f}"
        for i, stage in enumerate(plan.stages)
    ]
    saved = (
        f"token-steps a row: {plan.token_steps:,} of {plan.fullres_token_steps:,} at full resolution; "
        f"predicted saving {plan.saving:.2f}x"
    )
    return [*lines, "", saved]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
