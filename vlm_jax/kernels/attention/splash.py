"""Attention over many keys on a TPU: jax's splash attention kernel, made to keep this package's contract.

Splash divides 0 by 0 in a row that sees nothing. It is given one attention sink per head at -1e30, which weighs nothing
beside any key and makes an empty row's sum 1: value 0, gradient 0, no NaN. Which blocks it visits is worked out here:
splash reads that off a numpy mask while tracing, when a part of a split sequence does not know its place yet. Source:
jax.experimental.pallas.ops.tpu.splash_attention; the tile sizes of `tiles.json` follow the tables of tokamax (best at
1024 and more, 128 never).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from vlm_jax.kernels.attention.reference import Mask, Rule
from vlm_jax.kernels.tiles import tile_size

FEWEST_QUERIES = 128
_LANES = 128
_SINK = -1e30


def serves(rule: Rule, mask: Mask) -> bool:
    """Splash orders keys by their index, and its queries follow one another."""
    in_a_row = mask.q_positions is None or jnp.ndim(mask.q_positions) == 0
    return not rule.ordered or (in_a_row and mask.kv_positions is None)


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

    start = 0 if mask.q_positions is None else mask.q_positions
    of_queries, of_keys = _visits(rule, start, (padded_q // block_q, block_q), (padded_kv // block_kv, block_kv))
    compute = _compute_tile(block_kv, tile_size("attention.splash.compute", device))
    kernel = splash.SplashAttentionKernel(
        fwd_mask_info=of_queries,
        dq_mask_info=of_queries,
        dkv_mask_info=of_keys,
        mask_function=_sees(rule) if rule.ordered else None,
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
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=rule.softcap,
        residual_checkpoint_name=None,
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


def _visits(
    rule: Rule, start: jax.Array | int, queries: tuple[int, int], keys: tuple[int, int]
) -> tuple[MaskInfo, MaskInfo]:
    """Which blocks of keys each block of queries visits, [1, blocks, visits], and which of queries each of keys, [1,
    visits, blocks]. queries, keys: the number of blocks and their length."""
    behind = None if rule.sliding_window is None else rule.sliding_window - 1
    ahead = 0 if rule.causal else None
    sequence = start + jnp.arange(math.prod(queries), dtype=jnp.int32) if rule.ordered else None

    def info(block, seen):
        return MaskInfo(data_next=block, mask_next=None, block_mask=seen, partial_mask_blocks=None, q_sequence=sequence)

    of_queries = _visited(start, queries, keys, behind, ahead)
    of_keys = _visited(-start, keys, queries, ahead, behind)
    return info(*(x[None] for x in of_queries)), info(*(x.T[None] for x in of_keys))


def _visited(
    start: jax.Array | int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    behind: int | None,
    ahead: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The block that each row's n-th visit goes to, and whether it does: [rows, visits], as many as the busiest has.

    rows, columns: number of blocks and their length, of a side that begins at `start` and of one that begins at 0.
    behind, ahead: how far a row sees to either side; None without a limit.
    """
    (n_rows, size), (n_columns, other) = rows, columns
    first = start + size * jnp.arange(n_rows, dtype=jnp.int32)
    low = jnp.zeros_like(first) if behind is None else jnp.maximum((first - behind) // other, 0)
    high = jnp.full_like(first, n_columns - 1)
    if ahead is not None:
        high = jnp.minimum((first + size - 1 + ahead) // other, high)
    visits = n_columns
    if behind is not None and ahead is not None:
        step = math.gcd(size, other, start) if isinstance(start, int) else 1  # rows begin at any multiple of it
        most = max((at + size - 1 + ahead) // other - (at - behind) // other + 1 for at in range(0, other, step))
        visits = min(most, n_columns)
    block = low[:, None] + jnp.arange(visits, dtype=jnp.int32)
    seen = block <= high[:, None]
    block = jnp.minimum(block, high[:, None]).clip(0, n_columns - 1)  # none left: the last again, which is at hand
    # Few bytes, since splash keeps them in scalar memory.
    return block.astype(jnp.int8 if n_columns <= 128 else jnp.int16), seen.astype(jnp.int8)


@functools.cache
def _sees(rule: Rule) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The rule as splash's kernels take it; the same function each time, by which jax knows a kernel again."""

    def sees(q: jax.Array, kv: jax.Array) -> jax.Array:
        terms = [q >= kv] * rule.causal
        if rule.sliding_window is not None:
            terms.append(q - kv < rule.sliding_window)
        return functools.reduce(operator.and_, terms)

    return sees


def _tile(length: int, most: int) -> tuple[int, int]:
    """The tile and the padded length: the fewest equal tiles of at most `most`, in whole lanes."""
    tiles = math.ceil(length / most)
    tile = math.ceil(length / tiles / _LANES) * _LANES
    return tile, tile * tiles


def _compute_tile(tile: int, most: int) -> int:
    """The part of a key tile that is multiplied at once: its largest divisor of at most `most` in whole lanes."""
    return next(size for size in range(most, 0, -_LANES) if tile % size == 0)
