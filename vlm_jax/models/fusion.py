"""Prefix fusion: vision features take the places in the token row that the host decided."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def place_visual(
    embeddings: jax.Array,
    features: jax.Array,
    newline: jax.Array,
    index: jax.Array,
    inverse: jax.Array,
    weight: jax.Array | None = None,
    inverse_weight: jax.Array | None = None,
) -> jax.Array:
    """Replaces token embeddings by vision features where `index` says so.

    `embeddings [B, T, D]`, `features [B, K*P, D]`, `newline [D]` (stands where the index is K*P), `index [B, T]` (-1
    none), `inverse [B, K*P]` (the position at which each feature stands, -1 nowhere) -> [B, T, D]. The index is local
    to its row, so no gather crosses a shard of the batch; since each feature stands at most once, the backward pass is
    a gather through `inverse`. The newline's gradient is summed in float32.

    Interpolated features (`anyres_max_N`) have `index` and `weight [B, T, 4]`, the four that a position is made of,
    and `inverse` and `inverse_weight [B, K*P, 4]`, the four positions, at most, that a feature is part of. Both passes
    are then weighted gathers, summed in float32.
    """
    visual = jnp.where(_first(index) == features.shape[1], newline, _take(features, index, weight))
    return jnp.where(_first(index) < 0, embeddings, visual)


def _first(index: jax.Array) -> jax.Array:
    """`index [B, T]` or `[B, T, 4] -> [B, T, 1]`: whether there is a feature or a newline, its first entry tells."""
    return index[..., None] if index.ndim == 2 else index[..., :1]


def _take(rows: jax.Array, index: jax.Array, weight: jax.Array | None) -> jax.Array:
    """`rows [B, N, D]`, `index [B, T]` or, with their weights, `[B, T, 4]` -> [B, T, D]; indices out of range are
    clipped."""
    take = jax.vmap(lambda row, i: row.at[i].get(mode="clip"))
    if weight is None:
        return take(rows, index)
    four = (take(rows, index[..., i]) * weight[..., i, None] for i in range(weight.shape[-1]))
    return sum(four).astype(rows.dtype)


def _forward(embeddings, features, newline, index, inverse, weight, inverse_weight):
    placed = place_visual(embeddings, features, newline, index, inverse, weight, inverse_weight)
    return placed, (index, inverse, inverse_weight)


def _backward(saved, gradient):
    index, inverse, inverse_weight = saved
    d_embeddings = jnp.where(_first(index) < 0, gradient, 0)
    d_features = jnp.where(_first(inverse) < 0, 0, _take(gradient, inverse, inverse_weight))
    at_newline = _first(index) == inverse.shape[1]
    d_newline = jnp.sum(jnp.where(at_newline, gradient, 0), axis=(0, 1), dtype=jnp.float32).astype(gradient.dtype)
    return d_embeddings, d_features, d_newline, None, None, None, None


place_visual.defvjp(_forward, _backward)
