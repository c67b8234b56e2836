"""Normalisation over the last axis, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.layers.scope import Scope, ones, use, zeros


class RMSNorm(nnx.Module):
    """Zhang and Sennrich, 2019. `x [..., D]`; the scale has no offset (Llama's form)."""

    def __init__(self, scope: Scope, features: int, *, eps: float):
        self.scale = scope.param("scale", (features,), (None,), ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return use(self.scale, x.dtype) * wide.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Ba et al., 2016. `x [..., D]`."""

    def __init__(self, scope: Scope, features: int, *, eps: float):
        self.scale = scope.param("scale", (features,), (None,), ones)
        self.bias = scope.param("bias", (features,), (None,), zeros)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * use(self.scale, jnp.float32) + use(self.bias, jnp.float32)).astype(x.dtype)
