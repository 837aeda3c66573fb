"""Pictures and videos as bytes of a file format. Knows the output settings, but no rows and no parts."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from PIL import Image

from overtone.jobs.errors import UserError
from overtone.jobs.spec import Output

Kind = Literal["image", "video"]
BLANK_SPREAD = 2
"""Two pixels of a blank picture differ by no more than this in any colour: what codecs with loss make of one
colour."""
_PNG = {"compress_level": 1, "compress_type": 3}
"""zlib's Z_RLE: runs of equal bytes and Huffman codes alone. After PNG's own filters that finds nearly all
that a search would in a picture that a model makes, in less than half the time (see BENCHMARKS.md)."""
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
_NAME_CHARACTERS = 80
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])|.*-[0-9a-f]{24}", re.IGNORECASE)
"""Names of devices, which Windows has in every folder, and those that look like one with a hash."""
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Of pictures that rows start from."""
_EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}


def encode_media(media: Image.Image | np.ndarray, output: Output) -> bytes:
    """A picture as png, jpeg or webp, or a video (uint8 [frames, height, width, 3]) as MP4 with H.264.

    Several threads may call it, and the codecs let other threads run. ValueError for anything else, and for a
    video without frames; UserError where the video codec is not installed.
    """
    if isinstance(media, np.ndarray) and media.ndim == 4:
        return _encode_video(media, output)
    if not isinstance(media, Image.Image):
        raise ValueError(
            f"neither a picture nor a video: {type(media).__name__} {getattr(media, 'shape', '')}"
        )
    settings: dict[str, Any]
    image, codec = output.image, output.image.codec
    if codec == "png":
        settings = _PNG
    elif codec == "jpeg":
        settings = {"quality": image.quality, "subsampling": 0}
    else:
        settings = {"lossless": True} if image.lossless else {"quality": image.quality}
    out = io.BytesIO()
    media.convert("RGB").save(out, codec, **settings)
    return out.getvalue()


def media_kind(data: bytes) -> Kind:
    """Whether a file is a picture or a video, by its first bytes."""
    return "video" if data[4:8] == b"ftyp" else "image"


def media_extension(output: Output, kind: Kind = "image") -> str:
    """The ending of a file's name, without a dot."""
    return "mp4" if kind == "video" else _EXTENSIONS[output.image.codec]


def media_name(row_id: str, extension: str) -> str:
    """A plain file name for a row: its row_id where that is a safe name on any disk, else a part of it and a
    hash.

    It has only letters, digits, `-` and `_`, so that it is never a path, hidden, reserved or a pattern. No
    two names differ in the case of their letters alone, which some disks do not tell apart.
    """
    safe = set(row_id) <= _SAFE and row_id == row_id.lower() and not _RESERVED.fullmatch(row_id)
    if safe and 0 < len(row_id) <= _NAME_CHARACTERS:
        return f"{row_id}.{extension}"
    readable = "".join(c if c in _SAFE else "_" for c in row_id[: _NAME_CHARACTERS // 2])
    digest = blake2b(row_id.encode(errors="surrogatepass"), digest_size=12).hexdigest()
    return f"{readable}-{digest}.{extension}"


@dataclass(frozen=True)
class Seen:
    """What a look at every pixel of a picture or video shows."""

    height_px: int
    width_px: int
    spread: int
    """The largest difference between two pixels in any colour, in [0, 255]; of a video, within any frame."""

    @property
    def blank(self) -> bool:
        """Whether all of it is one colour, as far as a codec keeps that."""
        return self.spread <= BLANK_SPREAD


def look_at(data: bytes) -> Seen:
    """A file, decoded to its last byte. ValueError where it is broken."""
    if media_kind(data) == "video":
        return _look_at_video(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return Seen(image.height, image.width, _spread(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a whole picture: {error}") from None


def still(data: bytes) -> Image.Image:
    """The picture in a file, or the first frame of its video, in RGB. ValueError where there is none."""
    if media_kind(data) == "image":
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"not a whole picture: {error}") from None
    av = _av()
    try:
        with av.open(io.BytesIO(data)) as container:
            return next(container.decode(video=0)).to_image()
    except (av.FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(f"not a whole video: {error}") from None


def opened(data: bytes) -> Image.Image:
    """A picture's file that may come from anybody, its pixels not read yet. Only formats that Pillow decodes
    by itself: for PostScript, say, it would run another program. Raises what Pillow does for others."""
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])


def decode_video(data: bytes) -> np.ndarray:
    """All frames of a video, uint8 [T, H, W, 3]. ValueError where it is broken or has none."""
    av = _av()
    try:
        with av.open(io.BytesIO(data)) as container:
            found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"not a whole video: {error}") from None
    if not found:
        raise ValueError("a video without frames")
    return np.stack(found)


def _encode_video(frames: np.ndarray, output: Output) -> bytes:
    if frames.dtype != np.uint8 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"a video is uint8 [frames, height, width, 3], not {frames.dtype} {frames.shape}")
    av = _av()
    _, height, width, _ = frames.shape
    with TemporaryDirectory(prefix="overtone-") as folder:
        path = Path(folder) / "video.mp4"
        # With the index at the front a player can begin at once; moving it there needs a real file.
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            options = {"crf": str(output.video.crf)}
            stream = container.add_stream("libx264", rate=output.video.fps, options=options)
            stream.height, stream.width = height, width
            # Half-size colour planes, which every player knows, need even sides.
            stream.pix_fmt = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
            for frame in frames:  # [H, W, 3]
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        return path.read_bytes()


def _spread(picture: Image.Image) -> int:
    return max(int(high) - int(low) for low, high in picture.getextrema())  # type: ignore[misc]


def _look_at_video(data: bytes) -> Seen:
    av = _av()
    size: tuple[int, int] | None = None
    frames = promised = spread = 0
    try:
        with av.open(io.BytesIO(data)) as container:
            promised = container.streams.video[0].frames
            for frame in container.decode(video=0):
                size = frame.height, frame.width
                frames += 1
                if spread <= BLANK_SPREAD:  # one frame that is not blank is enough, and looking costs
                    spread = _spread(frame.to_image())
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"not a whole video: {error}") from None
    if size is None:
        raise ValueError("a video without frames")
    if promised and frames != promised:
        raise ValueError(f"not a whole video: {frames} frames instead of {promised}")
    return Seen(*size, spread)


def _av() -> Any:
    try:
        import av  # an extra: only jobs that make videos need it
    except ImportError as error:
        raise UserError("videos need PyAV: pip install 'overtone[video]'") from error
    return av
