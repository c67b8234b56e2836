"""Dense layers and embeddings, with LoRA inside."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.kernels.placement import platform_of
from vlm_jax.layers.scope import Initializer, Scope, gather_for_use, lecun, use, zeros
from vlm_jax.sharding import spec_of


class Linear(nnx.Module):
    """`x [..., in] -> [..., out]`. `axes` are the logical axes of the kernel [in, out].

    With LoRA on this path the kernel stays as it is and `lora_a [in, rank]`, `lora_b [rank, out]` are added.
    """

    def __init__(
        self,
        scope: Scope,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        bias: bool = False,
        init: Initializer = lecun,
    ):
        self.kernel = scope.param("kernel", (in_features, out_features), axes, init)
        self.bias = scope.param("bias", (out_features,), axes[1:], zeros) if bias else None
        self.lora = lora = scope.lora_here()
        if lora is not None:
            self.lora_a = scope.param("lora_a", (in_features, lora.rank), (axes[0], "rank"), lecun)
            self.lora_b = scope.param("lora_b", (lora.rank, out_features), ("rank", axes[1]), zeros)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`key` turns LoRA's dropout on."""
        y = matmul(x, use(self.kernel, x.dtype))
        if self.lora is not None:
            if key is not None and self.lora.dropout > 0:
                keep = jax.random.bernoulli(key, 1 - self.lora.dropout, x.shape, out_sharding=jax.typeof(x).sharding)
                x = jnp.where(keep, x / (1 - self.lora.dropout), 0)
            low = matmul(x, use(self.lora_a, x.dtype))
            y = y + matmul(low, use(self.lora_b, x.dtype)) * (self.lora.alpha / self.lora.rank)
        if self.bias is not None:
            y = y + use(self.bias, x.dtype)
        return y

    def merged(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel with its adapter added, for a product that is made elsewhere. No dropout."""
        kernel = use(self.kernel, dtype)
        if self.lora is None:
            return kernel
        return kernel + matmul(use(self.lora_a, dtype), use(self.lora_b, dtype)) * (self.lora.alpha / self.lora.rank)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [..., in] @ kernel [in, out]`; a width split over `tensor` on both sides is summed: row-parallel layers."""
    out = P(*spec_of(x)[:-1], spec_of(kernel)[-1])
    return jnp.einsum("...d,df->...f", x, kernel, out_sharding=out)


def _matmul_forward(x, kernel):
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(saved, gradient):
    # What autodiff would do, in the order that does not transpose the wider side; and on a CPU `gradient` is finished
    # first, because XLA there computes it inside the transpose, column by column (a third of a step's time).
    x, kernel = saved
    if platform_of(jax.sharding.get_abstract_mesh()) == "cpu":
        gradient = jax.lax.optimization_barrier(gradient)
    d_x = jnp.einsum("...f,df->...d", gradient, kernel, out_sharding=spec_of(x))
    d_kernel = jnp.einsum("...d,...f->df", x, gradient, out_sharding=spec_of(kernel))
    return d_x, d_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


class Embedding(nnx.Module):
    """Token embedding [V, D]."""

    def __init__(self, scope: Scope, vocab_size: int, features: int, *, init: Initializer):
        self.embedding = scope.param("embedding", (vocab_size, features), ("vocab", "embed"), init)

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """`tokens [B, T] -> [B, T, D]`."""
        return _look_up(self.embedding[...], tokens, dtype)

    def as_head(self, dtype: jnp.dtype) -> jax.Array:
        """The tied output projection [D, V]."""
        return use(self.embedding, dtype).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of `table`, gathered in `dtype`; their gradient is summed in float32."""
    return _rows(gather_for_use(table, dtype), tokens)


def _rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return table.at[tokens].get(out_sharding=P(*spec_of(tokens), None))


def _look_up_forward(table, tokens, dtype):
    return _look_up(table, tokens, dtype), (table, tokens)


def _look_up_backward(dtype, saved, gradient):
    table, tokens = saved
    zeros = gather_for_use(jnp.zeros_like(table), jnp.float32)
    (total,) = jax.vjp(lambda rows: _rows(rows, tokens), zeros)[1](gradient.astype(jnp.float32))
    total = jax.reshard(total.astype(table.dtype), spec_of(table))
    return total, np.zeros(tokens.shape, jax.dtypes.float0)


_look_up.defvjp(_look_up_forward, _look_up_backward)
