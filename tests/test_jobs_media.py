"""Pictures and videos survive their encoding, and their file names are safe anywhere."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from overtone.jobs.media import encode_media, look_at, media_extension, media_kind, media_name
from overtone.jobs.spec import Output

GRADIENT = np.stack(
    np.broadcast_arrays(np.arange(64)[:, None] * 3, np.arange(48)[None, :] * 5, 40), axis=-1
).astype(np.uint8)  # [H, W, 3]

ANY = 'abZ09-_./\\:*?"<>|%#~ \0\nüあ😀\ud800'


def size_of(data: bytes) -> tuple[int, int]:
    seen = look_at(data)
    return seen.height_px, seen.width_px


def output(**settings) -> Output:
    return Output.model_validate({"path": "out", **settings})


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("image", "extension", "error"),
    [
        ({}, "png", 0),
        ({"codec": "webp", "lossless": True}, "webp", 0),
        ({"codec": "jpeg"}, "jpg", 3),
        ({"codec": "webp", "quality": 95}, "webp", 3),
    ],
)
def test_pictures_come_back(image, extension, error):
    settings = output(image=image)
    data = encode_media(Image.fromarray(GRADIENT), settings)
    assert np.abs(decoded(data).astype(int) - GRADIENT).mean() <= error
    assert size_of(data) == (64, 48)
    assert (media_kind(data), media_extension(settings)) == ("image", extension)


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_quality_is_used(codec):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    sizes = [len(encode_media(noise, output(image={"codec": codec, "quality": q}))) for q in (10, 60, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


@pytest.mark.parametrize("size", [(48, 64), (33, 47)])
def test_videos_come_back(size):
    height, width = size
    frames = np.stack([np.full((height, width, 3), 40 + 10 * i, np.uint8) for i in range(9)])  # [T, H, W, 3]
    settings = output(video={"fps": 8, "crf": 10})
    data = encode_media(frames, settings)
    assert (media_kind(data), media_extension(settings, "video")) == ("video", "mp4")
    assert size_of(data) == size
    assert data.index(b"moov") < data.index(b"mdat")  # a player can begin at once
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 8)
        back = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).max() <= 4


@pytest.mark.parametrize(
    "media", [np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3)), "x"]
)
def test_anything_else_is_refused(media):
    with pytest.raises(ValueError):
        encode_media(media, output())


@pytest.mark.parametrize("medium", ["image", "video"])
def test_broken_files_are_found(medium):
    media = Image.fromarray(GRADIENT) if medium == "image" else np.stack([GRADIENT] * 4)
    data = encode_media(media, output())
    with pytest.raises(ValueError):
        size_of(data[: len(data) // 2])
    for rubbish in (b"", b"rubbish" * 10):
        with pytest.raises(ValueError):
            size_of(rubbish)


@given(st.text(alphabet=ANY, max_size=120))
def test_file_names_are_safe_anywhere(row_id):
    name = media_name(row_id, "png")
    stem, _, extension = name.rpartition(".")
    assert extension == "png"
    assert stem
    assert len(name.encode()) <= 100
    assert all(c.isascii() and (c.isalnum() or c in "-_") for c in stem)


@given(st.lists(st.text(alphabet="abAB/._üÜ", max_size=3), unique=True, max_size=30))
def test_different_rows_get_different_names(row_ids):
    """Also on a disk to which `a` and `A` are one letter."""
    assert len({media_name(row_id, "png").lower() for row_id in row_ids}) == len(row_ids)


def test_names_that_differ_in_case_alone_do_not_meet():
    row_ids = ["Qx7", "qX7", "qx7", "QX7", "a/b", media_name("a/b", "png")[:-4]]
    assert len({media_name(row_id, "png").lower() for row_id in row_ids}) == len(row_ids)
    assert media_name("qx7", "png") == "qx7.png"


@pytest.mark.parametrize("device", ["con", "PRN", "aux", "NUL", "com0", "COM9", "lpt1", "Lpt5"])
def test_no_name_is_a_device_s(device):
    """Windows has them in every folder, with any ending."""
    stem = media_name(device, "png").partition(".")[0]
    assert stem.lower() != device.lower()
    assert stem.startswith(device)
    assert media_name(f"{device.lower()}x", "png") == f"{device.lower()}x.png"


def test_readable_names_stay_readable():
    assert media_name("cat_007", "png") == "cat_007.png"
    assert media_name("a/b", "png").startswith("a_b-")
