"""Opens shards of as many records as LLaVA-1.5 trains on, and reads them at random: how long, in how much memory?

    python benchmarks/open_shards.py [--records=665000] [--workers=4] [--folder=DIR] [--output=open_shards.json]

The records are small (a conversation and an image of 8 x 8 pixels, about 600 bytes), in as many shards as full-size
ones would fill; what is measured does not depend on their size, but for the bytes that a read moves. Printed are the
time that `open_source` takes, the resident memory of the process and of each worker, and reads per second. Status 1
above 20 s, or above 1 GiB of what opening and reading add on the host, all processes together.

On an AMD EPYC with two cores, busy otherwise: 0.01 s; 238 MB resident, of which 5 are the data; four workers of about
240 MB, of which 12 each; 4,100 reads/s in one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from machine import cpu_model, versions
from PIL import Image as Pillow

from vlm_jax.data.reading import read
from vlm_jax.data.records import Image, Message, Record
from vlm_jax.data.sources import Source, open_source
from vlm_jax.data.sources.shards import pack_record, write_index, write_shard

SHARDS = 260  # 665,000 records of 100 kB, in shards of 256 MB
READS = 20_000
LIMIT_SECONDS, LIMIT_BYTES = 20, 1 << 30


def entries(first: int, last: int) -> Iterator[bytes]:
    file = io.BytesIO()
    Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    for number in range(first, last):
        asked = Message("user", (Image(0), f"\nWhat is in picture number {number}, and what is it made of?"))
        told = Message("assistant", (f"It is picture {number} of many; it is made of pixels of all colours. " * 2,))
        yield pack_record(Record(f"record-{number}", (asked, told), (file.getvalue(),)))


def make(folder: Path, records: int) -> None:
    edges = np.linspace(0, records, SHARDS + 1).astype(int).tolist()
    counts = {}
    for shard, (first, last) in enumerate(itertools.pairwise(edges)):
        name = f"train-{shard:05}-of-{SHARDS:05}.array_record"
        write_shard(folder / name, entries(first, last))
        counts[name] = last - first
    write_index(folder, counts, {})


def resident() -> np.ndarray:
    """Bytes of this process in memory: all, and those that are no part of a file (libraries, which processes share)."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    found = {line[0]: int(line[1]) * 1024 for line in lines if line[0] in ("VmRSS:", "RssAnon:")}
    return np.array([found["VmRSS:"], found["RssAnon:"]])


@dataclasses.dataclass(frozen=True)
class ReadOne:
    """Reads a record at random. Returns the process, its memory, and the number that the record tells of itself."""

    source: Source
    order: np.ndarray

    def __call__(self, number: int) -> tuple[int, np.ndarray, int]:
        record = self.source[int(self.order[number])]
        return os.getpid(), resident(), int(record.id.removeprefix("record-"))


def start(number: int) -> tuple[int, np.ndarray, int]:
    """What a worker has in memory before it reads."""
    time.sleep(0.01)
    return os.getpid(), resident(), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--folder", help="where there is room for a gigabyte")
    parser.add_argument("--output", help="a JSON file for the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        began = time.monotonic()
        make(Path(place), given.records)
        size = sum(file.stat().st_size for file in Path(place).iterdir())
        print(f"made     {given.records:,} records, {size / 1e6:,.0f} MB, in {time.monotonic() - began:.0f} s")

        idle = list(read(start, 0, 64 * given.workers, given.workers, ahead=given.workers))
        own = resident()
        began = time.monotonic()
        source = open_source(place)
        seconds, opened = time.monotonic() - began, resident() - own
        order = np.array(random.Random(0).sample(range(len(source)), READS))

        task, began = ReadOne(source, order), time.monotonic()
        for number in range(READS):
            assert task(number)[2] == order[number]
        alone, parent = READS / (time.monotonic() - began), resident()

        workers: dict[int, np.ndarray] = {}
        for number, (process, memory, told) in enumerate(read(task, 0, READS, given.workers, ahead=64)):
            if number == 0:
                began = time.monotonic()  # the workers have started
            assert told == order[number]
            workers[process] = np.maximum(workers.get(process, 0), memory)
        together = READS / (time.monotonic() - began)
    before = np.median([memory for _, memory, _ in idle], 0)
    added = [int(memory[1] - before[1]) for memory in workers.values()]
    host = int(parent[1] - own[1]) + sum(added)
    figures = {
        "records": given.records,
        "shards": SHARDS,
        "open_seconds": round(seconds, 3),
        "open_bytes": int(opened[1]),
        "parent_resident": int(parent[0]),
        "parent_added": int(parent[1] - own[1]),
        "worker_resident": [int(memory[0]) for memory in workers.values()],
        "worker_added": added,
        "host_bytes": host,
        "reads_per_second_one_thread": round(alone),
        "reads_per_second_workers": round(together),
        "cpu": cpu_model(),
        **versions("array_record", "grain", "numpy"),
    }
    mb = 1e6
    print(f"open     {seconds:.2f} s, {opened[1] / mb:.1f} MB (limit {LIMIT_SECONDS} s)")
    print(
        f"parent   {parent[0] / mb:.0f} MB resident, {(parent[1] - own[1]) / mb:.0f} of them by {READS:,} reads: "
        f"{alone:,.0f} a second in one thread"
    )
    for memory, more in zip(workers.values(), added, strict=True):
        print(f"worker   {memory[0] / mb:.0f} MB resident, {more / mb:.0f} more than it starts with")
    print(f"workers  {together:,.0f} reads/s together")
    print(f"host     {host / mb:.0f} MB for the data (limit {LIMIT_BYTES / mb:.0f})   ({figures['cpu']})")
    if given.output:
        Path(given.output).write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(seconds > LIMIT_SECONDS or host > LIMIT_BYTES)


if __name__ == "__main__":
    main()
