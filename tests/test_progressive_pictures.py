"""Rows that start from pictures: variations and inpainting by the plain pipelines, against diffusers' own
classes for them; and pictures of every kind as the engine takes them."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipes
import tiny_zoo
import torch
from PIL import Image

from overtone import progressive
from overtone.progressive import noise
from overtone.progressive.engine import Encoded, Engine
from overtone.progressive.engine.text import text_arguments
from overtone.progressive.families import FAMILIES, conditioned
from overtone.progressive.pictures import Pictures, upright
from overtone.progressive.schedule import plan_sampling, size_from
from overtone.progressive.settings import Sampling

SEEDS = [5, 2**40]
STEPS = 6
SIZE = (96, 128)
"""Width and height of all samples here."""
BUILDERS: dict[str, Callable[[], Any]] = {
    **{name: tiny_pipes.BUILDERS[name] for name in ("flux1", "flux2", "qwen-image", "z-image")},
    **{name: getattr(tiny_pipes, name) for name in ("sd3", "chroma", "ideogram4", "qwen_image_21")},
    **{
        name: getattr(tiny_zoo, name)
        for name in ("sana", "lumina2", "cogview4", "ernie_image", "krea2", "longcat_image", "aura_flow")
    },
}


@cache
def engine_of(family: str) -> Engine:
    pipe = BUILDERS[family]()
    if family == "qwen_image_21":
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=16,
            num_res_blocks=1,
            latents_mean=[0.1] * 16,
            latents_std=[1.5] * 16,
        )
        pipe.register_modules(vae=vae.eval().requires_grad_(False))
    return Engine(pipe)


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Coloured noise, coarse and fine."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size)
    fine = draw.integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + fine, 0, 255).astype(np.uint8))


def ring(size: tuple[int, int] = SIZE) -> Image.Image:
    """A mask whose edges fall on no cell's."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    distance = np.hypot(x - 0.45 * size[0], y - 0.55 * size[1])
    return Image.fromarray(((distance < 37) & (distance > 9)).astype(np.uint8) * 255)


def settings(engine: Engine, **fields: Any) -> Sampling:
    guidance = "true_cfg_scale" if engine.family.name in ("flux1", "qwen-image") else "guidance_scale"
    base: dict[str, Any] = {"num_steps": STEPS, "width": SIZE[0], "height": SIZE[1], guidance: 3.0}
    return Sampling(**(base | {"call_kwargs": {"max_sequence_length": 16}} | fields))


def run(engine: Engine, sampling: Sampling, pictures: list[Pictures | None], rows: slice = slice(2)) -> Any:
    """(plan, latents) of rows that start from pictures."""
    plan = engine.plan(sampling)
    encoded = engine.encode(tiny_pipes.PROMPTS[rows], ["a ring", "green"][rows], sampling, pictures=pictures)
    return plan, engine.denoise(plan, encoded, SEEDS[rows], sampling)[0]


# --------------------------------------------------------------------------------- against diffusers' classes


class MeanVae:
    """A VAE that is not sampled from."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def encode(self, pixels: torch.Tensor) -> Any:
        mode = self._vae.encode(pixels).latent_dist.mode()
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator: mode))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)


def own_call(cls: type, engine: Engine, sampling: Sampling, monkeypatch: Any, **given: Any) -> torch.Tensor:
    """diffusers' own class for it, with the row's noise and the VAE's mean."""
    parts = {name: part for name, part in engine.pipe.components.items() if part is not None}
    pipe = cls(**parts)
    pipe.__dict__["vae"] = MeanVae(parts["vae"])
    pipe.set_progress_bar_config(disable=True)
    grid = engine.plan(sampling).stages[-1].grid
    eps = noise.batch_noise(SEEDS[:1], noise.BASE, (engine.channels, *grid))
    monkeypatch.setattr(sys.modules[cls.__module__], "randn_tensor", lambda shape, **_: eps.reshape(shape))
    call = dict(sampling.call_kwargs) | {"height": sampling.height, "width": sampling.width}
    asked = engine.guidance(sampling) | {"strength": sampling.strength}  # the classes' defaults are others
    call |= {name: value for name, value in asked.items() if value is not None}
    text = text_arguments(engine.call, engine.encode(tiny_pipes.PROMPTS[:1], ["a ring"], sampling), sampling)
    return pipe(num_inference_steps=STEPS, output_type="latent", return_dict=False, **(call | text | given))[
        0
    ]


IMG2IMG = {
    "flux1": diffusers.FluxImg2ImgPipeline,
    "qwen-image": diffusers.QwenImageImg2ImgPipeline,
    "z-image": diffusers.ZImageImg2ImgPipeline,
}


@pytest.mark.parametrize("strength", [0.85, 0.5, 0.3])
@pytest.mark.parametrize("family", IMG2IMG)
def test_a_variation_is_the_librarys_image_to_image_bit_for_bit(family, strength, monkeypatch):
    engine = engine_of(family)
    sampling = settings(engine, mode="fullres", strength=strength)
    plan, latents = run(engine, sampling, [Pictures(picture(1))], slice(1))
    assert plan.start == plan.stages[0].first == {0.85: 0, 0.5: 3, 0.3: 4}[strength]
    own = own_call(IMG2IMG[family], engine, sampling, monkeypatch, image=picture(1))
    assert torch.equal(engine.call.pack(latents), own)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_is_flux_inpaint_bit_for_bit(strength, monkeypatch):
    engine = engine_of("flux1")
    sampling = settings(engine, mode="fullres", strength=strength)
    _, latents = run(engine, sampling, [Pictures(picture(1), ring())], slice(1))
    cls = diffusers.FluxInpaintPipeline
    own = own_call(cls, engine, sampling, monkeypatch, image=picture(1), mask_image=ring())
    assert torch.equal(engine.call.pack(latents), own)
    if strength == 1:  # a mask alone starts from noise
        alone = sampling.model_copy(update={"strength": None})
        assert torch.equal(run(engine, alone, [Pictures(picture(1), ring())], slice(1))[1], latents)


@pytest.mark.parametrize("family", BUILDERS)
def test_a_familys_pipeline_decodes_what_is_encoded_here(family):
    """Kept by masks that let one corner or the other change, a picture is decoded to what its VAE alone makes
    of it."""
    engine = engine_of(family)
    unit = 4 * engine.family.cell_px * engine.family.grid_multiple
    given = picture(3, (2 * unit, unit))
    sampling = Sampling(num_steps=12, height=unit, width=2 * unit, mode="fullres")
    plan = engine.plan(sampling)
    if family == "qwen_image_21":  # it has no text encoder here
        encoded = Encoded(({"prompt_embeds": torch.randn(5, 8)},), (None,))
    else:
        encoded = engine.encode(["a ring"], [None], sampling)
    kept = []
    for corner in ((0, 0), (2 * unit - unit // 4, unit - unit // 4)):
        mask = Image.new("L", given.size)
        mask.paste(255, (*corner, corner[0] + unit // 4, corner[1] + unit // 4))
        start = replace(encoded, pictures=(Pictures(given, mask),))
        kept.append(engine.denoise(plan, start, SEEDS[:1], sampling)[0])
    latents = kept[0].clone()
    half = latents.shape[-1] // 2
    latents[..., :half] = kept[1][..., :half]
    ours = np.asarray(engine.decode(plan, latents)[0].convert("RGB"), dtype=int)
    pixels = torch.from_numpy(np.asarray(given) / np.float32(127.5) - 1).movedim(-1, 0)[None]
    vae = engine.pipe.vae
    if vae.config.get("in_channels", 3) == 4:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    video = "temperal_downsample" in vae.config
    with torch.no_grad():
        coded = vae.encode(pixels.unsqueeze(2) if video else pixels)
        coded = coded.latent_dist.mode() if hasattr(coded, "latent_dist") else coded.latent
        own = vae.decode(coded, return_dict=False)[0]
    own = (own[:, :3, 0] if video else own[:, :3]).clamp(-1, 1)[0].movedim(0, -1)
    own = ((own / 2 + 0.5) * 255).round().numpy().astype(int)
    assert own.std() > 5
    assert np.abs(ours - own).max() <= 1


# ----------------------------------------------------------------------------------------------- in stages


@pytest.mark.parametrize(
    ("family", "mode"),
    [("flux1", "dct"), ("flux1", "dct_rewind"), ("flux1", "dct_matched"), ("flux2", "dct_rewind")],
)
def test_what_a_mask_keeps_is_the_picture_in_every_mode(family, mode):
    engine = engine_of(family)
    sampling = settings(engine, mode=mode, transition_sigmas=(0.7,))
    whole = settings(engine, mode="fullres", strength=1e-3)  # a last step from next to no noise
    pictures = [Pictures(picture(1), ring()), Pictures(picture(2), ring())]
    plan, latents = run(engine, sampling, pictures)
    assert len(plan.stages) == 2
    black = [Pictures(one.image, Image.new("L", SIZE)) for one in pictures]
    for one in black:  # a pixel of white, for a mask must have some
        one.mask.paste(255, (0, 0, 16, 16))
    kept = run(engine, whole, black)[1]
    cells = (plan.stages[-1].height * engine.family.subcells, plan.stages[-1].width * engine.family.subcells)
    white = np.asarray(ring())[:: SIZE[1] // cells[0], :: SIZE[0] // cells[1]] > 127
    planes = progressive.spectral.unpatchify(latents, engine.family.subcells)
    same = progressive.spectral.unpatchify(kept, engine.family.subcells)
    outside = torch.from_numpy(~white)
    outside[:4, :4] = False
    assert torch.equal(planes[..., outside], same[..., outside])
    assert (planes - same)[..., torch.from_numpy(white)].abs().mean() > 0.1


def test_a_cut_of_a_variation_with_a_mask_changes_no_bit():
    engine = engine_of("flux1")
    sampling = settings(engine, mode="fullres", strength=0.9)
    pictures = [Pictures(picture(1), ring()), Pictures(picture(2))]
    plan, whole = run(engine, sampling, pictures)
    (stage,) = plan.stages
    assert stage.first == 0  # of six steps
    encoded = engine.encode(tiny_pipes.PROMPTS, ["a ring", "green"], sampling, pictures=pictures)
    for cut in (1, 3, 5):
        parts = tuple(stage.cut(*ends) for ends in ((0, cut), (cut, STEPS)))
        latents, _ = engine.denoise(replace(plan, stages=parts), encoded, SEEDS, sampling)
        assert torch.equal(latents, whole), f"cut at step {cut}"


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *(("flux1", mode) for mode in ("fullres", "dct", "dct_rewind", "dct_matched")),
        ("flux2", "dct_rewind"),
        ("qwen-image", "fullres"),
        ("z-image", "dct_matched"),
    ],
)
def test_rows_with_different_pictures_together_as_one_by_one(family, mode):
    engine = engine_of(family)
    coarse = {} if mode == "fullres" else {"transition_sigmas": (0.5,)}
    sampling = settings(engine, mode=mode, strength=0.8, **coarse)
    pictures = [Pictures(picture(1)), Pictures(picture(2), ring())]
    plan, both = run(engine, sampling, pictures)
    assert plan.stages[0].first == plan.start == 1
    assert len(plan.stages) == (1 if mode == "fullres" else 2)
    for row in range(2):
        alone = run(engine, sampling, pictures[row : row + 1], slice(row, row + 1))[1]
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-4)
    assert (both[0] - both[1]).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("mode", "noise"),
    [
        *((mode, "coupled") for mode in ("fullres", "dct", "dct_rewind", "dct_matched")),
        ("dct_matched", "fresh"),
    ],
)
def test_from_noise_alone_a_picture_changes_no_bit(mode, noise):
    """Strength 1, and a row without a picture beside one that has a mask."""
    engine = engine_of("flux1")
    coarse = {} if mode == "fullres" else {"transition_sigmas": (0.8,), "noise": noise}
    sampling = settings(engine, mode=mode, **coarse)
    text = run(engine, sampling, [None, None])[1]
    full = sampling.model_copy(update={"strength": 1.0})
    assert torch.equal(run(engine, full, [Pictures(picture(1)), Pictures(picture(2))])[1], text)
    beside = run(engine, sampling, [Pictures(picture(1), ring()), None])[1]
    assert torch.equal(beside[1], text[1])
    assert not torch.equal(beside[0], text[0])


@pytest.mark.parametrize("fields", [{"noise": "fresh"}, {"transform": "haar"}, {"transform": "fft"}])
@pytest.mark.parametrize("mode", ["dct_rewind", "dct_matched"])
def test_variations_with_every_transform_and_fresh_noise(mode, fields):
    engine = engine_of("flux1")
    sampling = settings(engine, mode=mode, strength=0.9, transition_sigmas=(0.6,), **fields)
    sampling = sampling.model_copy(update={"height": 128, "width": 128})
    plan, latents = run(engine, sampling, [Pictures(picture(1)), Pictures(picture(2))])
    assert len(plan.stages) == 2
    assert torch.isfinite(latents).all()


def test_a_picture_is_encoded_once_for_all_its_rows_and_stages():
    engine, count = engine_of("flux1"), 0
    sampling = settings(engine, strength=0.9, transition_sigmas=(0.6,))
    one = Pictures(picture(1), ring())

    def counted(module: Any, args: Any) -> None:
        nonlocal count
        count += 1

    handle = engine.pipe.vae.encoder.register_forward_pre_hook(counted)
    try:
        run(engine, sampling, [one, one])
    finally:
        handle.remove()
    assert count == 1


def test_the_plan_begins_where_the_variation_does_and_counts_its_steps_alone():
    family, sigmas = FAMILIES["flux1"], np.linspace(1, 0, 51).tolist()
    plans = {s: plan_sampling(Sampling(scales="auto", strength=s), family, sigmas) for s in (1.0, 0.9, 0.5)}
    whole = plan_sampling(Sampling(scales="auto"), family, sigmas)
    assert plans[1.0].stages == whole.stages
    assert plans[1.0].cost == whole.cost
    assert [plan.start for plan in plans.values()] == [0, 5, 25]
    assert [plan.steps for plan in plans.values()] == [50, 45, 25]
    assert all(plan.stages[0].first == plan.start for plan in plans.values())
    assert plans[0.5].cost < plans[0.9].cost < whole.cost
    fullres = plan_sampling(Sampling(mode="fullres", strength=0.5), family, sigmas)
    assert fullres.cost == pytest.approx(25)
    assert fullres.saving == pytest.approx(1)


def test_the_ladder_of_a_variation_is_the_best_from_its_first_step():
    """No ladder of the same rungs is cheaper; the one that is best from noise may be."""
    family, sigmas = FAMILIES["flux1"], np.linspace(1, 0, 51).tolist()
    for strength in (0.9, 0.8):
        few = Sampling(scales="auto", strength=strength, max_rungs=2, delta=0.2)
        best = plan_sampling(few, family, sigmas)
        grids = [s / 128 for s in range(32, 128, 2)]
        others = [
            plan_sampling(Sampling(scales=(s, 1.0), strength=strength, delta=0.2), family, sigmas)
            for s in grids
        ]
        assert best.token_steps <= 1.02 * min(other.token_steps for other in others)


# ------------------------------------------------------------------------------------------------ one call


def test_generate_makes_variations_of_the_pictures_size_and_inpaints():
    pipe = engine_of("flux1").pipe
    given: dict[str, Any] = {"seeds": SEEDS, "num_steps": 4, "call_kwargs": {"max_sequence_length": 16}}
    images = [picture(1, (192, 128)), picture(2, (192, 128))]
    made = progressive.generate(pipe, tiny_pipes.PROMPTS, images=images, strength=0.8, batch_size=1, **given)
    assert [one.size for one in made.images] == [(192, 128)] * 2
    assert made.plan.start == 0
    mask = ring((192, 128))
    filled = progressive.generate(pipe, tiny_pipes.PROMPTS, images=images[0], masks=mask, **given)
    assert [one.size for one in filled.images] == [(192, 128)] * 2
    smaller = progressive.generate(
        pipe, "a ring", images=images[0], strength=0.5, height=64, width=64, num_steps=4, decode=False
    )
    assert (smaller.plan.height_px, smaller.plan.width_px, smaller.plan.start) == (64, 64, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"images": picture(1)}, "row 0 has no mask, and `strength` is not set"),
        ({"masks": ring()}, "row 0 has a mask and no picture"),
        ({"strength": 0.5}, "row 0 has no picture, and `strength`"),
        ({"images": [picture(1), None], "strength": 0.5}, "2 images for 1 prompts"),
        ({"images": picture(1), "masks": ring((64, 96))}, "sides must be in the same ratio"),
        ({"images": picture(1), "masks": Image.new("L", SIZE)}, "black in all 16x12 cells"),
        ({"images": "a.png", "strength": 0.5}, "5 images for 1 prompts"),
        ({"images": ["a.png"], "strength": 0.5}, "a picture is a str; give one of PIL's"),
    ],
)
def test_what_no_sample_can_start_from_is_refused(call, message):
    given = {"num_steps": 4, "height": SIZE[1], "width": SIZE[0]}
    with pytest.raises(ValueError, match=message):
        progressive.generate(engine_of("flux1").pipe, "a ring", seeds=1, **(given | call))


def test_videos_and_unknown_pipelines_start_from_no_picture():
    with pytest.raises(ValueError, match=r"wan2\.1 cannot start from a picture: it makes videos"):
        FAMILIES["wan2.1"].check_pictures()
    with pytest.raises(ValueError, match="generic cannot start from a picture"):
        FAMILIES["generic"].check_pictures()
    engine = Engine(tiny_pipes.wan())
    with pytest.raises(ValueError, match="it makes videos"):
        engine.plan(Sampling(strength=0.5))


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_a_class_that_starts_from_pictures_by_itself_is_told_of_the_plain_one(name):
    assert "`sampling.strength`" in conditioned(name)
    assert "text-to-image pipeline" in conditioned(name)
    pipe = engine_of("flux1").pipe
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    with pytest.raises(ValueError, match=r"`sampling\.strength`"):
        Engine(getattr(diffusers, name)(**parts))


# -------------------------------------------------------------------------------------------------- pixels


def through_file(image: Image.Image, kind: str, **how: Any) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return Image.open(file)


def test_pictures_of_every_kind_become_rgb_of_8_bits():
    plain = picture(4, (40, 24))
    levels = np.asarray(plain.convert("L"))
    deep = through_file(Image.fromarray(levels.astype(np.uint16) * 257), "PNG")
    assert deep.mode.startswith("I")
    assert np.array_equal(np.asarray(upright(deep))[..., 0], levels)
    assert upright(through_file(plain.convert("CMYK"), "TIFF")).mode == "RGB"
    assert np.abs(np.asarray(upright(plain.convert("CMYK")), int) - np.asarray(plain, int)).mean() < 3
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = upright(through_file(plain, "PNG", exif=exif))
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(plain), -1))
    hidden = plain.convert("RGBA")
    hidden.putalpha(0)
    assert np.asarray(upright(through_file(hidden, "PNG"))).min() == 255
    frames = through_file(plain, "GIF", save_all=True, append_images=[Image.new("RGB", plain.size)])
    assert np.abs(np.asarray(upright(frames), int) - np.asarray(plain, int)).mean() < 12
    with pytest.raises(ValueError, match="holds fractions"):
        upright(Image.fromarray(np.zeros((4, 4), np.float32)))


def test_a_picture_of_another_ratio_is_cut_padded_or_stretched():
    wide = Image.new("RGB", (200, 100), (255, 0, 0))
    wide.paste((0, 0, 255), (50, 0, 150, 100))
    both = Pictures(wide, Image.new("L", (100, 50)))
    cover = both.fitted(64, 64)
    assert np.asarray(cover.image).reshape(-1, 3).mean(0) == pytest.approx((0, 0, 255), abs=4)
    pad = both.fitted(64, 64, "pad")
    assert pad.image.getpixel((32, 2)) == (127, 127, 127)
    assert (pad.mask.getpixel((32, 2)), pad.mask.getpixel((32, 32))) == (255, 0)
    stretch = both.fitted(64, 64, "stretch")
    assert stretch.image.getpixel((4, 32)) == (255, 0, 0)
    assert stretch.image.getpixel((32, 32)) == (0, 0, 255)
    assert {one.image.size for one in (cover, pad, stretch)} == {(64, 64)}
    assert cover.fitted(64, 64) is cover


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ((1024, 1024), (1024, 1024)),
        ((4000, 3000), (1152, 896)),
        ((600, 400), (576, 384)),
        ((1000, 10), (1024, 64)),
        ((30, 30), (64, 64)),
    ],
)
def test_the_size_that_follows_from_a_picture(given, made):
    """The family's usual area or less, in steps of 64 px."""
    assert size_from(FAMILIES["flux1"], *given) == made
