"""Where an operation runs: the platform it is lowered for, its arguments' explicit mesh, what varies in shard_map.

Shared by the operations of this package, which read their arguments' sharding and wrap themselves in `jax.shard_map`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from vlm_jax.errors import UsageError, suggest

IMPLEMENTATIONS = ("reference", "xla", "pallas", "pallas_interpret")

# An entry of a PartitionSpec, as a tuple of mesh axes.
Axes = tuple[str, ...]


def check_implementation(implementation: str | None) -> None:
    """Raises `UsageError` unless `implementation` is None or one of `IMPLEMENTATIONS`."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise UsageError(
            f"implementation={implementation!r} is unknown{suggest(str(implementation), IMPLEMENTATIONS)}; "
            f"use None or one of {', '.join(IMPLEMENTATIONS)}"
        )


def choose(operation: str, mesh: AbstractMesh, refusal: str | None, implementation: str | None) -> str:
    """The implementation to use; "auto" leaves the choice to the platform that the program is lowered for.

    operation: its name, for errors. refusal: why the Pallas kernels cannot serve the call, if they cannot. Raises
    `UsageError` where the one asked for is unknown or cannot serve it.
    """
    check_implementation(implementation)
    platform = platform_of(mesh)
    if implementation in ("reference", "xla"):
        return implementation
    if implementation is None:
        return "xla" if refusal is not None else {"tpu": "pallas", None: "auto"}.get(platform, "xla")
    if refusal is not None:
        raise UsageError(f"{operation} cannot use {implementation!r}: {refusal}; or use implementation='xla' or None")
    if implementation == "pallas" and platform not in ("tpu", None):
        raise UsageError(
            f"{operation} has no Pallas kernel for {platform}; use implementation='xla' or None"
            + (", or 'pallas_interpret' to try the TPU's" if platform == "cpu" else "")
        )
    return implementation


def mesh_of(*arrays: jax.Array | None) -> AbstractMesh:
    """The mesh in use (`jax.set_mesh`, or the enclosing shard_map), else that of the arguments; possibly empty."""
    mesh = jax.sharding.get_abstract_mesh()
    for array in arrays:
        if mesh.empty and array is not None:
            mesh = jax.typeof(array).sharding.mesh
    return mesh


def platform_of(mesh: AbstractMesh) -> str | None:
    """'cpu', 'gpu' or 'tpu', read from the mesh, so that compiling ahead of time sees the target and not the host.

    None where there is no mesh: what is lowered for is then known only to `jax.lax.platform_dependent`.
    """
    kind = (device_kind(mesh) or "").lower()
    return next((platform for platform in ("tpu", "cpu") if kind.startswith(platform)), "gpu") if kind else None


def device_kind(mesh: AbstractMesh) -> str | None:
    """As jax names it ("TPU v4", "NVIDIA H200"), or None where there is no mesh."""
    return None if mesh.abstract_device is None else mesh.abstract_device.device_kind


def spec_of(array: jax.Array) -> tuple[Axes, ...]:
    """The explicit mesh axes over which each dimension of `array` is sharded."""
    typed = jax.typeof(array)
    spec = tuple(typed.sharding.spec) + (None,) * (typed.ndim - len(typed.sharding.spec))
    return tuple(() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec)


def partition(*axes: Axes) -> PartitionSpec:
    """`spec_of`, turned round."""
    return PartitionSpec(*(names if names else None for names in axes))


def axes_size(mesh: AbstractMesh, axes: Axes) -> int:
    """The number of parts into which `axes` cut a dimension."""
    size = 1
    for name in axes:
        size *= mesh.shape[name]
    return size


def varying_axes(array: jax.Array) -> frozenset[str]:
    """The manual axes over which `array` may differ from device to device (none outside shard_map)."""
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def zero_like(arrays: Sequence[jax.Array | None]) -> jax.Array | float:
    """A float32 zero that varies over every manual axis over which one of `arrays` varies.

    Added to an argument of a custom gradient rule it makes that argument vary alike, and its transpose sums the
    gradient over the axes that were missing; outside shard_map it is the number 0.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return 0.0
    zero = jnp.zeros((), jnp.float32)
    for array in arrays:
        if array is not None:
            zero = zero + jnp.full_like(array, 0, shape=(), dtype=jnp.float32)
    return zero


def vary_like(array: jax.Array | None, zero: jax.Array | float) -> jax.Array | None:
    """`array`, varying over the axes of `zero` too."""
    return array if array is None or isinstance(zero, float) else array + zero.astype(array.dtype)
