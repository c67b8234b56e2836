"""Samples that share a row give the loss and the gradients that they give in rows of their own."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from vlm_jax.data import ImageSettings
from vlm_jax.data.anyres import NEWLINE
from vlm_jax.data.conversation import IMAGE_ID, UNTRAINED
from vlm_jax.data.images import layout, process
from vlm_jax.data.rows import Row, collate, fusion_fields, fusion_row, join

SIDE = 8  # of a tile, of 2 x 2 features
ANYRES = ImageSettings(SIDE, 4, "anyres", "spatial_unpad", ((16, 8), (8, 16), (16, 16)), several="pad")
BOUNDED = ImageSettings(SIDE, 4, "anyres", "spatial_unpad", ((16, 16), (24, 24), (32, 32)), max_tiles=2)
SHAPES: list[list[tuple[int, int]]] = [[(40, 30)], [], [(9, 30), (8, 8), (20, 20)], [(30, 9)], [], [(8, 20)]]
PACKED = [[0, 1], [2, 3, 4], [5]]


def samples(settings: ImageSettings) -> list[Row]:
    """One image, text alone, several images (which are padded squares), a wide one, text, a high one."""
    made = []
    for number, shapes in enumerate(SHAPES):
        rng = np.random.default_rng(number)
        words = rng.integers(1, 32, 5 + 2 * number)
        ids = np.concatenate([[1], *[[IMAGE_ID, word] for word in words[: len(shapes)]], words]).astype(np.int32)
        labels = np.where((ids == IMAGE_ID) | (rng.random(len(ids)) < 0.3), UNTRAINED, ids).astype(np.int32)
        own = settings.of(len(shapes))
        pictures = [rng.integers(0, 256, (high, wide, 3), dtype=np.uint8) for wide, high in shapes]
        layouts = [layout(shape, own) for shape in shapes]
        tiles = [process(picture, own) for picture in pictures]
        made.append(fusion_row(ids, labels, tiles, layouts, settings))
    return made


def batch(rows: list[Row], settings: ImageSettings, count: int) -> dict[str, np.ndarray]:
    """[1, count, ...]; what is left over is rows of padding."""
    budgets = {
        "T": max(len(row["tokens"]) for row in rows) + 3,
        "K": max(len(row["tiles"]) for row in rows) + 1,
        "P": 4,
        "H": SIDE,
        "W": SIDE,
    }
    arrays = collate([*rows, *[None] * (count - len(rows))], fusion_fields(settings), budgets)
    return {name: array[None] for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("settings", "window", "norm"),
    [(ANYRES, None, "rank_mean"), (ANYRES, 7, "global_tokens"), (BOUNDED, None, "global_tokens")],
    ids=["ranks", "window", "interpolated"],
)
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(
    tiny: Any, settings: ImageSettings, window: int | None, norm: str
) -> None:
    changes = {"sliding_window": window}
    family = tiny.family("clip_vit", decoder="mistral", newline=True, decoder_changes=changes)
    params = tiny.params(family.bound.abstract)
    made = samples(settings)
    padded = batch(made, settings, 6)
    packed = batch([join([made[i] for i in row], fusion_fields(settings)) for row in PACKED], settings, 3)
    assert (packed["visual_index"] == packed["visual_inverse"].shape[2]).any()  # newlines
    assert not (packed["visual_index"] == NEWLINE).any()
    assert packed["segment_ids"].max(-1).tolist() == [[2, 3, 1]]

    def loss(params: Any, arrays: Any, packed: bool) -> Any:
        weights, total = family.weigh(arrays, norm=norm, ranks=3)
        one = {name: array[0] for name, array in arrays.items()}
        return family.loss(params, {}, one, weights[0], None, packed=packed)[0] / total

    step, results = jax.jit(jax.value_and_grad(loss), static_argnums=2), []
    for arrays in (padded, packed):
        value, grads = step(params, arrays, arrays is packed)
        results.append((float(value), tiny.on_host(grads)))
    (value, grads), (packed_value, packed_grads) = results
    assert packed_value == pytest.approx(value, rel=1e-5) and value > 0.1
    for path, grad in grads.items():
        assert np.abs(packed_grads[path] - grad).max() <= 1e-5 * max(1.0, np.abs(grad).max()), path
    moved = [path for path, grad in grads.items() if np.abs(grad).max() > 1e-6]
    assert {path.split("/")[0] for path in moved} == {"vision", "connector", "newline", "decoder"}
