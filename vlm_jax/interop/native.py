"""Our checkpoint on disk: sharded safetensors with one entry per layer, beside `config.json` and the tokenizer.

    config.json                        {"format": "vlm_jax", "model": {...}, "images": {...}, "template": ..., ...}
    model-00001-of-00002.safetensors   entries such as decoder.layers.3.mlp.up.kernel
    model.safetensors.index.json       entry -> file
    tokenizer files                    as transformers writes them

A model is written aside and moved into place at the end, `config.json` last: a folder that has one is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlm_jax.errors import UsageError
from vlm_jax.interop.layout import CONFIG, FORMAT, INDEX, PARTIAL, read_config

__all__ = ["entries", "load_params", "read_config", "save_model"]

STACKED = re.compile(r"(.*(?:^|/)layers)/(.*)")


def entries(path: str, shape: tuple[int, ...]) -> list[str]:
    """Names on disk of the parameter at `path`: one, or one per layer where it is stacked."""
    match = STACKED.fullmatch(path)
    if not match:
        return [path.replace("/", ".")]
    head, tail = match[1].replace("/", "."), match[2].replace("/", ".")
    return [f"{head}.{layer}.{tail}" for layer in range(shape[0])]


def save_model(
    directory: str,
    params: Mapping[str, jax.Array],
    config: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    shard_bytes: int = 4 << 30,
) -> None:
    """Writes weights, `config.json` and the tokenizer's files. Process 0 writes, every process must call.

    A model that was there before stays until the new one is wholly written; other files in the folder stay.
    """
    folder = epath.Path(directory)
    writer = jax.process_index() == 0
    partial = folder / PARTIAL
    if writer:
        if partial.exists():
            partial.rmtree()
        partial.mkdir(parents=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        (partial / CONFIG).write_text(json.dumps({"format": FORMAT, **config}, indent=1))
    sizes = {path: int(np.prod(a.shape)) * a.dtype.itemsize for path, a in params.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for path in params:
        if shards[-1] and filled + sizes[path] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(path)
        filled += sizes[path]
    index: dict[str, str] = {}
    for number, paths in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for path in paths:
            value = _on_host(params[path])
            parts = value if STACKED.fullmatch(path) else [value]
            names = entries(path, value.shape)
            tensors.update({name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)})
        if writer:
            save_file(tensors, str(partial / file), metadata={"format": FORMAT})
            shutil.copymode(partial / CONFIG, partial / file)  # safetensors lets only the owner read it
        index.update(dict.fromkeys(tensors, file))
    if writer:
        (partial / INDEX).write_text(
            json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}, indent=1)
        )
        _move_into_place(folder, partial)


def _move_into_place(folder: epath.Path, partial: epath.Path) -> None:
    """Renames alone, between two moments at which `config.json` tells that the folder is complete."""
    (folder / CONFIG).unlink(missing_ok=True)
    new = {file.name for file in partial.iterdir()}
    for old in folder.glob("model-*.safetensors"):
        if old.name not in new:
            old.unlink()
    for name in sorted(new, key=lambda name: name == CONFIG):
        (partial / name).replace(folder / name)
    partial.rmdir()


def _on_host(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def load_params(directory: str, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads weights into the shapes, dtypes and shardings of `abstract`, on the mesh in use; each device's slice is
    read alone.

    Raises UsageError that lists every missing, left-over and misshapen entry at once.
    """
    folder = epath.Path(directory)
    where = _read_index(folder)
    files = {file: _open(folder, file) for file in sorted(set(where.values()))}
    slices: dict[str, Any] = {}
    problems = []
    for path, a in abstract.items():
        expected = a.shape[1:] if STACKED.fullmatch(path) else a.shape
        for name in entries(path, a.shape):
            if name not in where:
                problems.append(f"missing {name}")
                continue
            try:
                slices[name] = files[where[name]].get_slice(name)
            except SafetensorError:
                problems.append(f"missing {name}, which the index places in {where[name]}")
                continue
            found = tuple(slices[name].get_shape())
            if found != expected:
                problems.append(f"{name} is {list(found)}, expected {list(expected)}")
    wanted = {name for path, a in abstract.items() for name in entries(path, a.shape)}
    problems += [f"left over {name}" for name in where if name not in wanted]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise UsageError(f"the weights in {directory} do not fit the model of its {CONFIG}:{listed}")
    mesh = jax.sharding.get_mesh()

    def load(path: str, a: jax.ShapeDtypeStruct) -> jax.Array:
        read = _reader([slices[name] for name in entries(path, a.shape)], bool(STACKED.fullmatch(path)), a.dtype)
        # The sharding of an abstract array names axes; where they lie is what the mesh in use says.
        return jax.make_array_from_callback(a.shape, NamedSharding(mesh, a.sharding.spec), read)

    return {path: load(path, a) for path, a in abstract.items()}


def _reader(parts: list[Any], stacked: bool, dtype: np.dtype) -> Callable[[Any], np.ndarray]:
    """`index -> values`; `index` has a slice for each dimension, the first for the layers if they are stacked."""

    def one(part: Any, index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(part[index if index else ...]).astype(dtype, copy=False)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return one(parts[0], index)
        return np.stack([one(part, index[1:]) for part in parts[index[0]]])

    return read


def _read_index(folder: epath.Path) -> dict[str, str]:
    if not (folder / INDEX).exists():
        raise UsageError(f"{folder} holds no {INDEX}: the model is not complete")
    try:
        where = json.loads((folder / INDEX).read_text())["weight_map"]
        return {str(name): epath.Path(file).name for name, file in where.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / INDEX} is damaged ({error}): write or copy the model again") from None


def _open(folder: epath.Path, file: str) -> Any:
    try:
        return safe_open(str(folder / file), framework="np")
    except FileNotFoundError:
        raise UsageError(f"the weight file {folder / file} is missing: copy the model again") from None
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the weight file {folder / file} is damaged ({error}): copy the model again") from None
