"""Prefix fusion: vision features take the places in the token row that the host decided."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def place_visual(
    embeddings: jax.Array, features: jax.Array, newline: jax.Array, index: jax.Array, inverse: jax.Array
) -> jax.Array:
    """Replaces token embeddings by vision features where `index` says so.

    `embeddings [B, T, D]`, `features [B, K*P, D]`, `newline [D]` (stands where the index is K*P), `index [B, T]` (-1
    none), `inverse [B, K*P]` (the position at which each feature stands, -1 nowhere) -> [B, T, D]. The index is local
    to its row, so no gather crosses a shard of the batch; since each feature stands at most once, the backward pass is
    a gather through `inverse`. The newline's gradient is summed in float32.
    """
    return _place(embeddings, features, newline, index)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """`rows [B, N, D]`, `index [B, T]` -> [B, T, D], out-of-range indices clipped."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="clip"))(rows, index)


def _place(embeddings: jax.Array, features: jax.Array, newline: jax.Array, index: jax.Array) -> jax.Array:
    index = index[..., None]
    visual = jnp.where(index == features.shape[1], newline, _take(features, index[..., 0]))
    return jnp.where(index < 0, embeddings, visual)


def _forward(embeddings, features, newline, index, inverse):
    return _place(embeddings, features, newline, index), (index, inverse)


def _backward(saved, gradient):
    index, inverse = saved
    d_embeddings = jnp.where(index[..., None] < 0, gradient, 0)
    d_features = jnp.where(inverse[..., None] < 0, 0, _take(gradient, inverse))
    at_newline = index[..., None] == inverse.shape[1]
    d_newline = jnp.sum(jnp.where(at_newline, gradient, 0), axis=(0, 1), dtype=jnp.float32).astype(gradient.dtype)
    none = np.zeros(index.shape, jax.dtypes.float0), np.zeros(inverse.shape, jax.dtypes.float0)
    return d_embeddings, d_features, d_newline, *none


place_visual.defvjp(_forward, _backward)
