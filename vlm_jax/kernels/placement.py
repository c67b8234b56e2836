"""Where an operation runs: the platform it is lowered for, its arguments' explicit mesh, what varies in shard_map.

Shared by the operations of this package, which read their arguments' sharding and wrap themselves in `jax.shard_map`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from vlm_jax.errors import UsageError, suggest

# MB of VMEM of a TPU's core, by jax's name for its kind; of those that are not here, at least 64.
FAST_MEMORY = {"TPU v2": 16, "TPU v3": 16, "TPU v4": 16, "TPU v5 lite": 128, "TPU v6 lite": 128}

IMPLEMENTATIONS = ("reference", "xla", "pallas", "pallas_interpret")

# An entry of a PartitionSpec, as a tuple of mesh axes.
Axes = tuple[str, ...]


def check_implementation(implementation: str | None, known: Sequence[str] = IMPLEMENTATIONS) -> None:
    """Raises `UsageError` unless `implementation` is None or one of `known`."""
    if implementation is not None and implementation not in known:
        raise UsageError(
            f"implementation={implementation!r} is unknown{suggest(str(implementation), known)}; "
            f"use None or one of {', '.join(known)}"
        )


def choose(
    operation: str,
    mesh: AbstractMesh,
    refusals: Mapping[str, str | None],
    implementation: str | None,
    *,
    log: bool = True,
) -> str:
    """The implementation to use; "auto" leaves the choice to the platform that the program is lowered for.

    operation: its name, for errors. refusals: by platform that has Pallas kernels ("tpu", "gpu"), why they cannot serve
    the call, or None where they can; "cudnn" for an operation that cuDNN has, which goes first on a GPU. log: whether
    a fallback is told, once. Raises `UsageError` where the one asked for is unknown or cannot serve it.
    """
    check_implementation(implementation, IMPLEMENTATIONS + (("cudnn",) if "cudnn" in refusals else ()))
    platform = platform_of(mesh)
    if implementation in ("reference", "xla"):
        return implementation
    if implementation is None:
        if platform is None:  # only a mesh says which GPU it is, so there a kernel is never chosen blindly
            if log and jax.default_backend() == "gpu":
                _log_once(f"{operation} runs in plain XLA: only a mesh says which GPU it is, so use jax.set_mesh")
            return "xla" if refusals["tpu"] is not None else "auto"
        kernels = [name for name in (("cudnn", "gpu") if platform == "gpu" else (platform,)) if name in refusals]
        for name in kernels:
            if refusals[name] is None:
                return "cudnn" if name == "cudnn" else "pallas"
        if kernels and log:
            _log_once(f"{operation} runs in plain XLA: " + "; ".join(str(refusals[name]) for name in kernels))
        return "xla"
    if implementation == "pallas" and platform is not None and platform not in refusals:
        raise UsageError(
            f"{operation} has no Pallas kernel for {platform}; use implementation='xla' or None"
            + (", or 'pallas_interpret' to try the TPU's" if platform == "cpu" else "")
        )
    refusal = refusals[{"cudnn": "cudnn", "pallas": platform or "tpu"}.get(implementation, "tpu")]
    if refusal is not None:
        raise UsageError(f"{operation} cannot use {implementation!r}: {refusal}; or use implementation='xla' or None")
    return implementation


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


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
    kind = device_kind(mesh)
    return platform_named(kind) if kind else None


def platform_named(device: str) -> str:
    """The platform of a device by its kind, or by its platform's name."""
    return next((platform for platform in ("tpu", "cpu") if device.lower().startswith(platform)), "gpu")


def device_of(mesh: AbstractMesh) -> str:
    """The name by which `tiles.tile_size` knows a device: the kind that the mesh tells, else jax's default platform."""
    return device_kind(mesh) or jax.default_backend()


def device_kind(mesh: AbstractMesh) -> str | None:
    """As jax names it ("TPU v4", "NVIDIA H200"), or None where there is no mesh."""
    return None if mesh.abstract_device is None else mesh.abstract_device.device_kind


# CUDA's compute capabilities (developer.nvidia.com/cuda-gpus), by a word of the device's name.
_CAPABILITIES = {
    **dict.fromkeys(("B100", "B200", "GB200"), 10.0),
    **dict.fromkeys(("H20", "H100", "H200", "H800", "GH200"), 9.0),
    **dict.fromkeys(("L4", "L20", "L40", "L40S", "ADA", "4060", "4070", "4080", "4090"), 8.9),
    **dict.fromkeys(("A10", "A10G", "A16", "A40", "A2", "A4000", "A5000", "A6000"), 8.6),
    **dict.fromkeys(("3060", "3070", "3080", "3090"), 8.6),
    **dict.fromkeys(("A100", "A30", "A800"), 8.0),
    **dict.fromkeys(("T4", "2070", "2080"), 7.5),
    **dict.fromkeys(("V100",), 7.0),
}


def compute_capability(device_kind: str | None) -> float | None:
    """Of an NVIDIA GPU by jax's name for it ("NVIDIA H200": 9.0); None where the name says nothing."""
    words = re.findall(r"[A-Z0-9]+", (device_kind or "").upper())
    return next((_CAPABILITIES[word] for word in words if word in _CAPABILITIES), None)


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
