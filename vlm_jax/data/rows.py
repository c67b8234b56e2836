"""Rows and batches: named arrays, each with a budget for every axis (docs/design.md).

A row is a dict of numpy arrays of their true sizes. A batch is rows padded to the budgets of its bucket and stacked.
What a family's batch consists of is a table of fields; a batch of any family is made by the one `collate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vlm_jax.data.anyres import NEWLINE, Layout
from vlm_jax.data.conversation import IMAGE_ID, UNTRAINED
from vlm_jax.data.images import ImageSettings

Row = dict[str, np.ndarray]
LARGEST = np.iinfo(np.int32).max  # NEWLINE is this number, and stays it


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a batch, without the leading axis of rows.

    axes: the budget of each axis: T tokens, S encoder tokens, K tiles, views or regions, C texts, F features of a
      region, H and W pixels, P features per tile, a product of them as in "K*P", or a number.
    pad: what stands beyond the row's own size.
    most: a budget; greater values become it. So a row can hold a number that only its batch decides.
    counts: what the values are numbers of, where samples that share a row must not share numbers: "segments", "images",
      or the axis whose places they name. first: the lowest of these numbers; what is below it is a mark and stays.
    """

    dtype: type[np.generic]
    axes: tuple[str | int, ...]
    pad: int = 0
    most: str | None = None
    counts: str | None = None
    first: int = 0

    def shape(self, budgets: Mapping[str, int]) -> tuple[int, ...]:
        """The sizes of the axes under these budgets."""
        return tuple(axis if isinstance(axis, int) else _size(axis, budgets) for axis in self.axes)


def _size(axis: str, budgets: Mapping[str, int]) -> int:
    return math.prod(budgets[name] for name in axis.split("*"))


TEXT = {
    "tokens": Field(np.int32, ("T",)),
    "positions": Field(np.int32, ("T",)),
    "segment_ids": Field(np.int32, ("T",), counts="segments", first=1),
    "labels": Field(np.int32, ("T",), UNTRAINED),
}
TILES = {
    "tiles": Field(np.uint8, ("K", "H", "W", 3)),
    "tile_image": Field(np.int32, ("K",), counts="images"),
}


def _placement(tokens: str, *, four: bool = False) -> dict[str, Field]:
    """Which feature, or which `four` with their weights, each position shows, and the inverse of that."""
    several: tuple[int, ...] = (4,) if four else ()
    fields = {
        "visual_index": Field(np.int32, (tokens, *several), -1, most="K*P", counts="K*P"),
        "visual_inverse": Field(np.int32, ("K*P", *several), -1, counts=tokens),
    }
    if four:
        fields["visual_weight"] = Field(np.float32, (tokens, 4))
        fields["visual_inverse_weight"] = Field(np.float32, ("K*P", 4))
    return fields


PREFIX_FUSION = TEXT | TILES | _placement("T")
INTERPOLATED_FUSION = TEXT | TILES | _placement("T", four=True)  # anyres_max_N
CROSS_ATTENTION = TEXT | TILES | {"media_index": Field(np.int32, ("T",), counts="images", first=1)}
ENCODER = {f"encoder_{name}": dataclasses.replace(TEXT[name], axes=("S",)) for name in list(TEXT)[:3]}
ENCODER_DECODER = TEXT | TILES | _placement("S") | ENCODER
DUAL_ENCODER = TILES | {
    "tokens": Field(np.int32, ("C", "T")),
    "segment_ids": Field(np.int32, ("C", "T"), counts="segments", first=1),
}
CAPTIONING_DUAL_ENCODER = DUAL_ENCODER | {"labels": Field(np.int32, ("C", "T"), UNTRAINED)}  # CoCa
SINGLE_STREAM = TEXT | {
    "regions": Field(np.float32, ("K", "F")),
    "boxes": Field(np.float32, ("K", 5)),
    "region_segment_ids": Field(np.int32, ("K",), counts="segments", first=1),
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
        batch[name] = array if field.most is None else np.minimum(array, _size(field.most, budgets), dtype=field.dtype)
    return batch


def join(rows: Sequence[Row], fields: Mapping[str, Field]) -> Row:
    """One row of several samples: every field end to end along its first axis, and numbers counted on. Of no samples,
    an empty row: `{}`.

    The last position of a sample has no label, positions restart with each, and no two share a segment or an image;
    other axes grow to the largest.
    """
    if len(rows) <= 1:
        return rows[0] if rows else {}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in fields}
    begun: Counter[str] = Counter()
    for row in rows:
        for name, field in fields.items():
            value = row[name]
            if field.counts is not None:
                raised = np.minimum(value.astype(np.int64) + begun[field.counts], LARGEST).astype(field.dtype)
                value = np.where(value >= field.first, raised, value)
            parts[name].append(value)
        begun.update(_extents(row, fields))
    return {name: _end_to_end(parts[name], field) for name, field in fields.items()}


def _extents(row: Row, fields: Mapping[str, Field]) -> dict[str, int]:
    """How far a row takes each first axis, and how many segments and images it has."""
    extents = {str(field.axes[0]): len(row[name]) for name, field in fields.items()}
    numbers: dict[str, int] = {}
    for name, field in fields.items():
        if field.counts is not None and field.counts not in extents:
            count = int(row[name].max(initial=field.first - 1)) + 1 - field.first
            numbers[field.counts] = max(numbers.get(field.counts, 0), count)
    return extents | numbers


def _end_to_end(parts: Sequence[np.ndarray], field: Field) -> np.ndarray:
    inner = np.max([part.shape[1:] for part in parts], axis=0).astype(int).tolist()
    if all(list(part.shape[1:]) == inner for part in parts):
        return np.concatenate(parts)
    room = [[(0, 0), *((0, most - size) for size, most in zip(one.shape[1:], inner, strict=True))] for one in parts]
    padded = [np.pad(part, pad, constant_values=field.pad) for part, pad in zip(parts, room, strict=True)]
    return np.concatenate(padded)


def fusion_fields(settings: ImageSettings) -> Mapping[str, Field]:
    """The fields of the rows that `fusion_row` makes."""
    return INTERPOLATED_FUSION if settings.weighted else PREFIX_FUSION


def fusion_row(
    input_ids: np.ndarray,
    labels: np.ndarray,
    tiles: Sequence[np.ndarray],
    layouts: Sequence[Layout],
    settings: ImageSettings,
) -> Row:
    """A prefix-fusion row of one sample.

    input_ids, labels: int32 [L], aligned; -200 marks where an image stands.
    tiles: those uint8 [k, size, size, 3] of each image, in the order of their positions. layouts: of each image.
    Returns the arrays of `fusion_fields(settings)`: an image is expanded to its places, `labels` are shifted (the
      target of a position stands at the position), so that the last has none. A text-only row has zero tiles. A newline
      is `NEWLINE` in the row, and K*P once `collate` knows K.
    """
    repeats = widths(input_ids, layouts)
    length = int(repeats.sum())
    counts = [one.tiles for one in layouts]
    if counts != [len(one) for one in tiles]:
        raise ValueError(f"{[len(one) for one in tiles]} tiles for layouts of {counts}")
    tokens = np.repeat(input_ids, repeats)
    visual = tokens == IMAGE_ID
    firsts = settings.features_per_tile * np.cumsum([0, *counts])  # of each image, and their end
    row = {
        "tokens": np.where(visual, 0, tokens).astype(np.int32),
        "positions": np.arange(length, dtype=np.int32),
        "segment_ids": np.ones(length, np.int32),
        "labels": np.append(np.repeat(labels, repeats)[1:], UNTRAINED).astype(np.int32),
        "tiles": np.concatenate([np.empty((0, settings.size, settings.size, 3), np.uint8), *tiles]),
        "tile_image": np.repeat(np.arange(len(layouts), dtype=np.int32), counts),
    }
    places = [
        np.where(one.places == NEWLINE, NEWLINE, one.places + at) for one, at in zip(layouts, firsts, strict=False)
    ]
    index, inverse = np.full(length, -1, np.int32), np.full(firsts[-1], -1, np.int32)
    if settings.weighted:
        return row | _place_four(visual, places, [one.weights for one in layouts], len(inverse))
    index[visual] = np.concatenate([[], *places])
    shown = np.flatnonzero(visual & (index != NEWLINE))
    inverse[index[shown]] = shown
    return row | {"visual_index": index, "visual_inverse": inverse}


def _place_four(
    visual: np.ndarray, places: Sequence[np.ndarray], weights: Sequence[np.ndarray | None], features: int
) -> Row:
    """The arrays of placement where a position may show four features, each with its weight."""
    index = np.full((len(visual), 4), -1, np.int32)
    weight = np.zeros((len(visual), 4), np.float32)
    one = np.array([[1, 0, 0, 0]], np.float32)
    index[visual] = np.concatenate([np.empty((0, 4)), *(p if p.ndim == 2 else p[:, None].repeat(4, 1) for p in places)])
    weight[visual] = np.concatenate(
        [one[:0], *(one.repeat(len(p), 0) if w is None else w for p, w in zip(places, weights, strict=True))]
    )
    inverse, inverse_weight = np.full((features, 4), -1, np.int32), np.zeros((features, 4), np.float32)
    position, slot = np.nonzero((weight > 0) & (index != NEWLINE))
    feature = index[position, slot]
    order = np.argsort(feature, kind="stable")
    ranked = feature[order]
    rank = np.arange(len(ranked)) - np.searchsorted(ranked, ranked)  # among those of the same feature, at most 3
    inverse[ranked, rank] = position[order]
    inverse_weight[ranked, rank] = weight[position, slot][order]
    return {
        "visual_index": index,
        "visual_inverse": inverse,
        "visual_weight": weight,
        "visual_inverse_weight": inverse_weight,
    }


def widths(input_ids: np.ndarray, layouts: Sequence[Layout]) -> np.ndarray:
    """int64 [L]: how many positions of the token row each id takes, an image all of its places.

    input_ids: int32 [L], -200 for an image. layouts: of each image. Raises ValueError where their numbers differ.
    """
    images = np.flatnonzero(input_ids == IMAGE_ID)
    if len(images) != len(layouts):
        raise ValueError(f"{len(images)} places for {len(layouts)} images")
    counts = np.ones(len(input_ids), np.int64)
    counts[images] = [len(one.places) for one in layouts]
    return counts
