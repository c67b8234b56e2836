"""What is wrong with a data set, found without a model: every record is parsed and every image decoded once, in
parallel; what stands in several places (duplicates, leaks into the validation data) shows in small facts about each.

Kinds of faults are those of training (`records.py: BAD_KINDS`) and those of `FOUND`. An image is turned as its EXIF
orientation asks by neither us nor LLaVA nor Hugging Face's processors, so that such a photo is seen lying on its side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from tqdm import tqdm

from vlm_jax.data.conversation import begin_with_user, check_conversation
from vlm_jax.data.duplicates import group_images, marks, same_picture
from vlm_jax.data.images import ImageSettings, Picture, process
from vlm_jax.data.reading import FusionEncoder, read
from vlm_jax.data.records import BAD_KINDS, TOLERATED, AnyPath, BadRecord, Record
from vlm_jax.data.sources import Source

Item = TypeVar("Item")

# What is found besides what training would find, and what can be done about it.
FOUND: dict[str, str] = {
    "leak": "take them out of the training data: what is measured on them is memory",
    "duplicate_record": "keep one of each; weigh a source by its `weight` instead",
    "exif_rotated": "turn the files themselves (--fix does)",
    "duplicate_image": "nothing, if meant; each is read and stored again",
}
ADVICE: Mapping[str, str] = BAD_KINDS | FOUND
# Told, but neither counted as bad nor mended.
NOTES = (*TOLERATED, "duplicate_image")
TURNS = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "mirrored upside down",
    5: "mirrored and turned by 90 degrees",
    6: "turned by 90 degrees clockwise",
    7: "mirrored and turned by 90 degrees",
    8: "turned by 90 degrees counter-clockwise",
}
# How many of each are as much work as starting a process.
WORTH = {"records": 20_000, "images": 1_000, "pairs": 300}
CHUNK = 16  # records or images that a worker looks at between two reports
TEMPLATE = "vicuna_v1"  # whose demands on a conversation hold where no config names another


class ImageName(NamedTuple):
    """An image of a set. source: number of the source in whose folder `path` is; or `path` is empty, and it is image
    number `position` inside record number `record` of that source. confined: whether it must lie in the folder."""

    source: int
    path: str
    record: int = -1
    position: int = -1
    confined: bool = True


class RecordFacts(NamedTuple):
    """digest: of all that is said. kind, message: what is wrong with it before its images are opened; empty if nothing.
    left_out: what of it is not trained on."""

    id: str
    digest: bytes = b""
    images: tuple[ImageName, ...] = ()
    words: int = 0
    kind: str = ""
    message: str = ""
    left_out: str = ""


class ImageFacts(NamedTuple):
    """digest, bytes: of the file. marks: see `duplicates.py`. All empty where `kind` says what is wrong."""

    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    marks: bytes = b""
    orientation: int = 1
    bytes: int = 0
    kind: str = ""
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong with one record. file: the image concerned, if it is one."""

    source: int
    index: int
    id: str
    kind: str
    message: str
    file: str = ""


@dataclasses.dataclass
class Inspection:
    """records, images: what was found of each. held_out: which sources are the validation data. same: for each image
    the first that shows the same picture. seconds: that reading the images took."""

    sources: tuple[Source, ...]
    held_out: tuple[bool, ...]
    records: dict[tuple[int, int], RecordFacts]
    images: dict[ImageName, ImageFacts]
    same: dict[ImageName, ImageName]
    seconds: float
    faults: list[Fault]

    def add(self, place: tuple[int, int], kind: str, message: str, name: ImageName | None = None) -> None:
        file = "" if name is None else name.path
        self.faults.append(Fault(*place, self.records[place].id, kind, message, file))


def inspect(
    sources: Sequence[Source], held_out: Sequence[bool], *, template: str | None = None, workers: int = 0
) -> Inspection:
    """Reads everything and finds what is wrong, in the order of the records. Progress is shown on stderr.

    held_out: for each source whether it is validation data. template: of the conversations; None asks only for what
      every template needs. workers: processes; 0 reads in threads.
    """
    sources = tuple(sources)
    places = [(number, index) for number, source in enumerate(sources) for index in range(len(source))]
    folders: dict[str, int] = {}
    shared = tuple(folders.setdefault(os.path.realpath(one.images), i) for i, one in enumerate(sources))
    look = RecordLooker(sources, shared, template or TEMPLATE)
    records = dict(zip(places, in_parallel(look, places, workers, "records"), strict=True))
    names = list(dict.fromkeys(name for facts in records.values() for name in facts.images))
    began = time.monotonic()
    images = dict(zip(names, in_parallel(ImageLooker(sources), names, workers, "images"), strict=True))
    seconds = time.monotonic() - began
    found = Inspection(sources, tuple(held_out), records, images, {}, seconds, [])
    _same(found, workers)
    _add_unusable(found)
    _add_repeated(found)
    _add_images(found)
    found.faults.sort(key=lambda one: (one.source, one.index))
    return found


@dataclasses.dataclass(frozen=True)
class RecordLooker:
    """(number of a source, number of a record) -> RecordFacts. folders: for each source the first with its images."""

    sources: tuple[Source, ...]
    folders: tuple[int, ...]
    template: str

    def __call__(self, place: tuple[int, int]) -> RecordFacts:
        number, index = place
        source = self.sources[number]
        facts = RecordFacts(f"{source.path.stem}-{index}")
        try:
            record = source[index]
            facts = facts._replace(id=record.id)
            kept, left_out = begin_with_user(record)
            facts = facts._replace(
                digest=_digest(repr((record.messages, record.texts)).encode()),
                images=tuple(self._name(number, index, i, image) for i, image in enumerate(record.images)),
                words=sum(len(message.text.split()) for message in record.messages),
                left_out=left_out,
            )
            _check(kept, self.template)
        except BadRecord as error:
            facts = facts._replace(kind=error.kind, message=str(error))
        return facts

    def _name(self, source: int, index: int, position: int, image: Any) -> ImageName:
        if not isinstance(image, (str, os.PathLike)):
            return ImageName(source, "", index, position)
        path = os.fspath(image)
        plain = ".." not in path and "://" not in path
        confined = not isinstance(image, AnyPath)
        return ImageName(self.folders[source], os.path.normpath(path) if plain else path, confined=confined)


def _check(record: Record, template: str) -> None:
    if not record.messages:
        return
    check_conversation(record, template)
    if not any(message.role in ("assistant", "document") for message in record.messages):
        raise BadRecord("no_trainable_token", "nobody answers in it, so that there is nothing to learn")


@dataclasses.dataclass(frozen=True)
class ImageLooker:
    """ImageName -> ImageFacts."""

    sources: tuple[Source, ...]

    def open(self, name: ImageName) -> Picture:
        source = self.sources[name.source]
        if name.path:
            return Picture(name.path if name.confined else AnyPath(name.path), source.images)
        return Picture(source[name.record].images[name.position], source.images)

    def __call__(self, name: ImageName) -> ImageFacts:
        try:
            picture = self.open(name)
            pixels = picture.pixels()
        except BadRecord as error:
            return ImageFacts(kind=error.kind, message=str(error))
        encoded = picture.encoded
        digest = _digest(pixels.tobytes() if encoded is None else encoded)
        return ImageFacts(picture.size, digest, marks(pixels), picture.orientation, len(encoded or b""))


@dataclasses.dataclass(frozen=True)
class PairLooker:
    """(ImageName, ImageName) -> whether they show the same picture."""

    images: ImageLooker

    def __call__(self, pair: tuple[ImageName, ImageName]) -> bool:
        return same_picture(*(self.images.open(name).pixels() for name in pair))


@dataclasses.dataclass(frozen=True)
class TileMaker:
    """ImageName -> number of its tiles, which are made as for training."""

    images: ImageLooker
    settings: ImageSettings

    def __call__(self, name: ImageName) -> int:
        return len(process(self.images.open(name).pixels(), self.settings))


@dataclasses.dataclass(frozen=True)
class Measurer:
    """(source, record) -> (kind, message) of what an encoder finds wrong with it, or has to cut off."""

    sources: tuple[Source, ...]
    encoder: FusionEncoder

    def __call__(self, place: tuple[int, int]) -> tuple[str, str]:
        source = self.sources[place[0]]
        try:
            _, cut = self.encoder.limit(self.encoder.measure(begin_with_user(source[place[1]])[0], source.images))
        except BadRecord as error:
            return error.kind, str(error)
        return ("truncated", cut) if cut else ("", "")


def in_parallel(look: Callable[[Item], Any], items: Sequence[Item], workers: int, unit: str) -> Iterator[Any]:
    """`look` of each item, in order. Starts no more processes than the number of items, of this unit, is worth."""
    chunks = tuple(tuple(items[at : at + CHUNK]) for at in range(0, len(items), CHUNK))
    if not chunks:
        return
    processes = min(workers, len(items) // WORTH[unit])
    shown = {"unit": f" {unit}", "disable": None, "delay": 1.0}
    with tqdm(total=len(items), **shown) as progress:
        for found in read(Chunks(look, chunks), 0, len(chunks), processes, ahead=4 * max(processes, 1)):
            progress.update(len(found.items))
            yield from found.items


@dataclasses.dataclass(frozen=True)
class Chunks(Generic[Item]):
    """The reader of `in_parallel`: what is found of all items of chunk number n."""

    look: Callable[[Item], Any]
    chunks: tuple[tuple[Item, ...], ...]

    def __call__(self, number: int) -> Answers:
        return Answers([self.look(item) for item in self.chunks[number]])


@dataclasses.dataclass(frozen=True)
class Answers:
    """Grain leaves an object of a class of ours as it is, where it would look for arrays in a list."""

    items: list[Any]


def _same(found: Inspection, workers: int) -> None:
    """Fills `same`, for the images that can be read."""
    names = [name for name, facts in found.images.items() if not facts.kind]
    facts = [found.images[name] for name in names]
    look = PairLooker(ImageLooker(found.sources))

    def same(pairs: Sequence[tuple[int, int]]) -> Iterable[bool]:
        return in_parallel(look, [(names[one], names[other]) for one, other in pairs], workers, "pairs")

    first = group_images([f.size for f in facts], [f.digest for f in facts], [f.marks for f in facts], same)
    found.same.update((name, names[number]) for name, number in zip(names, first, strict=True))


def _add_unusable(found: Inspection) -> None:
    """What training would find: at the first image that cannot be used, as there."""
    for place, facts in found.records.items():
        broken = next((name for name in facts.images if found.images[name].kind), None)
        if facts.kind:
            found.add(place, facts.kind, facts.message)
        elif broken is not None:
            found.add(place, found.images[broken].kind, found.images[broken].message, broken)
        elif facts.left_out:
            found.add(place, "assistant_first", facts.left_out)


def _add_repeated(found: Inspection) -> None:
    """Records that say the same about the same pictures, within the training data or within the validation data; and
    training data that shows what the validation data shows, or is the same text."""
    unusable = {(fault.source, fault.index) for fault in found.faults if fault.kind not in NOTES}
    seen: dict[tuple[Any, ...], tuple[int, int]] = {}
    shown: dict[ImageName, tuple[int, int]] = {}  # what the validation data shows, and the first record that does
    usable = [place for place in found.records if place not in unusable]
    for place in usable:
        facts, held_out = found.records[place], found.held_out[place[0]]
        pictures = tuple(found.same[name] for name in facts.images)
        first = seen.setdefault((held_out, facts.digest, pictures), place)
        if first != place:
            found.add(place, "duplicate_record", f"it is record {found.records[first].id!r} once more")
        if held_out:
            for picture in pictures:
                shown.setdefault(picture, place)
    for place in usable:
        facts = found.records[place]
        if found.held_out[place[0]]:
            continue
        leak = next((name for name in facts.images if found.same[name] in shown), None)
        if leak is not None:
            there = found.records[shown[found.same[leak]]]
            twin = next(name for name in there.images if found.same[name] == found.same[leak])
            what = f"its {_called(leak)} is {_called(twin)} of record {there.id!r} of the validation data"
            found.add(place, "leak", what, leak)
        elif not facts.images and (twin_place := seen.get((True, facts.digest, ()))):
            found.add(place, "leak", f"it is record {found.records[twin_place].id!r} of the validation data")


def _add_images(found: Inspection) -> None:
    """Photos that lie on their side, and files that show what another one shows."""
    users: dict[ImageName, list[tuple[int, int]]] = defaultdict(list)
    for place, facts in found.records.items():
        for name in dict.fromkeys(facts.images):
            users[name].append(place)
    firsts: dict[tuple[bool, ImageName], ImageName] = {}
    for name, places in users.items():
        facts_of = found.images[name]
        if facts_of.kind:
            continue
        if facts_of.orientation != 1:
            what = (
                f"its {_called(name)} asks to be {TURNS[facts_of.orientation]} (EXIF orientation "
                f"{facts_of.orientation}); the model would see it as it is stored"
            )
            for place in places:
                found.add(place, "exif_rotated", what, name)
        for held_out in dict.fromkeys(found.held_out[place[0]] for place in places):
            first = firsts.setdefault((held_out, found.same[name]), name)
            if first != name:
                place = next(one for one in places if found.held_out[one[0]] == held_out)
                equal = found.images[first].digest == facts_of.digest
                how = "is the same file as" if equal else "shows the same picture as"
                found.add(place, "duplicate_image", f"its {_called(name)} {how} {_called(first)}", name)


def _called(name: ImageName) -> str:
    return f"image {name.path!r}" if name.path else f"image {name.position + 1}"


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
