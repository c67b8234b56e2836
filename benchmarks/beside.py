"""Two sides measured in one process: they take turns, and a ratio is the median of the rounds' ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def in_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, round after round, each beginning with another side; a first round is not counted."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            one = seconds(sides[name])
            if number:
                took[name].append(one)
    return took


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
