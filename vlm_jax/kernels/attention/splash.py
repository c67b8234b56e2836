"""Attention over many keys on a TPU: jax's splash attention kernel, made to keep this package's contract.

Splash divides 0 by 0 in a row that sees nothing. It is given one attention sink per head at -1e30, which weighs nothing
beside any key and makes an empty row's sum 1: value 0, gradient 0, no NaN. Source: jax.experimental.pallas.ops.tpu.
splash_attention; the tile sizes of `tiles.json` follow the tables of tokamax (best at 1024 and more, 128 never).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from vlm_jax.kernels.attention.reference import Mask, Rule
from vlm_jax.kernels.tiles import tile_size

FEWEST_QUERIES = 128
_LANES = 128
_SINK = -1e30


def serves(rule: Rule, mask: Mask) -> bool:
    """Splash knows no order but that of the index."""
    return not rule.ordered or (mask.q_positions is None and mask.kv_positions is None)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, rule: Rule, device: str, interpret: bool = False
) -> jax.Array:
    """As `reference.attention` without a bias, for calls that it `serves`."""
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    block_q, padded_q = _tile(queries, longest_block(device))
    block_kv, padded_kv = _tile(keys, longest_block(device))

    def pad(array, length):  # [B, T, H, D] -> [B, H, padded, D]
        return jnp.pad(array, ((0, 0), (0, length - array.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    q_ids, kv_ids = mask.q_segment_ids, mask.kv_segment_ids
    if q_ids is None and padded_kv > keys:
        q_ids, kv_ids = jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)
    segments = sinks = None
    if q_ids is not None:  # 0 must not see 0: two ids that differ, and that nobody uses
        nobody = jnp.iinfo(jnp.int32).min
        q_ids = jnp.pad(q_ids, ((0, 0), (0, padded_q - queries)))
        kv_ids = jnp.pad(kv_ids, ((0, 0), (0, padded_kv - keys)))
        segments = splash.SegmentIds(jnp.where(q_ids == 0, nobody, q_ids), jnp.where(kv_ids == 0, nobody + 1, kv_ids))
        sinks = jnp.full((heads,), _SINK, jnp.float32)

    shape = (padded_q, padded_kv)
    if rule.sliding_window is not None:
        seen = splash.LocalMask(shape, (rule.sliding_window - 1, 0 if rule.causal else None), 0)
    else:
        seen = splash.CausalMask(shape) if rule.causal else splash.FullMask(shape)
    compute = _compute_tile(block_kv, tile_size("attention.splash.compute", device))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=compute,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=compute,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=rule.softcap,
        interpret=interpret,
    )
    q = q * jnp.asarray(rule.scale, q.dtype)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0, None))(
        pad(q, padded_q), pad(k, padded_kv), pad(v, padded_kv), segments, sinks
    )
    return out.swapaxes(1, 2)[:, :queries]


def longest_block(device: str) -> int:
    """Of queries, and of keys."""
    return tile_size("attention.splash.block", device)


def _tile(length: int, most: int) -> tuple[int, int]:
    """The tile and the padded length: the fewest equal tiles of at most `most`, in whole lanes."""
    tiles = math.ceil(length / most)
    tile = math.ceil(length / tiles / _LANES) * _LANES
    return tile, tile * tiles


def _compute_tile(tile: int, most: int) -> int:
    """The part of a key tile that is multiplied at once: its largest divisor of at most `most` in whole lanes."""
    return next(size for size in range(most, 0, -_LANES) if tile % size == 0)
