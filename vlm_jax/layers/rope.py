"""Rotary position embeddings (Su et al., 2021), split into halves as in Hugging Face, with Llama's scalings."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UsageError, suggest

KINDS = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies are changed for longer contexts.

    `linear`: divided by `factor`. `llama3` (Llama 3.1): long wavelengths divided by `factor`, short ones kept, the ones
    between `original_length / high_frequency_factor` and `.. / low_frequency_factor` interpolated. `yarn` (Peng et
    al., 2023): interpolated by the number of turns within `original_length`, and cos and sin scaled by
    `attention_factor` (default 0.1 ln(factor) + 1). `dynamic` (NTK) depends on the length of the sequence and is not
    supported.
    """

    kind: str
    factor: float
    original_length: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"rope scaling {self.kind!r} is not one of {', '.join(KINDS)}{suggest(self.kind, KINDS)}")


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """Angular frequencies float64 [head_dim / 2] in radians per position, and the factor on cos and sin."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    inverse = theta**-exponent
    if scaling is None:
        return inverse, 1.0
    if scaling.kind == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_length * inverse / (2 * math.pi)
        span = scaling.high_frequency_factor - scaling.low_frequency_factor
        keep = np.clip((turns - scaling.low_frequency_factor) / span, 0.0, 1.0)
        return keep * inverse + (1 - keep) * inverse / scaling.factor, 1.0
    if scaling.kind == "yarn":

        def dimension(turns: float) -> float:
            return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dimension(scaling.beta_fast)), 0)
        high = min(math.ceil(dimension(scaling.beta_slow)), head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        factor = scaling.attention_factor
        if factor is None:
            factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
        return inverse * (1 - ramp) + inverse / scaling.factor * ramp, factor
    raise AssertionError(scaling.kind)


def rope_table(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """`positions [B, T]` -> cos, sin float32 [B, T, 1, head_dim / 2]."""
    inverse, factor = frequencies(head_dim, theta, scaling)
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates `x [B, T, H, D]` in float32."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
