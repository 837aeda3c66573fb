"""What a part has kept of how its rows were made: settings, rows, and which of them went together. Runs none.

    part = StoredPart(store, key)
    part.spec(job), part.together(row_id), part.rows[row_id]

With the settings in the footer and the columns of a row, this is all that the row depends on, to the last
bit: which rows shared a chunk is in the footer's timings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from overtone.jobs.errors import SpecError
from overtone.jobs.parts import PartRow, Timing, part_format, read_footer, read_rows
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store

_NOWHERE = "-"
"""The paths of a spec that is used for its settings alone."""


@dataclass(frozen=True)
class Together:
    """How a row came through the stages: of each stage the chunks that it depends on, by row_ids."""

    batch: tuple[str, ...]
    """The rows whose prompts were encoded together."""
    chunks: tuple[tuple[tuple[str, ...], ...], ...]
    """[stages][chunks]; a chunk of a stage has rows of any chunk of the stage before."""


class StoredPart:
    """A part of a job, read once. VerifyError where it is broken."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self.key, self._format = store, key, part_format(key)
        with store.open(key) as file:
            self.footer = read_footer(file, self._format)
        self.rows: dict[str, PartRow] = {}
        """By row_id, without their pictures but for those that were asked for."""

    @property
    def keeps_negatives(self) -> bool:
        """Whether a row's negative prompt is in it."""
        return "negative_prompt" in self.footer.own_columns

    def read(self, places: Collection[int]) -> list[str]:
        """Read all rows, and the pictures of those at these places; returns their row_ids."""
        also = ("seed", "num_steps", *(("negative_prompt",) if self.keeps_negatives else ()))
        chosen = []
        with self._store.open(self.key) as file:
            for i, row in enumerate(read_rows(file, self.footer.kind, self._format, also=also)):
                self.rows[row.row_id] = row if i in places else replace(row, data=b"")
                if i in places:
                    chosen.append(row.row_id)
        return chosen

    def spec(self, job: JobSpec | None) -> JobSpec:
        """The settings that the part was made with, as a spec whose paths lead nowhere. Those of the job
        where the part is of an older version. SpecError where this version understands none."""
        kept, compute = self.footer.settings, self.footer.compute or {}
        if kept is None:
            if job is None:
                raise SpecError(f"{self.key} is of an older version, which kept no settings")
            return job
        model: dict[str, Any] = kept["model"] | {"offload": compute.get("offload", "none")}
        if job is not None:  # a part is data: what it says must not make a program run
            model["trust_remote_code"] = job.model.trust_remote_code
        workers = {name: compute[name] for name in ("threads", "compile") if name in compute}
        try:
            return JobSpec.model_validate(
                {
                    "model": model,
                    "prompts": {"path": _NOWHERE, "columns": kept["columns"], "keep": kept["keep"]},
                    "sampling": kept["sampling"],
                    # Of the output only the codec is needed; a tar has no place for what rows start from.
                    "output": kept["output"] | {"path": _NOWHERE, "format": "parquet"},
                    "seed": kept["seed"],
                    "workers": workers,
                }
            )
        except ValidationError as error:
            raise SpecError(f"the settings in {self.key} are of another version: {error}") from None

    def together(self, row_id: str) -> Together | None:
        """How a row was made. None: beside rows that are not in the part, or that is not known."""
        own = [line for line in self._denoised() if row_id in line.row_ids]
        batch = own[0].batch if own else None
        needed, chunks = {row_id}, list[tuple[tuple[str, ...], ...]]()
        for grid in reversed([(line.height, line.width) for line in own]):
            lines = [
                line.row_ids
                for line in self._denoised()
                if line.batch == batch and (line.height, line.width) == grid and needed & {*line.row_ids}
            ]
            chunks.insert(0, tuple(lines))
            needed = {name for names in lines for name in names}
        encoded = [t.row_ids for t in self.footer.timings if t.stage == "text_encode" and t.batch == batch]
        if not own or not needed <= self.rows.keys():
            return None
        names = [name for line in encoded for name in line if name in self.rows]
        return Together(tuple(dict.fromkeys(names)) or tuple(sorted(needed)), tuple(chunks))

    def repeats(self, row_id: str) -> bool:
        """Whether the row's prompt, or its negative prompt among others, is in several batches: it was
        encoded beside the texts of the first of them alone."""
        row, several = self.rows[row_id], len({one.negative_prompt for one in self.rows.values()}) > 1
        same = {
            name
            for name, one in self.rows.items()
            if one.prompt == row.prompt
            or (several and row.negative_prompt is not None and one.negative_prompt == row.negative_prompt)
        }
        return len({line.batch for line in self._denoised() if same & {*line.row_ids}}) > 1

    def _denoised(self) -> Iterator[Timing]:
        """The lines of denoising, in the order of time."""
        lines = (line for line in self.footer.timings if line.stage == "denoise" and line.batch is not None)
        return iter(sorted(lines, key=lambda line: line.start_s or 0.0))
