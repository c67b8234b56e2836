"""From a number to a row: reads, tokenises and decodes its samples, in threads and worker processes of Grain.

The element of a row is a pure function of its global step and slot. What is wrong with a record is handled here,
inside the map, and travels as an element: an exception that crosses Grain's iterator ends the run.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import grain
import numpy as np
from absl import flags

from vlm_jax.data.anyres import Layout
from vlm_jax.data.conversation import IMAGE_ID, UNTRAINED, begin_with_user, encode_conversation
from vlm_jax.data.images import ImageSettings, Picture, layout, process
from vlm_jax.data.order import Order, Place
from vlm_jax.data.records import BadRecord, Record
from vlm_jax.data.rows import LARGEST, Field, Row, fusion_row, join, widths
from vlm_jax.data.sources import Source
from vlm_jax.errors import UsageError

Element = TypeVar("Element")
THREADS = 4  # of the trainer's process, without workers; each worker has at most two
SMALL_ARRAY = 1 << 16  # bytes; larger arrays come from a worker through shared memory


@dataclasses.dataclass(frozen=True)
class Sample:
    """What became of one record in a slot. `kind` and `message` say what is wrong with it, both empty if nothing is; of
    the kinds in `records.py: USED` the rest is used all the same."""

    slot: int
    source: int
    index: int
    id: str
    kind: str = ""
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A record before its images are decoded.

    ids, labels: int32 [L], an image is one position. pictures, layouts: of each image. settings: as many images share.
    """

    ids: np.ndarray
    labels: np.ndarray
    pictures: tuple[Picture, ...]
    layouts: tuple[Layout, ...]
    settings: ImageSettings

    @property
    def tokens(self) -> int:
        """Positions of the token row, the visual ones among them."""
        return int(widths(self.ids, self.layouts).sum())

    @property
    def tiles(self) -> int:
        return sum(one.tiles for one in self.layouts)

    @property
    def trained(self) -> int:
        """Positions that have a label once they are shifted: the first token of a row is nobody's target."""
        return int((self.labels[1:] != UNTRAINED).sum())

    @property
    def least(self) -> int:
        """Positions up to the first of the `trained`, itself among them: a row that ends before it trains nothing."""
        ends = np.cumsum(widths(self.ids, self.layouts))[1:]
        return int(ends[self.labels[1:] != UNTRAINED].min(initial=LARGEST))

    def first(self, length: int) -> Measured:
        """What stands in the first `length` positions. Every image keeps its tiles, also where its features, or some of
        them, have lost their places (llava/model/llava_arch.py cuts after the images have been encoded too)."""
        taken = widths(self.ids, self.layouts)
        kept = np.clip(length - (np.cumsum(taken) - taken), 0, taken)
        images = self.ids == IMAGE_ID
        layouts = tuple(one.first(count) for one, count in zip(self.layouts, kept[images].tolist(), strict=True))
        left = images | (kept > 0)
        return dataclasses.replace(self, ids=self.ids[left], labels=self.labels[left], layouts=layouts)


@dataclasses.dataclass(frozen=True)
class FusionEncoder:
    """Makes prefix-fusion rows (LLaVA) of records.

    longest, most_tiles: tokens and tiles of the largest row; a record that needs more of either is bad ("too_long").
    truncate: of a record that needs more tokens the row holds the first `longest` ("truncated").
    image_placement, compat_drop_mismatch: of `encode_conversation`; what is dropped is bad ("mismatch").
    """

    tokenizer: Any
    template: str
    images: ImageSettings
    longest: int
    most_tiles: int
    image_placement: str = "first"
    compat_drop_mismatch: bool = False
    truncate: bool = False

    def measure(self, record: Record, folder: str | os.PathLike, seed: Sequence[int] = (0,)) -> Measured:
        """What the text and the headers of the images tell; no image is decoded, and no limit applies.

        seed: of random placement. Raises BadRecord.
        """
        encode = functools.partial(
            encode_conversation,
            record,
            self.template,
            tokenizer=self.tokenizer,
            image_placement=self.image_placement,
            seed=seed,
        )
        encoded = encode()
        ids, labels = encoded["input_ids"], encoded["labels"]
        if (labels == UNTRAINED).all():
            raise BadRecord("no_trainable_token", f"none of its {len(ids)} tokens is trained")
        if self.compat_drop_mismatch and (encode(compat_drop_mismatch=True)["labels"] == UNTRAINED).all():
            raise BadRecord("mismatch", f"LLaVA does not count {len(ids)} tokens as we do, and drops it")
        settings = self.images.of(len(record.images))
        pictures = tuple(Picture(image, folder) for image in record.images)
        layouts = tuple(layout(picture.size, settings) for picture in pictures)
        return Measured(ids, labels, pictures, layouts, settings)

    def limit(self, one: Measured) -> tuple[Measured, str]:
        """What of a record its row holds, and in words what is cut off; the words are empty if nothing is.

        Raises BadRecord: "too_long", or "no_trainable_token" if all that is trained would be cut off.
        """
        if one.tiles > self.most_tiles or (one.tokens > self.longest and not self.truncate):
            raise BadRecord(
                "too_long",
                f"it has {one.tokens} tokens and {one.tiles} tiles; the largest bucket holds {self.longest} and "
                f"{self.most_tiles}",
            )
        if one.tokens <= self.longest:
            return one, ""
        kept = one.first(self.longest)
        if not kept.trained:
            raise BadRecord(
                "no_trainable_token", f"none of the first {self.longest} of its {one.tokens} tokens is trained"
            )
        lost = one.trained - kept.trained
        return kept, f"the first {self.longest} of its {one.tokens} tokens are used; {lost} trained ones are cut off"

    def __call__(self, record: Record, folder: str | os.PathLike, seed: Sequence[int] = (0,)) -> tuple[Row, str]:
        """The row, and in words what of the record it leaves out (`limit`).

        seed: of random placement. Raises BadRecord; the images are decoded last, since that takes the time.
        """
        one, cut = self.limit(self.measure(record, folder, seed))
        pixels = [process(picture.pixels(), one.settings) for picture in one.pictures]
        return fusion_row(one.ids, one.labels, pixels, one.layouts, self.images), cut


@dataclasses.dataclass(frozen=True)
class Slot:
    """A row of a batch, and what became of its records. `used` of the samples are in the row, in their order; the row
    has no fields if none is."""

    samples: tuple[Sample, ...]
    row: Row
    used: int


@dataclasses.dataclass(frozen=True)
class Reader:
    """The slot number n of one process: slot `slots[n % len(slots)]` of step `n // len(slots)`.

    encode: (record, folder of its images, seed) -> row, and in words what is cut off. The seed is the order's and the
      record's place in the run.
    fields: of the rows.
    """

    order: Order
    sources: tuple[Source, ...]
    encode: Callable[[Record, str | os.PathLike, tuple[int, ...]], tuple[Row, str]]
    fields: Mapping[str, Field]
    slots: np.ndarray

    def __call__(self, number: int) -> Slot:
        step, local = divmod(number, len(self.slots))
        slot = int(self.slots[local])
        samples, rows = [], []
        for place_in_row, place in enumerate(self.order.at(step, slot)):
            sample, row = self._sample(slot, place, (self.order.seed, step, slot, place_in_row))
            samples.append(sample)
            rows += [row] if row else []
        return Slot(tuple(samples), join(rows, self.fields), len(rows))

    def _sample(self, slot: int, place: Place, seed: tuple[int, ...]) -> tuple[Sample, Row]:
        source = self.sources[place.source]
        sample = Sample(slot, place.source, place.record, f"{source.path.stem}-{place.record}")
        try:
            record, left_out = begin_with_user(source[place.record])
            sample = dataclasses.replace(sample, id=record.id)
            row, cut = self.encode(record, source.images, seed)
            if place.room is not None:
                _check_room(row, *place.room)
            notes = {"truncated": cut, "assistant_first": left_out}
            kind = next((kind for kind, note in notes.items() if note), "")
            return dataclasses.replace(sample, kind=kind, message="; ".join(filter(None, notes.values()))), row
        except BadRecord as error:
            return dataclasses.replace(sample, kind=error.kind, message=str(error)), {}


def _check_room(row: Row, tokens: int, tiles: int) -> None:
    """A record that has outgrown its place would push its neighbours out of the row."""
    needed = len(row["tokens"]), len(row["tile_image"])
    if needed[0] > tokens or needed[1] > tiles:
        raise BadRecord(
            "changed", f"it has {needed[0]} tokens and {needed[1]} tiles, but {tokens} and {tiles} when it was measured"
        )


def read(
    reader: Callable[[int], Element], first: int, last: int, workers: int, ahead: int, threads: int = THREADS
) -> Generator[Element]:
    """`reader` of the numbers `first : last` in order, about `ahead` of them in advance; to be closed after use.

    workers: processes that read; 0 reads in `threads` of this one. The elements do not depend on either.
    """
    if workers < 0:
        raise UsageError(f"data.workers is {workers}; give 0 (threads only) or a number of processes")
    elements = grain.MapDataset.range(first, last).map(reader)
    threads = min(threads, 2) if workers else threads
    share = max(-(-ahead // max(workers, 1)), threads)
    dataset = elements.to_iter_dataset(grain.ReadOptions(threads, share))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads a flag, and outside of absl.app nobody has parsed any
        options = grain.experimental.DatasetOptions(min_shm_size=SMALL_ARRAY)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, share), _start_worker)
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()


def _start_worker(index: int, count: int) -> None:
    """Ctrl-C and SIGTERM, which may be sent to all processes of a job, are the trainer's: it still needs data for the
    step that it is at. A worker whose trainer is gone (killed, out of memory) goes too.

    Linux could signal that (PR_SET_PDEATHSIG), but it does so when the *thread* that started the worker ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
