"""The sizes of tiles that are free: one table for all operations, by device.

`tiles.json` has every size for each platform ("cpu", "gpu", "tpu"), and may have some for a kind of device as jax names
it ("NVIDIA H200"), which go first: {device: {operation: {size: number, "from": where the numbers come from}}}.
`VLM_JAX_TILES=FILE` names a file of the same form, with as much in it as one likes; what it has goes before all that.
`python -m vlm_jax.kernels.tune` searches for sizes and writes such a file. A file is read once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from vlm_jax.errors import UsageError, suggest
from vlm_jax.kernels.placement import platform_named

ENVIRONMENT = "VLM_JAX_TILES"
PACKAGED = Path(__file__).with_name("tiles.json")
PLATFORMS = ("cpu", "gpu", "tpu")
SOURCE = "from"  # of an operation's sizes

Table = dict[str, dict[str, dict[str, Any]]]  # device, operation, size


@dataclasses.dataclass(frozen=True)
class Size:
    """what: the most that a tile has, of what; unit: a size is a multiple of it; platforms: those that use it."""

    what: str
    unit: int = 8
    platforms: tuple[str, ...] = PLATFORMS


SIZES: dict[str, dict[str, Size]] = {
    "contrastive": {
        "xla.rows": Size("images of a tile in XLA"),
        "xla.columns": Size("texts of a tile in XLA"),
        "tpu.tile": Size("images, and texts, of a tile, up to 1,024 features", 128, ("tpu",)),
        "tpu.wide_tile": Size("images, and texts, of a tile, beyond 1,024 features", 128, ("tpu",)),
        "gpu.panel_rows": Size("images of a panel", 128, ("gpu",)),
        "gpu.panel_columns": Size("texts of a panel", 256, ("gpu",)),
    },
    "attention": {
        "xla.block": Size("queries, and keys, of a block in XLA"),
        "xla.ordered_block": Size("the same where the call is causal or windowed and has more than 1,024 keys"),
        "xla.decode_block": Size("keys of a block in XLA for a single query"),
        "xla.scores": Size("scores of a block in XLA, all its heads together"),
        "xla.few_scores": Size("the same where a head has at most 16,384"),
        "splash.block": Size("queries, and keys, of a block", 128, ("tpu",)),
        "splash.compute": Size("keys of a block that are multiplied at once", 128, ("tpu",)),
        "short.scores": Size("scores of a head in a program", 128 * 128, ("tpu",)),
    },
    "cross_entropy": {
        "xla.tokens": Size("tokens of a chunk", 128),
        "xla.logits": Size("logits of a chunk of more than 128 tokens"),
    },
}
OPERATIONS = tuple(SIZES)


def tile_size(name: str, device: str) -> int:
    """The size `name`, such as "contrastive.xla.rows", on a device: its kind as jax names it, or a platform.

    A size that the device's platform does not use (of a kernel that is interpreted) is that of the platform which does.

    Raises:
        UsageError: as `read_table`, of the file that `VLM_JAX_TILES` names.
    """
    operation, _, size = name.partition(".")
    if (trial := _trial.value) is not None:
        trial.read.add(name)
        if name in trial.sizes:
            return trial.sizes[name]
    tables, file = [_packaged()], os.environ.get(ENVIRONMENT)
    if file:
        tables.insert(0, _of_user(file))
    platform, platforms = platform_named(device), SIZES[operation][size].platforms
    if platform not in platforms:
        device = platform = platforms[0]
    elif file:
        _note_if_unused(file, device)
    for table in tables:
        for entry in (table.get(device), table.get(platform)):
            if entry and size in entry.get(operation, {}):
                return entry[operation][size]
    raise AssertionError(f"{PACKAGED} has no {name} for {platform}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Trial:
    sizes: Mapping[str, int]
    read: set[str]


# jax keeps apart what it traced under different values, so a size may change between two calls of one function.
_trial = jax.make_user_context(None)


@contextlib.contextmanager
def trying(sizes: Mapping[str, int]) -> Iterator[set[str]]:
    """Under it these sizes hold (by the names that `tile_size` takes), whatever the tables say.

    Yields the names that have been looked up under it; they become more as programs are traced.
    """
    for name in sizes:
        operation, _, size = name.partition(".")
        assert size in SIZES[operation], name
    trial = _Trial(dict(sizes), set())
    with _trial(trial):
        yield trial.read


# --------------------------------------------------------------------------------------------------------------- tables


def read_table(file: str | Path, called: str | None = None) -> Table:
    """A table, checked. `called`: the file's name in errors.

    Raises:
        UsageError: one sentence, where the file cannot be read, or on the first thing in it that nothing would use.
    """
    where = called or str(file)
    try:
        table = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    form = 'expected {device: {operation: {size: number}}}, such as {"cpu": {"contrastive": {"xla.rows": 512}}}'
    if not isinstance(table, dict):
        raise UsageError(f"{where}: {form}")
    for device, entry in table.items():
        if device.lower() in PLATFORMS and device not in PLATFORMS:
            raise UsageError(f"{where}: device {device!r} is unknown (did you mean {device.lower()!r}?)")
        if not isinstance(entry, dict) or not all(isinstance(sizes, dict) for sizes in entry.values()):
            raise UsageError(f"{where}: {form}, found {device!r}: {json.dumps(entry)[:60]}")
        for operation, sizes in entry.items():
            if operation not in SIZES:
                known = f"expected {', '.join(OPERATIONS)}"
                raise UsageError(
                    f"{where}: operation {operation!r} is unknown{suggest(operation, OPERATIONS)}; {known}"
                )
            for name, value in sizes.items():
                if fault := _fault(device, operation, name, value):
                    raise UsageError(f"{where}: {device!r}, {operation}: {fault}")
    return table


def _fault(device: str, operation: str, name: str, value: Any) -> str | None:
    """What is wrong with one entry, as a clause."""
    if name == SOURCE:
        return None if isinstance(value, str) else f"{name!r} says in words where the sizes come from, not {value!r}"
    platform = platform_named(device)
    used = [known for known, size in SIZES[operation].items() if platform in size.platforms]
    if name not in used:
        unknown = f"a {platform} does not use it" if name in SIZES[operation] else "it is unknown"
        return f"size {name!r}: {unknown}{suggest(name, used)}; expected {', '.join(used)}"
    unit = SIZES[operation][name].unit
    if type(value) is not int or value <= 0 or value % unit:
        return f"size {name!r} is {value!r}, expected a positive whole number, a multiple of {unit}"
    return None


@functools.cache
def _packaged() -> Table:
    return read_table(PACKAGED)


@functools.cache
def _of_user(file: str) -> Table:
    return read_table(file, f"{ENVIRONMENT}={file}")


@functools.cache
def _note_if_unused(file: str, device: str) -> None:
    """A word, once, where the user's file has nothing for the device: its name may be misspelt there."""
    table = _of_user(file)
    if device not in table and platform_named(device) not in table:
        has = ", ".join(map(repr, table)) or "nothing"
        logging.getLogger(__name__).warning(f"{ENVIRONMENT}={file} has sizes for {has} and none for {device!r}")
