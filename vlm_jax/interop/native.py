"""Our checkpoint on disk: sharded safetensors with one entry per layer, beside `config.json` and the tokenizer.

    config.json                        {"format": "vlm_jax", "model": {...}, "images": {...}, "template": ..., ...}
    model-00001-of-00002.safetensors   entries such as decoder.layers.3.mlp.up.kernel
    model.safetensors.index.json       entry -> file
    tokenizer files                    as transformers writes them
    CARRIED                            of an imported model: what export gives back and nothing here computes with

A model is written aside and moved into place at the end, `config.json` last: a folder that has one is complete.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from vlm_jax.errors import UsageError
from vlm_jax.interop.layout import CARRIED, CONFIG, EXTRA, FORMAT, INDEX, PARTIAL, read_config
from vlm_jax.interop.weights import SHARD_BYTES, Lazy, open_safetensors, shards_of, write_safetensors, write_shards

__all__ = [
    "check_entries",
    "entries",
    "load_entries",
    "load_params",
    "open_entries",
    "read_config",
    "save_model",
    "write_model",
    "written_aside",
]

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
    extra: Mapping[str, Lazy] | None = None,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights, `config.json` and the tokenizer's files. Process 0 writes, every process must call.

    A model that was there before stays until the new one is wholly written; other files in the folder stay.
    extra, files: what an imported model carries along, the tensors of EXTRA and copies of files by their names.
    """
    tensors = _unstacked(params)
    if jax.process_index() != 0:
        for name in itertools.chain.from_iterable(shards_of(tensors, shard_bytes)):
            tensors[name].read()  # its part in the gather
        return
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = {file.name: file for file in Path(folder).iterdir()} | dict(files or {})
        write_model(directory, tensors, config, extra=extra or {}, files=files, shard_bytes=shard_bytes)


def write_model(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Lazy],
    config: Mapping[str, Any],
    *,
    extra: Mapping[str, Lazy],
    files: Mapping[str, str | os.PathLike[str]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model tensor by tensor, each in its own dtype: `tensors` by their names on disk, `extra` as EXTRA, and
    copies of `files`."""
    with written_aside(directory) as partial:
        for name, file in files.items():
            epath.Path(file).copy(partial / name)
        write_shards(partial, tensors, format=FORMAT, shard_bytes=shard_bytes, one_file=False)
        if extra:
            write_safetensors(partial / EXTRA, extra, format=FORMAT)
        (partial / CONFIG).write_text(json.dumps({"format": FORMAT, **config}, indent=1))


def _unstacked(params: Mapping[str, jax.Array]) -> dict[str, Lazy]:
    """The tensors on disk of parameters on devices, each brought to the host alone when its turn comes."""

    def lazy(x: jax.Array, layer: int | None) -> Lazy:
        def fetch(index: Any) -> np.ndarray:
            one = x if layer is None else jax.lax.index_in_dim(x, layer, keepdims=False)
            if not one.is_fully_addressable:
                return np.asarray(multihost_utils.process_allgather(one, tiled=True))[index]
            return np.asarray(one)[index]

        return Lazy(x.shape if layer is None else x.shape[1:], x.dtype, fetch)

    tensors = {}
    for path, x in params.items():
        layers = range(len(x)) if STACKED.fullmatch(path) else [None]
        tensors.update({name: lazy(x, layer) for name, layer in zip(entries(path, x.shape), layers, strict=True)})
    return tensors


@contextmanager
def written_aside(directory: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """A folder in which to write a model; what it holds at the end is moved into `directory`, `config.json` last. What
    fails on the way leaves the directory as it was."""
    folder = epath.Path(directory)
    fresh, partial = not folder.exists(), folder / PARTIAL
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        partial.rmtree()
        if fresh:
            folder.rmdir()
        raise
    _move_into_place(folder, partial)


def _move_into_place(folder: epath.Path, partial: epath.Path) -> None:
    """Renames alone, between two moments at which `config.json` tells that the folder is complete."""
    (folder / CONFIG).unlink(missing_ok=True)
    new = {file.name for file in partial.iterdir()}
    for old in (*folder.glob("model-*.safetensors"), *(folder / name for name in CARRIED)):
        if old.name not in new:
            old.unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == CONFIG):
        (partial / name).replace(folder / name)
    partial.rmdir()


def load_params(directory: str, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads a model of ours into the shapes, dtypes and shardings of `abstract`, on the mesh in use; each device's
    slice is read alone.

    Raises UsageError that lists every missing, left-over and misshapen entry at once.
    """
    found, problems = open_entries(directory)
    return load_entries(found, abstract, directory, problems)


def open_entries(directory: str | os.PathLike[str]) -> tuple[dict[str, Lazy], dict[str, str]]:
    """The tensors of a model of ours by their names on disk, and what is wrong with those that are not there."""
    folder = epath.Path(directory)
    where = _read_index(folder)
    files = {file: open_safetensors(folder / file) for file in sorted(set(where.values()))}
    found = {name: files[file][name] for name, file in where.items() if name in files[file]}
    lost = {name: file for name, file in where.items() if name not in found}
    return found, {name: f"missing {name}, which the index places in {file}" for name, file in lost.items()}


def check_entries(
    found: Mapping[str, Lazy],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    where: str,
    known: Mapping[str, str],
) -> None:
    """Raises UsageError that lists every missing, left-over and misshapen tensor, by their names on disk; `known` is
    what to tell of some."""
    problems = []
    wanted: set[str] = set()
    for path, a in abstract.items():
        expected = a.shape[1:] if STACKED.fullmatch(path) else a.shape
        for name in entries(path, a.shape):
            wanted.add(name)
            if name not in found:
                problems.append(known.get(name, f"missing {name}"))
            elif found[name].shape != expected:
                problems.append(f"{name} is {list(found[name].shape)}, expected {list(expected)}")
    problems += [f"left over {name}" for name in (*found, *known) if name not in wanted]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in sorted(problems))
        raise UsageError(f"the weights in {where} do not fit the model of its {CONFIG}:{listed}")


def load_entries(
    found: Mapping[str, Lazy],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    where: str,
    known: Mapping[str, str],
) -> dict[str, jax.Array]:
    """As `load_params`, from tensors by their names on disk."""
    check_entries(found, abstract, where, known)
    mesh = jax.sharding.get_mesh()

    def load(path: str, a: jax.ShapeDtypeStruct) -> jax.Array:
        read = _reader([found[name] for name in entries(path, a.shape)], bool(STACKED.fullmatch(path)), a.dtype)
        # The sharding of an abstract array names axes; where they lie is what the mesh in use says.
        return jax.make_array_from_callback(a.shape, NamedSharding(mesh, a.sharding.spec), read)

    return {path: load(path, a) for path, a in abstract.items()}


def _reader(parts: list[Lazy], stacked: bool, dtype: np.dtype) -> Callable[[Any], np.ndarray]:
    """`index -> values`; `index` has a slice for each dimension, the first for the layers if they are stacked."""

    def one(part: Lazy, index: tuple[slice, ...]) -> np.ndarray:
        return part.read(index if index else ...).astype(dtype, copy=False)

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
