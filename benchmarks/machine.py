"""On what a benchmark ran."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of these packages, without importing them."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
