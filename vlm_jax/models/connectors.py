"""Connectors: vision features [B, P, Dv] -> [B, P, D] in the decoder's width; `key` turns dropout on.

A new one is a class and a line below.
"""

from __future__ import annotations

import jax
from flax import nnx

from vlm_jax.errors import UsageError, suggest
from vlm_jax.layers.linear import Linear
from vlm_jax.layers.mlp import ACTIVATIONS
from vlm_jax.layers.scope import Scope, child_key


class Identity(nnx.Module):
    """For towers that already have the decoder's width."""

    def __init__(self, scope: Scope, in_features: int, features: int):
        if in_features != features:
            raise UsageError(
                f"connector 'identity' needs equal widths, but the tower gives {in_features} and the decoder takes "
                f"{features}; use 'linear' or 'mlp2x_gelu'"
            )

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return x


class Projection(nnx.Module):
    """One linear layer with bias (LLaVA 1.0)."""

    def __init__(self, scope: Scope, in_features: int, features: int):
        self.linear = Linear(scope / "linear", in_features, features, axes=(None, "embed"), bias=True)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.linear(x, child_key(key, "linear"))


class MLP2xGELU(nnx.Module):
    """Linear, exact GELU, linear, with biases (LLaVA 1.5)."""

    def __init__(self, scope: Scope, in_features: int, features: int):
        self.first = Linear(scope / "first", in_features, features, axes=("embed", "mlp"), bias=True)
        self.second = Linear(scope / "second", features, features, axes=("mlp", "embed"), bias=True)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        hidden = ACTIVATIONS["gelu"](self.first(x, child_key(key, "first")))
        return self.second(hidden, child_key(key, "second"))


CONNECTORS = {"identity": Identity, "linear": Projection, "mlp2x_gelu": MLP2xGELU}


def make_connector(kind: str, scope: Scope, in_features: int, features: int) -> nnx.Module:
    if kind not in CONNECTORS:
        raise UsageError(f"connector {kind!r} is not one of {', '.join(CONNECTORS)}{suggest(kind, CONNECTORS)}")
    return CONNECTORS[kind](scope, in_features, features)
