"""Images: opened safely, then brought to the square of pixels that a vision tower takes.

Safely: a path of a data set never leads out of its images folder or to another machine, only formats of photographs and
screenshots are decoded, and the header's size is checked before a pixel is. Orientation tags (EXIF) are not applied:
the reference systems (LLaVA, Hugging Face) do not apply them either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np
import simplejpeg
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


def process(pixels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """uint8 [H, W, 3] -> [size, size, 3]: what Hugging Face's processors make on Pillow, before they normalise."""
    return MODES[settings.mode](pixels, settings)


def _square(pixels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """transformers CLIPImageProcessor: resize the shortest side (rounding the other down), crop the centre."""
    (height, width), size = pixels.shape[:2], settings.size
    short = min(width, height)
    wide, high = int(size * width / short), int(size * height / short)
    return resize(pixels, (wide, high), ((wide - size) // 2, (high - size) // 2, size, size))


def _pad(pixels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """haotian-liu/LLaVA llava/mm_utils.py expand2square, then resize."""
    height, width = pixels.shape[:2]
    side = max(width, height)
    if width != height:
        square = np.full((side, side, 3), [int(channel * 255) for channel in settings.mean], np.uint8)
        left, top = (side - width) // 2, (side - height) // 2
        square[top : top + height, left : left + width] = pixels
        pixels = square
    return resize(pixels, (settings.size, settings.size))


def _squash(pixels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    return resize(pixels, (settings.size, settings.size))


MODES = {"square": _square, "pad": _pad, "resize": _squash}


def normalise(tiles: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [..., W, 3] -> float32: (pixel / 255 - mean) / std. Training does this on the device."""
    width = tiles.shape[-2]
    scale = np.tile(1 / (255 * np.asarray(std)), width).astype(np.float32)
    shift = np.tile(-np.asarray(mean) / np.asarray(std), width).astype(np.float32)
    rows = np.multiply(tiles.reshape(-1, width * 3), scale, dtype=np.float32)  # long rows are what numpy is fast at
    rows += shift
    return rows.reshape(tiles.shape)


def open_image(image: Any, root: str | os.PathLike | None = None) -> np.ndarray:
    """The pixels of an image: uint8 [H, W, 3], red, green, blue.

    image: a path relative to `root`, encoded bytes, a PIL image, or pixels as returned here.
    Raises BadRecord: "unsafe_path", "missing_image", "image_too_large", "broken_image", "malformed".
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    if isinstance(image, (bytes, bytearray, memoryview, Image.Image)):
        return _decode(image, "the image")
    if not isinstance(image, (str, os.PathLike)):
        raise BadRecord("malformed", f"an image is a {type(image).__name__}; give a path, bytes or a PIL image")
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


def _decode(source: Any, name: str) -> np.ndarray:
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
    if image.format == "JPEG" and image.mode == "RGB" and image is not source:
        # Pillow's pixels (both are libjpeg-turbo) straight into numpy: an image takes a sixth less time.
        with contextlib.suppress(ValueError):  # it is stricter than Pillow, which then has the last word
            return simplejpeg.decode_jpeg(source, "RGB")
    try:
        return _rgb(image)
    except Exception as error:  # as above, for a broken body
        raise BadRecord("broken_image", f"{name} cannot be decoded: {error}") from None


def _rgb(image: Image.Image) -> np.ndarray:
    """`convert("RGB")` as the reference systems do (transparency is dropped), but 16-bit grey keeps its range."""
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
