"""Feed-forward layers and their activations."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from vlm_jax.errors import UsageError, suggest
from vlm_jax.layers.linear import Linear
from vlm_jax.layers.scope import Scope, child_key


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI CLIP's approximation, `x * sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}


class MLP(nnx.Module):
    """`down(act(up(x)))` with biases, as in a vision transformer."""

    def __init__(self, scope: Scope, features: int, hidden: int, *, activation: str):
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UsageError(f"activation {activation!r} is not one of {known}{suggest(activation, ACTIVATIONS)}")
        self.up = Linear(scope / "up", features, hidden, axes=("embed", "mlp"), bias=True)
        self.down = Linear(scope / "down", hidden, features, axes=("mlp", "embed"), bias=True)
        self.activation = activation

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        hidden = ACTIVATIONS[self.activation](self.up(x, child_key(key, "up")))
        return self.down(hidden, child_key(key, "down"))


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))` without biases (Shazeer, 2020), as in Llama."""

    def __init__(self, scope: Scope, features: int, hidden: int):
        self.gate = Linear(scope / "gate", features, hidden, axes=("embed", "mlp"))
        self.up = Linear(scope / "up", features, hidden, axes=("embed", "mlp"))
        self.down = Linear(scope / "down", hidden, features, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        hidden = jax.nn.silu(self.gate(x, child_key(key, "gate"))) * self.up(x, child_key(key, "up"))
        return self.down(hidden, child_key(key, "down"))
