"""What a job would do, from the spec and Parquet footers alone: shards, stages, token-steps, saving, memory,
disk and place. Loads neither torch nor ray; knows nothing of how long anything takes.

    preview(spec)                   # reads no rows, but for the names of a small table
    preview(spec, check=True)       # reads every row, and tries the output's store with a few bytes
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from overtone.jobs.needs import NEW, Needs, needs_of, try_output
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import check_row_ids
from overtone.jobs.row_check import RowCheck, check_rows, gives, names_told_soon
from overtone.jobs.sampling import checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec
from overtone.progressive.checkpoints import Checkpoint
from overtone.progressive.families import MEASURED_SPECTRA
from overtone.progressive.presets import preset
from overtone.progressive.schedule import Profile, SamplingPlan


def preview(spec: JobSpec, *, check: bool = False) -> Preview:
    """Plan a job without starting it. UserError for whatever `run` would refuse: a spec, prompt table, size
    or output that cannot be used.

    `check` also reads every row and tries whether the output's store is safe; without it, rows are read only
    for their names, and only where the table is small.
    """
    checkpoint = checkpoint_of(spec)
    stages, job_plan = sampling_plan(spec, checkpoint), make_plan(spec)
    needs = needs_of(spec, job_plan, checkpoint)
    rows = check_rows(spec, job_plan, checkpoint) if check else None
    named = needs.state != NEW or not gives(job_plan, "row_id")  # a job that was begun has passed
    if rows is not None:
        try_output(spec)
        own = job_plan.num_rows * stages.height_px * stages.width_px
        needs = replace(needs, size_bytes=round(needs.size_bytes * rows.pixels / own))
    elif not named and names_told_soon(job_plan):
        check_row_ids(spec, job_plan.files)
        named = True
    return Preview(spec, job_plan, checkpoint, stages, needs, rows, named=named or check)


@dataclass(frozen=True)
class Preview:
    """A job before it runs: `job` is its shards, `sampling` the stages of a row at the job's own size."""

    spec: JobSpec
    job: JobPlan
    checkpoint: Checkpoint
    sampling: SamplingPlan
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
        chosen = preset(sampling.preset, self.checkpoint.family)
        own = chosen.changed(sampling.model_dump())
        return chosen.source + (f"; the spec itself says otherwise of {', '.join(own)}" if own else "")

    @property
    def stand_in(self) -> bool:
        """Whether the transitions follow a spectrum that was fitted on another model's latents."""
        return self.spec.sampling.spectrum is None and self.checkpoint.family not in MEASURED_SPECTRA

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
            "job_token_steps": self.rows.token_steps
            if self.rows
            else self.job.num_rows * self.sampling.token_steps,
            "preset": self.spec.sampling.preset,
            "preset_source": self.preset_source,
            "stand_in_spectrum": self.stand_in,
            "split_by_spectrum_alone": without.split if (without := self._by_spectrum_alone()) else None,
            "row_ids_checked": self.named,
            "needs": self.needs.as_dict(),
            "rows_checked": None if self.rows is None else self.rows.as_dict(),
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
            *(
                []
                if self.preset_source is None
                else [f"preset {self.spec.sampling.preset}: {self.preset_source}"]
            ),
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
            *_cost_lines(plan),
            "",
            *self.needs.lines(),
            *self._row_lines(),
            *self._spectrum_lines(),
            *self._consistency_lines(),
        ]
        return "\n".join(lines)

    def _row_lines(self) -> list[str]:
        """What was found in the rows, or what was not looked for in them."""
        if self.rows is not None:
            return ["", *self.rows.lines()]
        unknown = ["which are rejected"]
        if gives(self.job, "height", "width"):
            unknown.append("the sizes that they ask for themselves")
        if gives(self.job, "num_images"):
            unknown.append("how many samples they ask for")
        if not self.named:
            unknown.append("whether two have one row_id")
        return [f"rows        not read; `overtone plan SPEC --check` tells {', '.join(unknown)}"]

    def _spectrum_lines(self) -> list[str]:
        if not self.stand_in or len(self.sampling.stages) == 1:
            return []
        return [
            f"spectrum    a stand-in: none was measured for {self.checkpoint.family}, so the same delta may "
            "cost more or less here; `overtone calibrate` measures it"
        ]

    def _consistency_lines(self) -> list[str]:
        without = self._by_spectrum_alone()
        if without is None:
            return []
        scales = ", ".join(f"{scale:g}" for scale in sorted({row[0] for row in self._measured()}))
        same = "the same stages" if without.split == self.sampling.split else without.split
        return [f"consistency measured at scales {scales}; by the spectrum alone: {same}"]

    def _measured(self) -> Profile:
        return self.spec.sampling.consistency or ()

    def _by_spectrum_alone(self) -> SamplingPlan | None:
        """The stages without the measured consistency; None where none is given, or it decides nothing."""
        sampling = self.spec.sampling
        if not self._measured() or sampling.mode == "fullres":
            return None
        alone = sampling.model_copy(update={"consistency": None})
        return sampling_plan(self.spec.model_copy(update={"sampling": alone}), self.checkpoint)


def _cost_lines(plan: SamplingPlan) -> list[str]:
    """What a row costs, and the plain setting that costs as much: who saves could also take fewer steps."""
    counted: str = plan.step_cost.counts
    if counted == "FLOPs":
        counted += f", {plan.step_cost.text_tokens:,} tokens of text included"
    else:
        counted += " alone, since this transformer's FLOPs are not known here"
    lines = [
        f"cost a row: {plan.cost:.1f} full-size steps of {plan.steps} (by {counted}); "
        f"predicted saving {plan.saving:.2f}x over {_count(plan.steps, 'step')} at full resolution"
    ]
    if len(plan.stages) > 1:
        equal = _count(max(1, round(plan.cost)), "step")
        lines.append(f"for the same cost: plain full resolution with {equal} (`mode: fullres`); try both")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
