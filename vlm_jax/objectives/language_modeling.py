"""Next-token prediction: cross-entropy of the hidden states against labels that the host has already shifted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UsageError, suggest
from vlm_jax.kernels import linear_cross_entropy
from vlm_jax.sharding import spec_of

IGNORE = -100
LOSS_NORMS = ("global_tokens", "rank_mean")


def row_weights(labels: jax.Array, *, norm: str, ranks: int) -> jax.Array:
    """Weight of each row's trained tokens, float32, in the shape of `labels [A, R, T]` without its last axis.

    `global_tokens`: 1, so that the loss is the mean over the trained tokens of the whole batch. `rank_mean`: the rows
    in their order are cut into `ranks` equal groups and each group's mean counts the same, as data-parallel training
    with a mean on each device does (pytorch_systems: LLaVA's effective objective); groups without a trained token
    count nothing. Raises UsageError for an unknown norm and for rows that the groups do not divide.
    """
    if norm not in LOSS_NORMS:
        raise UsageError(f"loss_norm {norm!r} is not one of {', '.join(LOSS_NORMS)}{suggest(norm, LOSS_NORMS)}")
    counts = jnp.sum(labels != IGNORE, axis=-1, dtype=jnp.float32)
    if norm == "global_tokens":
        return jnp.ones_like(counts)
    if counts.size % ranks:
        raise UsageError(f"loss_ranks {ranks} does not divide the {counts.size} rows of a step")
    spec = spec_of(counts)
    groups = jax.reshard(counts, P(None, None)).reshape(ranks, counts.size // ranks)
    weights = 1 / jnp.maximum(jnp.sum(groups, axis=1, keepdims=True), 1)
    return jax.reshard(jnp.broadcast_to(weights, groups.shape).reshape(counts.shape), spec)


def total_weight(labels: jax.Array, weights: jax.Array) -> jax.Array:
    """The weight that the loss of a whole step is divided by; at least a tiny number, so that an empty step gives 0."""
    counts = jnp.sum(labels != IGNORE, axis=-1, dtype=jnp.float32)
    return jnp.maximum(jnp.sum(counts * weights), 1e-6)


def next_token_loss(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, *, z_loss: float = 0.0
) -> jax.Array:
    """Weighted sum of the cross-entropy: `hidden [R, T, D], head [D, V], labels [R, T], weights [R]` -> scalar."""
    rows, length, width = hidden.shape
    per_token = jnp.broadcast_to(weights[:, None], (rows, length)).reshape(rows * length)
    total, _ = linear_cross_entropy(
        hidden.reshape(rows * length, width), head, labels.reshape(rows * length), per_token, z_loss=z_loss
    )
    return total
