"""What a job would do, from the spec, Parquet footers and row_ids: shards, stages, token-steps, saving.
Loads neither torch nor ray; knows nothing of how long anything takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import check_row_ids
from overtone.jobs.sampling import checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec
from overtone.progressive.checkpoints import Checkpoint
from overtone.progressive.schedule import SamplingPlan

_CHECKED_ROWS = 1_000_000
"""Of more rows, that no two have one row_id is seen only by a run."""


def preview(spec: JobSpec) -> Preview:
    """Plan a job without starting it. UserError for a spec, prompt table or size that cannot be used."""
    checkpoint = checkpoint_of(spec)
    job_plan, plan = make_plan(spec), sampling_plan(spec, checkpoint)
    if job_plan.num_rows <= _CHECKED_ROWS:
        check_row_ids(spec, job_plan.files)
    return Preview(spec, job_plan, checkpoint, plan)


@dataclass(frozen=True)
class Preview:
    """A job before it runs: `job` is its shards, `sampling` the stages of a row at the job's own size."""

    spec: JobSpec
    job: JobPlan
    checkpoint: Checkpoint
    sampling: SamplingPlan

    def as_dict(self) -> dict[str, Any]:
        """The same as `text`, as data."""
        return {
            "name": self.spec.name,
            "model": self.spec.model.id,
            "family": self.checkpoint.family,
            "fingerprint": self.job.fingerprint,
            "files": len(self.job.files),
            "rows": self.job.num_rows,
            "shards": self.job.num_shards,
            "sampling": self.sampling.as_dict(),
            "job_token_steps": self.job.num_rows * self.sampling.token_steps,
        }

    def text(self) -> str:
        """A dozen lines for a terminal."""
        plan = self.sampling
        lines = [
            f"{self.spec.name}: {_count(self.job.num_rows, 'row')} in {_count(self.job.num_shards, 'shard')} "
            f"from {_count(len(self.job.files), 'file')}",
            f"model {self.spec.model.id} ({self.checkpoint.family}), {plan.width_px}x{plan.height_px} px"
            + (f", {plan.num_frames} frames" if plan.num_frames else "")
            + f", {plan.mode}, delta {plan.delta:g}, {plan.num_steps} steps",
            "",
            f"{'stage':>5}  {'grid':>9}  {'tokens':>8}  {'steps':>5}  {'sigma from':>10}  {'to':>6}",
        ]
        lines += [
            f"{i:>5}  {f'{stage.height}x{stage.width}':>9}  {stage.tokens:>8,}  "
            f"{stage.last - stage.first:>5}  "
            f"{stage.sigma_start:>10.4f}  {stage.sigma_end:>6.4f}"
            for i, stage in enumerate(plan.stages)
        ]
        lines += [
            "",
            f"token-steps a row: {plan.token_steps:,} of {plan.fullres_token_steps:,} at full resolution; "
            f"predicted saving {plan.saving:.2f}x",
        ]
        return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
