"""Anyres: tiles, their pixels and their places are those of LLaVA and of transformers."""

from __future__ import annotations

import io
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import ImageSettings, process
from vlm_jax.data.anyres import NEWLINE
from vlm_jax.data.images import Picture, layout, normalise
from vlm_jax.errors import UsageError

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
GRID = tuple((w, h) for w in range(1, 7) for h in range(1, 7))  # of LLaVA-OneVision, in tiles


def anyres(order: str = "wh", merge: str = "spatial_unpad", side: int = 336, patches: int = 576, **more: Any) -> Any:
    points = more.pop("pinpoints", tuple((a * side // 336, b * side // 336) for a, b in PINPOINTS))
    return ImageSettings(side, patches, "anyres", merge, points, order, **more)


# (width, height): (tiles, columns, rows, tokens), made by the reference code.
GOLDEN = {
    (336, 336): (3, 24, 24, 1176),
    (224, 224): (3, 24, 24, 1176),
    (300, 300): (3, 24, 24, 1176),
    (640, 480): (5, 48, 36, 2340),
    (500, 375): (5, 48, 36, 2340),
    (1024, 768): (5, 48, 36, 2340),
    (480, 640): (5, 36, 48, 2352),
    (1024, 899): (5, 48, 42, 2634),
    (1920, 1080): (5, 48, 28, 1948),
    (1080, 1920): (5, 28, 48, 1968),
    (672, 672): (5, 48, 48, 2928),
    (1024, 1024): (5, 48, 48, 2928),
    (333, 500): (3, 24, 36, 1476),
    (1008, 336): (4, 72, 24, 2328),
    (2000, 700): (4, 68, 24, 2232),
    (700, 2000): (4, 24, 68, 2276),
    (1000, 100): (4, 72, 8, 1160),
    (100, 1000): (4, 8, 72, 1224),
    (37, 1001): (4, 2, 72, 792),
    (50, 40): (3, 24, 20, 1076),
    (167, 20): (3, 24, 2, 626),
}
OTHERWISE = {(50, 40): (3, 30, 24, 1320), (167, 20): (3, 48, 6, 870)}  # where order "hw" chooses another canvas


@pytest.mark.parametrize("order", ["wh", "hw"])
def test_tiles_and_tokens_are_the_references(order: str) -> None:
    for size, golden in GOLDEN.items():
        tiles, columns, rows, tokens = OTHERWISE.get(size, golden) if order == "hw" else golden
        found = layout(size, anyres(order))
        assert (found.tiles, len(found.places)) == (tiles, tokens), size
        assert tokens == 576 + rows * (columns + 1) and (found.places == NEWLINE).sum() == rows


def test_every_place_of_a_grid_of_sizes_is_transformers() -> None:
    """transformers packs the numbers of the features themselves."""
    torch = pytest.importorskip("torch")
    from transformers.models.llava_next import modeling_llava_next as theirs

    for side, patches, points in [(336, 576, PINPOINTS), (28, 4, tuple((28 * w, 28 * h) for w, h in GRID))]:
        settings = anyres("hw", side=side, patches=patches, pinpoints=points)
        vision = types.SimpleNamespace(image_size=side, patch_size=side // int(patches**0.5))
        model = types.SimpleNamespace(
            config=types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(p) for p in points])
        )
        sizes = [(w, h) for w in range(3, 1400, 151) for h in range(5, 1400, 127)] + [(376, 799), (1, 2000), (2000, 1)]
        ours = [layout(size, settings) for size in sizes]
        features = [torch.arange(one.tiles * patches).reshape(one.tiles, patches, 1) for one in ours]
        counts = [theirs.image_size_to_num_patches((h, w), [*map(list, points)], side) for w, h in sizes]
        assert counts == [one.tiles for one in ours]
        packed, lengths = theirs.LlavaNextModel.pack_image_features(
            model, features, [(h, w) for w, h in sizes], "default", torch.tensor([NEWLINE])
        )
        assert lengths.tolist() == [len(one.places) for one in ours]
        assert all((one.places == want[:, 0].numpy()).all() for one, want in zip(ours, packed, strict=True))


def test_the_orders_round_differently() -> None:
    """The image fills 50.99999999999999 rows of patches: LLaVA cuts to 50 (72 - 2 * 11), transformers rounds to 51."""
    rows = [(layout((376, 799), anyres(order)).places == NEWLINE).sum() for order in ("wh", "hw")]
    assert rows == [50, 52]


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_merges_take_the_features_in_their_order(merge: str) -> None:
    """Tiles of 2 x 2 features, a canvas of 2 x 1 tiles, an image twice as wide as high."""
    found = layout((60, 30), anyres(merge=merge, side=8, patches=4, pinpoints=((16, 8),)))
    lines = {
        "flat": [[4, 5, 6, 7, 8, 9, 10, 11]],
        "spatial": [[4, 5, 8, 9], [6, 7, 10, 11]],
        "spatial_unpad": [[4, 5, 8, 9, NEWLINE], [6, 7, 10, 11, NEWLINE]],
    }[merge]
    assert found.tiles == 3 and found.places.tolist() == [0, 1, 2, 3, *np.ravel(lines)]
    alone = layout((60, 30), ImageSettings(8, 4, "pad", merge))
    assert alone.tiles == 1 and alone.places.tolist() == [0, 1, 2, 3] + [NEWLINE] * (merge == "spatial_unpad")


def test_images_that_share_a_record_may_have_another_mode() -> None:
    settings = anyres(several="pad")
    assert settings.of(1) is settings and layout((640, 480), settings.of(1)).tiles == 5
    assert settings.of(2).mode == "pad" and len(layout((640, 480), settings.of(2)).places) == 577
    assert anyres().of(3) == anyres()


@pytest.mark.parametrize("size", [(2000, 1500), (1400, 2600), (2304, 2304), (300, 300), (2304, 1000)])
def test_maps_above_the_maximum_are_torchs_interpolation(size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    points = tuple((384 * w, 384 * h) for w, h in GRID)
    settings = anyres(side=384, patches=16, pinpoints=points, max_tiles=9)
    found, free = (layout(size, s) for s in (settings, anyres(side=384, patches=16, pinpoints=points)))
    features = np.random.default_rng(0).standard_normal((found.tiles * 16, 3))
    rows = (free.places == NEWLINE).sum()
    whole = features[free.places[16:].reshape(rows, -1)[:, :-1]]  # what stands there without a maximum
    times = (whole.shape[0] * whole.shape[1] / (9 * 16)) ** 0.5
    assert (found.weights is not None) == (times > 1.1) == (size != (300, 300))
    if found.weights is None:
        assert (found.places == free.places).all()
        return
    shape = [int(n // times) for n in whole.shape[:2]]
    mapped = torch.from_numpy(whole).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(mapped, shape, mode="bilinear")[0].permute(1, 2, 0).numpy()
    places = found.places[16:].reshape(*[shape[0], shape[1] + 1], 4)
    assert (places[:, -1] == NEWLINE).all() and (found.places[:16] == np.arange(16)[:, None]).all()
    weights = found.weights[16:].reshape(places.shape)
    ours = (features[places[:, :-1]] * weights[:, :-1, :, None]).sum(2)
    np.testing.assert_allclose(ours, wanted, atol=1e-6)
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- pixels


def photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(200, 120), (61, 90), (57, 300), (400, 31), (20, 33), (112, 112), (5, 1), (230, 229)])
def test_tiles_are_those_of_the_llava_next_processor(size: tuple[int, int]) -> None:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    settings, image = anyres("hw", side=56, patches=16), photo(*size)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=[list(point) for point in settings.pinpoints],
    )
    wanted = processor(image, return_tensors="np")
    tiles = process(np.asarray(image), settings)
    assert tiles.dtype == np.uint8 and len(tiles) == layout(size, settings).tiles
    assert wanted["image_sizes"].tolist() == [[size[1], size[0]]]
    off = np.abs(normalise(tiles, settings.mean, settings.std) - wanted["pixel_values"][0].transpose(0, 2, 3, 1))
    levels = off * 255 * np.array(settings.std)
    assert levels.max() < 1.01 and (levels > 0.5).mean() < 2e-3  # a rounding may fall to the other side


def test_padding_is_black_before_it_is_normalised() -> None:
    settings = anyres(side=56, patches=16)
    tiles = normalise(process(np.full((30, 30, 3), 255, np.uint8), settings), settings.mean, settings.std)
    np.testing.assert_allclose(tiles[1, 0, 0], [-1.7923, -1.7521, -1.4802], atol=1e-4)
    assert tiles[0].min() > 1.9  # the whole image is squashed, not padded


def test_the_size_is_known_before_the_pixels_are_decoded() -> None:
    file = io.BytesIO()
    photo(640, 480).save(file, "JPEG")
    picture = Picture(file.getvalue()[:2000])  # the header, and a little of the body
    assert picture.size == (640, 480)
    with pytest.raises(UsageError, match="cannot be decoded"):
        picture.pixels()


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"merge": "spatial_unpadded"}, "did you mean 'spatial_unpad'"),
        ({"order": "xy"}, "known: wh, hw"),
        ({"several": "any"}, "unknown image mode 'any'"),
        ({"pinpoints": ()}, "needs images.pinpoints"),
        ({"pinpoints": ((336, 500),)}, r"has \(336, 500\); give pairs of multiples of 336"),
        ({"pinpoints": (336, 672)}, "has 336; give pairs"),
        ({"patches": 577}, "needs a square of features per tile, but there are 577"),
        ({"max_tiles": 0}, "images.max_tiles is 0"),
        ({"max_tiles": 9, "merge": "spatial"}, "works with images.merge 'spatial_unpad'"),
    ],
)
def test_settings_that_cannot_be_say_so(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        anyres(**changes)


def test_pinpoints_from_json_are_the_same_settings() -> None:
    assert anyres(pinpoints=[list(point) for point in PINPOINTS]) == anyres()
    assert anyres("hw").canvases == tuple((h, w) for w, h in PINPOINTS) and anyres().most_tiles == 5


def test_the_table_in_the_docs_is_printed_from_the_code(repository: Path) -> None:
    """Rows `| width x height | tiles | tokens in order wh | in order hw |`."""
    text = (repository / "docs/design.md").read_text()
    found = re.findall(r"^\| (\d+) x (\d+) \| (\d+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
    assert len(found) >= 6
    for width, height, *numbers in found:
        ours = [layout((int(width), int(height)), anyres(order)) for order in ("wh", "hw")]
        wanted = [ours[0].tiles, *(len(one.places) for one in ours)]
        assert [int(number.replace(",", "")) for number in numbers] == wanted
