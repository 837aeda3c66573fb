"""The table of published checkpoints against diffusers itself and against the published stage splits."""

from __future__ import annotations

import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.ideogram4 import pipeline_ideogram4 as ideogram

from overtone.progressive.checkpoints import Checkpoint, describe
from overtone.progressive.checkpoints.published import PUBLISHED
from overtone.progressive.families import FAMILIES
from overtone.progressive.schedule import plan_sampling
from overtone.progressive.settings import Sampling

FLUX1 = "black-forest-labs/FLUX.1-dev"
FLUX2 = "black-forest-labs/FLUX.2-klein-4B"
WAN = ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
Z_IMAGE = "Tongyi-MAI/Z-Image"
QWEN = "Qwen/Qwen-Image"

SQUARE = (1024, 1024, None)
VIDEO = (480, 832, 81)
# (model, (height px, width px, frames), steps, levels, delta, [(steps, grid) of each stage])
SPLITS = [
    (FLUX1, SQUARE, 50, 1, 0.01, [(18, (64, 64)), (32, (128, 128))]),
    (FLUX1, SQUARE, 50, 1, 0.05, [(28, (64, 64)), (22, (128, 128))]),
    (FLUX1, SQUARE, 50, 2, 0.01, [(10, (32, 32)), (8, (64, 64)), (32, (128, 128))]),
    (FLUX2, SQUARE, 30, 1, 0.05, [(18, (32, 32)), (12, (64, 64))]),
    (FLUX2, SQUARE, 30, 1, 0.10, [(20, (32, 32)), (10, (64, 64))]),
    *(
        (model, VIDEO, 50, 1, delta, [(coarse, (30, 52)), (50 - coarse, (60, 104))])
        for model in WAN
        for delta, coarse in ((0.01, 23), (0.02, 27), (0.05, 33), (0.10, 37))
    ),
    (Z_IMAGE, SQUARE, 50, 1, 0.01, [(26, (64, 64)), (24, (128, 128))]),
    # Published as 35 + 15 and 42 + 8, which no single schedule gives; the checkpoint's own gives these.
    (Z_IMAGE, SQUARE, 50, 1, 0.05, [(36, (64, 64)), (14, (128, 128))]),
    (Z_IMAGE, SQUARE, 50, 1, 0.10, [(39, (64, 64)), (11, (128, 128))]),
    (QWEN, SQUARE, 30, 1, 0.05, [(13, (64, 64)), (17, (128, 128))]),
    (QWEN, SQUARE, 30, 1, 0.10, [(16, (64, 64)), (14, (128, 128))]),
    (QWEN, SQUARE, 30, 1, 0.20, [(19, (64, 64)), (11, (128, 128))]),
]


@pytest.mark.parametrize(("model", "size", "num_steps", "levels", "delta", "split"), SPLITS)
def test_published_splits(model, size, num_steps, levels, delta, split):
    checkpoint = describe(model)
    if model in WAN:  # published for flow shift 5; the checkpoints themselves say 3
        checkpoint = checkpoint.with_scheduler(flow_shift=5.0)
    height, width, frames = size
    sigmas = checkpoint.sigmas(num_steps, height, width, frames)
    plan = plan_sampling(
        Sampling(levels=levels, delta=delta),
        FAMILIES[checkpoint.family],
        sigmas,
        height_px=height,
        width_px=width,
        num_frames=frames,
    )
    assert [(stage.steps, stage.grid) for stage in plan.stages] == split


@pytest.mark.parametrize(
    ("num_steps", "coarse"),
    [(20, {0.01: 6, 0.02: 7, 0.05: 9, 0.10: 11}), (48, {0.01: 12, 0.05: 21, 0.10: 26})],
)
def test_published_splits_of_ideogram_4(num_steps, coarse):
    """Published at 1024 px with the authors' presets, whose schedules differ in shape."""
    family = FAMILIES["ideogram4"]
    for delta, steps in coarse.items():
        sampling = Sampling(num_steps=num_steps, delta=delta, height=1024, width=1024)
        call = family.arguments(sampling, num_steps)
        assert len(call["guidance_schedule"]) == num_steps
        plan = plan_sampling(
            sampling, family, invented("Ideogram4Pipeline").sigmas(num_steps, 1024, 1024, call=call)
        )
        assert [(s.steps, s.grid) for s in plan.stages] == [(steps, (32, 32)), (num_steps - steps, (64, 64))]
    with pytest.raises(
        ValueError, match=r"num_steps is 30.* set num_steps to 12, 20 or 48, or give guidance"
    ):
        family.arguments(Sampling(), 30)


# --------------------------------------------------------------------------- against the pipelines themselves


class Stop(Exception):
    """Raised with the scheduler's sigmas once a pipeline has asked for its schedule."""


def stopping(scheduler_class):
    class Stopping(scheduler_class):
        def set_timesteps(self, *args, sigmas=None, mu=None, **kwargs):
            asked = {} if sigmas is None else {"sigmas": sigmas}
            if mu is not None:
                asked["mu"] = mu
            super().set_timesteps(*args, **asked, **kwargs)
            raise Stop(self.sigmas.tolist())

    return Stopping


TINY_TRANSFORMERS = {
    "FluxPipeline": {
        "num_layers": 0,
        "num_single_layers": 0,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "axes_dims_rope": (2, 2, 4),
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
    },
    "Flux2Pipeline": {
        "num_layers": 0,
        "num_single_layers": 0,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "axes_dims_rope": (2, 2, 2, 2),
        "joint_attention_dim": 8,
    },
    "QwenImagePipeline": {
        "num_layers": 0,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "axes_dims_rope": (2, 2, 4),
        "joint_attention_dim": 8,
    },
    "ZImagePipeline": {
        "dim": 64,
        "n_layers": 0,
        "n_refiner_layers": 0,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 8,
        "axes_dims": [8, 12, 12],
        "axes_lens": [64, 64, 64],
    },
    "WanPipeline": {"num_layers": 0, "num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 8},
    "StableDiffusion3Pipeline": {
        "num_layers": 0,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
        "joint_attention_dim": 8,
        "caption_projection_dim": 8,
        "pooled_projection_dim": 8,
    },
}
TINY_TRANSFORMERS["Flux2KleinPipeline"] = TINY_TRANSFORMERS["Flux2Pipeline"]
TEXT = torch.zeros(1, 4, 8)
CALLS = {
    "FluxPipeline": {"prompt_embeds": TEXT, "pooled_prompt_embeds": TEXT[:, 0]},
    "Flux2Pipeline": {"prompt_embeds": TEXT},
    "Flux2KleinPipeline": {"prompt_embeds": TEXT, "guidance_scale": 1.0},
    "QwenImagePipeline": {
        "prompt_embeds": TEXT,
        "prompt_embeds_mask": torch.ones(1, 4, dtype=torch.long),
        "true_cfg_scale": 1.0,
    },
    "ZImagePipeline": {"prompt_embeds": [TEXT[0]], "guidance_scale": 0.0},
    "WanPipeline": {"prompt_embeds": torch.zeros(1, 4, 4096), "guidance_scale": 1.0},
    "StableDiffusion3Pipeline": {
        "prompt_embeds": TEXT,
        "pooled_prompt_embeds": TEXT[:, 0],
        "guidance_scale": 0.0,
    },
}


def from_the_pipeline(checkpoint: Checkpoint, num_steps: int, height: int, width: int) -> list[float]:
    """The scheduler's sigmas when the real pipeline, called the usual way, has set them."""
    transformer = getattr(diffusers, checkpoint.transformer_class)(
        **TINY_TRANSFORMERS[checkpoint.pipeline_class]
    )
    scheduler_class = getattr(diffusers, checkpoint.scheduler_class)
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
    needed, _ = pipeline_class._get_signature_keys(pipeline_class)
    pipe = pipeline_class(
        **dict.fromkeys(needed)
        | {
            "scheduler": stopping(scheduler_class).from_config(checkpoint.scheduler),
            "transformer": transformer,
        }
    )
    with pytest.raises(Stop) as stop, warnings.catch_warnings(), torch.no_grad():
        pipe(height=height, width=width, num_inference_steps=num_steps, **CALLS[checkpoint.pipeline_class])
    return stop.value.args[0]


@pytest.mark.parametrize("model", [name for name, c in PUBLISHED.items() if c.pipeline_class in CALLS])
def test_sigmas_are_those_of_the_pipeline(model):
    checkpoint = describe(model)
    fewest = 2 if checkpoint.scheduler.get("shift_terminal") else 1
    for num_steps, height, width in ((50, 1024, 1024), (30, 512, 768), (4, 1536, 1024), (fewest, 256, 256)):
        ours = checkpoint.sigmas(num_steps, height, width)
        assert len(ours) == num_steps + 1
        assert ours[-1] == 0
        np.testing.assert_allclose(
            ours, from_the_pipeline(checkpoint, num_steps, height, width), rtol=0, atol=3e-7
        )


@pytest.mark.parametrize("num_steps", [2, 5, 50, 200])
def test_sigmas_of_pipelines_that_need_their_text_encoder(num_steps):
    euler = diffusers.FlowMatchEulerDiscreteScheduler
    for height, width in ((2048, 2048), (1024, 1536)):
        scheduler = euler(shift=1.7)
        mean = ideogram._resolution_aware_mu(height=height, width=width, base_mu=0.0)
        sigmas = ideogram._logit_normal_sigmas(num_steps, mean, std=1.5)
        scheduler.set_timesteps(sigmas=sigmas.tolist())
        ours = invented("Ideogram4Pipeline", scheduler={"shift": 1.7}).sigmas(num_steps, height, width)
        np.testing.assert_allclose(ours, scheduler.sigmas, rtol=0, atol=3e-7)

        checkpoint = describe("Qwen/Qwen-Image-2.1")
        scheduler = euler(**checkpoint.scheduler)
        mu = calculate_shift((height // 16) * (width // 16), 256, 8192, 0.5, 0.9)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
        ours = checkpoint.sigmas(num_steps, height, width)
        np.testing.assert_allclose(ours, scheduler.sigmas, rtol=0, atol=3e-7)


def invented(pipeline_class="SomePipeline", family="flux1", scheduler=None, pipeline=None, **fields):
    return Checkpoint(
        family=family,
        pipeline_class=pipeline_class,
        transformer_class="SomeTransformer",
        scheduler_class=fields.pop("scheduler_class", "FlowMatchEulerDiscreteScheduler"),
        transformer={},
        scheduler=scheduler or {},
        source="a test",
        pipeline=pipeline or {},
    )


@pytest.mark.parametrize(
    ("config", "mu"),
    [
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 0.7),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, 0.7),
        ({"shift": 2.5, "shift_terminal": 0.02}, None),
    ],
)
def test_other_scheduler_settings(config, mu):
    if mu is not None:  # the same mu at any size
        config = config | {"base_shift": mu, "max_shift": mu}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20), mu=mu)
    np.testing.assert_allclose(
        invented(scheduler=config).sigmas(20, 512, 512), scheduler.sigmas, rtol=0, atol=3e-7
    )


def test_sample_sigmas_of_a_distilled_checkpoint_fix_the_number_of_steps():
    own = [1.0, 0.9, 0.7, 0.4]
    checkpoint = invented("QwenImage21Pipeline", pipeline={"sample_sigmas": own})
    np.testing.assert_allclose(checkpoint.sigmas(4, 1024, 1024), [*own, 0], atol=1e-7)
    with pytest.raises(ValueError, match=r"num_steps is 50; this checkpoint is made for 4 steps"):
        checkpoint.sigmas(50, 1024, 1024)


@pytest.mark.parametrize(
    ("checkpoint", "num_steps", "message"),
    [
        (invented(), 0, "num_steps is 0; it must be at least 1"),
        (invented(scheduler={"use_beta_sigmas": True}), 4, "use_beta_sigmas"),
        (invented(scheduler_class="EulerDiscreteScheduler"), 4, "EulerDiscreteScheduler"),
        (invented(scheduler_class="UniPCMultistepScheduler"), 4, "flow matching"),
        (invented("WanPipeline", scheduler={"use_dynamic_shifting": True}), 4, "its pipeline does not"),
        (invented(scheduler={"shift_terminal": 0.02}), 1, "num_steps is 1; .* needs at least 2 steps"),
    ],
)
def test_a_schedule_that_is_not_known_is_refused(checkpoint, num_steps, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.sigmas(num_steps, 1024, 1024)


# ----------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_table_entry_builds_in_diffusers(model):
    checkpoint = describe(model)
    assert checkpoint.pipeline_class in FAMILIES[checkpoint.family].pipelines
    assert checkpoint.source.endswith(model)
    with torch.device("meta"):
        transformer = getattr(diffusers, checkpoint.transformer_class)(**checkpoint.transformer)
    getattr(diffusers, checkpoint.scheduler_class)(**checkpoint.scheduler)
    assert model not in PARAMETERS or sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(
        PARAMETERS[model], rel=0.04
    )


PARAMETERS = {  # billions, as the models are named or described by their authors
    FLUX1: 11.9,
    "black-forest-labs/FLUX.2-dev": 32.2,
    FLUX2: 3.88,
    "black-forest-labs/FLUX.2-klein-9B": 9.08,
    QWEN: 20.4,
    Z_IMAGE: 6.15,
    WAN[0]: 1.42,
    WAN[1]: 14.3,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 5.0,
    "stabilityai/stable-diffusion-3.5-large": 8.06,
}


# --------------------------------------------------------------------------------------------- local folders


@pytest.fixture
def folder(tmp_path):
    """A folder in diffusers format without weights."""

    def write(index=None, scheduler=None, transformer=None, *, without=()):
        files = {
            "model_index.json": {
                "_class_name": "FluxPipeline",
                "_diffusers_version": "0.42.1",
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                "transformer": ["diffusers", "FluxTransformer2DModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            }
            | (index or {}),
            "scheduler/scheduler_config.json": {"_class_name": "x", "shift": 3.0} | (scheduler or {}),
            "transformer/config.json": {"_class_name": "x", "num_layers": 2} | (transformer or {}),
        }
        for name, value in files.items():
            if name not in without:
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return tmp_path

    return write


def test_a_folder_is_read(folder):
    checkpoint = describe(str(folder({"some_switch": True, "image_encoder": [None, None]})))
    assert checkpoint.family == "flux1"
    assert checkpoint.transformer == {"num_layers": 2}
    assert checkpoint.scheduler == {"shift": 3.0}
    assert checkpoint.pipeline == {"some_switch": True}
    assert checkpoint.default_steps is None
    assert checkpoint.sigmas(2, 512, 512) == pytest.approx([1.0, 0.75, 0.0])


@pytest.mark.parametrize(
    ("values", "family"),
    [
        ({}, "wan2.1"),
        ({"boundary_ratio": None}, "wan2.1"),
        ({"boundary_ratio": 0.875}, "wan2.2"),
        ({"expand_timesteps": True}, "wan2.2-5b"),
    ],
)
def test_families_that_share_a_pipeline_class(folder, values, family):
    path = folder({"_class_name": "WanPipeline"} | values, {"use_flow_sigmas": True})
    assert describe(str(path)).family == family


def test_an_embedded_model_written_elsewhere_is_of_its_own_family(folder):
    path = folder()
    (path / "spectrum.json").write_text('{"amplitude": 8.6, "beta": 1.42}')
    assert describe(str(path)).family == "tiny"


def test_an_unknown_flow_matching_pipeline_is_generic(folder):
    assert describe(str(folder({"_class_name": "NewPipeline"}))).family == "generic"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            {"without": ["model_index.json"]},
            "model_index.json is missing",
        ),
        ({"without": ["scheduler/scheduler_config.json"]}, "scheduler_config.json is missing"),
        ({"index": {"transformer": [None, None]}}, "names no transformer"),
        ({"index": {"scheduler": ["diffusers", "DDIMScheduler"]}}, "DDIMScheduler that is not flow-matching"),
    ],
)
def test_a_folder_that_cannot_be_used(folder, make, message):
    with pytest.raises(ValueError, match=message):
        describe(str(folder(**make)))


def test_a_broken_file_is_named(folder):
    path = folder()
    (path / "transformer" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read: .*line 1"):
        describe(str(path))
    (path / "transformer" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json does not hold a JSON object"):
        describe(str(path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'some/model' is no checkpoint known offline; give `tiny`"
    ) as error:
        describe("some/model")
    assert all(name in str(error.value) for name in PUBLISHED)


def test_a_missing_folder_is_said_to_be_missing(tmp_path):
    with pytest.raises(ValueError, match=r"model_index.json is missing"):
        describe(str(tmp_path / "nothing"))


def test_the_embedded_model_is_described_as_its_own_family():
    checkpoint = describe("tiny")
    assert checkpoint.family == "tiny"
    assert checkpoint.pipeline_class == "FluxPipeline"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**checkpoint.scheduler)
    mu = calculate_shift(16 * 16)  # 256 px are 16 x 16 tokens; taken only where the scheduler asks for it
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 30, 30), mu=mu)
    np.testing.assert_allclose(checkpoint.sigmas(30, 256, 256), scheduler.sigmas, atol=3e-7)
