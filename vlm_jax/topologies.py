"""TPUs that are not there, to compile for. Needs libtpu, which holds their compiler (`pip install -e ".[plan]"`)."""

from __future__ import annotations

import os

import jax
from jax.experimental import topologies

# Four chips of each kind, one host, as libtpu names them.
TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# What libtpu would ask of the machine, and leave to load it in several processes at once.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_chips(name: str) -> list[jax.Device]:
    """The chips of a topology by libtpu's name for it ("v5e:4x4"). For a process with `JAX_PLATFORMS=cpu`, whose
    environment it changes: libtpu reads where it is from there."""
    os.environ.update(_ENVIRONMENT)
    flat = {"chips_per_host_bounds": (2, 2, 1)} if name.count("x") == 1 else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **flat).devices)
