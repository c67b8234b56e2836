"""From a source to shards, in two passes over its records that each run in parallel and can be cut short at any time.

The first pass reads every record, decodes its images, and notes its size and the digests of its images, or what is
wrong with it. Its notes alone decide everything: records that share an image (the same pixels, in whatever file) form a
group; whole groups, in an order drawn by the seed, go to validation until it is full; each side keeps the order of the
source and is cut into shards of about the same size. The second pass writes the shards.

Both passes are tasks that write one file each, under its final name only when it is complete, in `OUTPUT.preparing`. A
task whose file is there is skipped, so that repeating a command goes on where it was; the last step renames the result.
Tasks know nothing of each other and may run anywhere that sees the folder: `data/tasks.py` has two places.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vlm_jax.data.images import Picture
from vlm_jax.data.records import BAD_KINDS, BadRecord, Record
from vlm_jax.data.sources import Source
from vlm_jax.data.sources.shards import pack_record, write_index, write_shard
from vlm_jax.data.tasks import Run, finish, write_whole
from vlm_jax.errors import UsageError

SIDES = ("train", "validation")
BAD_RECORDS = "bad_records.jsonl"
MOST_CHUNKS = 4096  # of the first pass; a chunk has 64 records at least
LEAST_IN_CHUNK = 64


def digest(data: bytes | memoryview, seed: int = 0) -> int:
    """64 bits of a text or of pixels; equal digests of different images put two records on the same side, no more."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "little")


def embed(record: Record, images: Path) -> tuple[Record, list[Picture]]:
    """The record with its images inside, as their files have them; what came as pixels is a PNG. Raises BadRecord."""
    pictures = [Picture(image, images) for image in record.images]
    encoded = tuple(picture.encoded or _png(picture.pixels()) for picture in pictures)
    return dataclasses.replace(record, images=encoded), pictures


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------- the first pass


@dataclasses.dataclass(frozen=True)
class Notes:
    """Of the first pass, over some records in order.

    sizes: int64 [n], bytes of each record in a shard; 0 for a bad one. entries: uint64 [n], digest of those bytes.
    counts: int64 [n], digests of each record: one per image, and of a record without images one of what is said.
    digests: uint64 [sum of counts]. bad: JSON lines of what is wrong with bad records.
    """

    sizes: np.ndarray
    entries: np.ndarray
    counts: np.ndarray
    digests: np.ndarray
    bad: tuple[str, ...]

    def save(self, file: Path) -> None:
        arrays = dataclasses.asdict(self) | {"bad": np.frombuffer("\n".join(self.bad).encode(), np.uint8)}
        with write_whole(file) as out:
            np.savez(out, **arrays)

    @classmethod
    def load(cls, file: Path) -> Notes:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {field.name: stored[field.name] for field in dataclasses.fields(cls)}
        return cls(**arrays | {"bad": tuple(bytes(arrays["bad"]).decode().splitlines())})

    @classmethod
    def join(cls, parts: Iterable[Notes]) -> Notes:
        parts = list(parts)
        arrays = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(cls)
            if field.name != "bad"
        }
        return cls(**arrays, bad=tuple(line for part in parts for line in part.bad))


@dataclasses.dataclass(frozen=True)
class Look:
    """The task of the first pass: `work/notes/NUMBER.npz` of records `bounds[number] : bounds[number + 1]`."""

    source: Source
    work: Path
    bounds: np.ndarray
    seed: int

    def file(self, number: int) -> Path:
        return self.work / "notes" / f"{number:06}.npz"

    def __call__(self, number: int) -> str:
        if self.file(number).exists():
            return ""
        sizes, entries, counts, digests, bad = [], [], [], list[int](), []
        for index in range(*self.bounds[number : number + 2].tolist()):
            name, size, entry, found = f"{self.source.path.stem}-{index}", 0, 0, list[int]()
            try:
                record = self.source[index]
                name = record.id
                packed, found = self._examine(record)
                size, entry = len(packed), digest(packed)
            except BadRecord as error:
                line = {"index": index, "id": name, "kind": error.kind, "message": str(error)}
                bad.append(json.dumps(line))
            except UsageError as error:
                return str(error)
            sizes.append(size)
            entries.append(entry)
            counts.append(len(found))
            digests.extend(found)
        notes = Notes(
            np.array(sizes, np.int64),
            np.array(entries, np.uint64),
            np.array(counts, np.int64),
            np.array(digests, np.uint64),
            tuple(bad),
        )
        try:
            notes.save(self.file(number))
        except OSError as error:
            return f"{self.work} cannot be written: {error.strerror or error}"
        return ""

    def _examine(self, record: Record) -> tuple[bytes, list[int]]:
        whole, pictures = embed(record, self.source.images)
        found = []
        for picture in pictures:
            pixels = np.ascontiguousarray(picture.pixels())
            found.append(digest(repr(pixels.shape).encode() + pixels.tobytes(), self.seed))
        if not found:
            found = [digest(pack_record(dataclasses.replace(record, id="", extra={})), self.seed)]
        return pack_record(whole), found


def chunks(records: int) -> np.ndarray:
    """Where the chunks of the first pass begin, and the end: int64 [chunks + 1]."""
    size = max(LEAST_IN_CHUNK, -(-records // MOST_CHUNKS))
    return np.append(np.arange(0, records, size), records)


# ------------------------------------------------------------------------------------------------------------- the plan


def divide(notes: Notes, validation: float) -> dict[str, np.ndarray]:
    """The numbers of the good records of each side, in their order.

    validation: the fraction of records wanted; groups are taken while they fit, at least one record in all.
    Raises UsageError if every group is too large for that.
    """
    good = np.flatnonzero(notes.sizes)
    if validation == 0:
        return {"train": good, "validation": good[:0]}
    owners = np.repeat(np.arange(len(notes.counts)), notes.counts)
    of_good = notes.sizes[owners] > 0
    owners, digests = owners[of_good], notes.digests[of_good]
    distinct, images = np.unique(digests, return_inverse=True)
    nodes = len(notes.counts) + len(distinct)
    edges = coo_array((np.ones(len(owners), np.int8), (owners, len(notes.counts) + images)), shape=(nodes, nodes))
    _, labels = connected_components(edges, directed=False)
    groups, members = np.unique(labels[good], return_inverse=True)
    sizes = np.bincount(members)
    # The digests are keyed with the seed: their order is the draw. A group's is the least of its images'.
    draws = np.full(nodes, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(draws, labels[owners], digests)
    wanted, taken = max(1, round(validation * len(good))), np.zeros(len(groups), bool)
    for group in np.argsort(draws[groups], kind="stable").tolist():
        if sizes[group] <= wanted:
            taken[group] = True
            wanted -= sizes[group]
            if not wanted:
                break
    if not taken.any() or taken.all():
        raise UsageError(
            f"the {len(good):,} good records cannot be divided by image: {int(sizes.max()):,} of them are connected by "
            "images they share; give --validation=0, or a larger fraction"
        )
    return {"train": good[~taken[members]], "validation": good[taken[members]]}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which records stand in which shard.

    numbers: of the good records, int64 [n], those of training first. entries: uint64 [n], their digests. shards: (side,
    name of the file, first and end in `numbers`) of each.
    """

    numbers: np.ndarray
    entries: np.ndarray
    shards: tuple[tuple[str, str, int, int], ...]

    @classmethod
    def make(cls, notes: Notes, validation: float, shard_bytes: int) -> Plan:
        numbers, shards, start = [], [], 0
        for side, chosen in divide(notes, validation).items():
            sizes = notes.sizes[chosen]
            _, first = np.unique((np.cumsum(sizes) - sizes) // shard_bytes, return_index=True)
            edges = start + np.append(first, len(chosen))
            for i, (begin, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
                shards.append((side, f"{side}-{i:05}-of-{len(first):05}.array_record", begin, end))
            start += len(chosen)
            numbers.append(chosen)
        chosen = np.concatenate(numbers)
        return cls(chosen, notes.entries[chosen], tuple(shards))

    def save(self, file: Path) -> None:
        with write_whole(file) as out:
            np.savez(out, numbers=self.numbers, entries=self.entries, shards=np.array(json.dumps(self.shards)))

    @classmethod
    def load(cls, file: Path) -> Plan:
        with np.load(file, allow_pickle=False) as stored:
            shards = tuple(tuple(shard) for shard in json.loads(str(stored["shards"])))
            return cls(stored["numbers"], stored["entries"], shards)


# ------------------------------------------------------------------------------------------------------ the second pass


@dataclasses.dataclass(frozen=True)
class Write:
    """The task of the second pass: shard `number` of the plan in `work/plan.npz`."""

    source: Source
    work: Path

    def __call__(self, number: int) -> str:
        plan = _plan(self.work / "plan.npz")
        side, name, begin, end = plan.shards[number]
        file = self.work / "result" / side / name
        if not file.exists():
            try:
                write_shard(file, self._entries(plan, begin, end))
            except UsageError as error:
                return str(error)
            except OSError as error:
                return f"{file} cannot be written: {error.strerror or error}"
        return ""

    def _entries(self, plan: Plan, begin: int, end: int) -> Iterator[bytes]:
        for number, expected in zip(plan.numbers[begin:end].tolist(), plan.entries[begin:end].tolist(), strict=True):
            try:
                packed = pack_record(embed(self.source[number], self.source.images)[0])
            except BadRecord:
                packed = b""
            if digest(packed) != expected:
                raise UsageError(
                    f"record {number} of {self.source.path} has changed since the first pass: delete {self.work}, and "
                    "start again"
                )
            yield packed


@functools.lru_cache(1)
def _plan(file: Path) -> Plan:
    return Plan.load(file)


# ------------------------------------------------------------------------------------------------------------ the whole


@dataclasses.dataclass(frozen=True)
class Outcome:
    """records, shards: of each side. bad: how many records of each kind could not be used."""

    records: Mapping[str, int]
    shards: Mapping[str, int]
    bad: Mapping[str, int]


def prepare(
    source: Source,
    work: Path,
    run: Run,
    *,
    validation: float,
    seed: int,
    shard_bytes: int,
    max_bad_fraction: float,
    already_bad: Iterable[str] = (),
    made_from: Mapping[str, Any],
) -> Outcome:
    """Makes `work/result`, a folder of train/, validation/ (where asked for) and bad_records.jsonl.

    already_bad: JSON lines of records that never became records of `source`.
    Raises UsageError: too many bad records (before a shard is written), no room on the disk, a source that changed.
    """
    result = work / "result"
    for folder in (work / "notes", *(result / side for side in SIDES)):
        folder.mkdir(parents=True, exist_ok=True)
    look = Look(source, work, chunks(len(source)), seed)
    finish(run(look, len(look.bounds) - 1, "read", np.diff(look.bounds)))
    notes = Notes.join(Notes.load(look.file(number)) for number in range(len(look.bounds) - 1))
    bad = [*already_bad, *notes.bad]
    with write_whole(result / BAD_RECORDS) as out:
        out.write("".join(line + "\n" for line in bad).encode())
    kinds = _check_bad(bad, len(source) + len(bad) - len(notes.bad), max_bad_fraction, result / BAD_RECORDS)

    plan = Plan.make(notes, validation, shard_bytes)
    names = {side: [name for at, name, _, _ in plan.shards if at == side] for side in SIDES}
    for side in SIDES:  # what processes that were killed had begun
        for file in (result / side).iterdir():
            if file.name not in names[side]:
                file.unlink()
    _check_room(notes, plan, result)
    plan.save(work / "plan.npz")
    _plan.cache_clear()
    finish(run(Write(source, work), len(plan.shards), "write", np.array([end - at for *_, at, end in plan.shards])))
    records = {side: {name: end - at for where, name, at, end in plan.shards if where == side} for side in SIDES}
    for side in SIDES:
        if records[side]:
            write_index(result / side, records[side], {**made_from, "side": side})
        else:
            shutil.rmtree(result / side)
    return Outcome(
        {side: sum(counts.values()) for side, counts in records.items()},
        {side: len(counts) for side, counts in records.items()},
        kinds,
    )


def _check_bad(lines: list[str], records: int, allowed: float, file: Path) -> Mapping[str, int]:
    found = [json.loads(line) for line in lines]
    kinds = Counter(line["kind"] for line in found)
    if len(found) > allowed * records or len(found) == records:
        told = "; ".join(f"{count} {kind} ({BAD_KINDS[kind]})" for kind, count in kinds.items())
        raise UsageError(
            f"{len(found):,} of {records:,} records cannot be used, more than --max_bad_fraction={allowed:g} allows: "
            f"{told}; all listed in {file}. First: {found[0]['id']!r}: {found[0]['message']}"
        )
    return kinds


def _check_room(notes: Notes, plan: Plan, result: Path) -> None:
    left = [plan.numbers[at:end] for side, name, at, end in plan.shards if not (result / side / name).exists()]
    needed = sum(int(notes.sizes[numbers].sum()) for numbers in left)
    free = shutil.disk_usage(result).free
    if needed > free:
        raise UsageError(
            f"the shards need {needed / 1e9:,.1f} GB, and {result} has {free / 1e9:,.1f} GB free; make room, and "
            "repeat the command"
        )
