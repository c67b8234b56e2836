"""What attention over the rows of a decoder costs a device: a model of it, reasoned and not measured.

It weighs packed rows against padded ones, which other kernels serve and which skip less or more. Two things make
attention dearer than products of as many operations: pairs that are computed though nobody sees them, and scores that
pass through memory, which they do where XLA's blocks serve a GPU or a TPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vlm_jax.kernels import placement
from vlm_jax.kernels.attention import packed_gpu, splash, tpu, xla
from vlm_jax.kernels.attention.api import choose
from vlm_jax.kernels.attention.reference import Mask, Rule

RECOMPUTED = 14 / 12  # operations forward and backward, over those of a gradient that keeps its scores
KERNEL_RATE = 0.6  # of a matrix product's rate, within a kernel, or in blocks that stay in a CPU's cache
SCORE_PASSES = 10  # times that XLA's blocks write or read an array of scores: 4 forward, 6 backward
# Operations of a matrix product that a device does while it moves a byte: an A100 does 312 T in bfloat16 and moves
# 2 TB a second, a v5e 197 T and 0.8. In float32 a GPU does a tenth.
INTENSITY = {"gpu": {2: 160, 4: 16}, "tpu": {2: 240, 4: 240}, "cpu": {2: 0, 4: 0}}


def visible_pairs(length: int, sliding_window: int | None) -> int:
    """How many pairs of positions of a sample see each other, causally."""
    window = min(length, sliding_window or length)
    return window * (window + 1) // 2 + (length - window) * window


def equal_pairs(
    rows: Sequence[Sequence[int]],
    length: int,
    *,
    heads: int,
    kv_heads: int,
    features: int,
    sliding_window: int | None,
    dtype: jnp.dtype,
    packed: bool,
) -> float:
    """Causal self-attention over these rows, forward and backward, under the mesh in use: as many pairs, if products
    computed nothing but what is seen, would take as long.

    rows: the lengths of the samples of each. length: T. packed: whether segment ids say who belongs together, or
      lengths do, of rows with one sample each.
    """
    q, k = (jax.ShapeDtypeStruct((len(rows), length, n, features), dtype) for n in (heads, kv_heads))
    ids = jax.ShapeDtypeStruct((len(rows), length), jnp.int32)
    rule = Rule(causal=True, sliding_window=sliding_window, softcap=None, scale=1.0, padded=not packed)
    mask, mesh = Mask(ids, ids, None, None), placement.mesh_of()
    choice = choose(mesh, rule, q, k, mask, None, None, None, log=False)
    platform, device = placement.platform_of(mesh) or jax.default_backend(), placement.device_of(mesh)
    dear = RECOMPUTED / KERNEL_RATE
    if choice == "xla":
        block = xla.choose_blocks(q.shape, k.shape, ordered=True, device=device).keys
        size = jnp.dtype(dtype).itemsize
        dear += SCORE_PASSES * (4 + size) / 2 * INTENSITY[platform][size] / (12 * features)
    elif choice == "pallas" and platform == "gpu":
        block = packed_gpu.TILE
    elif platform == "tpu" and tpu.is_short(rule, q, k, mask, placement.device_kind(mesh)):
        return dear * len(rows) * length**2  # it skips nothing
    else:  # blocks are skipped by their place alone
        block = splash.longest_block(device) if platform == "tpu" else packed_gpu.TILE  # cuDNN's are about as large
        rows = [[length]] * len(rows)
    return dear * sum(visible_pairs(n, sliding_window) + n * min(block, length) for row in rows for n in row)
