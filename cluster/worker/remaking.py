"""Some rows of a job made again from what is stored, and compared with what is there. Knows no driver.

    found = remake(store, 8, load_engine, job=spec)          # found.remarks(), found.wrong

A row depends on its settings, prompt and seed, and in its last bits on the processor, on the libraries, and
on the rows that it shared chunks with. So the same chunks are run again, and on the same kind of processor
with the same libraries the pixels must be the same. Where something differs that changes last bits, the
reason is said, and a row may differ by `TOLERANCE` levels in the mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from overtone.cluster.faults import first_line
from overtone.cluster.worker.protocol import Engine, compile_for, device_name
from overtone.cluster.worker.stored import StoredPart
from overtone.jobs.errors import StoreError, UserError, VerifyError
from overtone.jobs.media import decode_video, encode_media, still
from overtone.jobs.parts import Footer, PartRow, package_versions
from overtone.jobs.sampling import entry_of
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store
from overtone.jobs.words import counted

TOLERANCE = 4.0
"""Mean difference of a picture's pixels, in levels of 255, that last bits may make. Another seed or prompt
makes tens."""
_DECIDING = ("overtone", "torch", "diffusers", "transformers")
"""Packages whose version may change last bits."""


@dataclass
class Remade:
    """What became of the rows that were made again."""

    same: int = 0
    """To the pixel; where the codec has loss, to the byte."""
    close: int = 0
    """Within `TOLERANCE`, for one of `reasons`."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why last bits may differ, and for how many rows."""
    skipped: list[str] = field(default_factory=list)
    """Why rows were not made again."""
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    """(part, row_id, how it differs)"""

    def remarks(self) -> list[str]:
        """Lines for people, without what is wrong."""
        made = self.same + self.close + len(self.wrong)
        lines = [f"made {counted(made, 'row')} again: {self.same:,} the same to the last bit of the picture"]
        if self.close:
            lines[0] += f", {self.close:,} within a mean difference of {TOLERANCE:g} of 255 levels"
        lines += [f"  last bits may differ in {counted(n, 'row')}: {why}" for why, n in self.reasons.items()]
        return lines + [f"  not made again: {why}" for why in dict.fromkeys(self.skipped)]


def remake(
    store: Store,
    count: int,
    engine_factory: Callable[[JobSpec], Engine],
    *,
    job: JobSpec | None = None,
    negatives: bool = False,
) -> Remade:
    """Make `count` rows of the parts in a store again, spread over them by a fixed rule (`spread`).

    `engine_factory` loads the model, as for a worker. `job`: the spec, for what parts of older versions do
    not have; `negatives`: whether its prompts have negative ones. UserError where the model cannot be loaded.
    """
    found = Remade()
    engine: Engine | None = None
    for part, places in spread(store, count, found):
        if not places:
            continue
        if negatives and not part.keeps_negatives:
            found.skipped.append("rows of an older version, whose negative prompts were not kept")
            continue
        spec = part.spec(job)
        if spec.pictured:
            found.skipped.append("rows that start from pictures, which this check has no place for")
            continue
        if entry_of(spec) != (part.footer.settings or {}).get("entry", {}):
            found.skipped.append("rows of a family whose samples this version makes in another way")
            continue
        if engine is None:
            engine = _loaded(spec, engine_factory)
        for row_id in part.read(places):
            _remake(part, part.rows[row_id], spec, engine, found)
    return found


def spread(store: Store, count: int, found: Remade) -> Iterator[tuple[StoredPart, list[int]]]:
    """(a part, places of rows in it), parts in the order of their names.

    Of n rows, the k-th is at (k + 1/2) / n of all rows. Where there are more parts than n, it is at this
    share of the parts, and then of the rows of that part, so that few are opened.
    """
    keys = [info.key for info in store.list("data/") if info.key.endswith((".parquet", ".tar"))]
    if len(keys) <= count:
        parts = [part for key in keys if (part := _opened(store, key, found))]
        ends = list(accumulate(part.footer.rows for part in parts))
        total = ends[-1] if ends else 0
        chosen = min(count, total)
        rows = [(2 * k + 1) * total // (2 * chosen) for k in range(chosen)]
        for part, end in zip(parts, ends, strict=True):
            first = end - part.footer.rows
            yield part, [row - first for row in rows if first <= row < end]
        return
    for k in range(count):
        share = (k + 0.5) / count
        place = int(share * len(keys))
        opened = (_opened(store, key, found) for key in (*keys[place:], *keys[:place]))
        part = next((part for part in opened if part and part.footer.rows), None)
        if part is not None:
            yield part, [int(share * part.footer.rows)]


def _opened(store: Store, key: str, found: Remade) -> StoredPart | None:
    try:
        return StoredPart(store, key)
    except (VerifyError, StoreError) as error:
        found.skipped.append(f"rows of {key}: {error}")
        return None


def _loaded(spec: JobSpec, engine_factory: Callable[[JobSpec], Engine]) -> Engine:
    try:
        return engine_factory(spec)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"the model {spec.model.id} cannot be loaded here: {first_line(error)}") from error


def _remake(part: StoredPart, row: PartRow, spec: JobSpec, engine: Engine, found: Remade) -> None:
    """Make one row again, and note what came of it."""
    reasons = list(_reasons(part, row, engine))
    try:
        data = encode_media(_made(part, row, spec, engine), spec.output)
        distance = _distance(row.data, data, lossless=_lossless(spec, part.footer))
    except Exception as error:  # noqa: BLE001 - whatever it is, this row cannot be made as it was
        found.wrong.append((part.key, row.row_id, f"cannot be made again: {first_line(error)}"))
        return
    if distance == 0:
        found.same += 1
        return
    if reasons and distance <= TOLERANCE:
        found.close += 1
        found.reasons.update(reasons)
        return
    allowed = f"up to {TOLERANCE:g} could be, because {'; '.join(reasons)}" if reasons else "none should be"
    found.wrong.append(
        (
            part.key,
            row.row_id,
            f"made again it differs by {distance:.3g} of 255 levels in the mean, where {allowed}",
        )
    )


def _reasons(part: StoredPart, row: PartRow, engine: Engine) -> Iterator[str]:
    """Why the last bits of a row may not be the same here."""
    footer, here = part.footer, device_name(engine)
    if footer.device_name != here:
        where = footer.device_name or f"{footer.device}, which its part does not name further"
        yield f"made on {where}; this is {here}"
    now = package_versions()
    for name in _DECIDING:
        if footer.versions.get(name) != now.get(name):
            yield f"made with {name} {footer.versions.get(name)}; this is {now.get(name)}"
    if (footer.compute or {}).get("compile", "off") != "off":
        yield "made by compiled code, which is tuned anew on each machine"
    if part.together(row.row_id) is None:
        yield "made beside rows that are not in the part"
    elif part.repeats(row.row_id):
        yield "its prompt is in several batches, and was encoded for the first of them"


def _made(part: StoredPart, row: PartRow, spec: JobSpec, engine: Engine) -> Any:
    """The picture or video of a row, through the chunks that it went through; alone where they are not
    known."""
    plan = engine.plan(spec.sampling, height_px=row.height_px, width_px=row.width_px)
    together = part.together(row.row_id)
    alone = (((row.row_id,),),) * len(plan.stages)
    chunks, names = (together.chunks, together.batch) if together else (alone, (row.row_id,))
    if len(chunks) != len(plan.stages) or plan.num_steps != row.num_steps:
        raise ValueError(
            f"it went through {len(chunks)} stages and {row.num_steps} steps, and would through "
            f"{len(plan.stages)} and {plan.num_steps} now"
        )
    rows = [part.rows[name] for name in names]
    compile_for(engine, plan, max(len(chunk) for stage in chunks for chunk in stage), spec.sampling)
    encoded = engine.encode(
        [one.prompt for one in rows], [one.negative_prompt for one in rows], spec.sampling
    )
    trajectories = engine.begin(plan, encoded, [one.seed for one in rows], spec.sampling)
    for index, stage in enumerate(chunks):
        for chunk in stage:
            trajectories.run(index, [names.index(name) for name in chunk])
    [medium] = engine.decode(plan, trajectories.latents([names.index(row.row_id)]))
    return medium


def _lossless(spec: JobSpec, footer: Footer) -> bool:
    return footer.kind == "image" and (spec.output.image.codec == "png" or spec.output.image.lossless)


def _distance(stored: bytes, made: bytes, *, lossless: bool) -> float:
    """Mean difference in levels of 255: 0 only where the pixels are the same, or with a codec with loss the
    bytes. At least the smallest number above 0 where such bytes differ and their pixels do not."""
    if stored == made:
        return 0.0
    pixels = [_pixels(data) for data in (stored, made)]
    if pixels[0].shape != pixels[1].shape:
        raise ValueError(f"it has the shape {pixels[0].shape}, and would have {pixels[1].shape} now")
    distance = float(np.abs(pixels[0].astype(np.int16) - pixels[1]).mean())
    return distance if lossless else max(distance, np.finfo(float).tiny)


def _pixels(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3], or [T, H, W, 3] of a video."""
    return decode_video(data) if data[4:8] == b"ftyp" else np.asarray(still(data))
