"""Pixels as Hugging Face's, and files that must not be opened."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import BadRecord, ImageSettings, normalise, open_image, process
from vlm_jax.data.resize import resize
from vlm_jax.errors import UsageError

# Width, height: landscape, portrait, enlarged, tall (where Pillow filters the columns first), thin, and the same size.
SIZES = [(64, 48), (97, 131), (50, 40), (23, 37), (40, 150), (31, 300), (300, 31), (1, 90), (56, 56)]


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def levels(a: Any, b: Any) -> int:
    return int(np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64)).max())


@pytest.mark.parametrize("size", SIZES)
def test_square_gives_the_pixels_of_the_clip_processor(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    settings, image = ImageSettings(56, 16), noise(*size)
    raw = processor(image, return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
    tile = process(open_image(image), settings)[0]
    assert tile.dtype == np.uint8 and tile.shape == (56, 56, 3) and tile.flags.c_contiguous
    assert levels(tile, raw.transpose(1, 2, 0)) <= 1  # a rounding may fall to the other side
    normal = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = normalise(tile, settings.mean, settings.std)
    assert np.abs(ours - normal).max() <= 1.01 / 255 / min(settings.std)


@pytest.mark.parametrize("size", SIZES)
def test_resize_gives_the_pixels_of_the_siglip_processor(size: tuple[int, int]) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": 56, "width": 56}, do_rescale=False, do_normalize=False)
    image = noise(*size)
    raw = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert levels(process(open_image(image), ImageSettings(56, 16, "resize"))[0], raw) <= 1


def test_pad_puts_the_image_into_the_middle_of_the_mean_colour() -> None:
    image = noise(40, 20)
    tile = process(open_image(image), ImageSettings(40, 16, "pad"))[0]
    assert levels(tile[10:30], image) == 0
    assert (tile[:10] == (122, 116, 104)).all() and (tile[30:] == (122, 116, 104)).all()


@pytest.mark.parametrize("size", [(112, 112), (28, 28), (168, 84), (84, 84)])
def test_halves_are_rounded_as_pillow_rounds_them(size: tuple[int, int]) -> None:
    # Ratios whose weights are short binary fractions: one value in sixteen or so is a half.
    image = noise(*size)
    different = np.asarray(image.resize((56, 56), Image.Resampling.BICUBIC)) != resize(open_image(image), (56, 56))
    assert different.mean() < 1e-3


def test_a_crop_is_cut_out_of_the_whole() -> None:
    image = noise(120, 90)
    whole = resize(open_image(image), (64, 48))
    assert levels(resize(open_image(image), (64, 48), (8, 3, 40, 30)), whole[3:33, 8:48]) == 0
    assert levels(whole, image.resize((64, 48), Image.Resampling.BICUBIC)) <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "1", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 6), 40_000, np.uint16))
    else:
        image = noise(6, 5).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG" if mode == "CMYK" else "PNG")
    opened = open_image(file.getvalue())
    assert opened.shape == (5, 6, 3) and opened.dtype == np.uint8
    if mode == "I;16":
        assert opened[0, 0].tolist() == [40_000 >> 8] * 3
    elif mode != "CMYK":  # which a JPEG changes
        assert (opened == np.asarray(image.convert("RGB"))).all()
    assert (open_image(opened) == opened).all() and open_image(image).shape == (5, 6, 3)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_are_decoded_to_pillows_pixels(subsampling: str, progressive: bool) -> None:
    file = io.BytesIO()
    noise(53, 37).save(file, "JPEG", quality=80, subsampling=subsampling, progressive=progressive)
    assert (open_image(file.getvalue()) == np.asarray(Image.open(file))).all()


def test_a_jpeg_that_ends_early_is_broken() -> None:
    file = io.BytesIO()
    noise(53, 37).save(file, "JPEG")
    with pytest.raises(BadRecord) as error:
        open_image(file.getvalue()[: len(file.getvalue()) // 2])
    assert error.value.kind == "broken_image"


def png(width: int, height: int) -> bytes:
    """The header of a PNG that claims a size and has no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_images_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    noise(30, 20).save(tmp_path / "secret.png")
    noise(30, 20).save(root / "whole.png")
    whole = (root / "whole.png").read_bytes()
    (root / "half.png").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("hello")
    (root / "empty.png").write_bytes(b"")
    (root / "bomb.png").write_bytes(png(8000, 8000))
    (root / "huge.png").write_bytes(png(50_000, 50_000))
    noise(30, 20).save(root / "vector.tiff")
    (root / "folder.png").mkdir()
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink(root / "whole.png", root / "inner.png")
    os.mkfifo(root / "pipe.png")
    kinds = {
        "half.png": "broken_image",
        "text.png": "broken_image",
        "empty.png": "broken_image",
        "vector.tiff": "broken_image",  # a format that is not on the list
        "bomb.png": "image_too_large",
        "huge.png": "image_too_large",
        "missing.png": "missing_image",
        "folder.png": "missing_image",
        "pipe.png": "missing_image",
        "../secret.png": "unsafe_path",
        "link.png": "unsafe_path",
        str(root / "whole.png"): "unsafe_path",
        "https://example.com/a.png": "unsafe_path",
        "data:image/png;base64,AAAA": "unsafe_path",
        "a\0b.png": "unsafe_path",
    }
    for path, kind in kinds.items():
        with pytest.raises(BadRecord) as error:
            open_image(path, root)
        assert error.value.kind == kind, path
    assert open_image("whole.png", root).shape == open_image("inner.png", root).shape == (20, 30, 3)


def test_an_unknown_mode_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'square'"):
        ImageSettings(56, 16, "sqare")
