"""Devices that are not there, for programs that are made ahead of time."""

from __future__ import annotations

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

T4, A100, H200, B200 = "Tesla T4", "NVIDIA A100-SXM4-40GB", "NVIDIA H200", "NVIDIA B200"


def absent_mesh(
    kind: str, count: int = 1, *, axis: str = "data", axis_type: AxisType = AxisType.Explicit
) -> AbstractMesh:
    """A mesh over `count` devices of a kind as jax names it."""
    tpu = kind.startswith("TPU")
    device = AbstractDevice(kind, num_cores=1 if tpu else 132, platform="tpu" if tpu else "cuda")
    return AbstractMesh((count,), (axis,), axis_types=(axis_type,), abstract_device=device)
