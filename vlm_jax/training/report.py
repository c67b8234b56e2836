"""Which modules a stage moved, and by how much: the difference between its weights at the end and at its start.

The start is kept on disk beside the stage's checkpoints (`Checkpoints.save_start`), not in memory: it costs 4 bytes per
trained parameter there, a third of one checkpoint, and survives a resume. It is read back when the optimizer's state is
gone, so that the comparison, which is exact, fits wherever the training did.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Moved:
    """What became of the trained parameters of one module.

    change: norm of the difference. relative: that over the norm at the start, None where this was zero.
    largest: of the changes of single weights. layers, still: how many layers there are, and how many did not move.
    """

    parameters: int
    change: float
    relative: float | None
    largest: float
    layers: int
    still: int


def module_of(path: str) -> str:
    """`decoder/layers/mlp/up/kernel` → `decoder/layers/mlp/up`; adapters are a module of their own."""
    module, _, leaf = path.rpartition("/")
    return f"{module} (lora)" if leaf in ("lora_a", "lora_b") else module or leaf


def compare(before: Params, after: Params) -> dict[str, Moved]:
    """Each module of `after`, which holds the same paths as `before`, by name."""
    measured = jax.device_get(jax.jit(_measure)(dict(before), dict(after)))
    groups: dict[str, list[str]] = {}
    for path in after:
        groups.setdefault(module_of(path), []).append(path)
    moved = {}
    for module, paths in groups.items():
        change, norm, largest = ({path: measured[path][i] for path in paths} for i in range(3))
        squared = sum(float(c.sum()) for c in change.values())
        start = sum(float(n.sum()) for n in norm.values())
        by_layer = sum(largest[path] for path in paths)  # of one length within a module
        moved[module] = Moved(
            parameters=sum(math.prod(after[path].shape) for path in paths),
            change=math.sqrt(squared),
            relative=math.sqrt(squared / start) if start else None,
            largest=max(float(one.max()) for one in largest.values()),
            layers=len(by_layer),
            still=int((by_layer == 0).sum()),
        )
    return moved


def _measure(before: dict[str, jax.Array], after: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, ...]]:
    """For each path and layer: squared norm of the difference, squared norm at the start, largest difference."""

    def measure(path: str) -> tuple[jax.Array, ...]:
        stacked = "/layers/" in path
        axes = tuple(range(1 if stacked else 0, after[path].ndim))
        start = before[path].astype(jnp.float32)
        change = after[path].astype(jnp.float32) - start
        sums = jnp.sum(change**2, axes), jnp.sum(start**2, axes), jnp.max(jnp.abs(change), axes)
        return tuple(jnp.atleast_1d(one) for one in sums)

    return {path: measure(path) for path in after}


def table(moved: Mapping[str, Moved], frozen: Mapping[str, jax.ShapeDtypeStruct]) -> str:
    """For people: the modules in their order, then what the stage held still. `frozen` are the untrained parameters."""
    width = max([len(module) for module in moved] + [len("moved")])
    lines = [f"{'moved':<{width}}{'parameters':>15}{'change':>11}{'relative':>10}{'largest':>10}"]
    for module, one in moved.items():
        relative = "from zero" if one.relative is None else f"{one.relative:.2%}"
        note = ""
        if one.still == one.layers:
            note = "  did not move"
        elif one.still:
            note = f"  {one.still} of {one.layers} layers did not move"
        lines.append(
            f"{module:<{width}}{one.parameters:>15,}{one.change:>11.2e}{relative:>10}{one.largest:>10.1e}{note}"
        )
    held: dict[str, int] = {}
    for path, a in frozen.items():
        part = path.split("/")[0]
        held[part] = held.get(part, 0) + math.prod(a.shape)
    if held:
        lines.append("frozen: " + ", ".join(f"{part} ({count:,})" for part, count in held.items()))
    return "\n".join(lines)


def as_json(moved: Mapping[str, Moved]) -> dict[str, Any]:
    return {module: dataclasses.asdict(one) for module, one in moved.items()}
