"""The definition of the linear cross-entropy: plain jnp, in float32, with a [T, V] array of logits.

Label smoothing as in Szegedy et al. 2016 (and torch), z-loss as in PaLM, the soft cap of Gemma 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of a call is known before it is traced."""

    softcap: float | None
    z_loss: float
    label_smoothing: float
    axis_name: str | tuple[str, ...] | None


def vocabulary(kernel: jax.Array, settings: Settings) -> tuple[int, jax.Array | int]:
    """The size of the whole vocabulary, and the number of the first entry that is here."""
    here = kernel.shape[1]
    if settings.axis_name is None:
        return here, 0
    return here * jax.lax.axis_size(settings.axis_name), here * jax.lax.axis_index(settings.axis_name)


def over_vocabulary(reduction: Callable, array: jax.Array, settings: Settings) -> jax.Array:
    """`reduction` (jax.lax.psum, jax.lax.pmax) over the devices that share the vocabulary."""
    return array if settings.axis_name is None else reduction(array, settings.axis_name)


def linear_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    *,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """hidden [T, D], kernel [D, V], bias [V] or None, labels int [T], weights [T] -> total, per-token loss [T]."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.matmul(hidden.astype(dtype), kernel.astype(dtype), precision="highest")
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if settings.softcap is not None:
        logits = settings.softcap * jnp.tanh(logits / settings.softcap)

    size, first = vocabulary(kernel, settings)
    top = over_vocabulary(jax.lax.pmax, jax.lax.stop_gradient(logits.max(-1)), settings)
    sums = over_vocabulary(jax.lax.psum, jnp.exp(logits - top[:, None]).sum(-1), settings)
    logsumexp = top + jnp.log(sums)
    at_label = (labels[:, None] - first) == jnp.arange(kernel.shape[1])
    target = over_vocabulary(jax.lax.psum, jnp.where(at_label, logits, 0).sum(-1), settings)
    mean = over_vocabulary(jax.lax.psum, logits.sum(-1), settings) / size

    smoothing = settings.label_smoothing
    loss = logsumexp - (1 - smoothing) * target - smoothing * mean + settings.z_loss * logsumexp**2
    loss = jnp.where(labels == IGNORE, 0, loss)
    return (loss * weights).sum(), loss
