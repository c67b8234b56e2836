"""Shards: ArrayRecord files of records whose images stand inside them, as `python -m vlm_jax.data.prepare` writes them.

A folder of shards holds `shards.json`, its index: {"format": "vlm_jax shards", "version": 1, "records", "shards":
[{"file", "records", "bytes"}, ...], "made_from": {...}}. Each entry of an ArrayRecord file is one record as a
MessagePack map: "id"; "messages", each [role, whether it is trained, [part, ...]], a part being a text or the number of
an image; "images", each its encoded bytes, or a path relative to an images folder; and, where the record has them,
"texts", "regions" ([rows, columns, little-endian float32 bytes]) and "extra". Reading one runs no code, and a damaged
entry is noticed (ArrayRecord keeps checksums).
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import functools
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vlm_jax.data.records import BadRecord, Image, Message, Record
from vlm_jax.errors import UsageError

INDEX = "shards.json"
BELOW = f"*/{INDEX}"  # what the folder of the sides has
FORMAT = "vlm_jax shards"
VERSION = 1
# One record per chunk: reading one decompresses nothing else. Images hardly shrink; zstd's fastest level is for texts.
WRITER_OPTIONS = "group_size:1,zstd:1"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
OPEN_READERS = 256  # per process: a large set has more shards than a process may have open files
READER_BUFFER = 32_768


def pack_record(record: Record) -> bytes:
    """A record as it stands in a shard. Raises BadRecord("malformed") for what MessagePack cannot hold."""
    packed: dict[str, Any] = {
        "id": record.id,
        "messages": [
            [message.role, message.train, [part if isinstance(part, str) else part.index for part in message.content]]
            for message in record.messages
        ],
        "images": list(record.images),
    }
    if record.texts:
        packed["texts"] = list(record.texts)
    if record.regions is not None:
        regions = np.asarray(record.regions, "<f4")
        packed["regions"] = [*regions.shape, regions.tobytes()]
    if record.extra:
        packed["extra"] = dict(record.extra)
    try:
        return msgpack.packb(packed, default=_plain)
    except (ValueError, OverflowError, TypeError, UnicodeEncodeError) as error:
        raise BadRecord("malformed", f"it cannot be stored in a shard: {error}") from None


def unpack_record(data: bytes) -> Record:
    """The opposite. Raises BadRecord("malformed")."""
    try:
        packed = msgpack.unpackb(data, strict_map_key=False)
        messages = tuple(
            Message(
                str(role), tuple(part if isinstance(part, str) else Image(int(part)) for part in parts), bool(train)
            )
            for role, train, parts in packed["messages"]
        )
        regions = None
        if "regions" in packed:
            rows, columns, numbers = packed["regions"]
            regions = np.frombuffer(numbers, "<f4").reshape(rows, columns)
        texts = tuple(map(str, packed.get("texts", ())))
        return Record(str(packed["id"]), messages, tuple(packed["images"]), texts, regions, packed.get("extra", {}))
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise BadRecord("malformed", f"it is no record of a shard: {error!r}") from None


def _plain(value: Any) -> Any:
    """What the other keys of a record hold besides MessagePack's own kinds, as one of those."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal, uuid.UUID, os.PathLike)):
        return str(value)
    raise TypeError(f"one of its keys holds a {type(value).__name__}")


def write_shard(path: Path, entries: Iterable[bytes]) -> None:
    """Writes packed records; the same entries give the same bytes. The file takes its name when it is complete, so that
    a process that ends at any time, or a second writer, leaves nothing half done."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    writer = ArrayRecordWriter(os.fspath(temporary), WRITER_OPTIONS)
    try:
        for entry in entries:
            writer.write(entry)
        writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        if writer.is_open():
            writer.close()
        temporary.unlink(missing_ok=True)


def write_index(folder: Path, counts: Mapping[str, int], made_from: Mapping[str, Any]) -> None:
    """Writes `shards.json`. counts: records of each shard by the name of its file, in order."""
    shards = [
        {"file": name, "records": count, "bytes": (folder / name).stat().st_size} for name, count in counts.items()
    ]
    index = {"format": FORMAT, "version": VERSION, "records": sum(counts.values()), "shards": shards}
    (folder / INDEX).write_text(json.dumps({**index, "made_from": dict(made_from)}, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class ShardSource:
    """The records of a folder of shards. Its size is that of the list of shards, whatever they hold.

    ends: the number of records up to the end of each shard.
    """

    path: Path
    images: Path
    files: tuple[str, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord("malformed") for an entry that is damaged or no record."""
        index = range(len(self))[index]
        shard = int(np.searchsorted(self.ends, index, side="right"))
        file = self.files[shard]
        place = index - (self.ends[shard - 1] if shard else 0)
        try:
            (entry,) = _reader(os.fspath(self.path / file)).read([place])
        except FileNotFoundError:
            raise UsageError(f"{self.path / file} is gone since it was opened; start the command again") from None
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadRecord("malformed", f"entry {place} of {file} cannot be read: {reason:.200}") from None
        return unpack_record(entry)


@functools.lru_cache(OPEN_READERS)
def _reader(path: str) -> ArrayRecordReader:
    if not os.path.exists(path):
        raise FileNotFoundError(path)
    return ArrayRecordReader(path, options=READER_OPTIONS, file_reader_buffer_size=READER_BUFFER)


def open_shards(folder: Path, images: Path) -> ShardSource:
    """Opens a folder with an index; no shard is read, only their sizes are compared.

    images: the folder of images that are paths, which only shards made by hand have.
    Raises UsageError: an index that is none, of a newer version, or shards that are missing or of another size.
    """
    place = folder / INDEX
    try:
        index = json.loads(place.read_text("utf-8"))
        files = tuple(str(shard["file"]) for shard in index["shards"])
        sizes = [int(shard["bytes"]) for shard in index["shards"]]
        counts = [int(shard["records"]) for shard in index["shards"]]
        known = index["format"] == FORMAT and isinstance(index["version"], int) and min([0, *counts]) == 0
    except (ValueError, KeyError, TypeError):
        known = False
    if not known or any(os.path.basename(file) != file or file in ("", ".", "..") for file in files):
        raise UsageError(f"{place} is no index of shards; prepare the data again (python -m vlm_jax.data.prepare)")
    if index["version"] > VERSION:
        raise UsageError(f"{place} is of version {index['version']}, and this vlm_jax reads {VERSION}: upgrade vlm_jax")
    if not sum(counts):
        raise UsageError(f"{folder} has no records")
    _check_sizes(folder, files, sizes)
    return ShardSource(folder, images, files, tuple(int(end) for end in np.cumsum(counts)))


def refuse_parent(folder: Path, images: Path) -> ShardSource:
    """What opening the folder that holds the sides says."""
    sides = ", ".join(sorted(os.fspath(index.parent) for index in folder.glob(BELOW)))
    raise UsageError(f"{folder} holds several sets of records; name one of them: {sides}")


def _check_sizes(folder: Path, files: Sequence[str], sizes: Sequence[int]) -> None:
    found = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    wrong = [
        f"{file} ({'missing' if file not in found else f'{found[file]:,} bytes instead of {size:,}'})"
        for file, size in zip(files, sizes, strict=True)
        if found.get(file) != size
    ]
    if wrong:
        raise UsageError(
            f"{len(wrong)} of the {len(files)} shards in {folder} are not as {INDEX} lists them: {', '.join(wrong[:3])}"
            "; copy the folder again"
        )
