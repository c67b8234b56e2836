"""Images: opened safely, then brought to the squares of pixels that a vision tower takes.

Safely: a path of a data set never leads out of its images folder or to another machine, only formats of photographs and
screenshots are decoded, and the header's size is checked before a pixel is. Orientation tags (EXIF) are not applied:
the reference systems (LLaVA, Hugging Face) do not apply them either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from vlm_jax.data import anyres
from vlm_jax.data.anyres import Layout, Size
from vlm_jax.data.records import AnyPath, BadRecord
from vlm_jax.data.resize import resize
from vlm_jax.data.safety import read_file
from vlm_jax.errors import UsageError, suggest

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # of an animation, the first picture
MAX_PIXELS = 50_000_000
MAX_SCANS = 50  # of a progressive JPEG: about ten are usual, and each goes over all pixels, however few bytes it has

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How an image becomes tiles of a vision tower, and how their features stand in the token row.

    size: side of a tile in pixels. features_per_tile: P, what the connector gives for each. mean, std: per channel, of
      pixels scaled to 0..1; tiles stay uint8 on the host, and the model subtracts and divides. These four are the
      model's; the others are `config.images`.
    mode: "square" resizes the shortest side and crops the centre (CLIP); "pad" first pads to a square with the mean
      colour (LLaVA-1.5); "resize" squashes (SigLIP); "anyres" gives the squashed image and, besides, tiles of the
      image at a higher resolution (LLaVA-1.6).
    several: the mode of images that share a record with others; None: `mode`. LLaVA-NeXT trains these with "pad";
      at inference LLaVA and Hugging Face keep anyres.
    merge: "flat" takes the features tile by tile; "spatial" in the rows of the image, after those of the squashed one;
      "spatial_unpad" also drops the padding and ends each row with the model's newline, and an image of one tile with
      one newline.
    pinpoints: the canvases that anyres may choose from, multiples of `size`, each in the order of `pinpoint_order`:
      "wh" as LLaVA's configs write them, "hw" as Hugging Face's. The order decides between equally good canvases, and
      "hw" also rounds as transformers does: keep the order that the weights were trained with.
    max_tiles: anyres_max_N, which shrinks larger maps of features to about N tiles; None does not.
    """

    size: int
    features_per_tile: int
    mode: str = "square"
    merge: str = "flat"
    pinpoints: tuple[Size, ...] = ()
    pinpoint_order: str = "wh"
    max_tiles: int | None = None
    several: str | None = None
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"image size is {self.size}; give at least 1 pixel")
        modes = (*ONE_TILE, "anyres")
        for what, value, known in (
            ("image mode", self.mode, modes),
            ("image mode", self.several or self.mode, modes),
            ("images.merge", self.merge, MERGES),
            ("images.pinpoint_order", self.pinpoint_order, ORDERS),
        ):
            if value not in known:
                raise UsageError(f"unknown {what} {value!r}{suggest(str(value), known)}; known: {', '.join(known)}")
        if self.merge != "flat" and math.isqrt(self.features_per_tile) ** 2 != self.features_per_tile:
            raise UsageError(
                f"images.merge {self.merge!r} needs a square of features per tile, but there are "
                f"{self.features_per_tile}; set it to 'flat'"
            )
        if self.max_tiles is not None and (not isinstance(self.max_tiles, int) or self.max_tiles < 1):
            raise UsageError(f"images.max_tiles is {self.max_tiles!r}; give a number of tiles, or None")
        if self.max_tiles is not None and self.merge != "spatial_unpad":
            raise UsageError(f"images.max_tiles works with images.merge 'spatial_unpad', not {self.merge!r}")
        for point in self.pinpoints:
            pair = isinstance(point, (list, tuple)) and len(point) == 2 and all(isinstance(n, int) for n in point)
            if not pair or any(n < 1 or n % self.size for n in point):
                raise UsageError(f"images.pinpoints has {point!r}; give pairs of multiples of {self.size} pixels")
        object.__setattr__(self, "pinpoints", tuple((int(a), int(b)) for a, b in self.pinpoints))
        if "anyres" in (self.mode, self.several) and not self.pinpoints:
            raise UsageError("images.mode 'anyres' needs images.pinpoints, such as ((672, 672), (336, 1008))")

    @property
    def canvases(self) -> tuple[Size, ...]:
        """The pinpoints as (width, height), in their order. Here and nowhere else is `pinpoint_order` undone."""
        return self.pinpoints if self.pinpoint_order == "wh" else tuple((w, h) for h, w in self.pinpoints)

    @property
    def most_tiles(self) -> int:
        """Tiles of one image, at most."""
        grids = [1 + w * h // self.size**2 for w, h in self.canvases] if "anyres" in (self.mode, self.several) else []
        return max([1, *grids])

    @property
    def weighted(self) -> bool:
        """Whether a position may hold several features with weights."""
        return self.max_tiles is not None and "anyres" in (self.mode, self.several)

    def of(self, images: int) -> ImageSettings:
        """Those of a record with so many images."""
        return dataclasses.replace(self, mode=self.several) if self.several and images > 1 else self


def layout(size: Size, settings: ImageSettings) -> Layout:
    """Tiles and places of an image of this (width, height)."""
    features = settings.features_per_tile
    if settings.mode != "anyres":
        one = anyres.flat(1, features)
        newline = settings.merge == "spatial_unpad"
        return Layout(1, np.append(one.places, np.int32(anyres.NEWLINE))) if newline else one
    wide, high = anyres.best_canvas(size, settings.canvases)
    grid = wide // settings.size, high // settings.size
    if settings.merge == "flat":
        return anyres.flat(1 + grid[0] * grid[1], features)
    if settings.merge == "spatial":
        return anyres.spatial(grid, features)
    rounded = settings.pinpoint_order == "hw"
    return anyres.unpadded(size, grid, features, rounded=rounded, most=settings.max_tiles)


def process(pixels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """uint8 [H, W, 3] -> tiles [k, size, size, 3]: what Hugging Face's processors make on Pillow, before they
    normalise. k is that of `layout`."""
    if settings.mode != "anyres":
        return ONE_TILE[settings.mode](pixels, settings)[None]
    canvas = anyres.best_canvas((pixels.shape[1], pixels.shape[0]), settings.canvases)
    return anyres.cut(pixels, canvas, settings.size)


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


ONE_TILE = {"square": _square, "pad": _pad, "resize": _squash}
MERGES = ("flat", "spatial", "spatial_unpad")
ORDERS = ("wh", "hw")


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
    return Picture(image, root).pixels()


class Picture:
    """An image of which the header is read: `size` (width, height) is known, and `pixels()` decodes the rest.

    Arguments and errors as for `open_image`.
    """

    def __init__(self, image: Any, root: str | os.PathLike | None = None):
        self._pixels: np.ndarray | None = None
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            self._pixels, self.size = image, (image.shape[1], image.shape[0])
            self._source = None
            return
        self._source, self._name = image, "the image"
        if isinstance(image, (str, os.PathLike)):
            path, confined = os.fspath(image), not isinstance(image, AnyPath)
            if root is None:
                raise BadRecord("unsafe_path", f"image {path[:200]!r} is a path, and no images folder is known")
            self._source, self._name = read_file(path, root, confined), f"image {path!r}"
        elif not isinstance(image, (bytes, bytearray, memoryview, Image.Image)):
            raise BadRecord("malformed", f"an image is a {type(image).__name__}; give a path, bytes or a PIL image")
        self._image = _open(self._source, self._name)
        self.size = self._image.size

    def pixels(self) -> np.ndarray:
        """uint8 [H, W, 3]. Raises BadRecord("broken_image")."""
        return _decode(self._image, self._source, self._name) if self._pixels is None else self._pixels

    @property
    def encoded(self) -> bytes | None:
        """The file as it is; None for an image that is none."""
        return bytes(self._source) if isinstance(self._source, (bytes, bytearray, memoryview)) else None

    @property
    def orientation(self) -> int:
        """How the file asks to be turned or mirrored: EXIF's orientation, 2 to 8; 1 as it is stored. `pixels()` does
        not turn it."""
        if self._pixels is not None:
            return 1
        try:
            value = self._image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # as in `_open`; damaged notes about an image do not make it a broken one
            return 1
        return value if value in range(2, 9) else 1


def _open(source: Any, name: str) -> Image.Image:
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
    if image.info.get("progressive") and image is not source and bytes(source).count(b"\xff\xda") > MAX_SCANS:
        raise BadRecord("broken_image", f"{name} has more than {MAX_SCANS} scans; save it anew")
    return image


def _decode(image: Image.Image, source: Any, name: str) -> np.ndarray:
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
