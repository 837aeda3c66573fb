"""Every pipeline of the installed diffusers that makes pictures or videos of text: what becomes of it here.

`python tests/test_progressive_classes.py` prints the table of progressive/README.md.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipes
import tiny_unknown
import tiny_zoo
import torch

from overtone.progressive import layouts, noise
from overtone.progressive.engine import Engine
from overtone.progressive.families import FAMILIES, conditioned
from overtone.progressive.pipelines import unfit
from overtone.progressive.settings import Sampling

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is not a family known here"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),  # a tiny model's parts of size 0
]

README = Path(__file__).parents[1] / "progressive" / "README.md"
BEGIN, END = "<!-- pipelines: begin -->\n", "<!-- pipelines: end -->"

GENERIC = "runs on the generic entry"
NOT_TRIED = "not tried: a trial decides when it is loaded"
_NO_FLOW = "refused: the scheduler is not a flow-matching one"
_INVERTED = "refused: the scheduler has inverted sigmas"
TRIED = {
    "OvisImagePipeline": GENERIC,
    "SanaPAGPipeline": GENERIC,
    "StableDiffusion3PAGPipeline": GENERIC,
    "LuminaPipeline": GENERIC,
    "EasyAnimatePipeline": GENERIC,
    "NucleusMoEImagePipeline": GENERIC,
    "PRXPipeline": GENERIC,
    "SanaVideoPipeline": GENERIC,
    "MotifVideoPipeline": f"{GENERIC} where ClassifierFreeGuidance guides it; refused with other guiders",
    "BriaFibo2Pipeline": GENERIC,
    "Cosmos2_5_PredictBasePipeline": GENERIC,
    "ZImageOmniPipeline": GENERIC,
    "HunyuanImagePipeline": f"{GENERIC} as distilled; refused with the guider that it has else",
    "SanaSprintPipeline": _NO_FLOW,
    "PixArtAlphaPipeline": _NO_FLOW,
    "PixArtSigmaPipeline": _NO_FLOW,
    "PixArtSigmaPAGPipeline": _NO_FLOW,
    "LattePipeline": _NO_FLOW,
    "AllegroPipeline": _NO_FLOW,
    "CogVideoXPipeline": _NO_FLOW,
    "CogView3PlusPipeline": _NO_FLOW,
    "MochiPipeline": _INVERTED,
    "OmniGenPipeline": _INVERTED,
    "SkyReelsV2DiffusionForcingPipeline": "refused: each frame has a noise level of its own",
    "Kandinsky5T2IPipeline": "refused: it makes a few sizes alone, and a picture is a video of one frame",
    "Cosmos2TextToImagePipeline": "refused: it takes a picture for a video of one frame",
    "BriaPipeline": "refused: it asks its scheduler for what flow-matching ones do not have",
    "Cosmos3OmniPipeline": "refused: nothing says how many channels its latents have",
    "HiDreamImagePipeline": "refused: it makes one area alone, whatever size it is asked for",
    "HunyuanImageRefinerPipeline": "refused: it refines a picture",
    "PRXPixelPipeline": "refused: it starts from more than unit noise",
}
"""What came of those that have no entry: each built with tiny random weights, and loaded."""
_CANNOT = "cannot run in stages .*"
_ENDS = f"{_CANNOT} trial of two steps ends with"
SENTENCES = {
    _NO_FLOW: "which is not a flow-matching one",
    _INVERTED: "inverted sigmas",
    TRIED["Kandinsky5T2IPipeline"]: f"{_ENDS} RuntimeError: cannot reshape",
    TRIED["Cosmos2TextToImagePipeline"]: rf"{_CANNOT} noise of the shape \(1, 4, 1, \d+, \d+\)",
    TRIED["SkyReelsV2DiffusionForcingPipeline"]: _ENDS,
    TRIED["BriaPipeline"]: f"{_ENDS} AttributeError: .* no attribute 'scale_model_input'",
    TRIED["Cosmos3OmniPipeline"]: "its transformer's configuration names no in_channels",
    TRIED["HiDreamImagePipeline"]: f"{_ENDS} ValueError: Unexpected latents shape",
    TRIED["HunyuanImageRefinerPipeline"]: f"{_ENDS} ValueError: .*its call also takes image",
    TRIED["PRXPixelPipeline"]: f"{_CANNOT} it starts from noise .* deviation of (1.9|2.0)",
}
"""Of the messages of those that are refused when they are loaded."""


def classes() -> Iterator[tuple[str, type]]:
    """The classes whose call makes samples of a size from a prompt; those for more than that are refused by
    name."""
    for name in sorted(dir(diffusers)):
        found = getattr(diffusers, name) if name.endswith("Pipeline") else None
        if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline):
            takes = inspect.signature(found.__call__).parameters.keys()
            if {"prompt", "height"} <= takes and not conditioned(name):
                yield name, found


def outcome(name: str, pipeline: type) -> str:
    entry = next((f.name for f in FAMILIES.values() if name in f.pipelines), None)
    if entry is not None:
        return "has an entry"
    init = inspect.signature(pipeline.__init__).parameters
    if why := unfit(pipeline, has_transformer="transformer" in init):
        return f"refused: {why}"
    if name in TRIED:
        return TRIED[name]
    scheduler: Any = init["scheduler"].annotation
    if isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin):
        takes = inspect.signature(scheduler.__init__).parameters
        if not scheduler.__name__.startswith("FlowMatch") and "use_flow_sigmas" not in takes:
            if scheduler is not diffusers.SchedulerMixin:
                return "refused: the scheduler is not a flow-matching one"
    return NOT_TRIED


def table() -> str:
    rows: dict[str, list[str]] = {}
    for name, pipeline in classes():
        rows.setdefault(outcome(name, pipeline), []).append(name.removesuffix("Pipeline"))
    first = ("has an entry", *sorted(one for one in rows if one.startswith(GENERIC)))
    order = [*first, *sorted(rows.keys() - {*first, NOT_TRIED}), *({NOT_TRIED} & rows.keys())]
    lines = [f"| {one} | {', '.join(rows[one])} |" for one in order]
    return "\n".join(["| what becomes of it | pipelines of diffusers |", "|---|---|", *lines]) + "\n"


def test_the_readmes_table_is_what_the_code_does():
    text = README.read_text()
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert shown.strip() == table().strip(), "paste what `python tests/test_progressive_classes.py` prints"


@pytest.mark.parametrize("name", tiny_unknown.BUILDERS)
def test_a_class_without_an_entry_runs_on_the_generic_one_or_is_refused_in_a_sentence(name):
    pipe = tiny_unknown.BUILDERS[name]()
    assert type(pipe).__name__ == name
    if not TRIED[name].startswith(GENERIC):
        with pytest.raises(ValueError, match=SENTENCES[TRIED[name]]) as caught:
            Engine(pipe)
        assert "\n" not in str(caught.value)
        return
    engine = Engine(pipe)
    assert engine.family.name == "generic"
    check_own_call(engine)
    check_rows(engine, random.Random(name))


def test_a_pipeline_that_casts_no_latents_is_given_them_in_the_dtype_of_its_own():
    engine = Engine(tiny_unknown.prx().to(torch.bfloat16))
    check_rows(engine, random.Random(0))
    sampling = Sampling(mode="fullres", num_steps=2, height=64, width=64)
    plan = engine.plan(sampling)
    latents, _ = engine.denoise(plan, engine.encode(["a ring"], [None], sampling), [1], sampling)
    assert latents.dtype == torch.bfloat16


def test_values_that_are_no_pixels_are_refused():
    with pytest.raises(ValueError, match=r"PRXPixelPipeline decodes to values from -\d.* to \d"):
        Engine(tiny_unknown.prx_pixel(noise_scale=1.0))


def test_a_pipeline_that_a_component_guides():
    """Refused where that remembers the steps before; else rows run their negative prompts."""
    with pytest.raises(ValueError, match="AdaptiveProjectedMixGuidance, guides by the step's number or by"):
        Engine(tiny_unknown.hunyuan_image(diffusers.AdaptiveProjectedMixGuidance()))
    engine = Engine(tiny_unknown.hunyuan_image(diffusers.ClassifierFreeGuidance(guidance_scale=3.0)))
    sampling = Sampling(mode="fullres", num_steps=2, height=64, width=64)
    plan = engine.plan(sampling)

    def made(negative: str | None) -> torch.Tensor:
        return engine.denoise(plan, engine.encode(["a ring"], [negative], sampling), [1], sampling)[0]

    assert torch.equal(made(None), made(""))
    assert not torch.allclose(made(None), made("green"))


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "name", [*tiny_zoo.BUILDERS, *(n for n, what in TRIED.items() if what.startswith(GENERIC))]
)
def test_rows_depend_on_themselves_alone_whatever_the_settings(name, seed):
    engine = Engine((tiny_zoo.BUILDERS | tiny_unknown.BUILDERS)[name]())
    check_rows(engine, random.Random(f"{name} {seed}"))


def check_own_call(engine: Engine) -> None:
    """Full resolution is the pipeline's own call with its own scheduler, bit for bit."""
    unit = engine.family.cell_px * engine.family.grid_multiple
    sampling = Sampling(mode="fullres", num_steps=3, height=4 * unit, width=6 * unit)
    plan = engine.plan(
        sampling, num_frames=engine.family.default_frames and engine.family.frames_per_latent + 1
    )
    ours, _ = engine.denoise(plan, engine.encode(["a ring"], [None], sampling), [1], sampling)
    grid = plan.stages[0].grid
    base = noise.batch_noise([1], noise.BASE, ours.shape[1:])
    call = {"prompt": ["a ring"], "latents": engine.call.pack(base)} | engine.family.call
    call |= engine.call.size(grid, plan.num_frames, plan.num_steps)
    if type(engine.pipe).__name__ == "EasyAnimatePipeline":
        call["negative_prompt"] = [""]  # it cannot do without
    assert torch.equal(layouts.unpack(engine.family, engine.pipe(**call)[0], *grid), ours)


def check_rows(engine: Engine, draw: random.Random) -> None:
    """Rows of drawn settings together are the rows alone, of the size asked for, finite and decoded."""
    family = engine.family
    unit = family.cell_px * family.grid_multiple
    fields: dict[str, Any] = {
        "mode": draw.choice(["dct", "dct_rewind", "dct_matched"]),
        "num_steps": draw.randint(3, 8),
        "height": draw.choice([4, 6, 8]) * unit,
        "width": draw.choice([4, 6, 8]) * unit,
        "transition_sigmas": (draw.choice([0.5, 0.7, 0.9]),),
        "noise": draw.choice(["coupled", "fresh"]),
    }
    if family.default_frames is not None:
        fields["num_frames"] = draw.choice([1, 1 + family.frames_per_latent])
    if family.guidance is not None and family.guidance[0] in engine.call.defaults and draw.random() < 0.5:
        least = 1.0 if type(engine.pipe).__name__.startswith("PRX") else 0.0  # it refuses less
        fields[family.guidance[0]] = draw.choice([least, 1.0, 2.5])
    if "max_sequence_length" in engine.call.defaults:
        fields["call_kwargs"] = {"max_sequence_length": 16}
    sampling = Sampling(**fields)
    plan = engine.plan(sampling)
    prompts = [*tiny_pipes.PROMPTS, draw.choice(tiny_pipes.PROMPTS)]
    negatives = [draw.choice([None, "green"]) for _ in prompts]
    seeds = [draw.randrange(2**40) for _ in prompts]
    encoded = engine.encode(prompts, negatives, sampling)
    sizes = [draw.randint(1, 3) for _ in plan.stages]
    together, _ = engine.denoise(plan, encoded, seeds, sampling, batch_sizes=sizes)
    assert together.shape[-2:] == plan.stages[-1].grid
    for row, seed in enumerate(seeds):
        alone, _ = engine.denoise(
            plan, engine.encode(prompts[row : row + 1], negatives[row : row + 1], sampling), [seed], sampling
        )
        assert torch.isfinite(alone).all()
        assert torch.allclose(alone[0], together[row], atol=1e-3, rtol=1e-3), (fields, negatives)
    made = engine.decode(plan, together[:1])[0]
    size = made.shape[1:3] if hasattr(made, "shape") else made.size[::-1]
    assert tuple(size) == (fields["height"], fields["width"])


if __name__ == "__main__":
    print(table(), end="")
