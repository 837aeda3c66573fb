"""Quality: scorers and what they may not do, distances between sets, and how sure a difference is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFilter
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image.fid import FrechetInceptionDistance

from overtone.progressive.errors import ScorerError
from overtone.progressive.scoring import (
    features_of_rows,
    frechet_distance,
    named,
    paired_difference,
    paired_distance_difference,
    score_rows,
)
from overtone.progressive.tiny import world

SCENES = [world.scene(seed) for seed in world.HELD_OUT_SEEDS[:8]]
CAPTIONS = [world.caption(scene) for scene in SCENES]
NOT_A_FUNCTION = 3


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.fromarray(world.render(scene)) for scene in SCENES]


def flat(level: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (level, level, level))


# ------------------------------------------------------------------------------ functions of a user


def brightness(pictures, prompts):
    """A scorer: mean level; the prompt may ask it to misbehave."""
    if "raise" in prompts:
        raise RuntimeError("cannot read this prompt")
    if len(prompts) > 1 and "alone" in prompts:
        raise RuntimeError("one at a time")
    levels = [float(np.asarray(one).mean()) for one in pictures]
    levels = [
        float("nan") if prompt == "nan" else level for level, prompt in zip(levels, prompts, strict=True)
    ]
    return torch.tensor(levels[1:] if "short" in prompts else levels, dtype=torch.float64)


def means(pictures):
    """An encoder: the mean colour."""
    return torch.tensor(np.stack([np.asarray(one).mean((0, 1)) for one in pictures]))


def nested(pictures, prompts):
    return [[1.0] for _ in pictures]


NAME = f"{__name__}:brightness"


def test_a_function_scores_rows_in_their_order():
    found = score_rows(named(NAME), [flat(3), flat(7), flat(5)], ["", "", ""])
    assert found.dtype == np.float64
    assert found.tolist() == [3, 7, 5]


def test_a_video_has_the_mean_of_its_frames_and_beside_it_a_picture_its_own():
    video = np.stack([np.full((64, 64, 3), level, np.uint8) for level in range(0, 200, 10)])
    found = score_rows(named(NAME), [video, flat(3), video[0]], ["", "", ""])
    assert found.tolist() == pytest.approx([95, 3, 0], abs=3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("raise", r"brightness', row b: RuntimeError: cannot read this prompt"),
        ("alone", r"brightness', rows a to c together: RuntimeError: one at a time"),
        ("nan", r"brightness' gave NaN or infinity for row b"),
        ("short", r"brightness' gave 2 values for 3 pictures, rows a to c; it must give one a picture"),
    ],
)
def test_a_scorer_that_misbehaves_is_named_and_so_is_the_row(prompt, message):
    with pytest.raises(ScorerError, match=message):
        score_rows(named(NAME), [flat(1), flat(2), flat(3)], ["", prompt, ""], row_ids=["a", "b", "c"])


def test_numbers_in_lists_are_not_one_number_a_picture():
    with pytest.raises(ScorerError, match=r"row 0: TypeError: it must return a flat list"):
        score_rows(named(f"{__name__}:nested"), [flat(1)], [""])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beauty", "no scorer is named 'beauty'; there are judge, things, clip,"),
        ("", "no scorer is named ''"),
        ("frechet", "no scorer is named 'frechet'"),
        ("no_such_module:score", r"there is no module 'no_such_module' \(PYTHONPATH=\. adds this folder\)"),
        (f"{__name__}:beauty", "has no 'beauty'"),
        (f"{__name__}:NOT_A_FUNCTION", "'NOT_A_FUNCTION' is no function, but int"),
        ("frechet:no_such_module:encode", "there is no module 'no_such_module'"),
        ("clip:/no/such/folder", "no CLIP weights at '/no/such/folder'"),
        ("frechet:clip:/no/such/folder", "no CLIP weights at '/no/such/folder'"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(name, message):
    with pytest.raises(ScorerError, match=message) as caught:
        named(name)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------- the judge


def test_the_judge_gives_exact_pictures_all_points_and_worse_ones_fewer(pictures):
    judge, things = named("judge"), named("things")
    few, prompts = pictures[:2], CAPTIONS[:2]
    blurred = [one.filter(ImageFilter.GaussianBlur(3)) for one in few]
    assert score_rows(judge, few, prompts).tolist() == score_rows(things, few, prompts).tolist() == [100] * 2
    assert (score_rows(judge, blurred, prompts) < 95).all()
    assert (score_rows(things, pictures[4:6], prompts) < 100).any()


@pytest.mark.parametrize("name", ["judge", "things"])
def test_the_judge_refuses_other_models_before_anything_is_drawn(name):
    judge = named(name)
    judge.check(CAPTIONS, [(256, 256)])
    with pytest.raises(ScorerError, match="is for the embedded model: caption is 'a cat'"):
        judge.check(["a cat"], [(256, 256)])
    with pytest.raises(ScorerError, match="reads 256x256 px, not 256x512"):
        judge.check(CAPTIONS, [(256, 512)])
    with pytest.raises(ScorerError, match="row 7: ValueError: caption is 'a cat'"):
        score_rows(judge, [flat(1).resize((256, 256))], ["a cat"], row_ids=["7"])


# -------------------------------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, as transformers saves one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = {word: k for k, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {
        "vocab_size": len(words),
        "max_position_embeddings": 24,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    vision = size | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.text_projection.weight.data.neg_()  # or every cosine would be below 0, and every score 0
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def library_clip_score(folder: Path, picture: Image.Image, prompt: str) -> float:
    """torchmetrics' own, given features as it expects them, tensors."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)

    def tensors(encode):
        return lambda *inputs: getattr(encode(*inputs), "pooler_output", None)

    plain = SimpleNamespace(
        config=model.config,
        to=lambda device: plain,
        get_image_features=tensors(model.get_image_features),
        get_text_features=tensors(model.get_text_features),
    )
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return float(clip_score(pixels, prompt, lambda: (plain, processor)).detach())


def test_clip_scores_are_the_librarys(clip_folder, pictures):
    scorer = named(f"clip:{clip_folder}")
    prompts = ["a red ring", "blue", *CAPTIONS[2:8]]
    found = score_rows(scorer, pictures, prompts)
    assert scorer.needs_prompt
    for picture, prompt, value in list(zip(pictures, prompts, found, strict=True))[:2]:
        assert value == pytest.approx(library_clip_score(clip_folder, picture, prompt), abs=1e-3)
        assert value == pytest.approx(
            score_rows(scorer, [picture], [prompt])[0], abs=1e-4
        )  # padding is masked
    assert len(set(found.round(4))) > 1
    assert ((found > 0) & (found <= 100)).all()


def test_distances_of_clip_features_tell_sets_apart(clip_folder, pictures):
    distance = named(f"frechet:clip:{clip_folder}")
    features = features_of_rows(distance, pictures)
    blurred = features_of_rows(distance, [one.filter(ImageFilter.GaussianBlur(9)) for one in pictures])
    assert features.shape == (8, 8)
    assert distance.distance(features, features[::-1]) == pytest.approx(0, abs=1e-9)
    assert distance.distance(blurred, features) > 1e-4


# --------------------------------------------------------------------------- distances between sets


def test_the_frechet_distance_is_the_librarys():
    class Itself(torch.nn.Module):
        num_features = 6

        def forward(self, features):
            return features

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)) + 1
    library = FrechetInceptionDistance(feature=Itself(), normalize=True).set_dtype(torch.float64)
    library.update(torch.from_numpy(a), real=True)
    library.update(torch.from_numpy(b), real=False)
    assert frechet_distance(a, b) == pytest.approx(float(library.compute()), rel=1e-6)


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 12))
def test_the_frechet_distance_of_moved_and_stretched_features_is_known(seed, rows, width):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, width))
    moved = features + 3.0
    total = float(features.var(axis=0, ddof=1).sum())
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    stretched = features.mean(axis=0) + 2 * (features - features.mean(axis=0))
    assert frechet_distance(features, rng.permutation(features)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(moved, features) == pytest.approx(9 * width)
    assert frechet_distance(stretched, features) == pytest.approx(total)  # (2 - 1)^2 tr(S)
    other = rng.normal(size=(rows + 3, width))
    there, back = frechet_distance(features, other), frechet_distance(other, features)
    assert there == pytest.approx(back)
    assert there == pytest.approx(frechet_distance(features @ turn, other @ turn))


def test_sets_that_cannot_be_compared_are_refused():
    one, two = np.zeros((1, 3)), np.zeros((2, 3))
    for distance in (frechet_distance, named("spectrum").distance):
        with pytest.raises(ValueError, match="needs two pictures"):
            distance(one, two)
        with pytest.raises(ValueError, match="different encoders"):
            distance(two, np.zeros((2, 4)))


def test_the_spectrum_knows_blur_noise_and_tint_and_grows_with_them(pictures):
    spectrum = named("spectrum")
    reference = features_of_rows(spectrum, pictures)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(256, 256, 3))

    def noised(one, amount):
        return np.clip(np.asarray(one) + amount * noise, 0, 255).astype(np.uint8)

    damages = {
        "blur": lambda one, amount: one.filter(ImageFilter.GaussianBlur(amount)),
        "noise": lambda one, amount: noised(one, 3 * amount),
        "tint": lambda one, amount: Image.blend(one, Image.new("RGB", one.size, "blue"), amount / 20),
    }
    assert reference.shape == (8, 16)
    assert spectrum.distance(reference, reference) == 0
    for damage in damages.values():
        found = [
            spectrum.distance(features_of_rows(spectrum, [damage(one, k) for one in pictures]), reference)
            for k in (1, 2, 5)
        ]
        assert 0.01 < found[0] < found[1] < found[2]


def test_the_spectrum_finds_a_wave_in_its_band():
    spectrum = named("spectrum")
    x = np.arange(128)
    for cycles, band in ((60, 0), (40, 1), (30, 2), (3, 8)):
        wave = 128 + 60 * np.cos(np.pi * cycles * 2 * (x + 0.5) / 128)
        picture = np.repeat(np.repeat(wave[None, :, None], 128, 0), 3, 2).round().astype(np.uint8)
        bands = features_of_rows(spectrum, [picture])[0, :10]
        assert bands.argmax() == band
        assert bands[band] == pytest.approx(10 * np.log10(60**2 / 2), abs=0.1)


def test_the_spectrum_refuses_what_is_too_small():
    with pytest.raises(
        ScorerError, match=r"'spectrum', row 0: ValueError: a picture of 64x63 px is too small"
    ):
        features_of_rows(named("spectrum"), [Image.new("RGB", (63, 64))])


# ------------------------------------------------------------------------------- how sure it is

SCORES = arrays.arrays(np.float64, st.integers(2, 40), elements=st.floats(-100, 100, width=32))


@given(SCORES, st.floats(-50, 50), st.integers(0, 99))
def test_a_difference_is_the_mean_and_its_interval_mirrors_moves_and_grows(scores, shift, seed):
    others = scores[::-1].copy()
    found = paired_difference(scores, others, seed=seed, resamples=100)
    assert found.mean == pytest.approx((scores - others).mean(), abs=1e-9)
    assert found.rows == len(scores)
    assert found.low <= found.high
    assert found == paired_difference(scores, others, seed=seed, resamples=100)
    mirrored = paired_difference(others, scores, seed=seed, resamples=100)
    assert [mirrored.low, mirrored.high] == pytest.approx([-found.high, -found.low], abs=1e-9)
    moved = paired_difference(scores + shift, others, seed=seed, resamples=100)
    assert [moved.low, moved.high] == pytest.approx([found.low + shift, found.high + shift], abs=1e-6)
    surer = paired_difference(scores, others, seed=seed, resamples=100, confidence=0.5)
    assert found.low <= surer.low <= surer.high <= found.high
    same = paired_difference(scores, scores)
    assert (same.low, same.mean, same.high) == (0, 0, 0)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        rows = rng.normal(50, 20, 40)  # some prompts are hard for every setting
        found = paired_difference(rows + rng.normal(1, 3, 40), rows, resamples=400, seed=trial)
        held += found.low <= 1 <= found.high
        assert found.half_width < 2  # unpaired it would be 9
    assert 0.89 < held / 300 < 0.98


def test_many_rows_are_drawn_in_turns_and_all_count():
    scores = np.random.default_rng(1).normal(size=30_000)
    found = paired_difference(scores, np.zeros_like(scores), resamples=100)
    assert found.half_width == pytest.approx(1.96 / np.sqrt(30_000), rel=0.25)


def test_what_is_no_pair_of_rows_is_refused():
    assert paired_difference([3.0], [1.0]).mean == 2
    assert paired_difference([3.0], [1.0]).half_width == np.inf
    for scores, others in (([], []), ([1.0, 2.0], [1.0]), ([[1.0]], [[1.0]])):
        with pytest.raises(ValueError, match="same rows"):
            paired_difference(scores, others)
    with pytest.raises(ValueError, match="finite"):
        paired_difference([np.nan, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"confidence is 95"):
        paired_difference([2.0, 1.0], [1.0, 1.0], confidence=95)


@pytest.mark.parametrize("name", ["spectrum", f"frechet:{__name__}:means"])
def test_a_set_that_is_nearer_to_the_reference_is_found_to_be(name, pictures):
    distance = named(name)

    def tinted(amount: float) -> np.ndarray:
        tint = Image.new("RGB", (256, 256), "blue")
        return features_of_rows(distance, [Image.blend(one, tint, amount) for one in pictures])

    reference, near, far = tinted(0), tinted(0.1), tinted(0.4)
    found = paired_distance_difference(distance, near, far, reference)
    apart = distance.distance(far, reference) - distance.distance(near, reference)
    assert found.mean == pytest.approx(apart)
    assert 0 < found.low < found.mean < found.high
    back = paired_distance_difference(distance, far, near, reference[:5], resamples=50)  # other rows stay
    assert back.high < 0
    with pytest.raises(ValueError, match="same rows"):
        paired_distance_difference(distance, near, far[:5], reference)
