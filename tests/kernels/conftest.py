"""Meshes, TPUs to compile for, and an interpreted GPU, for the tests of the operations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # from jax 0.11 on it is in mosaic_gpu
from jax.sharding import AxisType, Mesh

from vlm_jax import topologies


@pytest.fixture
def explicit_mesh() -> Callable[..., Mesh]:
    """`explicit_mesh(2, 2, 2)`: data, fsdp and tensor over the first devices, all axes explicit."""

    def make(*sizes: int) -> Mesh:
        devices = jax.devices()[: int(np.prod(sizes))]
        return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3, devices=devices)

    return make


@pytest.fixture
def with_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax traces a call of cuDNN only where it finds cuDNN."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.fixture
def gpu_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What `interpret=` of a kernel for Mosaic GPU takes. There must be no race between its threads; jax 0.12 also
    minds the order of the TMA's writes and of what is read before them.

    jax has no other door to these: how a thread is run (0.10 compiles every thread of every program anew, a second each
    time; here each kernel once), and the races that were found.
    """
    compiled: dict[Any, Any] = {}
    lock = threading.Lock()

    def run_jaxpr(jaxpr: Any, consts: Any, *args: Any) -> None:
        with lock:
            if jaxpr not in compiled:
                call = jax.jit(lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args) and None)
                compiled[jaxpr] = call.lower(consts, *args).compile()
        compiled[jaxpr](consts, *args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run_jaxpr)
    yield InterpretGPUParams(detect_races=True)
    races = gpu_callbacks.get_races().races_found
    gpu_callbacks.reset_gpu_interpret_mode_state()
    assert not races


@pytest.fixture(params=topologies.TPUS.values())
def tpu_chips(request: pytest.FixtureRequest) -> list[jax.Device]:
    """Chips of one kind to compile for; none is there. Skips the test without libtpu."""
    pytest.importorskip("libtpu")
    return topologies.tpu_chips(request.param)
