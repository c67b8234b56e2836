"""Attention on a GPU: what serves a call, by the compute capability of the GPU and by what the call asks.

cuDNN, through jax.nn, where every query sees every key, or those before it, up to the length of its row: it knows
neither segment ids nor positions. `packed_gpu.py`, our kernel, on a Hopper GPU for what is left and has no bias. The
rest runs in blocks of XLA.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from vlm_jax.errors import UsageError
from vlm_jax.kernels.attention import packed_gpu
from vlm_jax.kernels.attention.reference import Mask, Rule
from vlm_jax.kernels.placement import compute_capability

FEWEST_QUERIES = 32  # fewer (decoding) would mostly be padding
HALVES = ("bfloat16", "float16")
# The largest head of cuDNN, forward and backward, by compute capability: what jax.nn lets through, and for 10.0 what
# cuDNN's support matrix has.
CUDNN_HEADS = {8.0: 128, 8.6: 128, 8.9: 128, 9.0: 256, 10.0: 128}


def check_dtype(dtype: jnp.dtype, device_kind: str | None) -> None:
    """Raises `UsageError` for bfloat16 on a GPU that has no such arithmetic."""
    capability = compute_capability(device_kind)
    if capability is not None and capability < 8.0 and dtype == jnp.bfloat16:
        raise UsageError(
            f"attention: {device_kind} (compute capability {capability}) has no bfloat16 arithmetic and would emulate "
            "it; use float32, in training --config.dtype=float32"
        )


def worthwhile(q_shape: tuple[int, ...]) -> bool:
    """Whether a kernel does more than fill up its tiles."""
    return q_shape[1] >= FEWEST_QUERIES


def refusal(
    rule: Rule, q: jax.Array, k: jax.Array, mask: Mask, bias: jax.Array | None, device_kind: str | None
) -> str | None:
    """Why our kernel cannot serve a call, as a clause; None if it can."""
    del rule, mask  # it serves them all
    capability = compute_capability(device_kind)
    if capability != 9.0:
        return f"the kernel needs compute capability 9.0 (H100, H200), and {_named(device_kind, capability)}"
    if bias is not None:
        return "the kernel takes no bias"
    if q.dtype not in HALVES or k.dtype != q.dtype:
        return f"the kernel multiplies bfloat16 or float16, not {q.dtype} by {k.dtype}"
    if q.shape[3] > packed_gpu.HEAD_SIZES[-1]:
        return f"the kernel takes heads of at most {packed_gpu.HEAD_SIZES[-1]}, not {q.shape[3]}"
    return None


def cudnn_refusal(
    rule: Rule, q: jax.Array, k: jax.Array, mask: Mask, bias: jax.Array | None, device_kind: str | None
) -> str | None:
    """Why cuDNN cannot serve a call, as a clause; None if it can."""
    capability = compute_capability(device_kind)
    if capability not in CUDNN_HEADS:
        return f"cuDNN serves compute capabilities from 8.0 to 10.0, and {_named(device_kind, capability)}"
    if mask.q_segment_ids is not None and not rule.padded:
        return "cuDNN knows no segment ids, only lengths"
    if rule.ordered and (mask.q_positions is not None or mask.kv_positions is not None):
        return "cuDNN orders by index, not by positions, which a part of a split T needs"
    if rule.sliding_window is not None and not rule.causal:
        return "cuDNN has a sliding window only where the call is causal"
    if bias is not None or rule.softcap is not None:
        return "cuDNN is given no bias (its gradient is not general) and has no soft cap"
    if q.dtype not in HALVES or k.dtype != q.dtype:
        return f"cuDNN multiplies bfloat16 or float16, not {q.dtype} by {k.dtype}"
    if q.shape[3] > CUDNN_HEADS[capability] or q.shape[3] % 8:
        return f"cuDNN takes heads of at most {CUDNN_HEADS[capability]} in whole eights here, not {q.shape[3]}"
    return None if _has_cudnn() else "jax finds no cuDNN where the program is traced"


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, rule: Rule) -> jax.Array:
    """As `reference.attention` without a bias, for calls that `cudnn_refusal` lets through."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    real, lengths = mask.q_segment_ids, {}
    if real is not None:  # a row of padding is given one position, so that nothing is divided by a sum of nothing
        ids = {"query_seq_lengths": real, "key_value_seq_lengths": mask.kv_segment_ids}
        lengths = {name: jnp.maximum(jnp.sum(row != 0, -1, dtype=jnp.int32), 1) for name, row in ids.items()}
    elif queries % 2 or keys % 2:
        full = {"query_seq_lengths": queries, "key_value_seq_lengths": keys}
        lengths = {name: jnp.full((batch,), length, jnp.int32) for name, length in full.items()}
    # jax refuses an odd length in training, and 577 patches are odd; cuDNN knows lengths.
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    window = None if rule.sliding_window is None else (rule.sliding_window - 1, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, scale=rule.scale, is_causal=rule.causal, local_window_size=window, implementation="cudnn", **lengths
    )
    out = out[:, :queries]
    return out if real is None else jnp.where((real != 0)[..., None, None], out, 0)


def _has_cudnn() -> bool:
    """Whether jax finds cuDNN; it traces no call of it otherwise. Without the CUDA plugin there is none."""
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        try:
            jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
        except RuntimeError:
            return False
    return True


def _named(device_kind: str | None, capability: float | None) -> str:
    if device_kind is None:
        return "without a mesh nothing says which GPU it is"
    return f"{device_kind} has {capability}" if capability else f"that of {device_kind!r} is not known"
