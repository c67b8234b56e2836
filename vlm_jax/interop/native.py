"""Our checkpoint on disk: sharded safetensors with one entry per layer, beside `config.json` and the tokenizer.

    config.json                        {"format": "vlm_jax", "model": {...}, "images": {...}, "template": ..., ...}
    model-00001-of-00002.safetensors   entries such as decoder.layers.3.mlp.up.kernel
    model.safetensors.index.json       entry -> file
    tokenizer files                    as transformers writes them
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlm_jax.errors import UsageError

FORMAT = "vlm_jax"
INDEX = "model.safetensors.index.json"
STACKED = re.compile(r"(.*(?:^|/)layers)/(.*)")


def entries(path: str, shape: tuple[int, ...]) -> list[str]:
    """Names on disk of the parameter at `path`: one, or one per layer where it is stacked."""
    match = STACKED.fullmatch(path)
    if not match:
        return [path.replace("/", ".")]
    head, tail = match[1].replace("/", "."), match[2].replace("/", ".")
    return [f"{head}.{layer}.{tail}" for layer in range(shape[0])]


def save_model(
    directory: str, params: Mapping[str, jax.Array], config: Mapping[str, Any], *, shard_bytes: int = 4 << 30
) -> None:
    """Writes weights and `config.json`; process 0 writes, every process must call."""
    folder = epath.Path(directory)
    writer = jax.process_index() == 0
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
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
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for path in paths:
            value = _on_host(params[path])
            names = entries(path, value.shape)
            parts = value if STACKED.fullmatch(path) else [value]
            tensors.update({name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)})
        if writer:
            save_file(tensors, str(folder / name), metadata={"format": FORMAT})
        index.update(dict.fromkeys(tensors, name))
    if writer:
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}, indent=1)
        )
        (folder / "config.json").write_text(json.dumps({"format": FORMAT, **config}, indent=1))


def _on_host(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def read_config(directory: str) -> dict[str, Any]:
    """`config.json` of one of our checkpoints. Raises UsageError when it is not one."""
    file = epath.Path(directory) / "config.json"
    if not file.exists():
        raise UsageError(f"{directory} holds no config.json: it is not a model")
    config = json.loads(file.read_text())
    if config.get("format") != FORMAT:
        raise UsageError(f"{file} is not a {FORMAT} checkpoint (model_type {config.get('model_type')!r})")
    return config


def load_params(directory: str, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads weights into the shapes, dtypes and shardings of `abstract`; each device's slice is read alone.

    Raises UsageError that lists every missing, left-over and misshapen entry at once.
    """
    folder = epath.Path(directory)
    if not (folder / INDEX).exists():
        raise UsageError(f"{directory} holds no {INDEX}: the checkpoint is incomplete")
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    wanted = {name: a for path, a in abstract.items() for name in entries(path, a.shape)}
    problems = [f"missing {name}" for name in wanted if name not in where]
    problems += [f"left over {name}" for name in where if name not in wanted]
    try:
        files = {name: safe_open(str(folder / name), framework="np") for name in sorted(set(where.values()))}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"a weight file of {directory} is missing or damaged: {error}") from error
    for path, a in abstract.items():
        expected = a.shape[1:] if STACKED.fullmatch(path) else a.shape
        for name in entries(path, a.shape):
            if name in where:
                found = tuple(files[where[name]].get_slice(name).get_shape())
                if found != expected:
                    problems.append(f"{name} is {list(found)}, expected {list(expected)}")
    if problems:
        raise UsageError(f"the weights in {directory} do not fit the model: " + "; ".join(sorted(problems)))

    def load(path: str, a: jax.ShapeDtypeStruct) -> jax.Array:
        names = entries(path, a.shape)
        slices = [files[where[name]].get_slice(name) for name in names]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if STACKED.fullmatch(path):
                return np.stack([part[index[1:]] if index[1:] else part[...] for part in slices[index[0]]]).astype(a.dtype)
            return np.asarray(slices[0][index] if index else slices[0][...]).astype(a.dtype)

        return jax.make_array_from_callback(a.shape, a.sharding, read)

    return {path: load(path, a) for path, a in abstract.items()}


