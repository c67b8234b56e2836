"""The definition of attention: plain jnp, in float32 (float64 for float64 arguments), with a [B, H, T, S] array.

softmax(softcap(scale * q·k) + bias) · v over the keys that a query sees (Vaswani et al. 2017; grouped heads: Ainslie et
al. 2023; soft cap: Gemma 2, which caps before it adds the mask).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rule:
    """What of a call is known before it is traced."""

    causal: bool
    sliding_window: int | None
    softcap: float | None
    scale: float
    padded: bool = False  # a row is one segment, 1, and what fills it up, 0: cuDNN knows that as a length

    @property
    def ordered(self) -> bool:
        """Whether positions matter."""
        return self.causal or self.sliding_window is not None


class Mask(NamedTuple):
    """The arrays that decide who sees whom: int32 [B, T] and [B, S], or None (no segments; positions are indices).

    q_positions may also be a scalar: where the first query stands, and the others follow it.
    """

    q_segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    q_positions: jax.Array | int | None
    kv_positions: jax.Array | None

    def with_positions(self, rule: Rule, queries: int, keys: int) -> Mask:
        """The mask with positions that are there if and only if the rule needs them; indices are [1, T] and [1, S]."""
        if not rule.ordered:
            return self._replace(q_positions=None, kv_positions=None)
        q = 0 if self.q_positions is None else self.q_positions
        q = q if jnp.ndim(q) else (q + jnp.arange(queries, dtype=jnp.int32))[None]
        kv = jnp.arange(keys, dtype=jnp.int32)[None] if self.kv_positions is None else self.kv_positions
        return self._replace(q_positions=q, kv_positions=kv)


def visible(rule: Rule, mask: Mask) -> jax.Array | None:
    """bool [..., T, S], True where a query sees a key, from arrays [..., T] and [..., S]; None if all see all."""
    terms = []
    if mask.q_segment_ids is not None:
        q, kv = mask.q_segment_ids[..., :, None], mask.kv_segment_ids[..., None, :]
        terms.append((q == kv) & (q != 0))
    if rule.ordered:
        q, kv = mask.q_positions[..., :, None], mask.kv_positions[..., None, :]
        if rule.causal:
            terms.append(kv <= q)
        if rule.sliding_window is not None:
            terms.append(q - kv < rule.sliding_window)
    return functools.reduce(operator.and_, terms) if terms else None


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, bias: jax.Array | None, *, rule: Rule) -> jax.Array:
    """q [B, T, H, D], k and v [B, S, K, D], bias broadcastable to [B, H, T, S] -> [B, T, H, D] in q's dtype."""
    batch, queries, heads, features = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.astype(dtype).reshape(batch, queries, kv_heads, heads // kv_heads, features)

    scores = rule.scale * jnp.einsum("btkgd,bskd->bkgts", grouped, k.astype(dtype), precision="highest")
    scores = scores.reshape(batch, heads, queries, keys)
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    if bias is not None:
        scores = scores + bias.astype(dtype)
    seen = visible(rule, mask.with_positions(rule, queries, keys))
    if seen is not None:
        scores = jnp.where(seen[:, None], scores, -jnp.inf)

    # A row that sees nothing has the maximum -inf and the sum 0: both are replaced, so that value and gradient are 0.
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, queries, keys)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v.astype(dtype), precision="highest")
    return out.reshape(batch, queries, heads, features).astype(q.dtype)
