"""Two sides measured in one process: they take turns, and a ratio is the median of the rounds' ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.kernels.tune import in_turns, seconds

__all__ = ["bare_products", "in_turns", "ratio", "seconds"]


def ratio(took: Mapping[str, list[float]], theirs: str, ours: str) -> float:
    return statistics.median(t / o for t, o in zip(took[theirs], took[ours], strict=True))


def bare_products(rounds: int) -> dict[str, float]:
    """GF/s of a product of large matrices, of either side."""
    import torch

    size, times = 2048, 4
    a, b = (np.random.default_rng(i).standard_normal((size, size), np.float32) for i in range(2))
    ja, jb, ta, tb = jnp.asarray(a), jnp.asarray(b), torch.tensor(a), torch.tensor(b)
    product = jax.jit(jnp.matmul)
    took = in_turns(
        {
            "jax": lambda: [product(ja, jb).block_until_ready() for _ in range(times)],
            "torch": lambda: [ta @ tb for _ in range(times)],
        },
        2 * rounds,
    )
    return {name: times * 2 * size**3 / 1e9 / statistics.median(one) for name, one in took.items()}
