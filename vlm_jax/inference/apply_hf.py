"""Runs a model on the arrays that the Hugging Face processor of the same model yields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vlm_jax.data import ImageSettings
from vlm_jax.data.anyres import NEWLINE, Layout
from vlm_jax.data.images import layout
from vlm_jax.data.rows import Row
from vlm_jax.errors import UsageError, suggest
from vlm_jax.models.binding import Bound, Params
from vlm_jax.models.llava import Batch, Llava
from vlm_jax.sharding import RULES, batch_shards, place

INPUTS = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_sizes")


def make_logits(bound: Bound[Llava], *, dtype: jnp.dtype) -> Callable[[Params, Batch], jax.Array]:
    """`(params, batch) -> logits float32 [B, T, V]`."""

    @jax.jit
    def logits(params: Params, batch: Batch) -> jax.Array:
        model = bound.bind(params)
        hidden, _ = model(batch, dtype=dtype)
        return model.decoder.logits(hidden)

    return logits


def place_inputs(batch: Row) -> dict[str, jax.Array]:
    """The arrays of `hf_batch` on the mesh in use, with rows of padding up to what its devices divide."""
    shards = batch_shards()
    more = -len(batch["tokens"]) % shards
    padded = {name: np.concatenate([a, np.repeat(a[-1:], more, axis=0)]) for name, a in batch.items()}
    return {name: place(a, jax.sharding.get_mesh(), P(RULES.batch)) for name, a in padded.items()}


def hf_batch(inputs: Mapping[str, Any], settings: ImageSettings, image_token_id: int) -> Row:
    """The arrays of prefix fusion (docs/design.md, without labels) from those of a processor.

    inputs: input_ids [B, T] in which each image is as many image tokens as it has places; attention_mask [B, T];
      pixel_values [N, 3, H, W], or [N, tiles, 3, H, W] with image_sizes [N, 2] as (height, width), of all images of the
      batch in the order of their tokens; position_ids [B, T], by default the index, as transformers has it.
    """
    given = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
    for name in given:
        if name not in INPUTS:
            raise UsageError(f"apply_hf takes no {name!r}{suggest(name, INPUTS)}; it takes {', '.join(INPUTS)}")
    if "input_ids" not in given:
        raise UsageError("apply_hf needs input_ids")
    tokens = given["input_ids"]
    if tokens.ndim != 2 or not tokens.size:
        raise UsageError(f"input_ids are {list(tokens.shape)}; give [batch, length]")
    rows, length = tokens.shape
    visual = tokens == image_token_id
    tiles, layouts = _images(given, settings)
    of_row = _share(visual.sum(axis=1), layouts)
    features, most = settings.features_per_tile, max(1, *(sum(one.tiles for one in row) for row in of_row))
    index = np.full((rows, length), -1, np.int32)
    inverse = np.full((rows, most * features), -1, np.int32)
    shape = (settings.size, settings.size, 3)
    placed = np.zeros((rows, most, *shape), np.float32)
    tile_image = np.zeros((rows, most), np.int32)
    images = iter(tiles)
    for row, own in enumerate(of_row):
        first, places = 0, [np.empty(0, np.int64)]
        for number, one in enumerate(own):
            placed[row, first : first + one.tiles] = next(images)
            tile_image[row, first : first + one.tiles] = number
            places.append(np.where(one.places == NEWLINE, most * features, one.places + first * features))
            first += one.tiles
        index[row, visual[row]] = np.concatenate(places)
        shown = np.flatnonzero(visual[row] & (index[row] != most * features))
        inverse[row, index[row, shown]] = shown
    positions = given.get("position_ids", np.broadcast_to(np.arange(length), (rows, length)))
    return {
        "tokens": np.where(visual, 0, tokens).astype(np.int32),
        "positions": np.broadcast_to(positions, (rows, length)).astype(np.int32),
        "segment_ids": (given.get("attention_mask", np.ones_like(tokens)) != 0).astype(np.int32),
        "tiles": placed,
        "tile_image": tile_image,
        "visual_index": index,
        "visual_inverse": inverse,
    }


def _images(given: Mapping[str, np.ndarray], settings: ImageSettings) -> tuple[list[np.ndarray], list[Layout]]:
    """The tiles float32 [k, H, W, 3] of each image, normalised as they came, and their layouts."""
    if "pixel_values" not in given:
        return [], []
    pixels = given["pixel_values"].astype(np.float32)
    if settings.weighted:
        raise UsageError("images.max_tiles has no counterpart among Hugging Face's processors: use generate")
    anyres = settings.mode == "anyres"
    expected = (3, settings.size, settings.size)
    if pixels.ndim != 4 + anyres or pixels.shape[-3:] != expected:
        wanted = "[images, tiles, 3, H, W]" if anyres else "[images, 3, H, W]"
        raise UsageError(
            f"pixel_values are {list(pixels.shape)}; this model takes {wanted} with H = W = {settings.size}"
        )
    if anyres and len(given.get("image_sizes", ())) != len(pixels):
        raise UsageError(f"give image_sizes (height, width) of all {len(pixels)} images, as the processor yields them")
    sizes = given["image_sizes"].tolist() if anyres else [(settings.size, settings.size)] * len(pixels)
    layouts = [layout((int(width), int(height)), settings) for height, width in sizes]
    tiles = [(image if anyres else image[None]).transpose(0, 2, 3, 1) for image in pixels]
    short = [n for n, (image, one) in enumerate(zip(tiles, layouts, strict=True)) if len(image) < one.tiles]
    if short:
        n = short[0]
        raise UsageError(
            f"pixel_values hold {len(tiles[n])} tiles of image {n}, whose size asks for {layouts[n].tiles}"
        )
    return [image[: one.tiles] for image, one in zip(tiles, layouts, strict=True)], layouts


def _share(counts: np.ndarray, layouts: list[Layout]) -> list[list[Layout]]:
    """The images of each row, by how many image tokens it has."""
    rows, rest = [], list(layouts)
    for number, count in enumerate(counts.tolist()):
        own: list[Layout] = []
        while sum(len(one.places) for one in own) < count and rest:
            own.append(rest.pop(0))
        features = sum(len(one.places) for one in own)
        if features != count:
            raise UsageError(f"row {number} has {count} image tokens, but its images have {features} features")
        rows.append(own)
    if rest:
        raise UsageError(f"{len(rest)} of {len(layouts)} images have no tokens in input_ids")
    return rows
