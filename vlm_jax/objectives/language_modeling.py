"""Next-token prediction: cross-entropy of the hidden states against labels that the host has already shifted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UsageError, suggest
from vlm_jax.kernels import linear_cross_entropy
from vlm_jax.kernels.cross_entropy.reference import IGNORE
from vlm_jax.sharding import spec_of

LOSS_NORMS = ("global_tokens", "rank_mean")


def token_weights(labels: jax.Array, segment_ids: jax.Array, *, norm: str, ranks: int) -> jax.Array:
    """Weight of each position's loss, float32, in the shape of `labels [A, R, T]`.

    `global_tokens`: 1, so that the loss is the mean over the trained tokens of the whole batch. `rank_mean`: the
    samples in their order are cut into `ranks` groups, as equal as can be, and each group's mean counts the same, as
    data-parallel training with a mean on each device does (pytorch_systems: LLaVA's effective objective); groups
    without a trained token count nothing. Samples are the segments of the rows, so that it is the same loss whether
    they share rows or not; an empty row counts as one. Raises UsageError for an unknown norm.
    """
    if norm not in LOSS_NORMS:
        raise UsageError(f"loss_norm {norm!r} is not one of {', '.join(LOSS_NORMS)}{suggest(norm, LOSS_NORMS)}")
    ones = jnp.ones_like(labels, jnp.float32)
    if norm == "global_tokens":
        return ones
    in_row = jnp.maximum(jnp.max(segment_ids, axis=-1), 1)
    spec = spec_of(in_row)
    counts = jax.reshard(in_row, P(None, None))
    before = (jnp.cumsum(counts.reshape(-1)) - counts.reshape(-1)).reshape(counts.shape)
    number = jax.reshard(before, spec)[..., None] + jnp.maximum(segment_ids, 1) - 1
    group = number * ranks // jnp.sum(counts)
    is_in = group[..., None] == jnp.arange(ranks)
    trained = jnp.sum(is_in & (labels != IGNORE)[..., None], axis=(0, 1, 2), dtype=jnp.float32)
    return ones * jnp.sum(jnp.where(is_in, 1 / jnp.maximum(trained, 1), 0), axis=-1)


def total_weight(labels: jax.Array, weights: jax.Array) -> jax.Array:
    """The weight that the loss of a whole step is divided by; at least a tiny number, so that an empty step gives 0."""
    return jnp.maximum(jnp.sum(jnp.where(labels != IGNORE, weights, 0)), 1e-6)


def next_token_loss(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, *, z_loss: float = 0.0
) -> jax.Array:
    """Weighted sum of the cross-entropy: `hidden [R, T, D], head [D, V], labels [R, T], weights [R, T]` -> scalar."""
    rows, length, width = hidden.shape
    total, _ = linear_cross_entropy(
        hidden.reshape(rows * length, width),
        head,
        labels.reshape(rows * length),
        weights.reshape(rows * length),
        z_loss=z_loss,
    )
    return total
