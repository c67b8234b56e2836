"""Attention on a TPU: which Pallas kernel serves a call.

`short.py` where it can; `splash.py` for longer keys, and for what is ordered by index and longer than one of its
blocks, of which it skips those that nobody sees.
"""

from __future__ import annotations

import jax

from vlm_jax.kernels.attention import short, splash
from vlm_jax.kernels.attention.reference import Mask, Rule
from vlm_jax.kernels.placement import FAST_MEMORY


def refusal(
    rule: Rule, q: jax.Array, k: jax.Array, mask: Mask, bias: jax.Array | None, device_kind: str | None
) -> str | None:
    """Why neither kernel can serve a call, as a clause; None if one can."""
    if bias is not None:
        return "the kernels take no bias"
    if _fits(q, k, device_kind) or splash.serves(rule, mask):
        return None
    return f"beyond {short.MOST_KEYS:,} keys it orders by index, so leave q_positions and kv_positions out"


def skips(rule: Rule, keys: int, device: str) -> bool:
    """Whether blocks that nobody sees are passed over, of a call that is ordered by index."""
    return rule.ordered and keys > splash.longest_block(device)


def worthwhile(q_shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> bool:
    """Whether a kernel does more than fill up its blocks: not in decoding, or for a handful of latents."""
    return q_shape[1] >= (short.FEWEST_QUERIES if kv_shape[1] <= short.MOST_KEYS else splash.FEWEST_QUERIES)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    rule: Rule,
    device_kind: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `reference.attention` without a bias, for calls that `refusal` lets through. device_kind: as jax names it;
    None where it is not known."""
    kernel = short if is_short(rule, q, k, mask, device_kind) else splash
    return kernel.attention(q, k, v, mask, rule=rule, device=device_kind or "tpu", interpret=interpret)


def is_short(rule: Rule, q: jax.Array, k: jax.Array, mask: Mask, device_kind: str | None) -> bool:
    """Whether `short.py` takes a call that one of the kernels can serve, and not `splash.py`."""
    long = skips(rule, k.shape[1], device_kind or "tpu") or not _fits(q, k, device_kind)
    return not (long and splash.serves(rule, mask))


def _fits(q: jax.Array, k: jax.Array, device_kind: str | None) -> bool:
    memory = min(64, FAST_MEMORY.get(device_kind or "", 64)) * 2**20  # more was not tried
    needed = short.Plan.make(q.shape, k.shape, device_kind or "tpu").fast_memory(q.dtype.itemsize)
    return k.shape[1] <= short.MOST_KEYS and needed <= memory
