"""Meshes for the tests of the operations."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh


@pytest.fixture
def explicit_mesh() -> Callable[..., Mesh]:
    """`explicit_mesh(2, 2, 2)`: data, fsdp and tensor over the first devices, all axes explicit."""

    def make(*sizes: int) -> Mesh:
        devices = jax.devices()[: int(np.prod(sizes))]
        return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3, devices=devices)

    return make


@pytest.fixture(params=["v4:2x2x1", "v5e:2x2", "v5:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def tpu_chips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[jax.Device]:
    """Chips of one kind to compile for; none is there. Skips the test without libtpu."""
    pytest.importorskip("libtpu")
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in (settings | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        monkeypatch.setenv(name, value)
    hosts = {"chips_per_host_bounds": (2, 2, 1)} if request.param.count("x") == 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=request.param, **hosts).devices
