"""The pairs of a block of images and a block of texts, tile by tile, in plain XLA: no array of all pairs exists.

The operations here, and their twins in `tpu.py`, know only *negative* pairs. Image i of the block and text j are
partners where j == i + `offset`; partners are left out, because `loss.py` adds them exactly and in float32, at O(N D).
On a CPU a tile is sized for the cache, and the factors are laid out so that no product has a large transposed one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.kernels.tiles import tile_size

# The logit of a pair that does not count: its exponential is 0 beside any real one, and no infinity becomes a NaN.
NOTHING = -1e30


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a tile: images and texts."""

    rows: int
    columns: int


def choose_tiles(images: int, texts: int, device: str) -> Tiles:
    """Tiles for n images and m texts, as large as `tiles.tile_size` lets them be on the device."""
    rows, columns = (tile_size(f"contrastive.xla.{name}", device) for name in ("rows", "columns"))
    return Tiles(_even(images, rows), _even(texts, columns))


def softmax_sums(
    image: jax.Array, text: jax.Array, scale: jax.Array, offset: jax.Array | int, *, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Logsumexp of the negatives of each image, [n], and of each text, [m]; about `NOTHING` where there are none.

    image [n, D], text [m, D], scale float32, offset int32. One pass over the tiles makes both.
    """
    cut = _Cut(image, text, scale, None, offset, tiles)

    def row(i, carry):
        def column(j, carry):
            top, total, tops, totals = carry
            logits = cut.logits(i, j)
            new = jnp.maximum(top, logits.max(1))
            total = total * jnp.exp(top - new) + jnp.exp(logits - new[:, None]).sum(1)
            old = tops[j]
            down = jnp.maximum(old, logits.max(0))
            sums = totals[j] * jnp.exp(old - down) + jnp.exp(logits - down).sum(0)
            return new, total, tops.at[j].set(down), totals.at[j].set(sums)

        out, tops, totals = carry
        init = cut.full(NOTHING, tiles.rows), cut.full(0, tiles.rows), tops, totals
        top, total, tops, totals = loop(cut.shape[1], column, init)
        return out.at[i].set(top + jnp.log(total)), tops, totals

    columns = (cut.shape[1], tiles.columns)
    init = cut.full(0, cut.shape[0], tiles.rows), cut.full(NOTHING, *columns), cut.full(0, *columns)
    rows, tops, totals = loop(cut.shape[0], row, init)
    return cut.of_images(rows), cut.of_texts(tops + jnp.log(totals))


def softmax_gradients(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    offset: jax.Array | int,
    row_logsumexp: jax.Array,
    column_logsumexp: jax.Array,
    *,
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array]:
    """slope · text [n, D] and slopeᵀ · image [m, D] in float32; slope = exp(logit - row) + exp(logit - column).

    The logsumexps, [n] and [m], are those over all pairs, partners included.
    """
    cut = _Cut(image, text, scale, None, offset, tiles)
    rows, columns = cut.image_parts(row_logsumexp), cut.text_parts(column_logsumexp)

    def slope(logits, i, j):
        return jnp.exp(logits - rows[i][:, None]) + jnp.exp(logits - columns[j]), ()

    return cut.gradients(slope)[0]


def sigmoid_gradients(
    image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, offset: jax.Array | int, *, tiles: Tiles
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """((slope · text, slopeᵀ · image), (Σ softplus(logit), Σ slope) per image [n]); slope = sigmoid(logit)."""
    cut = _Cut(image, text, scale, bias, offset, tiles)

    def slope(logits, i, j):
        value, slope = softplus_and_sigmoid(logits)
        return slope, (value.sum(1), slope.sum(1))

    return cut.gradients(slope, sums=2)


def sigmoid_sums(
    image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, offset: jax.Array | int, *, tiles: Tiles
) -> jax.Array:
    """Σ softplus(logit) over the negatives of each image, [n]: the loss where no gradient is asked for."""
    cut = _Cut(image, text, scale, bias, offset, tiles)

    def row(i, out):
        def column(j, total):
            return total + softplus_and_sigmoid(cut.logits(i, j))[0].sum(1)

        return out.at[i].set(loop(cut.shape[1], column, cut.full(0, tiles.rows)))

    return cut.of_images(loop(cut.shape[0], row, cut.full(0, cut.shape[0], tiles.rows)))


def softplus_and_sigmoid(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log(1 + exp(x)) and its derivative, from one exponential that cannot overflow."""
    small = jnp.exp(-jnp.abs(logits))
    return jnp.maximum(logits, 0) + jnp.log1p(small), jnp.where(logits >= 0, 1, small) / (1 + small)


class _Cut:
    """One call's arrays, cut into tiles: tile (i, j) pairs images i * rows .. with texts j * columns .."""

    def __init__(self, image, text, scale, bias, offset, tiles: Tiles):
        self.tiles, self.scale, self.bias, self.offset = tiles, scale, bias, offset
        self.counts = image.shape[0], text.shape[0]
        self.shape = math.ceil(image.shape[0] / tiles.rows), math.ceil(text.shape[0] / tiles.columns)
        self.dtype = jnp.promote_types(image.dtype, jnp.float32)
        self.images, self.texts = self.image_parts(image), self.text_parts(text)
        self.turned = self.texts.mT  # [.., D, columns]

    def image_parts(self, array: jax.Array) -> jax.Array:
        """[n, ..] -> [row tiles, rows, ..], filled up with zeros."""
        return cut_into(array, self.shape[0], self.tiles.rows)

    def text_parts(self, array: jax.Array) -> jax.Array:
        return cut_into(array, self.shape[1], self.tiles.columns)

    def of_images(self, parts: jax.Array) -> jax.Array:
        """`image_parts`, turned round."""
        return parts.reshape(-1, *parts.shape[2:])[: self.counts[0]]

    def of_texts(self, parts: jax.Array) -> jax.Array:
        return parts.reshape(-1, *parts.shape[2:])[: self.counts[1]]

    def full(self, value: float, *shape: int) -> jax.Array:
        """A start for a loop; it varies over the mesh as the images do."""
        return jnp.full_like(self.images, value, dtype=self.dtype, shape=shape)

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a · b, summed in float32; float32 factors are not rounded, which GPUs and TPUs would do otherwise."""
        precision = "highest" if a.dtype == jnp.float32 else None
        return jnp.matmul(a, b, precision=precision, preferred_element_type=self.dtype)

    def logits(self, i, j) -> jax.Array:
        """Tile (i, j), [rows, columns]; `NOTHING` for partners and beyond the ends."""
        logits = self.scale * self.product(self.images[i], self.turned[j])
        if self.bias is not None:
            logits = logits + self.bias
        row = i * self.tiles.rows + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        column = j * self.tiles.columns + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        out = column - row == self.offset
        if self.counts[0] % self.tiles.rows:
            out |= row >= self.counts[0]
        if self.counts[1] % self.tiles.columns:
            out |= column >= self.counts[1]
        return jnp.where(out, NOTHING, logits)

    def gradients(self, slope: Callable, sums: int = 0):
        """((slope · text [n, D], slopeᵀ · image [m, D]), `sums` sums per image [n]).

        `slope(logits, i, j)` gives a tile's slopes and its sums, each [rows].
        """
        features, kind = self.images.shape[-1], self.images.dtype

        def row(i, carry):
            image = self.images[i].T

            def column(j, carry):
                d_row, d_texts, totals = carry
                slopes, parts = slope(self.logits(i, j), i, j)
                slopes = slopes.astype(kind)
                d_row = d_row + self.product(slopes, self.texts[j])
                d_text = d_texts[j] + self.product(image, slopes)
                totals = tuple(total + part for total, part in zip(totals, parts, strict=True))
                return d_row, d_texts.at[j].set(d_text), totals

            d_images, d_texts, outs = carry
            init = self.full(0, self.tiles.rows, features), d_texts, (self.full(0, self.tiles.rows),) * sums
            d_row, d_texts, totals = loop(self.shape[1], column, init)
            outs = tuple(out.at[i].set(total) for out, total in zip(outs, totals, strict=True))
            return d_images.at[i].set(d_row), d_texts, outs

        d_images = self.full(0, self.shape[0], self.tiles.rows, features)
        d_texts = self.full(0, self.shape[1], features, self.tiles.columns)
        totals = (self.full(0, self.shape[0], self.tiles.rows),) * sums
        d_images, d_texts, totals = loop(self.shape[0], row, (d_images, d_texts, totals))
        return (self.of_images(d_images), self.of_texts(d_texts.mT)), tuple(self.of_images(x) for x in totals)


def cut_into(array: jax.Array, parts: int, size: int) -> jax.Array:
    """[n, ..] -> [parts, size, ..], filled up with zeros."""
    pad = parts * size - array.shape[0]
    if pad:
        array = jnp.pad(array, ((0, pad),) + ((0, 0),) * (array.ndim - 1))
    return array.reshape(parts, size, *array.shape[1:])


def loop(steps: int, body: Callable, carry: Any) -> Any:
    return body(0, carry) if steps == 1 else jax.lax.fori_loop(0, steps, body, carry)


def _even(length: int, limit: int) -> int:
    """The size of the fewest equal tiles of at most `limit` that cover `length`; in whole eights if several."""
    tiles = math.ceil(length / limit)
    return length if tiles == 1 else math.ceil(length / tiles / 8) * 8
