"""What every test stands on: eight simulated CPU devices, no network, no window, few threads.

The environment is set here, at import, because jax reads it when it is first imported.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

DEVICES = 8
REPOSITORY = Path(__file__).resolve().parents[1]

# Single-threaded products: `pytest -n 2` already fills two cores, and the tests' matrices are tiny.
XLA_FLAGS = f"--xla_force_host_platform_device_count={DEVICES} --xla_cpu_multi_thread_eigen=false"

os.environ.update(
    {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": XLA_FLAGS,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "WANDB_MODE": "disabled",
    }
)
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # a cached program would hide a recompilation

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python ARGS` from the checkout in a process of its own, with `devices` simulated devices.

    For what must not share this process: exit statuses, signals, what an import pulls in.
    """

    def run(
        *args: str | os.PathLike[str], devices: int = 1, timeout: float = 300.0, cwd: Path = REPOSITORY, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        flags = XLA_FLAGS.replace(f"count={DEVICES}", f"count={devices}")
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": flags, **environ}
        command = [sys.executable, *map(os.fspath, args)]
        return subprocess.run(
            command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )

    return run


@pytest.fixture(scope="session")
def run_processes() -> Callable[..., list[str]]:
    """Runs a program as `count` processes of one JAX job, one device each: `run(program, *arguments, count=2)`.

    Each gets the arguments, the address to meet at and its own number; returns what each printed. A process that does
    not end well fails the test with its stderr.
    """

    def run(program: str, *arguments: str, count: int = 2) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = XLA_FLAGS.replace(f"count={DEVICES}", "count=1")
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": flags}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments, address, str(number)],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]
        printed = []
        for process in processes:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            printed.append(out)
        return printed

    return run
