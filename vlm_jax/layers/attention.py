"""Grouped-query self-attention with its projections, for vision encoders and decoders, and the key-value cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.kernels import attention
from vlm_jax.layers.linear import Linear
from vlm_jax.layers.norms import RMSNorm
from vlm_jax.layers.rope import apply_rope
from vlm_jax.layers.scope import Scope, child_key
from vlm_jax.sharding import RULES, reshape, spec_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Who sees whom: segment ids and positions [B, T] of the queries (and of the keys, where they differ).

    `lengths` [B] takes the place of the segment ids where a row is one sample and its padding.
    """

    segment_ids: jax.Array | None = None
    positions: jax.Array | None = None
    lengths: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values [L, B, K, S, Dh] of the positions written so far; slot s of a row holds its position s.

    In this order the products of a decoding step read them as they stand.
    """

    keys: jax.Array
    values: jax.Array


class SelfAttention(nnx.Module):
    """`x [B, T, D] -> [B, T, D]`."""

    def __init__(
        self,
        scope: Scope,
        features: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        causal: bool,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        sliding_window: int | None = None,
    ):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.causal, self.sliding_window = causal, sliding_window
        wide, narrow = heads * head_dim, kv_heads * head_dim
        self.query = Linear(scope / "query", features, wide, axes=("embed", "heads"), bias=qkv_bias)
        self.key = Linear(scope / "key", features, narrow, axes=("embed", "heads"), bias=qkv_bias)
        self.value = Linear(scope / "value", features, narrow, axes=("embed", "heads"), bias=qkv_bias)
        self.out = Linear(scope / "out", wide, features, axes=("heads", "embed"), bias=out_bias)
        normed = qk_norm_eps is not None
        self.query_norm = RMSNorm(scope / "query_norm", head_dim, eps=qk_norm_eps) if normed else None
        self.key_norm = RMSNorm(scope / "key_norm", head_dim, eps=qk_norm_eps) if normed else None

    def project(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array] | None, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, Dh] and keys, values [B, T, K, Dh], normalised and rotated."""
        q = self._heads(self.query(x, child_key(key, "query")), self.heads)
        k = self._heads(self.key(x, child_key(key, "key")), self.kv_heads)
        v = self._heads(self.value(x, child_key(key, "value")), self.kv_heads)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def __call__(
        self,
        x: jax.Array,
        mask: Mask,
        rope: tuple[jax.Array, jax.Array] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attention of `x` to itself. Also returns its keys and values, for a cache."""
        q, k, v = self.project(x, rope, key)
        out = attention(
            q,
            k,
            v,
            causal=self.causal,
            q_segment_ids=mask.segment_ids,
            kv_segment_ids=mask.segment_ids,
            lengths=mask.lengths,
            sliding_window=self.sliding_window,
        )
        return self._project_out(out, key), (k, v)

    def decode(
        self,
        x: jax.Array,
        cache: Cache,
        layer: jax.Array | int,
        positions: jax.Array,
        rope: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, Cache]:
        """One token per row: `x [B, 1, D]` at `positions [B]` sees what the cache holds up to itself."""
        q, k, v = self.project(x, rope, None)
        cache = Cache(keys=_write(cache.keys, layer, positions, k), values=_write(cache.values, layer, positions, v))
        size = cache.keys.shape[3]
        slots = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (x.shape[0], size))
        slots = jax.reshard(slots, P(RULES.batch, None))
        seen = jnp.where(slots <= positions[:, None], 1, 0)
        out = attention(
            q,
            cache.keys[layer].swapaxes(1, 2),
            cache.values[layer].swapaxes(1, 2),
            causal=True,
            q_segment_ids=jnp.ones_like(positions[:, None]),
            kv_segment_ids=seen,
            q_positions=positions[:, None],
            kv_positions=slots,
            sliding_window=self.sliding_window,
        )
        return self._project_out(out, None), cache

    def _heads(self, x: jax.Array, heads: int) -> jax.Array:
        """`[B, T, heads * Dh] -> [B, T, heads, Dh]`; heads that do not divide over `tensor` are gathered."""
        batch, length, width = spec_of(x)
        if width is not None and heads % jax.sharding.get_abstract_mesh().shape[width]:
            x, width = jax.reshard(x, P(batch, length, None)), None
        return reshape(x, (*x.shape[:2], heads, self.head_dim), P(batch, length, width, None))

    def _project_out(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        batch, length, heads, _ = spec_of(x)
        x = reshape(x, (*x.shape[:2], self.heads * self.head_dim), P(batch, length, heads))
        return self.out(x, child_key(key, "out"))


def _write(cache: jax.Array, layer: jax.Array | int, positions: jax.Array, new: jax.Array) -> jax.Array:
    """Writes `new [B, 1, K, Dh]` at `[layer, b, :, positions[b]]` of `cache [L, B, K, S, Dh]`."""
    rows = jax.reshard(jnp.arange(len(positions)), spec_of(positions))
    return cache.at[layer, rows, :, positions].set(new[:, 0].astype(cache.dtype), out_sharding=spec_of(cache))
