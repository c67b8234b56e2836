"""Images: opened safely, then brought to the square of pixels that a vision tower takes.

Safely: a path of a data set never leads out of its images folder or to another machine, only formats of photographs and
screenshots are decoded, and the header's size is checked before a pixel is. Orientation tags (EXIF) are not applied:
the reference systems (LLaVA, Hugging Face) do not apply them either.
"""

from __future__ import annotations

import dataclasses
import io
import os
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm_jax.data.records import BadRecord
from vlm_jax.data.resize import resize
from vlm_jax.errors import UsageError, suggest

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # of an animation, the first picture
MAX_PIXELS = 50_000_000
MAX_BYTES = 200_000_000

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How an image becomes the tile of a vision tower.

    size: side of the tile in pixels.
    mode: "square" resizes the shortest side and crops the centre (CLIP); "pad" first pads to a square with the mean
      colour (LLaVA-1.5's expand2square); "resize" squashes (SigLIP).
    mean, std: per channel, of pixels scaled to 0..1. Tiles stay uint8 on the host: the model subtracts and divides.
    """

    size: int
    mode: str = "square"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"unknown image mode {self.mode!r}{suggest(self.mode, MODES)}; known: {', '.join(MODES)}")
        if self.size < 1:
            raise UsageError(f"image size is {self.size}; give at least 1 pixel")


def process(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """An RGB image as uint8 [size, size, 3]: what Hugging Face's processors feed on Pillow, before normalising."""
    return MODES[settings.mode](image, settings)


def _square(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """transformers CLIPImageProcessor: resize the shortest side (rounding the other down), crop the centre."""
    (width, height), size = image.size, settings.size
    short = min(width, height)
    wide, high = int(size * width / short), int(size * height / short)
    return resize(image, (wide, high), ((wide - size) // 2, (high - size) // 2, size, size))


def _pad(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """haotian-liu/LLaVA llava/mm_utils.py expand2square, then resize."""
    width, height = image.size
    side = max(width, height)
    if width != height:
        square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in settings.mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return resize(image, (settings.size, settings.size))


def _squash(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    return resize(image, (settings.size, settings.size))


MODES = {"square": _square, "pad": _pad, "resize": _squash}


def normalise(tiles: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [..., W, 3] -> float32: (pixel / 255 - mean) / std. Training does this on the device."""
    width = tiles.shape[-2]
    scale = np.tile(1 / (255 * np.asarray(std)), width).astype(np.float32)
    shift = np.tile(-np.asarray(mean) / np.asarray(std), width).astype(np.float32)
    rows = np.multiply(tiles.reshape(-1, width * 3), scale, dtype=np.float32)  # long rows are what numpy is fast at
    rows += shift
    return rows.reshape(tiles.shape)


def open_image(image: Any, root: str | os.PathLike | None = None) -> Image.Image:
    """Decodes an image to RGB.

    image: a path relative to `root`, encoded bytes, or a PIL image.
    Raises BadRecord: "unsafe_path", "missing_image", "image_too_large", "broken_image".
    """
    if isinstance(image, Image.Image):
        return _decode(image, "the image")
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(image, "the image")
    if not isinstance(image, (str, os.PathLike)):
        raise BadRecord("malformed", f"an image is a {type(image).__name__}, not a path")
    return _decode(_read(os.fspath(image), root), f"image {os.fspath(image)!r}")


def _read(path: str, root: str | os.PathLike | None) -> bytes:
    if root is None:
        raise BadRecord("unsafe_path", f"image {path!r} is a path, and no images folder is known")
    if "://" in path or path.startswith("data:"):
        raise BadRecord("unsafe_path", f"image {path[:200]!r} is a URL; download it into the images folder")
    if os.path.isabs(path) or ".." in path.replace("\\", "/").split("/") or "\0" in path:
        raise BadRecord("unsafe_path", f"image {path!r} is not a plain path relative to the images folder")
    base = os.path.realpath(root)
    full = os.path.realpath(os.path.join(base, path))
    if os.path.commonpath([base, full]) != base:
        raise BadRecord("unsafe_path", f"image {path!r} is a link that leads out of the images folder {base}")
    try:
        status = os.stat(full)
        if not stat.S_ISREG(status.st_mode):
            raise BadRecord("missing_image", f"image {path!r} in {base} is not a file")
        if status.st_size > MAX_BYTES:
            raise BadRecord("image_too_large", f"image {path!r} has {status.st_size:,} bytes, more than {MAX_BYTES:,}")
        with open(full, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BadRecord("missing_image", f"image {path!r} is not in {base}") from None
    except OSError as error:
        raise BadRecord("missing_image", f"image {path!r} in {base} cannot be read: {error.strerror}") from None


def _decode(source: Any, name: str) -> Image.Image:
    try:
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source), formats=FORMATS)
        width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadRecord("image_too_large", f"{name} has more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise BadRecord("broken_image", f"{name} is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except Exception as error:  # Pillow's readers raise whatever a broken header makes them stumble over
        raise BadRecord("broken_image", f"{name} cannot be opened: {error}") from None
    if width * height > MAX_PIXELS:
        raise BadRecord("image_too_large", f"{name} has {width} x {height} pixels; {MAX_PIXELS:,} are allowed")
    try:
        return _rgb(image)
    except Exception as error:  # as above, for a broken body
        raise BadRecord("broken_image", f"{name} cannot be decoded: {error}") from None


def _rgb(image: Image.Image) -> Image.Image:
    """`convert("RGB")` as the reference systems do (transparency is dropped), but 16-bit grey keeps its range."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image
