"""Tensors on disk that are read when they are asked for, slice by slice, and written one after the other.

The safetensors format (a header of JSON, then the values) is read and written here rather than by its library, which
maps whole files and wants whole files to write: of a model of any size, one tensor at a time is in memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from vlm_jax.errors import UsageError

SHARD_BYTES = 4 << 30  # of a file of our own
MAX_HEADER = 100 << 20  # bytes, as safetensors has it
DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("uint8"),
    "I8": np.dtype("int8"),
    "I16": np.dtype("int16"),
    "I32": np.dtype("int32"),
    "I64": np.dtype("int64"),
    "F16": np.dtype("float16"),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Index = Any  # a tuple of slices, one for each dimension, or `...`


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that is somewhere else: `read(index)` gives its values there, in memory of their own."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[Index], np.ndarray]

    def read(self, index: Index = ...) -> np.ndarray:
        return self.fetch(index)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def held(value: np.ndarray) -> Lazy:
    """A tensor that is in memory already."""
    return Lazy(value.shape, value.dtype, lambda index: value[index])


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, Lazy]:
    """The tensors of a file. Raises UsageError in one sentence when it is missing, truncated or damaged otherwise."""
    file = Path(path)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"{size:,} bytes do not hold its header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _entry(file, 8 + length, size, **entry) for name, entry in header.items()}
        used = sum(lazy.nbytes for lazy in tensors.values())
        if 8 + length + used != size:
            raise ValueError(f"its header tells of {8 + length + used:,} bytes, but it has {size:,}")
    except FileNotFoundError:
        raise UsageError(f"the weight file {file} is missing: copy the model again") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        told = f"no dtype {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"the weight file {file} is damaged ({told}): copy the model again") from None
    return tensors


def _entry(file: Path, start: int, size: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Lazy:
    kind, (begin, end) = DTYPES[dtype], data_offsets
    if any(n < 0 for n in shape) or not 0 <= begin <= end or end - begin != math.prod(shape) * kind.itemsize:
        raise ValueError(f"{data_offsets} is not the place of {shape} values of {dtype}")
    if start + end > size:
        raise ValueError(f"it ends after {size:,} of at least {start + end:,} bytes")

    def fetch(index: Index) -> np.ndarray:
        if begin == end:
            return np.empty(shape, kind)[index]
        # Mapped for this read alone: what a lasting map has touched would stay resident.
        whole = np.memmap(file, np.uint8, "r", start + begin, (end - begin,))
        return np.array(whole.view(kind).reshape(shape)[index])

    return Lazy(tuple(shape), kind, fetch)


def open_torch(path: str | os.PathLike[str]) -> dict[str, Lazy]:
    """The tensors of a file that `torch.save` wrote, through a reader that admits nothing else."""
    from vlm_jax.interop.torch_file import TorchFile

    file = TorchFile(path)

    def lazy(name: str) -> Lazy:
        return Lazy(tuple(file.shape(name)), np.dtype(file.dtype(name)), lambda index: file.get(name)[index])

    return {name: lazy(name) for name in file.keys()}


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Lazy], *, format: str) -> None:
    """Writes a file, reading each tensor when its turn comes. `format` is what its metadata tells."""
    order = _in_order(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": format}}
    offset = 0
    for name in order:
        lazy = tensors[name]
        header[name] = {
            "dtype": NAMES[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [offset, offset := offset + lazy.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with epath.Path(path).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = np.ascontiguousarray(tensors[name].read())
            stream.write(value.reshape(-1).view(np.uint8).data)


def write_shards(
    folder: str | os.PathLike[str], tensors: Mapping[str, Lazy], *, format: str, shard_bytes: int, one_file: bool
) -> None:
    """Writes `model-00001-of-0000N.safetensors` and their index; with `one_file`, a model that fits into one shard as
    `model.safetensors` without an index, as transformers does."""
    shards = [{name: tensors[name] for name in names} for names in shards_of(tensors, shard_bytes)]
    place = epath.Path(folder)
    if one_file and len(shards) == 1:
        write_safetensors(place / "model.safetensors", shards[0], format=format)
        return
    index = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(place / file, shard, format=format)
        index.update(dict.fromkeys(shard, file))
    total = sum(lazy.nbytes for lazy in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (place / "model.safetensors.index.json").write_text(text)


def shards_of(tensors: Mapping[str, Lazy], shard_bytes: int) -> list[list[str]]:
    """The tensors of each shard, in the order in which `write_shards` reads them."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, lazy in tensors.items():
        if shards[-1] and filled + lazy.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += lazy.nbytes
    return [_in_order({name: tensors[name] for name in names}) for names in shards]


def _in_order(tensors: Mapping[str, Lazy]) -> list[str]:
    """Wide numbers first, as safetensors orders them, so that each value lies on a multiple of its size."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
