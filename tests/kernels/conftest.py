"""Meshes for the tests of the operations."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh


@pytest.fixture
def explicit_mesh() -> Callable[..., Mesh]:
    """`explicit_mesh(2, 2, 2)`: data, fsdp and tensor over the first devices, all axes explicit."""

    def make(*sizes: int) -> Mesh:
        devices = jax.devices()[: int(np.prod(sizes))]
        return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3, devices=devices)

    return make
