"""Presets: what they stand for, and that a job with one is the job with its values written out."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from overtone.jobs.errors import SpecError
from overtone.jobs.plan import make_plan
from overtone.jobs.preview import preview
from overtone.jobs.spec import JobSpec, load_spec, with_overrides
from overtone.progressive import Sampling
from overtone.progressive.checkpoints import describe
from overtone.progressive.cost import step_cost
from overtone.progressive.families import FAMILIES
from overtone.progressive.presets import PRESETS, preset
from overtone.progressive.schedule import plan_sampling
from overtone.progressive.settings import PresetName

MODELS = {
    "tiny": "tiny",
    "flux1": "black-forest-labs/FLUX.1-dev",
    "flux2": "black-forest-labs/FLUX.2-dev",
    "qwen-image": "Qwen/Qwen-Image",
    "z-image": "Tongyi-MAI/Z-Image",
    "wan2.1": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}


@pytest.fixture
def written(tmp_path):
    pq.write_table(pa.table({"prompt": ["a large red circle"] * 3}), tmp_path / "prompts.parquet")

    def spec(sampling: str, model: str = "tiny") -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(
            f"model: {model}\nprompts: prompts.parquet\noutput: {tmp_path / 'out'}\nsampling: {sampling}\n"
        )
        return path

    return spec


@pytest.mark.parametrize("family", sorted(PRESETS))
def test_each_costs_less_than_the_one_before(family):
    """In full-size steps, and all but plain full resolution less than their own steps."""
    assert set(PRESETS[family]) == set(get_args(PresetName))
    checkpoint = describe(MODELS[family])
    costs = []
    for name in get_args(PresetName):
        sampling = Sampling(**preset(name, family).settings)
        size = FAMILIES[family].default_height, FAMILIES[family].default_width
        cost = step_cost(checkpoint.transformer_class, checkpoint.transformer, FAMILIES[family], sampling)
        sigmas = checkpoint.sigmas(sampling.num_steps, *size)
        made = plan_sampling(sampling, FAMILIES[family], sigmas, step_cost=cost)
        assert made.cost < made.steps or len(made.stages) == 1
        costs.append(made.cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[2] < costs[1] < costs[0]


@pytest.mark.parametrize("name", get_args(PresetName))
def test_a_job_with_a_preset_is_the_job_with_its_values_written_out(written, name):
    named = load_spec(written(f"{{preset: {name}, true_cfg_scale: 3}}"))
    values = ", ".join(f"{key}: {value}" for key, value in preset(name, "tiny").settings.items())
    spelled = load_spec(written(f"{{{values}, true_cfg_scale: 3}}"))
    assert named.samples() == spelled.samples()
    assert make_plan(named).fingerprint == make_plan(spelled).fingerprint
    assert named.to_json() == spelled.to_json()
    assert JobSpec.from_json(named.to_json()).sampling == spelled.sampling


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({"num_steps": 12}, {"num_steps": 12, "levels": 1}),
        ({"scales": "auto"}, {"scales": "auto", "levels": None}),
        ({"transition_sigmas": [0.7]}, {"levels": None, "transition_sigmas": (0.7,)}),
        ({"delta": 0.2}, {"delta": 0.2, "levels": 1}),
        ({"mode": "fullres"}, {"mode": "fullres", "levels": 1}),
    ],
)
def test_what_the_spec_says_itself_comes_first(written, own, kept):
    values = ", ".join(f"{key}: {value}" for key, value in own.items())
    spec = load_spec(written(f"{{preset: fast, {values}}}"))
    assert {key: getattr(spec.sampling, key) for key in kept} == kept
    shown = preview(spec)
    assert "the spec itself says otherwise of" in shown.text()


def test_plan_says_where_a_preset_is_from(written):
    spec = load_spec(written("{preset: balanced}", "black-forest-labs/FLUX.1-dev"))
    shown = preview(spec)
    source = preset("balanced", "flux1").source
    assert f"preset balanced: {source}\n" in shown.text()
    assert shown.as_dict()["preset"] == "balanced"
    assert shown.as_dict()["preset_source"] == source
    assert "not measured here" in source
    plain = preview(load_spec(written("{levels: 1}")))
    assert "\npreset " not in plain.text()
    assert plain.as_dict()["preset"] is None


def test_a_preset_given_on_the_command_line(written):
    spec = load_spec(written("{true_cfg_scale: 3}"), ["sampling.preset=fast"])
    assert spec.sampling.num_steps == preset("fast", "tiny").settings["num_steps"]
    with pytest.raises(SpecError, match="has all its settings already"):
        with_overrides(spec, ["sampling.preset=balanced"])


@pytest.mark.parametrize(
    ("sampling", "model", "message"),
    [
        ("{preset: quick}", "tiny", "'quick' is no preset; choose one of faithful, balanced, fast"),
        (
            "{preset: fast}",
            "stabilityai/stable-diffusion-3.5-large",
            "no presets for the family sd3, only for flux1, flux2, qwen-image, tiny, wan2.1, z-image",
        ),
        ("{preset: fast}", "someone/unheard-of", "no checkpoint known offline"),
        ("{preset: fast}", "black-forest-labs/FLUX.1-schnell", "is made for 4 steps"),
    ],
)
def test_what_has_no_preset_is_refused_in_a_sentence(written, sampling, model, message):
    with pytest.raises(SpecError, match=message) as refused:
        load_spec(written(sampling, model))
    assert "job.yaml:4" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_program_gives_the_values_themselves():
    with pytest.raises(ValueError, match="preset is filled in where a job spec is read"):
        Sampling(preset="fast", num_steps=6)
