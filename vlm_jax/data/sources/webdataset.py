"""WebDataset tars: records whose image, text and JSON are members of one name, `cat.jpg`, `cat.txt`, `cat.json`.

Nothing is unpacked: the places of the members are listed once, and a record is read from there. A tar that holds what
only an attack or an accident puts there (absolute names, `..`, links, devices, sizes beyond any image's) is refused as
a whole, and so is one that was cut off.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.data.formats import parse_record
from vlm_jax.data.records import BadRecord, Record
from vlm_jax.data.safety import MAX_BYTES
from vlm_jax.data.tables import IMAGE_SUFFIXES, answered, columns_of
from vlm_jax.data.tasks import Run, finish, write_whole
from vlm_jax.errors import UsageError

TEXT, DATA = ".txt", ".json"
MAX_TEXT_BYTES = 16_000_000
PARTS = ("image", "text", "data")  # what a record is made of: rows of `places`
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"(\xb5/\xfd": "unzstd"}
BLOCK = tarfile.BLOCKSIZE

Index = dict[str, np.ndarray]


class _Checked(tarfile.TarInfo):
    """Headers whose size is no negative number, on which `tarfile` would run in a circle."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Checked:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:
            raise UsageError("a member has a negative size")
        return info


def index_tar(file: Path) -> tuple[str, Index]:
    """Lists the records of a tar: what is wrong with it or "", and

    names: uint8, the names of the records, each ended by a newline. places: int64 [n, 3, 2], first byte and size of
      each of `PARTS`; a size of -1 where there is none, -2 where there are several. other: uint8, JSON of how many
      members of each other kind there are.
    """
    try:
        with open(file, "rb") as stream:
            return "", _list(stream)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})", {}
    except tarfile.TarError as error:
        return f"{file} is no tar, or damaged: {error}", {}
    except UsageError as error:
        return f"{file} is refused: {error}", {}


def _list(stream: BinaryIO) -> Index:
    start = stream.read(8)
    for magic, command in COMPRESSED.items():
        if start.startswith(magic):
            raise UsageError(f"it is compressed, so that no record can be read by itself; unpack it first ({command})")
    end = stream.seek(0, 2)
    stream.seek(0)
    found: dict[str, np.ndarray] = {}
    other = Counter[str]()
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Checked) as tar:
        for member in tar:
            _check(member, end)
            folder, _, base = member.name.rpartition("/")
            if member.isdir() or base.startswith("."):
                continue
            stem, dot, suffix = base.partition(".")
            kind = (dot + suffix).lower()
            part = 0 if kind in IMAGE_SUFFIXES else {TEXT: 1, DATA: 2}.get(kind)
            if part is None:
                other[kind or "no suffix"] += 1
                continue
            name = f"{folder}/{stem}" if folder else stem
            places = found.setdefault(name, np.full((len(PARTS), 2), -1, np.int64))
            places[part] = (member.offset_data, member.size) if places[part, 1] == -1 else (0, -2)
        # `tarfile` takes a header that it cannot read for the end; whatever stood after it would be lost.
        stream.seek(tar.offset)
        if stream.read(BLOCK) != bytes(BLOCK):
            raise UsageError(f"its members end at byte {tar.offset:,} of {end:,} without an end mark: it was cut off")
    names = "".join(name.replace("\n", " ") + "\n" for name in found).encode("utf-8", "replace")
    return {
        "names": np.frombuffer(names, np.uint8),
        "places": np.array(list(found.values()), np.int64).reshape(-1, len(PARTS), 2),
        "other": np.frombuffer(json.dumps(other).encode(), np.uint8),
    }


def _check(member: tarfile.TarInfo, end: int) -> None:
    name = member.name
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise UsageError(f"member {name!r:.200} leads out of the archive")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise UsageError(f"member {name!r:.200} is a link, a device or of another special kind")
    if not 0 <= member.size <= MAX_BYTES or member.offset_data + member.size > end:
        raise UsageError(f"member {name!r:.200} claims {member.size:,} bytes; an image has {MAX_BYTES:,} at most")


# ----------------------------------------------------------------------------------------------------------- the source


@dataclasses.dataclass(frozen=True)
class TarSource:
    """The records of some tars, which `index` lists. question: the template of `tables.answered`."""

    path: Path
    files: tuple[Path, ...]
    index: Path
    count: int
    question: str | None = None

    @property
    def images(self) -> Path:
        """No image of a tar is a path."""
        return self.path

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Record:
        names, places, ends = _load(self.index)
        file = int(np.searchsorted(ends, number, side="right"))
        name = names[number]
        missing = [part for part, size in zip(PARTS, places[number, :, 1].tolist(), strict=True) if size == -2]
        if missing:
            raise BadRecord("malformed", f"{name!r} has several members of one kind: {', '.join(missing)}")
        try:
            with open(self.files[file], "rb") as stream:
                image, text, data = (_member(stream, *place) for place in places[number].tolist())
        except OSError as error:
            raise UsageError(f"{self.files[file]} cannot be read ({error.strerror}); start the command again") from None
        if image is None and data is None:
            raise BadRecord("missing_image", f"{name!r} has no image ({', '.join(IMAGE_SUFFIXES)})")
        if text is None and data is None:
            raise BadRecord("malformed", f"{name!r} has no text ({TEXT}) and no JSON ({DATA})")
        return _record(f"{self.files[file].stem}/{name}", image, text, data, self.question)


def _member(stream: BinaryIO, start: int, size: int) -> bytes | None:
    if size < 0:
        return None
    stream.seek(start)
    return stream.read(size)


def _record(name: str, image: bytes | None, text: bytes | None, data: bytes | None, question: str | None) -> Record:
    raw: Any = {}
    try:
        caption = None if text is None else text[:MAX_TEXT_BYTES].decode("utf-8").strip()
        raw = json.loads(data[:MAX_TEXT_BYTES]) if data is not None else {}
    except UnicodeDecodeError:
        raise BadRecord("malformed", "its text is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRecord("malformed", f"its JSON is not valid: {error}") from None
    if not isinstance(raw, Mapping):
        raise BadRecord("malformed", f"its JSON is a {type(raw).__name__}, not an object")
    if "conversations" in raw or "messages" in raw:
        extra = {} if caption is None else {"caption": caption}
        given = {key: value for key, value in raw.items() if key not in ("image", "images")}
        return parse_record({**extra, **given, "image": image}, name)
    if image is None:
        raise BadRecord("missing_image", f"it has no image ({', '.join(IMAGE_SUFFIXES)})")
    columns = columns_of([key for key, value in raw.items() if isinstance(value, str)], {})
    columns.pop("image", None)
    said = {ours: raw[key] for ours, key in columns.items()}
    extra = {key: value for key, value in raw.items() if key not in columns.values()}
    if caption is not None and not {"question", "answer"} <= set(said):
        said, extra = {"caption": caption}, dict(raw)
    elif caption is not None:
        extra = {**extra, "caption": caption}
    return answered(name, image, said, question, extra)


@functools.lru_cache(2)
def _load(index: Path) -> tuple[Sequence[str], np.ndarray, np.ndarray]:
    with np.load(index, allow_pickle=False) as stored:
        return bytes(stored["names"]).decode().split("\n"), stored["places"], stored["ends"]


# --------------------------------------------------------------------------------------------------------- listing many


def open_tars(source: str, question: str | None, work: Path, run: Run, note: Callable[[str], None]) -> TarSource:
    """Lists the members of the tars that `source` names, once for a work folder.

    source: a tar, a folder of them, or a pattern. note: is told what is left out.
    Raises UsageError: no such file, no record, or a tar that is refused.
    """
    files = _tars(source)
    index = work / "tars.npz"
    if not index.exists():
        (work / "tars").mkdir(exist_ok=True)
        task = _List(files, work / "tars")
        finish(run(task, len(files), "list", np.ones(len(files), np.int64)))
        found = [task.load(number) for number in range(len(files))]
        places = np.concatenate([one["places"] for one in found])
        other: dict[str, int] = {}
        for one in found:
            for suffix, count in json.loads(bytes(one["other"])).items():
                other[suffix] = other.get(suffix, 0) + count
        if other:
            kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(other.items()))
            note(f"members that are neither image, .txt nor .json are left out: {kinds}")
        with write_whole(index) as out:
            names = np.concatenate([one["names"] for one in found])
            np.savez(out, names=names, places=places, ends=np.cumsum([len(one["places"]) for one in found]))
    with np.load(index, allow_pickle=False) as stored:
        count = len(stored["places"])
    if not count:
        raise UsageError(f"{source} has no record: an image, and a .txt or .json of the same name")
    path = Path(source).expanduser()
    return TarSource(path if path.exists() else files[0].parent, files, index, count, question)


@dataclasses.dataclass(frozen=True)
class _List:
    """The task of listing tar `number`."""

    files: tuple[Path, ...]
    folder: Path

    def __call__(self, number: int) -> str:
        file = self.folder / f"{number:06}.npz"
        if file.exists():
            return ""
        message, index = index_tar(self.files[number])
        if not message:
            with write_whole(file) as out:
                np.savez(out, **index)  # type: ignore[arg-type]
        return message

    def load(self, number: int) -> Index:
        with np.load(self.folder / f"{number:06}.npz", allow_pickle=False) as stored:
            return dict(stored)


def _tars(source: str) -> tuple[Path, ...]:
    """A tar, a folder of them, or a pattern of the shell with `{0000..0041}`."""
    found = [Path(one) for pattern in _numbers(os.path.expanduser(source)) for one in _matches(pattern)]
    if not found:
        raise UsageError(f"{source} is neither a tar, nor a folder or pattern that has any")
    return tuple(found)


def _matches(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        return sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))


def _numbers(pattern: str) -> list[str]:
    """WebDataset's `{0000..0041}`, written out."""
    before, brace, rest = pattern.partition("{")
    inside, closed, after = rest.partition("}")
    first, dots, last = inside.partition("..")
    if not (brace and closed and dots and first.isdecimal() and last.isdecimal()):
        return [pattern]
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    names = [f"{before}{number}{end}" for number in numbers for end in _numbers(after)]
    missing = [name for name in names if not os.path.exists(name)]
    if missing:
        raise UsageError(
            f"{len(missing)} of the {len(names)} files of {pattern} do not exist, the first is {missing[0]}"
        )
    return names
