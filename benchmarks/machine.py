"""What a benchmark runs on."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

PAGES = "glibc.malloc.hugetlb=1"  # what the Makefile exports
THREADS = 2


def on_two_cores() -> None:
    """Holds this process, and whatever is compared in it, to the CPU, two cores of it, and large pages.

    To be called before jax or torch is imported. The pages need a new process, which takes this one's place.
    """
    if "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": PAGES})
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(THREADS)}


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of these packages, without importing them."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
