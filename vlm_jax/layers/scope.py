"""How parameters are made: each module gets a `Scope` that knows its path, its random key and how it is sharded.

A parameter's initial value depends on the seed and on its path alone, so that it is the same on any mesh and does not
change when a sibling is added. Stacked layers are made directly with their leading axis.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UsageError
from vlm_jax.sharding import RULES, current_mesh_shape, spec_of, without_fsdp

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype, P], jax.Array]
"""`(key, shape, dtype, spec) -> value`, made in its sharding: each device draws its own part."""


def normal(std: float) -> Initializer:
    return lambda key, shape, dtype, spec: std * jax.random.normal(key, shape, dtype, out_sharding=spec)


def lecun(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, spec: P) -> jax.Array:
    """Normal with variance 1 / fan-in, for kernels [in, out]."""
    return jax.random.normal(key, shape, dtype, out_sharding=spec) * shape[0] ** -0.5


def zeros(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, spec: P) -> jax.Array:
    return jnp.zeros(shape, dtype, out_sharding=spec)


def ones(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, spec: P) -> jax.Array:
    return jnp.ones(shape, dtype, out_sharding=spec)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al., 2021) on every `Linear` whose path matches `targets` wholly.

    The output is `x W + dropout(x) A B * alpha / rank`, with B zero at the start. There is no dropout at the head of a
    decoder, whose product is made within the loss.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str = r"decoder/layers/.*"

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise UsageError(f"lora needs a rank above 0 and a dropout in [0, 1); got {self.rank} and {self.dropout}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UsageError(f"lora.targets {self.targets!r} is not a regex: {error}") from error


@dataclasses.dataclass(frozen=True)
class Scope:
    """`scope / "name"` is the scope of a child. `stack` are leading axes that every parameter below gets."""

    key: jax.Array
    path: str = ""
    param_dtype: jnp.dtype = jnp.float32
    lora: LoRA | None = None
    stack: tuple[int, ...] = ()

    def __truediv__(self, name: str) -> Scope:
        return dataclasses.replace(self, path=f"{self.path}/{name}" if self.path else name)

    def stacked(self, layers: int) -> Scope:
        return dataclasses.replace(self, stack=(*self.stack, layers))

    def lora_here(self) -> LoRA | None:
        return self.lora if self.lora is not None and re.fullmatch(self.lora.targets, self.path) else None

    def param(self, name: str, shape: Sequence[int], axes: Sequence[str | None], init: Initializer) -> nnx.Param:
        """A parameter [*stack, *shape]; `axes` names the logical axis of each dimension of `shape`."""
        key = jax.random.fold_in(self.key, zlib.crc32(f"{self.path}/{name}".encode()))
        spec = RULES.stored(axes, shape, current_mesh_shape())
        make = lambda key: init(key, tuple(shape), self.param_dtype, spec)  # noqa: E731
        for _ in self.stack:
            make = jax.vmap(make)
        if self.stack:
            key = jax.random.split(key, self.stack)
        value = jax.reshard(make(key), P(*(None,) * len(self.stack), *spec))
        return nnx.Param(value)


def use(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """The parameter as a layer computes with it."""
    return gather_for_use(param[...], dtype)


def gather_for_use(value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cast first, then gathered over `fsdp`, so that the narrow form travels."""
    value = value.astype(dtype)
    return jax.reshard(value, without_fsdp(spec_of(value)))


def child_key(key: jax.Array | None, name: str) -> jax.Array | None:
    """Key of a part of a module; None (no dropout) stays None."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
