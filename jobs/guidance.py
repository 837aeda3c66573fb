"""Whether a job's rows run a negative prompt, and what that costs, without loading the model. Knows no rows.

found = guidance_of(spec, FAMILIES["qwen-image"], checkpoint)
found.runs, found.line(plan)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from overtone.jobs.spec import JobSpec
from overtone.progressive.checkpoints import Checkpoint
from overtone.progressive.families import Family, Guided
from overtone.progressive.schedule import SamplingPlan


def guidance_of(spec: JobSpec, family: Family, checkpoint: Checkpoint | None) -> Guidance | None:
    """What the pipeline's own call does with these settings; None where only the loaded model tells."""
    if checkpoint is None or family.name == "generic" or family.guider:
        return None  # whether it is distilled is in its configuration
    runs: Guided = "never"
    distilled = bool(checkpoint.pipeline.get("is_distilled"))
    takes = checkpoint.pipeline_class not in family.without_negative and not distilled
    if takes:
        runs = family.guided(spec.sampling, family.guidance_default)
    argument, off = family.guidance or (None, None)
    asked = getattr(spec.sampling, argument) if argument else None
    return Guidance(
        runs=runs,
        possible=takes and family.guidance is not None,
        argument=argument,
        scale=family.guidance_default if asked is None else asked,
        off=off,
        unprompted=family.unprompted,
        interval=spec.sampling.guidance_interval,
    )


@dataclass(frozen=True)
class Guidance:
    """What guidance costs a row."""

    runs: Guided
    """Which rows run a negative prompt."""
    possible: bool
    """Whether the model runs negative prompts at some setting of `argument`."""
    argument: str | None
    """The setting that rules it; None: there is none."""
    scale: float | None
    """That setting's value, or else the default of the pipeline's call."""
    off: float | None
    """The largest value at which no negative prompt runs."""
    unprompted: bool
    """As `Family.unprompted`."""
    interval: tuple[float, float] | None = None
    """Noise levels within which a step runs a negative prompt; None: at every step."""

    @property
    def passes_per_step(self) -> int | None:
        """How often a transformer runs for a row at each step within the interval; None: that depends on the
        row."""
        if self.unprompted:
            return 2
        return {"never": 1, "given": None, "always": 2}[self.runs]

    @property
    def applied(self) -> float | None:
        """The scale at which a negative prompt runs; None: none runs, or no setting rules it."""
        return None if self.runs == "never" else self.scale

    def without_effect(self) -> str | None:
        """What to say of a table with negative prompts that no row would run; None where rows run theirs."""
        if self.runs != "never":
            return None
        set_it = f"set sampling.{self.argument} above {self.off:g}, or" if self.possible else "it never does;"
        return (
            "the table's negative prompts have no effect: the model runs none with these settings; "
            f"{set_it} let the column pass through by `prompts.columns: {{negative_prompt: null}}`"
        )

    def as_dict(self) -> dict[str, Any]:
        """The same as `line`, as data."""
        return asdict(self) | {
            "interval": self.interval and list(self.interval),
            "passes_per_step": self.passes_per_step,
        }

    def line(self, plan: SamplingPlan | None) -> str:
        """For a terminal; `plan`: a row's stages, where they are known."""
        if self.interval is None or self.runs == "never":
            return self._passes()
        low, high = self.interval
        count = "" if plan is None else f" ({plan.guided_steps} of {plan.steps})"
        return (
            f"{self._passes()}; only at steps from noise levels {low:g} to {high:g}{count}, one pass at the "
            "others"
        )

    def _passes(self) -> str:
        if self.unprompted:
            return "a second transformer runs without the text: two passes a step"
        asked = self.argument if self.scale is None else f"{self.argument} {self.scale:g}"
        if self.runs == "never":
            return "no negative prompt runs: one pass of the transformer a step"
        if self.runs == "given":
            return (
                f"{asked} runs a negative prompt where a row has one, at two passes of the transformer a "
                "step; other rows take one"
            )
        return (
            f"{asked} runs a negative prompt (the pipeline's own where a row has none): two passes of the "
            f"transformer a step, about twice the time of {self.argument} {self.off:g}"
        )
