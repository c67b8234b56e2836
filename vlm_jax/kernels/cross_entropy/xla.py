"""The linear cross-entropy in chunks of tokens: no [T, V] array exists, and the gradients are made in the forward pass.

After Liger-Kernel's FusedLinearCrossEntropy (Hsu et al. 2024): the loss is the last operation of a model, so that its
gradient is known up to one factor as soon as a chunk's logits are; they are never made again. Two more savings: tokens
without a label (a prompt, an image, padding) are moved to the end and never multiplied, and what is not trained (a
frozen head under LoRA) gets no gradient. The loop ends after the last chunk that has a label.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from vlm_jax.kernels.cross_entropy.reference import IGNORE, Settings, over_vocabulary, vocabulary
from vlm_jax.kernels.placement import vary_like, zero_like
from vlm_jax.kernels.tiles import tile_size


def chunk_size(tokens: int, entries: int, device: str) -> int:
    """Tokens per chunk: a power of two from 128, up to what `tiles.tile_size` says of tokens and of their logits.

    At least eight chunks, if they are not shorter than 128: the more of them, the more can be left out.
    """
    longest, logits = (tile_size(f"cross_entropy.xla.{name}", device) for name in ("tokens", "logits"))
    chunk = 2 ** int(math.log2(max(128, min(longest, logits / entries, tokens / 8))))
    return min(tokens, chunk)


def linear_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    *,
    settings: Settings,
    device: str,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.linear_cross_entropy`, in memory O(chunk * V).

    Factors of products are in hidden's dtype (the kernel and the logits' gradient are rounded to it), sums in float32.
    """
    chunk = chunk_size(hidden.shape[0], kernel.shape[1], device)
    tokens = zero_like((hidden, labels, weights))
    hidden, weights = vary_like(hidden, tokens), vary_like(weights, tokens)
    every = zero_like((hidden, kernel, bias))
    kernel, bias = vary_like(kernel, every), vary_like(bias, every)
    return _compiled(settings, chunk, hidden, kernel, bias, labels, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(settings, chunk, hidden, kernel, bias, labels, weights):
    total, per_token, _ = _run(settings, chunk, hidden, kernel, bias, labels, weights, (False,) * 3)
    return total, per_token


def _loss_forward(settings, chunk, hidden, kernel, bias, labels, weights):
    wanted = tuple(x is not None and x.perturbed for x in (hidden, kernel, bias))
    arrays = (None if x is None else x.value for x in (hidden, kernel, bias, labels, weights))
    total, per_token, gradients = _run(settings, chunk, *arrays, wanted)
    return (total, per_token), (gradients, hidden.value, kernel.value, None if bias is None else bias.value)


def _loss_backward(settings, chunk, residuals, cotangents):
    (d_hidden, d_kernel, d_bias), hidden, kernel, bias = residuals
    factor = cotangents[0]
    if isinstance(factor, jax.custom_derivatives.SymbolicZero):
        factor = jnp.zeros((), jnp.float32)

    def scaled(gradient, like):
        return None if gradient is None else (gradient * factor).astype(like.dtype)

    return scaled(d_hidden, hidden), scaled(d_kernel, kernel), scaled(d_bias, bias), None, None


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)
_compiled = jax.jit(_loss, static_argnums=(0, 1))  # one trace, and none for a repeated eager call


def _run(settings: Settings, chunk: int, hidden, kernel, bias, labels, weights, wanted: tuple[bool, bool, bool]):
    """-> total, per-token loss [T], and the gradients of the total (None where not wanted)."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    entries, factors = kernel.shape[1], kernel.astype(hidden.dtype)
    whole_vocabulary, first = vocabulary(kernel, settings)
    smoothing, softcap = settings.label_smoothing, settings.softcap

    # Slots are tokens in the order in which they are worked on: those with a label first.
    tokens = hidden.shape[0]
    slots = math.ceil(tokens / chunk) * chunk
    labelled = labels != IGNORE
    count = labelled.sum()
    slot_of = jnp.where(labelled, jnp.cumsum(labelled) - 1, count + jnp.cumsum(~labelled) - 1)
    token_at = jnp.full_like(slot_of, 0, shape=(slots,)).at[slot_of].set(jnp.arange(tokens), unique_indices=True)

    def step(i, carry):
        total, per_slot, d_hidden, d_kernel, d_bias = carry
        token = jax.lax.dynamic_slice_in_dim(token_at, i * chunk, chunk)
        live = i * chunk + jnp.arange(chunk) < count
        x, label = jnp.where(live[:, None], hidden[token], 0), labels[token] - first
        here = (label >= 0) & (label < entries) & live

        logits = jnp.matmul(x, factors, preferred_element_type=dtype)
        if bias is not None:
            logits = logits + bias.astype(dtype)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        top = over_vocabulary(jax.lax.pmax, logits.max(-1), settings)
        sums = over_vocabulary(jax.lax.psum, jnp.exp(logits - top[:, None]).sum(-1), settings)
        logsumexp = top + jnp.log(sums)
        target = jnp.take_along_axis(logits, jnp.clip(label, 0, entries - 1)[:, None], 1)[:, 0]
        target = over_vocabulary(jax.lax.psum, jnp.where(here, target, 0), settings)
        loss = logsumexp - (1 - smoothing) * target + settings.z_loss * logsumexp**2
        if smoothing:
            loss = loss - smoothing / whole_vocabulary * over_vocabulary(jax.lax.psum, logits.sum(-1), settings)
        weight = jnp.where(live, weights[token], 0)
        total = total + (loss * weight).sum()
        per_slot = jax.lax.dynamic_update_slice_in_dim(per_slot, loss, i * chunk, 0)

        if any(wanted):
            slope = (weight * (1 + 2 * settings.z_loss * logsumexp))[:, None]
            d_logits = slope * jnp.exp(logits - logsumexp[:, None])
            at_label = jnp.where(here, label, -1)[:, None] == jnp.arange(entries)
            d_logits = d_logits - weight[:, None] * (
                jnp.where(at_label, 1 - smoothing, 0) + smoothing / whole_vocabulary
            )
            if softcap is not None:
                d_logits = d_logits * (1 - (logits / softcap) ** 2)
        if d_bias is not None:
            d_bias = d_bias + d_logits.sum(0)
        if d_hidden is not None:
            part = jnp.matmul(d_logits.astype(x.dtype), factors.T, preferred_element_type=dtype)
            part = over_vocabulary(jax.lax.psum, part, settings).astype(x.dtype)
            d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, part, i * chunk, 0)
        if d_kernel is not None:
            d_kernel = d_kernel + jnp.matmul(x.T, d_logits.astype(x.dtype), preferred_element_type=dtype)
        return total, per_slot, d_hidden, d_kernel, d_bias

    carry = (
        jnp.full_like(hidden, 0, dtype=dtype, shape=()),
        jnp.full_like(hidden, 0, dtype=dtype, shape=(slots,)),
        jnp.full_like(hidden, 0, shape=(slots, hidden.shape[1])) if wanted[0] else None,
        jnp.full_like(kernel, 0, dtype=dtype) if wanted[1] else None,
        jnp.full_like(bias, 0, dtype=dtype) if wanted[2] else None,
    )
    total, per_slot, d_hidden, d_kernel, d_bias = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, step, carry)
    per_token = jnp.where(labelled, per_slot[slot_of], 0)
    if d_hidden is not None:
        d_hidden = jnp.where(labelled[:, None], d_hidden[slot_of], 0)
    return total, per_token, (d_hidden, d_kernel, d_bias)
