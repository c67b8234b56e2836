"""Attention over a sequence that is split over devices: the keys come to the queries, gathered.

Where the order is causal, late queries see more than early ones, and all devices wait for the last one, which has
2 - 1 / P times the mean work. So queries change places before, and outputs after (Llama 3, Grattafiori et al. 2024,
section 3.3.2): T is cut into 2 P halves of a device's part, and device i computes the halves i and 2 P - 1 - i.

    device            0     1     2     3
    holds           0 1 | 2 3 | 4 5 | 6 7
    computes        0 7 | 1 6 | 2 5 | 3 4
    halves it sees    9     9     9     9     (from the places that it holds: 3, 7, 11, 15)

A narrow window has no need of that, nor of all keys: those of the few devices before are fetched.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlm_jax.kernels.attention.reference import Mask, Rule

HALF = 256  # shorter halves cost as much to send as they save

Serve = Callable[[jax.Array, jax.Array, jax.Array, Mask, jax.Array | None], jax.Array]


def attention(
    serve: Serve,
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    *,
    axis_name: str | tuple[str, ...],
    skips: bool,
) -> jax.Array:
    """As `reference.attention` inside shard_map, with T and S split over `axis_name`; `bias` has S whole.

    serve(q, k, v, mask, bias) computes some of the queries. skips: whether it passes over keys that nobody sees,
    without which all devices have the same work as it is.
    """
    devices, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    queries, keys, window = q.shape[1], k.shape[1], rule.sliding_window
    by_index = queries == keys and mask.q_positions is None and mask.kv_positions is None
    if rule.causal and by_index and bias is None:
        # With a window of half of the sequence or less, the device with the most work would keep it.
        wide = window is None or 2 * window > devices * keys
        if skips and wide and queries % 2 == 0 and queries >= 2 * HALF:
            return _in_halves(serve, q, k, v, mask, axis_name)
        back = devices if window is None else math.ceil((window - 1) / keys)
        if back < devices - 1:
            return _in_windows(serve, q, k, v, mask, back, axis_name)
    if rule.ordered and mask.q_positions is None:
        mask = mask._replace(q_positions=device * queries)
    return serve(q, *_gathered(k, v, mask, axis_name), bias)


def _gathered(k, v, mask: Mask, axis_name) -> tuple[jax.Array, jax.Array, Mask]:
    """The keys and values of all devices, and what belongs to them of the mask."""

    def whole(array):
        return None if array is None else jax.lax.all_gather(array, axis_name, axis=1, tiled=True)

    mask = mask._replace(kv_segment_ids=whole(mask.kv_segment_ids), kv_positions=whole(mask.kv_positions))
    return whole(k), whole(v), mask


def _in_halves(serve: Serve, q, k, v, mask: Mask, axis_name) -> jax.Array:
    """One call for each half, so that no block of queries has some of both, which are far apart."""
    devices, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    k, v, mask = _gathered(k, v, mask, axis_name)
    length = q.shape[1] // 2
    outs = []
    for part in (0, 1):  # the even halves, then the odd ones: of either, each device holds one and computes one
        ways = [(half // 2, min(half, 2 * devices - 1 - half)) for half in range(part, 2 * devices, 2)]
        back = [(target, source) for source, target in ways]
        own = slice(part * length, (part + 1) * length)
        ids = None if mask.q_segment_ids is None else _sent(mask.q_segment_ids[:, own], axis_name, ways)
        half = jnp.where(device % 2 == part, device, 2 * devices - 1 - device)
        its_mask = mask._replace(q_segment_ids=ids, q_positions=half * length)
        outs.append(_sent(serve(_sent(q[:, own], axis_name, ways), k, v, its_mask, None), axis_name, back))
    return jnp.concatenate(outs, 1)


def _in_windows(serve: Serve, q, k, v, mask: Mask, back: int, axis_name) -> jax.Array:
    """With the keys of this device and of the `back` devices before it, which are all that a window reaches."""
    devices = jax.lax.axis_size(axis_name)

    def near(array):
        ways = ([(source, source + n) for source in range(devices - n)] for n in range(back, 0, -1))
        return jnp.concatenate([*(_sent(array, axis_name, way) for way in ways), array], 1)

    if mask.q_segment_ids is None:  # the first devices receive 0 for what is not there, which nobody sees
        ids = jnp.full_like(k, 1, dtype=jnp.int32, shape=k.shape[:2])
        mask = mask._replace(q_segment_ids=ids, kv_segment_ids=ids)
    mask = mask._replace(kv_segment_ids=near(mask.kv_segment_ids), q_positions=back * k.shape[1])
    return serve(q, near(k), near(v), mask, None)


def _sent(array: jax.Array, axis_name, ways: list[tuple[int, int]]) -> jax.Array:
    """`array` of the device that sends it here, by (source, target); 0 where none does."""
    return jax.lax.ppermute(array, axis_name, ways)
