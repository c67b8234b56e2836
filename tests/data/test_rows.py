"""Rows and their batches, for every family of docs/design.md."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vlm_jax.data import ImageSettings, process, rows
from vlm_jax.data.anyres import NEWLINE, flat
from vlm_jax.data.conversation import IMAGE_ID, UNTRAINED
from vlm_jax.data.images import layout

BUDGETS = {"T": 9, "S": 7, "K": 3, "C": 2, "F": 4, "H": 2, "W": 2, "P": 2}
FAMILIES = {
    "prefix_fusion": rows.PREFIX_FUSION,
    "interpolated_fusion": rows.INTERPOLATED_FUSION,
    "cross_attention": rows.CROSS_ATTENTION,
    "encoder_decoder": rows.ENCODER_DECODER,
    "dual_encoder": rows.DUAL_ENCODER,
    "captioning_dual_encoder": rows.CAPTIONING_DUAL_ENCODER,
    "single_stream": rows.SINGLE_STREAM,
}


def text(*ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels, of which all but the first and the images are trained."""
    array = np.array(ids, np.int32)
    return array, np.where((array == IMAGE_ID) | (np.arange(len(ids)) == 0), UNTRAINED, array)


def tile(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 2, 2, 3), value, np.uint8)


def test_a_row_places_every_feature_and_shifts_the_labels() -> None:
    ids = np.array([1, IMAGE_ID, 5, IMAGE_ID, 6, 2], np.int32)
    labels = np.array([UNTRAINED] * 4 + [6, 2], np.int32)
    row = rows.fusion_row(ids, labels, [tile(1), tile(2, count=2)], [flat(1, 2), flat(2, 2)], ImageSettings(2, 2))
    assert row["tokens"].tolist() == [1, 0, 0, 5, 0, 0, 0, 0, 6, 2]
    assert row["visual_index"].tolist() == [-1, 0, 1, -1, 2, 3, 4, 5, -1, -1]
    assert row["labels"].tolist() == [UNTRAINED] * 7 + [6, 2, UNTRAINED]
    assert row["positions"].tolist() == list(range(10)) and (row["segment_ids"] == 1).all()
    assert row["tile_image"].tolist() == [0, 1, 1] and row["tiles"][:, 0, 0, 0].tolist() == [1, 2, 2]
    assert (row["visual_index"][row["visual_inverse"]] == np.arange(6)).all()
    assert all(row[name].dtype == field.dtype for name, field in rows.PREFIX_FUSION.items())


def test_a_row_without_images_has_no_tiles() -> None:
    row = rows.fusion_row(*text(1, 5), [], [], ImageSettings(2, 2))
    assert row["tiles"].shape == (0, 2, 2, 3) and row["visual_inverse"].shape == (0,)
    assert row["labels"].tolist() == [5, UNTRAINED]


# Tiles of 2 x 2 features, canvases of up to 3 x 3 tiles; with `most`, maps of more than two tiles shrink.
CANVASES = tuple((8 * w, 8 * h) for w in range(1, 4) for h in range(1, 4))
ANYRES = ImageSettings(8, 4, "anyres", "spatial_unpad", CANVASES)


def pixels(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("most", [None, 2])
def test_images_of_any_sizes_stand_in_one_batch(most: int | None) -> None:
    """What each position shows, and the inverse of it, are one sparse matrix, written by rows and by columns."""
    settings = dataclasses.replace(ANYRES, max_tiles=most)
    made, rooms = [], []
    for sizes in [[(30, 30)], [], [(9, 40), (8, 8), (100, 20)], [(300, 7)]]:
        pictures = [pixels(*size) for size in sizes]
        layouts = [layout(size, settings) for size in sizes]
        ids, labels = text(1, *[IMAGE_ID, 5] * len(sizes), 6)
        tiles = [process(picture, settings) for picture in pictures]
        made.append(rows.fusion_row(ids, labels, tiles, layouts, settings))
        rooms.append([len(one.places) for one in layouts])
        assert len(made[-1]["tokens"]) == rows.widths(ids, layouts).sum() == 2 + sum(1 + n for n in rooms[-1])
    K = max(len(row["tiles"]) for row in made) + 1
    T = max(len(row["tokens"]) for row in made) + 2
    budgets = {"T": T, "K": K, "P": 4, "H": 8, "W": 8}
    batch = rows.collate([*made, None], rows.fusion_fields(settings), budgets)
    index, inverse = batch["visual_index"], batch["visual_inverse"]
    if most is None:
        index, inverse = index[..., None], inverse[..., None]
    weight = batch.get("visual_weight", (index >= 0).astype(np.float32))
    back = batch.get("visual_inverse_weight", (inverse >= 0).astype(np.float32))
    for b, room in enumerate([*rooms, []]):
        shows, shown = np.zeros((2, T, 4 * K), np.float32)
        at = np.nonzero((index[b] >= 0) & (index[b] < 4 * K))
        np.add.at(shows, (at[0], index[b][at]), weight[b][at])
        at = np.nonzero(inverse[b] >= 0)
        np.add.at(shown, (inverse[b][at], at[0]), back[b][at])
        np.testing.assert_array_equal(shows, shown)
        newlines = index[b, :, 0] == 4 * K
        np.testing.assert_allclose(shows.sum(1) + newlines, (index[b, :, 0] >= 0), atol=1e-6)
        assert (index[b, :, 0] >= 0).sum() == sum(room)
    parts = [(a > 0).sum(-1).max() for name, a in batch.items() if name.endswith("weight")]
    assert parts == ([] if most is None else [4, 2])  # a position shows four features, a feature stands twice


@pytest.mark.parametrize("family", FAMILIES)
def test_one_collate_makes_a_batch_of_every_family(family: str) -> None:
    fields = FAMILIES[family]
    rng = np.random.default_rng(0)
    small = BUDGETS | {"T": 5, "S": 3, "K": 2, "C": 1}
    made = [
        {name: rng.integers(1, 6, field.shape(sizes)).astype(field.dtype) for name, field in fields.items()}
        for sizes in (small, BUDGETS)
    ]
    batch = rows.collate([*made, None], fields, BUDGETS)
    assert set(batch) == set(fields)
    for name, field in fields.items():
        shape = field.shape(BUDGETS)
        assert batch[name].shape == (3, *shape) and batch[name].dtype == field.dtype
        inside = tuple(slice(size) for size in field.shape(small))
        assert (batch[name][0][inside] == made[0][name]).all() and (batch[name][1] == made[1][name]).all()
        batch[name][0][inside] = field.pad
        assert (batch[name][0] == field.pad).all() and (batch[name][2] == field.pad).all()


def of_sample(family: str, budgets: dict[str, int], images: int) -> rows.Row:
    """A sample's arrays of a family: random, but what is numbered is numbered as in a row of its own."""
    rng = np.random.default_rng(budgets["T"])
    row = {}
    for name, field in FAMILIES[family].items():
        shape = field.shape(budgets)
        row[name] = rng.integers(1, 6, shape).astype(field.dtype)
        if field.counts == "segments":
            row[name] = np.ones(shape, np.int32)
        elif field.counts == "images":
            row[name] = (np.arange(shape[0]) % images + field.first).astype(np.int32)
            row[name][0] = field.first - 1 if field.first else 0
        elif field.counts is not None:
            row[name] = rng.integers(-1, budgets["K"] * budgets["P"], shape).astype(np.int32)
    if "visual_index" in row:
        row["visual_index"][-1] = NEWLINE
    return row


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_every_family_share_a_row(family: str) -> None:
    """Each finds its own arrays again: at an offset of place, and what it numbers at an offset of number."""
    fields = FAMILIES[family]
    sizes = [BUDGETS | {"T": 5, "S": 3, "K": 2, "C": 1}, BUDGETS | {"T": 4, "S": 4, "K": 1, "C": 1}, BUDGETS]
    images = [2, 1, 3]
    made = [of_sample(family, size, count) for size, count in zip(sizes, images, strict=True)]
    row = rows.join(made, fields)
    begun = dict.fromkeys((*BUDGETS, "K*P", "segments", "images"), 0)
    for sample, size, count in zip(made, sizes, images, strict=True):
        for name, field in fields.items():
            value = sample[name].astype(np.int64) if field.counts is not None else sample[name]
            at = (slice(begun[field.axes[0]], begun[field.axes[0]] + len(value)), *map(slice, value.shape[1:]))
            numbered = field.counts is not None and value >= field.first
            raised = np.where(numbered & (value != NEWLINE), value + begun.get(field.counts, 0), value)
            np.testing.assert_array_equal(row[name][at], raised)
        for axis in ("T", "S", "K", "C"):
            begun[axis] += size[axis]
        begun["K*P"] += size["K"] * size["P"]
        begun["segments"] += 1
        begun["images"] += count
    for name, field in fields.items():
        assert row[name].dtype == field.dtype and len(row[name]) == begun[field.axes[0]]
    assert rows.join(made[:1], fields) is made[0] and rows.join([], fields) == {}
    whole = {**BUDGETS, "T": 20, "S": 20, "K": 8, "C": 4}
    batch = rows.collate([row, None], fields, whole)
    if "visual_index" in batch:
        assert (batch["visual_index"][0] == 8 * 2).sum() >= 3  # newlines of all three


def test_the_fields_are_those_of_the_design() -> None:
    text = {"tokens", "positions", "segment_ids", "labels"}
    place = {"visual_index", "visual_inverse"}
    assert set(rows.PREFIX_FUSION) == text | place | {"tiles", "tile_image"}
    assert set(rows.INTERPOLATED_FUSION) - set(rows.PREFIX_FUSION) == {"visual_weight", "visual_inverse_weight"}
    assert set(rows.CROSS_ATTENTION) == text | {"tiles", "tile_image", "media_index"}
    encoder = {"encoder_tokens", "encoder_positions", "encoder_segment_ids"}
    assert set(rows.ENCODER_DECODER) == text | place | encoder | {"tiles", "tile_image"}
    assert set(rows.DUAL_ENCODER) == {"tiles", "tile_image", "tokens", "segment_ids"}
    assert set(rows.SINGLE_STREAM) == text | {"regions", "boxes", "region_segment_ids"}


def test_a_row_that_does_not_fit_is_an_error() -> None:
    row = rows.fusion_row(*text(*range(10)), [], [], ImageSettings(2, 2))
    with pytest.raises(ValueError, match="does not fit"):
        rows.collate([row], rows.PREFIX_FUSION, BUDGETS)
    with pytest.raises(ValueError, match="the batch"):
        rows.collate([{"tokens": row["tokens"]}], rows.PREFIX_FUSION, BUDGETS)
