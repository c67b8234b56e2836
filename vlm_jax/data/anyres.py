"""The anyres layout of LLaVA-1.6: into which tiles an image is cut, and which of their features stand in the token row.

From haotian-liu/LLaVA (llava/mm_utils.py, llava/model/llava_arch.py); the bound on features from LLaVA-VL/LLaVA-NeXT;
the other rounding from transformers' llava_next. All of it follows from an image's size. Sizes are (width, height).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from vlm_jax.data.resize import resize

Size = tuple[int, int]
NEWLINE = np.iinfo(np.int32).max  # a place where the learnt vector stands that ends a row of patches


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the size of an image decides, before a pixel of it is decoded.

    tiles: k. With more than one, the first is the whole image.
    places: int32 [n], what stands at each of its n positions: `tile * P + feature`, or NEWLINE. Interpolated features
      have [n, 4], the four that each is made of.
    weights: float32 [n, 4] of the four; None where there is one.
    """

    tiles: int
    places: np.ndarray
    weights: np.ndarray | None = None

    def first(self, count: int) -> Layout:
        """The same tiles with the first `count` places alone; a feature that has lost its place stands nowhere."""
        weights = None if self.weights is None else self.weights[:count]
        return dataclasses.replace(self, places=self.places[:count], weights=weights)


def best_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that keeps most of the image's pixels, then the one with the least room to spare; of equals the first
    (`select_best_resolution`)."""
    width, height = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def fit(size: Size, canvas: Size) -> Size:
    """The image's size once it fills one side of the canvas (`resize_and_pad_image`)."""
    (width, height), (wide, high) = size, canvas
    if wide / width < high / height:
        return wide, min(math.ceil(height * (wide / width)), high)
    return min(math.ceil(width * (high / height)), wide), high


def cut(pixels: np.ndarray, canvas: Size, side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> [1 + n, side, side, 3]: the whole image squashed, then the n tiles of the canvas, row by row,
    with the image in its middle and black around it."""
    wide, high = fit((pixels.shape[1], pixels.shape[0]), canvas)
    left, top = (canvas[0] - wide) // 2, (canvas[1] - high) // 2
    board = np.zeros((canvas[1], canvas[0], 3), np.uint8)
    board[top : top + high, left : left + wide] = resize(pixels, (wide, high))
    rows, columns = canvas[1] // side, canvas[0] // side
    tiles = np.empty((1 + rows * columns, side, side, 3), np.uint8)
    tiles[0] = resize(pixels, (side, side))
    tiles[1:].reshape(rows, columns, side, side, 3)[...] = board.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return tiles


def flat(tiles: int, features: int) -> Layout:
    """All features of all tiles in their order."""
    return Layout(tiles, np.arange(tiles * features, dtype=np.int32))


def spatial(grid: Size, features: int) -> Layout:
    """The whole image, then the tiles' features row by row of the image. `grid` counts tiles (columns, rows)."""
    index = _index(grid, features)
    return Layout(1 + grid[0] * grid[1], np.append(np.arange(features), index).astype(np.int32))


def unpadded(size: Size, grid: Size, features: int, *, rounded: bool, most: int | None = None) -> Layout:
    """As `spatial`, without the rows or columns of padding, and a newline after each row.

    rounded: numbers are rounded to seven digits before they are cut to integers (transformers), or not (LLaVA).
    most: shrinks maps of more than about this number of tiles to it (`anyres_max_N`), bilinearly.
    """
    index = _unpad(_index(grid, features), size, rounded)
    rows, columns = index.shape
    over = math.sqrt(rows * columns / (most * features)) if most else 0.0
    if over <= 1.1:
        lines = np.append(index, np.full((rows, 1), NEWLINE), axis=1)
        return Layout(1 + grid[0] * grid[1], np.append(np.arange(features), lines).astype(np.int32))
    # Twice the neighbours of two axes. Since maps shrink, no feature is a neighbour of more than two along an axis.
    (near_rows, row_weights), (near_columns, column_weights) = (
        _neighbours(old, max(1, int(old // over))) for old in (rows, columns)
    )
    four = index[near_rows[:, None, :, None], near_columns[None, :, None, :]].reshape(len(near_rows), -1, 4)
    weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    lines = np.append(four, np.full((len(four), 1, 4), NEWLINE), axis=1).reshape(-1, 4)
    line_weights = np.append(weights.reshape(four.shape), np.full((len(four), 1, 4), [1.0, 0, 0, 0]), axis=1)
    whole = np.repeat(np.arange(features)[:, None], 4, axis=1)
    return Layout(
        1 + grid[0] * grid[1],
        np.append(whole, lines, axis=0).astype(np.int32),
        np.append(np.full((features, 4), [1.0, 0, 0, 0]), line_weights.reshape(-1, 4), axis=0).astype(np.float32),
    )


def _index(grid: Size, features: int) -> np.ndarray:
    """Numbers of the features of a grid of tiles as they lie in the image, [rows, columns], beginning with tile 1."""
    (columns, rows), side = grid, math.isqrt(features)
    numbers = features + np.arange(rows * columns * features).reshape(rows, columns, side, side)
    return numbers.swapaxes(1, 2).reshape(rows * side, columns * side)


def _unpad(index: np.ndarray, size: Size, rounded: bool) -> np.ndarray:
    """Without what the canvas added to the image. An odd rest stays (`unpad_image`)."""
    (rows, columns), (width, height) = index.shape, size
    if width / height > columns / rows:
        inner = height * (columns / width)
        off = (rows - int(round(inner, 7) if rounded else inner)) // 2
        return index[off : rows - off]
    inner = width * (rows / height)
    off = (columns - int(round(inner, 7) if rounded else inner)) // 2
    return index[:, off : columns - off]


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and weights [new, 2] of what each value of a shrunk axis is made of, as torch's bilinear interpolation
    with align_corners=False makes it."""
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    low = at.astype(np.int64)
    return np.stack([low, np.minimum(low + 1, old - 1)], 1), np.stack([1 - (at - low), at - low], 1)
