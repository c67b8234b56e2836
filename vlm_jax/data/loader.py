"""Batches of a run: the same global batch at the same step on any number of processes, workers and restarts.

Slot r of a step is row (r // R, r % R) of its [A, R] rows (A micro-batches, R rows each over all processes); process h
of H owns the rows h·R/H : (h + 1)·R/H of every micro-batch. A slot holds one record, or several with packing. A batch
belongs to the smallest bucket that holds the rows of *all* processes, so these agree on it, one step ahead, with a
gather of a few numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.data.bad_records import KINDS, BadRecordList
from vlm_jax.data.conversation import check_placement
from vlm_jax.data.images import ImageSettings
from vlm_jax.data.index import Index, build_index
from vlm_jax.data.order import Order
from vlm_jax.data.packing import PackedOrder, Packing
from vlm_jax.data.reading import THREADS, FusionEncoder, Reader, Sample, Slot, read
from vlm_jax.data.rows import Row, collate, fusion_fields
from vlm_jax.data.sources import SourceSpec, open_source
from vlm_jax.data.templates import get_template
from vlm_jax.errors import UsageError

Item = TypeVar("Item")
AHEAD = 2  # steps that stand ready, beside those in the readers' hands


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """The rows of one process in one step.

    arrays: of docs/design.md, each [A, R/H, ...].
    step: counted from 0 at the start of the order.
    bucket: (T, K), the same on all processes.
    samples: usable samples; tokens: T times rows; real_tokens: those that are no padding. All three of all processes.
    delivered: what became of the records in this process's slots, in their order.
    bad: records so far with which something is wrong, by kind, of all processes.
    """

    arrays: Row
    step: int
    bucket: tuple[int, int]
    samples: int
    tokens: int
    real_tokens: int
    delivered: tuple[Sample, ...]
    bad: Mapping[str, int]


class Loader:
    """Opens the sources and describes the batches; iterating reads them, from `start_step` to the last step.

    Every iteration is a fresh one. Close it (`batches = iter(loader); ...; batches.close()`) to stop threads and
    workers before its end.

    sources: files of records, or one path.
    tokenizer, template, images, image_placement, compat_drop_mismatch, truncate: what makes a row (`FusionEncoder`).
    samples: of a step, over all processes.
    micro_batches, rows, shards: A and R, with A·R at least the slots of a step: `samples`, or with packing what holds
      so many on average. Default one micro-batch; R is the least, a multiple of `shards`. What is left over is rows of
      padding.
    lengths, tiles: the buckets' T and K, every T with every K; with packing the largest of each.
    packing, index: how rows are packed, and the sizes of all records; default as padded, measured or from `index_cache`
      (a folder; None keeps none).
    shuffle: each epoch anew; without, the order of the files.
    steps: the last step (exclusive), or `epochs` of them (rounded up); default one epoch.
    workers: processes that read, per process; 0 reads in `threads`, of which one is best where images are tiny: there
      reading is mostly Python's work, and threads are in each other's way.
    max_bad_fraction, bad_records, stage: see `BadRecordList`; `bad_records` is its folder, None keeps no list.
    process_index, process_count: default jax's.
    agree: gathers one int32 vector [n] of every process -> [process_count, n]; default over jax's devices.

    Raises UsageError for what cannot be opened or does not fit together. Iterating raises UsageError when too many
    records are bad, at the same step on every process.
    """

    def __init__(
        self,
        sources: str | os.PathLike | Sequence[SourceSpec],
        *,
        tokenizer: Any,
        template: str,
        images: ImageSettings,
        image_placement: str = "first",
        compat_drop_mismatch: bool = False,
        truncate: bool = False,
        samples: int,
        lengths: Sequence[int],
        tiles: Sequence[int] = (1,),
        micro_batches: int | None = None,
        rows: int | None = None,
        shards: int = 1,
        packing: Packing | None = None,
        index: Index | None = None,
        index_cache: str | os.PathLike | None = None,
        seed: int = 0,
        shuffle: bool = True,
        epochs: float | None = None,
        steps: int | None = None,
        start_step: int = 0,
        workers: int = 0,
        threads: int = THREADS,
        max_bad_fraction: float = 0.01,
        bad_records: str | os.PathLike | None = None,
        stage: str = "",
        process_index: int | None = None,
        process_count: int | None = None,
        agree: Callable[[np.ndarray], Any] | None = None,
    ):
        specs = (SourceSpec(os.fspath(sources)),) if isinstance(sources, (str, os.PathLike)) else tuple(sources)
        get_template(template)
        check_placement(image_placement)
        for name, sizes in {"lengths": lengths, "tiles": tiles}.items():
            if not sizes or min(sizes) < 1:
                raise UsageError(f"buckets.{name} is {tuple(sizes)}; give at least one size, each at least 1")
        self.lengths, self.tiles = tuple(sorted(lengths)), tuple(sorted(tiles))
        if images.most_tiles > self.tiles[-1]:
            raise UsageError(
                f"buckets.tiles ends at {self.tiles[-1]}, but images.pinpoints cut an image into up to "
                f"{images.most_tiles} tiles, the whole image among them: add {images.most_tiles} to buckets.tiles"
            )
        self.process_index = jax.process_index() if process_index is None else process_index
        self.process_count = jax.process_count() if process_count is None else process_count
        self._agree = agree or gather_processes
        self.sources = tuple(open_source(spec.path, spec.images, confined=spec.confined) for spec in specs)
        longest, most_tiles = self.lengths[-1], self.tiles[-1]
        self.encode = FusionEncoder(
            tokenizer, template, images, longest, most_tiles, image_placement, compat_drop_mismatch, truncate
        )
        counts, weights = tuple(len(source) for source in self.sources), tuple(float(spec.weight) for spec in specs)
        self.index: Index | None = None
        self.order = Order(counts, weights, samples, seed, shuffle)
        if packing is not None and packing.fit is not None:
            self.lengths, self.tiles, budget = (longest,), (most_tiles,), (longest, most_tiles)
            self.index = index or build_index(
                self.sources,
                self.encode,
                workers=workers,
                cache=index_cache,
                process_index=self.process_index,
                process_count=self.process_count,
                agree=self._agree,
            )
            limited = self.index.limited(self.encode)
            packed: dict[str, Any] = {"tokens": limited.tokens, "tiles": limited.tiles, "budget": budget}
            self.order = PackedOrder(counts, weights, samples, seed, shuffle, packing=packing, **packed)
            self._check_index(limited, max_bad_fraction)
        self.micro_batches, self.rows = _grid(self.order.slots, micro_batches, rows, shards)
        if self.rows % self.process_count:
            raise UsageError(
                f"{self.rows} rows of a micro-batch do not divide among {self.process_count} processes; "
                "change batch.samples or batch.per_device"
            )
        self.num_samples = self.order.num_samples
        self.steps = steps if steps is not None else self.order.steps(epochs or 1.0)
        self.order.seen(self.steps)  # the epochs up to there are laid out, once and for all workers
        self.start_step = start_step
        self._budgets = {"H": images.size, "W": images.size, "P": images.features_per_tile}
        self._fields = fusion_fields(images)
        self._workers, self._threads = workers, threads
        self._max_bad_fraction = max_bad_fraction
        self._bad_records, self._stage = bad_records, stage

    def _check_index(self, index: Index, max_bad_fraction: float) -> None:
        """What the first pass over a packed set would find is told before the first step."""
        count = sum(self.order.counts)
        if len(index) != count:
            raise UsageError(f"the sources have {count:,} records, but {len(index):,} were measured; start a new run")
        BadRecordList(None, 0).check(index.bad, count, count, max_bad_fraction)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to tell before the first step: how full the rows are, and what is left empty."""
        if not isinstance(self.order, PackedOrder):
            return ()
        spare = self.micro_batches * self.rows - self.order.slots
        empty = f"{spare} more rows of each step are empty; a larger batch.samples would fill them"
        return (self.order.describe(), *([empty] if spare else []))

    def bucket(self, longest: int, most_tiles: int) -> tuple[int, int]:
        """T and K of a step whose rows take at most so many tokens and tiles."""
        return _smallest(self.lengths, longest), _smallest(self.tiles, most_tiles)

    def __iter__(self) -> Generator[HostBatch]:
        listed = BadRecordList(self._bad_records, self.start_step, self.process_index, self.process_count, self._stage)
        batches = self._batches(Counter(listed.counts))
        if self.process_count == 1:
            batches = in_background(batches, AHEAD)
        with contextlib.closing(batches):
            for batch in batches:
                bad = [sample for sample in batch.delivered if sample.kind]
                listed.add([self._line(batch.step, sample) for sample in bad])
                seen = self.order.seen(batch.step + 1)
                listed.check(batch.bad, seen, self.num_samples, self._max_bad_fraction)
                yield batch

    def _line(self, step: int, sample: Sample) -> dict[str, Any]:
        source = str(self.sources[sample.source].path)
        return {"step": step, "id": sample.id, "source": source, "kind": sample.kind, "message": sample.message}

    def _batches(self, bad: Counter[str]) -> Generator[HostBatch]:
        steps = self._steps()
        if self.process_count > 1:  # the gather is the main thread's, as everything that the devices do in order
            steps = in_background(steps, AHEAD)
        waiting = None
        with contextlib.closing(steps):
            for slots in steps:
                # The gather for the next step is started before this one is delivered, and looked at after, so that
                # the devices never wait for it.
                bad.update(sample.kind for slot in slots for sample in slot.samples if sample.kind)
                needs = _needs(slots, bad)
                gathered = needs[None] if self.process_count == 1 else self._agree(needs)
                if waiting is not None:
                    yield self._batch(*waiting)
                waiting = slots, gathered, waiting[2] + 1 if waiting else self.start_step
            if waiting is not None:
                yield self._batch(*waiting)

    def _steps(self) -> Generator[list[Slot]]:
        """The slots of this process, a step at a time."""
        local = self.rows // self.process_count
        grid = np.arange(self.micro_batches * self.rows).reshape(self.micro_batches, self.process_count, local)
        numbers = grid[:, self.process_index].reshape(-1)
        reader = Reader(self.order, self.sources, self.encode, self._fields, numbers)
        first, last = self.start_step * len(numbers), self.steps * len(numbers)
        reading = read(reader, first, last, self._workers, ahead=len(numbers), threads=self._threads)
        with contextlib.closing(reading) as slots:
            while step := list(itertools.islice(slots, len(numbers))):
                yield step

    def _batch(self, slots: list[Slot], gathered: Any, step: int) -> HostBatch:
        gathered = np.asarray(gathered)
        longest, most_tiles = gathered[:, :2].max(0).tolist()
        samples, real_tokens, *bad = gathered[:, 2:].sum(0).tolist()
        bucket = self.bucket(longest, most_tiles)
        budgets = self._budgets | {"T": bucket[0], "K": bucket[1]}
        arrays = collate([slot.row or None for slot in slots], self._fields, budgets)
        return HostBatch(
            arrays={name: array.reshape(self.micro_batches, -1, *array.shape[1:]) for name, array in arrays.items()},
            step=step,
            bucket=bucket,
            samples=samples,
            tokens=bucket[0] * self.micro_batches * self.rows,
            real_tokens=real_tokens,
            delivered=tuple(sample for slot in slots for sample in slot.samples),
            bad=dict(zip(KINDS, bad, strict=True)),
        )


def _grid(slots: int, micro_batches: int | None, rows: int | None, shards: int) -> tuple[int, int]:
    """A and R."""
    if rows is None:
        rows = -(-slots // ((micro_batches or 1) * shards)) * shards
    count = -(-slots // rows) if micro_batches is None else micro_batches
    if count * rows < slots:
        raise UsageError(f"{count} micro-batches of {rows} rows cannot hold {slots} samples")
    return count, rows


def _needs(slots: Sequence[Slot], bad: Mapping[str, int]) -> np.ndarray:
    """What the processes tell each other: longest row, most tiles, samples, tokens, bad records of each kind."""
    lengths = [len(slot.row["tokens"]) for slot in slots if slot.row]
    tiles = [len(slot.row["tile_image"]) for slot in slots if slot.row]
    numbers = [max(lengths, default=0), max(tiles, default=0), sum(slot.used for slot in slots), sum(lengths)]
    return np.array([*numbers, *(bad[kind] for kind in KINDS)], np.int32)


def _smallest(sizes: Sequence[int], needed: int) -> int:
    return next(size for size in sizes if size >= needed)


def gather_processes(numbers: np.ndarray) -> jax.Array:
    """int32 [n] of each process -> [processes, n] on each. Returns at once; reading the array waits for the devices."""
    mesh, replicate = _replication()
    with jax.set_mesh(mesh):
        spread = jax.make_array_from_process_local_data(NamedSharding(mesh, P("process")), numbers[None])
        return replicate(spread).addressable_data(0)


@functools.cache
def _replication() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))
    return mesh, jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def in_background(items: Generator[Item], ahead: int) -> Generator[Item]:
    """Runs a generator in a thread, `ahead` items in advance. Its errors are raised here; closing this closes it."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
    stop = threading.Event()

    def put(kind: str, value: Any = None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put((kind, value), timeout=0.1)

    def run() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    put("item", item)
                    if stop.is_set():
                        return
            put("end")
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=run, name="vlm_jax-data", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stop.set()
        thread.join(timeout=30.0)
