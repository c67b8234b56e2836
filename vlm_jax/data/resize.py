"""Pillow's bicubic resize of RGB images, as two products with banded matrices: the same pixels in half of the time.

Pillow (libImaging/Resample.c) filters the rows, rounds to uint8, then filters the columns and rounds again, with
weights of 22 fractional bits. A row of a banded matrix holds a few neighbours, so each product is cut into small dense
ones along the diagonal, and only the part of the image that a crop needs is computed. About one value in 50,000 falls
on the other side of a rounding and differs by one level from Pillow's.
"""

from __future__ import annotations

import functools
import threading

import numpy as np
from PIL import Image

# Output pixels per small product: with more of them the zeros of the band cost more than the calls.
ROW_BLOCK = 5  # of a row, three channels each: 15 columns, just below what the kernels of OpenBLAS work on at once
COLUMN_BLOCK = 8
# OpenBLAS starts its threads above this many multiplications. We want one image per thread, and no lock.
ONE_THREAD = 2**18


def resize(pixels: np.ndarray, size: tuple[int, int], crop: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Resizes an image, uint8 [H, W, 3], to `size` (width, height), bicubic, and returns the `crop` of it.

    crop: (left, top, width, height) within the resized image; default all of it.
    Returns uint8 [height, width, 3], C-contiguous.
    """
    (old_height, old_width), (new_width, new_height) = pixels.shape[:2], size
    left, top, width, height = crop or (0, 0, *size)
    if (old_width, old_height) == size == (width, height):
        return pixels.copy()
    if old_height > new_height and old_height - new_height > 2 * (old_width - new_width):
        # Pillow filters the columns first where that is much less work (since 13.0, Pillow#9549).
        resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        return np.array(resized.crop((left, top, left + width, top + height)))
    columns, row_bands = _bands(old_width, new_width, left, width, ROW_BLOCK, 3)
    rows, column_bands = _bands(old_height, new_height, top, height, COLUMN_BLOCK, 1)
    read = pixels.reshape(old_height, old_width * 3)[rows, columns.start * 3 : columns.stop * 3]

    chunk = min(len(read), max(1, ONE_THREAD // max(weights.size for _, _, weights in row_bands)))
    source, filtered, result = _scratch.take((chunk, read.shape[1]), (len(read), width * 3), (height, width * 3))
    for first in range(0, len(read), chunk):
        some = read[first : first + chunk]
        np.copyto(source[: len(some)], some)
        target = filtered[first : first + chunk]
        for inputs, outputs, weights in row_bands:
            np.matmul(source[: len(some), inputs], weights, out=target[:, outputs])
    # Pillow rounds halves up, and enlarging to twice the size has many of them.
    np.clip(np.add(filtered, 0.5, out=filtered), 0, 255.5, out=filtered)
    np.floor(filtered, out=filtered)

    for inputs, outputs, weights in column_bands:
        np.matmul(weights.T, filtered[inputs], out=result[outputs])
    np.clip(np.add(result, 0.5, out=result), 0, 255.5, out=result)
    return result.astype(np.uint8).reshape(height, width, 3)


class _Scratch(threading.local):
    """Memory for what lies between, kept by each thread: fresh pages from the system cost as much as the arithmetic."""

    floats = np.empty(0, np.float32)

    def take(self, *shapes: tuple[int, int]) -> list[np.ndarray]:
        stops = np.cumsum([rows * columns for rows, columns in shapes]).tolist()
        if self.floats.size < stops[-1]:
            self.floats = np.empty(stops[-1], np.float32)
        starts = [0, *stops]
        return [self.floats[i:j].reshape(shape) for i, j, shape in zip(starts, stops, shapes, strict=False)]


_scratch = _Scratch()


@functools.lru_cache(maxsize=256)
def _bands(
    old: int, new: int, first: int, count: int, block: int, channels: int
) -> tuple[slice, list[tuple[slice, slice, np.ndarray]]]:
    """The filter of one axis for output pixels `first : first + count`, cut along its diagonal.

    Returns the range of input pixels that it reads, and pieces (inputs, outputs, weights [inputs, outputs]) whose
    slices count values (pixels times channels) from the start of that range and of the output.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (first + np.arange(count) + 0.5) * scale
    low = np.maximum((centre - 2 * stretch + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + 2 * stretch + 0.5).astype(np.int64), old)
    tap = low[:, None] + np.arange((high - low).max())
    weights = np.where(tap < high[:, None], _bicubic((tap + 0.5 - centre[:, None]) / stretch), 0.0)
    weights = np.rint(weights / weights.sum(1, keepdims=True) * 2**22) / 2**22

    number = np.arange(count) // block
    start, stop = low[::block], np.append(high[block - 1 : -1 : block], high[-1])
    span = (stop - start).max()
    start = np.minimum(start, high[-1] - span)
    output, offset = np.nonzero(weights)
    dense = np.zeros((len(start), span, block), np.float32)
    dense[number[output], tap[output, offset] - start[number[output]], output % block] = weights[output, offset]
    if channels > 1:
        dense = dense[:, :, None, :, None] * np.eye(channels, dtype=np.float32)[:, None]
        dense = dense.reshape(len(start), span * channels, block * channels)
    pieces = []
    for i, at in enumerate((start - low[0]).tolist()):
        outputs = slice(i * block * channels, min((i + 1) * block, count) * channels)
        inputs = slice(at * channels, (at + span) * channels)
        pieces.append((inputs, outputs, dense[i, :, : outputs.stop - outputs.start]))
    return slice(int(low[0]), int(high[-1])), pieces


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys's cubic convolution with a = -0.5, as in Pillow."""
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
