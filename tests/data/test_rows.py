"""Rows and their batches, for every family of docs/design.md."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_jax.data import rows
from vlm_jax.data.conversation import IMAGE_ID, UNTRAINED

BUDGETS = {"T": 9, "S": 7, "K": 3, "C": 2, "F": 4, "H": 2, "W": 2, "P": 2}
FAMILIES = {
    "prefix_fusion": rows.PREFIX_FUSION,
    "cross_attention": rows.CROSS_ATTENTION,
    "encoder_decoder": rows.ENCODER_DECODER,
    "dual_encoder": rows.DUAL_ENCODER,
    "captioning_dual_encoder": rows.CAPTIONING_DUAL_ENCODER,
    "single_stream": rows.SINGLE_STREAM,
}


def tile(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 2, 2, 3), value, np.uint8)


def test_a_row_places_every_feature_and_shifts_the_labels() -> None:
    ids = np.array([1, IMAGE_ID, 5, IMAGE_ID, 6, 2], np.int32)
    labels = np.array([UNTRAINED] * 4 + [6, 2], np.int32)
    row = rows.fusion_row(ids, labels, [tile(1), tile(2, count=2)], patches_per_tile=2, size=2)
    assert row["tokens"].tolist() == [1, 0, 0, 5, 0, 0, 0, 0, 6, 2]
    assert row["visual_index"].tolist() == [-1, 0, 1, -1, 2, 3, 4, 5, -1, -1]
    assert row["labels"].tolist() == [UNTRAINED] * 7 + [6, 2, UNTRAINED]
    assert row["positions"].tolist() == list(range(10)) and (row["segment_ids"] == 1).all()
    assert row["tile_image"].tolist() == [0, 1, 1] and row["tiles"][:, 0, 0, 0].tolist() == [1, 2, 2]
    assert (row["visual_index"][row["visual_inverse"]] == np.arange(6)).all()
    assert all(row[name].dtype == field.dtype for name, field in rows.PREFIX_FUSION.items())


def test_a_row_without_images_has_no_tiles() -> None:
    row = rows.fusion_row(np.array([1, 5], np.int32), np.array([UNTRAINED, 5], np.int32), [], 2, size=2)
    assert row["tiles"].shape == (0, 2, 2, 3) and row["visual_inverse"].shape == (0,)
    assert row["labels"].tolist() == [5, UNTRAINED]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_collate_makes_a_batch_of_every_family(family: str) -> None:
    fields = FAMILIES[family]
    rng = np.random.default_rng(0)
    small = BUDGETS | {"T": 5, "S": 3, "K": 2, "C": 1}
    made = [
        {name: rng.integers(1, 9, field.shape(sizes)).astype(field.dtype) for name, field in fields.items()}
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


def test_the_fields_are_those_of_the_design() -> None:
    text = {"tokens", "positions", "segment_ids", "labels"}
    place = {"visual_index", "visual_inverse"}
    assert set(rows.PREFIX_FUSION) == text | place | {"tiles", "tile_image"}
    assert set(rows.CROSS_ATTENTION) == text | {"tiles", "tile_image", "media_index"}
    encoder = {"encoder_tokens", "encoder_positions", "encoder_segment_ids"}
    assert set(rows.ENCODER_DECODER) == text | place | encoder | {"tiles", "tile_image"}
    assert set(rows.DUAL_ENCODER) == {"tiles", "tile_image", "tokens", "segment_ids"}
    assert set(rows.SINGLE_STREAM) == text | {"regions", "boxes", "region_segment_ids"}


def test_a_row_that_does_not_fit_is_an_error() -> None:
    row = rows.fusion_row(np.arange(10, dtype=np.int32), np.arange(10, dtype=np.int32), [], 2, size=2)
    with pytest.raises(ValueError, match="does not fit"):
        rows.collate([row], rows.PREFIX_FUSION, BUDGETS)
    with pytest.raises(ValueError, match="the batch"):
        rows.collate([{"tokens": row["tokens"]}], rows.PREFIX_FUSION, BUDGETS)
