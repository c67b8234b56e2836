"""Rows and batches: named arrays, each with a budget for every axis (docs/design.md).

A row is a dict of numpy arrays of their true sizes. A batch is rows padded to the budgets of its bucket and stacked.
What a family's batch consists of is a table of fields; a batch of any family is made by the one `collate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from vlm_jax.data.conversation import IMAGE_ID, UNTRAINED

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch, without the leading axis of rows.

    axes: the budget of each axis: T tokens, S encoder tokens, K tiles, views or regions, C texts, F features of a
      region, H and W pixels, P features per tile, a product of them as in "K*P", or a number.
    pad: what stands beyond the row's own size.
    """

    dtype: type[np.generic]
    axes: tuple[str | int, ...]
    pad: int = 0

    def shape(self, budgets: Mapping[str, int]) -> tuple[int, ...]:
        """The sizes of the axes under these budgets."""
        return tuple(
            axis if isinstance(axis, int) else math.prod(budgets[name] for name in axis.split("*"))
            for axis in self.axes
        )


TEXT = {
    "tokens": Field(np.int32, ("T",)),
    "positions": Field(np.int32, ("T",)),
    "segment_ids": Field(np.int32, ("T",)),
    "labels": Field(np.int32, ("T",), UNTRAINED),
}
TILES = {
    "tiles": Field(np.uint8, ("K", "H", "W", 3)),
    "tile_image": Field(np.int32, ("K",)),
}


def _placement(tokens: str) -> dict[str, Field]:
    return {"visual_index": Field(np.int32, (tokens,), -1), "visual_inverse": Field(np.int32, ("K*P",), -1)}


PREFIX_FUSION = TEXT | TILES | _placement("T")
CROSS_ATTENTION = TEXT | TILES | {"media_index": Field(np.int32, ("T",))}
ENCODER_DECODER = (
    TEXT | TILES | _placement("S") | {f"encoder_{name}": Field(np.int32, ("S",)) for name in list(TEXT)[:3]}
)
DUAL_ENCODER = TILES | {
    "tokens": Field(np.int32, ("C", "T")),
    "segment_ids": Field(np.int32, ("C", "T")),
}
CAPTIONING_DUAL_ENCODER = DUAL_ENCODER | {"labels": Field(np.int32, ("C", "T"), UNTRAINED)}  # CoCa
SINGLE_STREAM = TEXT | {
    "regions": Field(np.float32, ("K", "F")),
    "boxes": Field(np.float32, ("K", 5)),
    "region_segment_ids": Field(np.int32, ("K",)),
}


def collate(rows: Sequence[Row | None], fields: Mapping[str, Field], budgets: Mapping[str, int]) -> Row:
    """Stacks rows, padded to the budgets: every field as [len(rows), ...]. None is a row of padding.

    Raises ValueError when a row does not have exactly the fields, or is larger than a budget.
    """
    batch = {}
    for name, field in fields.items():
        shape = field.shape(budgets)
        array = np.full((len(rows), *shape), field.pad, field.dtype)
        for target, row in zip(array, rows, strict=True):
            if row is None:
                continue
            if set(row) != set(fields):
                raise ValueError(f"a row has {sorted(row)}, the batch {sorted(fields)}")
            value = row[name]
            if value.ndim != len(shape) or any(size > budget for size, budget in zip(value.shape, shape, strict=True)):
                raise ValueError(f"{name} {value.shape} of a row does not fit into {shape}")
            target[tuple(slice(size) for size in value.shape)] = value
        batch[name] = array
    return batch


def fusion_row(
    input_ids: np.ndarray, labels: np.ndarray, images: Sequence[np.ndarray], patches_per_tile: int, size: int
) -> Row:
    """A prefix-fusion row of one sample.

    input_ids, labels: int32 [L], aligned; -200 marks where an image stands.
    images: the tiles uint8 [k, size, size, 3] of each, in the order of their positions.
    patches_per_tile: P, the visual features that the connector gives for a tile.
    Returns the arrays of `PREFIX_FUSION`: an image is expanded to all features of its tiles, `labels` are shifted (the
      target of a position stands at the position), so that the last has none. A text-only row has zero tiles.
    """
    tiles_of = [len(tiles) for tiles in images]
    length = expanded_length(input_ids, tiles_of, patches_per_tile)
    repeats = np.ones(len(input_ids), np.int64)
    repeats[input_ids == IMAGE_ID] = np.array(tiles_of, np.int64) * patches_per_tile
    tokens = np.repeat(input_ids, repeats)
    visual = tokens == IMAGE_ID
    inverse = np.flatnonzero(visual).astype(np.int32)
    index = np.full(length, -1, np.int32)
    index[visual] = np.arange(len(inverse))
    return {
        "tokens": np.where(visual, 0, tokens).astype(np.int32),
        "positions": np.arange(length, dtype=np.int32),
        "segment_ids": np.ones(length, np.int32),
        "labels": np.append(np.repeat(labels, repeats)[1:], UNTRAINED).astype(np.int32),
        "tiles": np.concatenate([np.empty((0, size, size, 3), np.uint8), *images]),
        "tile_image": np.repeat(np.arange(len(images), dtype=np.int32), tiles_of),
        "visual_index": index,
        "visual_inverse": inverse,
    }


def expanded_length(input_ids: np.ndarray, tiles_of: Sequence[int], patches_per_tile: int) -> int:
    """Positions of a sample once each image holds the features of its tiles."""
    places = int((input_ids == IMAGE_ID).sum())
    if places != len(tiles_of):
        raise ValueError(f"{places} places for {len(tiles_of)} images")
    return len(input_ids) - places + sum(tiles_of) * patches_per_tile
