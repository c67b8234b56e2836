"""Mesh and sharding rules: the one place where parallelism is decided.

Every array of a run lives on one Explicit mesh with the axes `data` (replicas), `fsdp` (replicas that share the
storage of the weights) and `tensor` (the width of the layers is split). One device is the mesh 1 x 1 x 1 and runs the
same code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UsageError

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis (or None: replicated). A name that is not a field here raises."""

    batch: tuple[str, ...] = ("data", "fsdp")
    embed: str | None = "fsdp"  # model width of a kernel
    heads: str | None = "tensor"  # query, key and value heads (times head size in a kernel)
    mlp: str | None = "tensor"  # inner width of a feed-forward layer
    vocab: str | None = "tensor"
    rank: str | None = None  # LoRA

    def axis(self, name: str | None) -> str | tuple[str, ...] | None:
        if name is None:
            return None
        known = [field.name for field in dataclasses.fields(self)]
        if name not in known:
            raise ValueError(f"no logical axis {name!r}; the rules have {known}")
        return getattr(self, name)

    def stored(self, axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int]) -> P:
        """Sharding of a parameter at rest. A dimension that its mesh axis does not divide stays whole.

        Raises ValueError when two dimensions claim one mesh axis, whatever their sizes.
        """
        claimed = [self.axis(name) for name in axes]
        parts = [() if axis is None else (axis,) if isinstance(axis, str) else axis for axis in claimed]
        used = [axis for names in parts for axis in names]
        if len(set(used)) != len(used):
            raise ValueError(f"axes {tuple(axes)} put two dimensions on one mesh axis: {claimed}")
        divides = [size % math.prod(mesh[a] for a in names) == 0 for size, names in zip(shape, parts, strict=True)]
        return P(*(axis if whole else None for axis, whole in zip(claimed, divides, strict=True)))


RULES = ShardingRules()
BATCH = P(RULES.batch)  # the leading axis of everything that has a batch


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """An Explicit mesh over `devices` (default: all). One size may be -1: what the others leave.

    Raises UsageError when the sizes do not multiply to the number of devices.
    """
    devices = list(devices) if devices is not None else jax.devices()
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    wrong = {axis: size for axis, size in sizes.items() if size != -1 and size < 1}
    free = [axis for axis, size in sizes.items() if size == -1]
    if wrong or len(free) > 1:
        raise UsageError(f"mesh sizes are positive, and at most one is -1 (the rest); got {sizes}")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(devices) % fixed or (not free and fixed != len(devices)):
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UsageError(
            f"mesh {asked} does not divide the {len(devices)} device(s) at hand; "
            f"set --config.mesh.data, .fsdp and .tensor so that their product is {len(devices)} (one may be -1)"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES), devices=devices
    )


def current_mesh_shape() -> Mapping[str, int]:
    """Sizes of the mesh in use. Raises RuntimeError when none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise RuntimeError("no mesh is set: call jax.set_mesh(vlm_jax.sharding.make_mesh()) first")
    return mesh.shape


def batch_shards() -> int:
    """Number of pieces that the batch axis is cut into on the current mesh."""
    shape = current_mesh_shape()
    return int(np.prod([shape[axis] for axis in RULES.batch]))


def without_fsdp(spec: P) -> P:
    """Sharding of a parameter while it is used: gathered over `fsdp`, still split over `tensor`."""
    return P(*(None if axis == "fsdp" else axis for axis in spec))


def spec_of(x: jax.Array) -> P:
    """The PartitionSpec in the type of `x`, one entry per dimension."""
    spec = jax.typeof(x).sharding.spec
    return P(*spec, *(None,) * (x.ndim - len(spec)))


def reshape(x: jax.Array, shape: Sequence[int], spec: P) -> jax.Array:
    """Reshape that says how the result is sharded, as an Explicit mesh asks when dimensions split."""
    return jax.lax.reshape(x, tuple(shape), out_sharding=spec)


def place(x: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """Makes the global array of which this process holds the rows `x`."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)


def concrete(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of `x` on the devices of the mesh in use, as those who allocate arrays want it;
    what `jax.eval_shape` gives names the axes only."""
    spec = getattr(x.sharding, "spec", P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(jax.sharding.get_mesh(), spec))
