"""What a run needs, and whether it is here: memory per device, weights, data. Known from the config alone, so that a
laptop is told in a second, before anything is fetched or compiled, and what it could run instead."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import constants, try_to_load_from_cache

from vlm_jax.config import load_config, plain, split_spec
from vlm_jax.data.sources import is_there, open_source
from vlm_jax.errors import UsageError
from vlm_jax.families import DTYPES, make_family
from vlm_jax.training.optimizer import multipliers

OWN_DATA = "--config.data.train=my.json --config.data.images=photos/"


@dataclasses.dataclass(frozen=True)
class StageNeeds:
    """Parameters of a stage, and the bytes that each device holds of weights, gradients and optimizer. Activations, the
    batch and the compiler's buffers are not in it: a run needs more than this."""

    name: str
    trained: int
    total: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def bytes(self) -> int:
        return self.weights + self.gradients + self.optimizer


def stage_needs(config: Any) -> list[StageNeeds]:
    """For each stage, on the mesh in use; nothing is allocated. Raises UsageError where the config is wrong."""
    abstract = make_family(plain(config.model), dtype=config.dtype, remat=config.remat).bound.abstract
    local = {path: math.prod(a.sharding.shard_shape(a.shape)) for path, a in abstract.items()}
    total = sum(math.prod(a.shape) for a in abstract.values())
    moments = 4 + (2 if config.optimizer.first_moment == "bfloat16" else 4)
    frozen_bytes = DTYPES[config.frozen_dtype](0).dtype.itemsize
    result = []
    for stage in config.stages:
        rates = multipliers(list(abstract), stage.groups)
        trained = [path for path, rate in rates.items() if rate is not None]
        here = sum(local[path] for path in trained)
        frozen = sum(local.values()) - here
        result.append(
            StageNeeds(
                name=stage.name,
                trained=sum(math.prod(abstract[path].shape) for path in trained),
                total=total,
                weights=(8 if config.ema is not None else 4) * here + frozen_bytes * frozen,
                gradients=4 * here,
                optimizer=moments * here,
            )
        )
    return result


def device_memory() -> int | None:
    """Bytes of the device with the least, None where nobody knows. Devices that are one CPU share its memory."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
        except (AttributeError, ValueError, OSError):
            return None
    limits: list[int] = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices]
    return min(limits) or None


def check(config: Any, spec: str) -> None:
    """Raises UsageError when the run that `spec` (FILE[:ARGS]) and its changes describe cannot begin here: one message
    with all that it needs, what of it is missing, and the two nearest things that would run.

    What is not known is not held against it: a device that does not tell its memory, weights that can be fetched.
    """
    needs, memory = stage_needs(config), device_memory()
    most = max(needs, key=lambda one: one.bytes)
    short = memory is not None and most.bytes > memory
    weights = {name: _weights(name) for name in _starts(config)}
    sources = _sources(config)
    data = {path: is_there(path) for source in sources for path in source if path}
    named = config.data.train or all(stage.data.train for stage in config.stages)
    if not short and not any("MISSING" in where for where in weights.values()):
        if config.data.train or config.data.images:  # a path that the user typed: one sentence says what is wrong
            for path, images in sources:
                if not is_there(path) or (images and not is_there(images)):
                    open_source(path, images)
        if all(data.values()):
            return
    mesh = " x ".join(f"{axis}={size}" for axis, size in jax.sharding.get_mesh().shape.items())
    lines = [f"{spec} cannot run here; it needs"]
    lines += [f"  stage {one.name}: {one.trained:,} of {one.total:,} parameters trained" for one in needs]
    parts = f"{_gb(most.weights)} of weights, {_gb(most.gradients)} of gradients, {_gb(most.optimizer)} of optimizer"
    lines.append(f"  memory: {_gb(most.bytes)} per device in stage {most.name} on the mesh {mesh}: {parts};")
    lines.append("    activations and buffers come on top")
    lines += [f"    MISSING: there are {_gb(memory)}"] if short and memory is not None else []
    lines += [f"  weights: {name} ({where})" for name, where in weights.items()]
    lines += [f"  data: {path}" + ("" if there else " (MISSING)") for path, there in data.items()]
    lines += [] if named else [f"  data: yours (MISSING; name it with {OWN_DATA})"]
    nearest = "".join(f"\n  python -m vlm_jax.train --config={command}" for command in _nearest(config, spec, memory))
    raise UsageError("\n".join(lines) + (f"\nthe nearest that would run here:{nearest}" if nearest else ""))


def _starts(config: Any) -> list[str]:
    """The models that the weights come from."""
    parts = [path for path in config.parts.values() if path]
    return [config.init_from] if config.init_from else list(dict.fromkeys(parts))


def _weights(name: str) -> str:
    """Where the model at this path is. A folder is looked into by those who open it, who know what to expect there."""
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1 or name[0] in "/.~" or os.path.exists(name):
        return "a folder"
    if isinstance(try_to_load_from_cache(repository, "config.json", revision=revision or None), str):
        return "fetched before"
    return "MISSING; HF_HUB_OFFLINE forbids to fetch it" if constants.HF_HUB_OFFLINE else "to be fetched from the hub"


def _sources(config: Any) -> list[tuple[str, str | None]]:
    """The data files of all stages, each with its folder of images."""
    found = []
    for stage in config.stages:
        train = config.data.train or stage.data.train or ()
        sources: list[Mapping[str, Any]] = [{"path": train}] if isinstance(train, str) else list(train)
        images = config.data.images or stage.data.images
        found += [(str(one["path"]), dict(one).get("images") or images) for one in sources]
    return found


def _nearest(config: Any, spec: str, memory: int | None) -> list[str]:
    """At most two commands: this config at its tiny size, and a fine-tuning by LoRA that fits: this config's, else the
    largest, or on a CPU, which is slow, the smallest. Needs nothing but the config files beside this one."""
    file, args = split_spec(spec)
    found = [f"{file}:tiny"] if "tiny" not in args and _size(f"{file}:tiny") is not None else []
    others = [str(path) for path in sorted(Path(file).parent.glob("*.py"))]
    sizes = {f"{one}:task,lora": _size(f"{one}:task,lora") for one in others}
    # Half as much again as the estimate, for what it leaves out.
    fitting = {one: size for one, size in sizes.items() if size and (memory is None or 1.5 * size <= memory)}
    fitting.pop(spec, None)
    slow = jax.local_devices()[0].platform == "cpu"
    by_size = sorted(fitting, key=lambda one: fitting[one] if slow else -fitting[one])
    own = [one for one in by_size if one == f"{file}:task,lora" and not slow]
    return [*found, *(f"{one} {OWN_DATA}" for one in (own + by_size)[:1])]


def _size(spec: str) -> int | None:
    """The bytes per device that a config needs; None for one without this variant."""
    try:
        return max(one.bytes for one in stage_needs(load_config(spec)[0]))
    except UsageError:
        return None


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
