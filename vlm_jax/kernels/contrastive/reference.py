"""The definition of the contrastive losses: plain jnp, in float32 (float64 for float64), with all N x N pairs.

softmax: CLIP (Radford et al. 2021), the mean of the cross-entropies of both directions. sigmoid: SigLIP (Zhai et al.
2023), every pair a yes-or-no question of its own; their sum over N, as in the paper, big_vision and open_clip.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _logits(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(image.dtype, jnp.float32)
    return scale.astype(dtype) * jnp.matmul(image.astype(dtype), text.astype(dtype).T, precision="highest")


def softmax_contrastive_loss(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    """image and text [N, D], scale a scalar -> scalar."""
    logits = _logits(image, text, scale)
    of_text = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    of_image = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    return -(of_text.mean() + of_image.mean()) / 2


def sigmoid_contrastive_loss(image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """image and text [N, D], scale and bias scalars -> scalar."""
    logits = _logits(image, text, scale)
    logits = logits + bias.astype(logits.dtype)
    sign = 2 * jnp.eye(len(logits), dtype=logits.dtype) - 1
    return -jax.nn.log_sigmoid(sign * logits).sum() / len(logits)
