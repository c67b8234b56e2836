"""The order of a run: which records stand in which row of which step, as a pure function of the settings.

There is no state but the number of the step, and the order knows nothing of processes, workers or devices; so a run
goes on exactly, on any number of hosts.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.errors import UsageError


class Place(NamedTuple):
    """A record in a row: the number of its source, its number in there, and the tokens and tiles that the row keeps
    for it (None: all that a row may hold)."""

    source: int
    record: int
    room: tuple[int, int] | None = None


@dataclasses.dataclass(eq=False)
class Order:
    """Mixes sources, shuffles each epoch, and cuts it into steps; the last step of an epoch may have empty slots.

    Here a row is one record; `data/packing.py: PackedOrder` has rows of several.

    counts, weights: records of each source, and how often each is seen per epoch.
    samples: of a step.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    samples: int
    seed: int
    shuffle: bool = True
    _ends: list[int] = dataclasses.field(default_factory=list, init=False, repr=False)  # of epochs, in steps

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; give 0 or more")
        if self.samples < 1:
            raise UsageError(f"a batch has {self.samples} samples; give at least 1")
        for number, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            if weight <= 0 or round(weight * count) < 1:
                raise UsageError(
                    f"source number {number} of the mixture has weight {weight}, which gives none of its {count} "
                    "records per epoch; raise the weight or leave the source out"
                )

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return sum(_size(count, weight) for count, weight in zip(self.counts, self.weights, strict=True))

    @property
    def slots(self) -> int:
        """Rows of a step."""
        return self.samples

    def rows(self, epoch: int) -> int:
        """Rows of an epoch."""
        return self.num_samples

    def row(self, epoch: int, number: int) -> Sequence[int]:
        """The records of a row, numbered through all sources."""
        return self.records(epoch)[number : number + 1].tolist()

    def room(self, record: int) -> tuple[int, int] | None:
        """What a row keeps for this record."""
        return None

    def seen_in(self, epoch: int, rows: int) -> int:
        """Samples in the first `rows` rows of an epoch, or in all of it if it has fewer."""
        return min(rows, self.num_samples)

    def records(self, epoch: int) -> np.ndarray:
        """All records of an epoch in their order, numbered through all sources: int64 [num_samples]."""
        return _epoch(self.counts, self.weights, self.seed, epoch, self.shuffle)

    def steps(self, epochs: float) -> int:
        """Steps of so many epochs; each epoch begins with a step of its own."""
        whole = int(epochs)
        rest = epochs - whole
        before = self._end(whole - 1) if whole else 0
        return before + (math.ceil(rest * (self._end(whole) - before)) if rest else 0)

    def seen(self, steps: int) -> int:
        """Samples in the first `steps` steps, those among them that cannot be used."""
        epoch, within = self._locate(steps)
        return epoch * self.num_samples + (self.seen_in(epoch, within * self.slots) if within else 0)

    def at(self, step: int, slot: int) -> tuple[Place, ...]:
        """The records of a row of a step; none where an epoch's last step has no more rows."""
        epoch, within = self._locate(step)
        number = within * self.slots + slot
        if slot >= self.slots or number >= self.rows(epoch):
            return ()
        return tuple(Place(*self._find(record), self.room(record)) for record in self.row(epoch, number))

    def _locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the step within it."""
        while not self._ends or self._ends[-1] < step:
            self._end(len(self._ends))
        epoch = bisect.bisect_right(self._ends, step)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def _end(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before - (-self.rows(len(self._ends)) // self.slots))
        return self._ends[epoch]

    def _find(self, record: int) -> tuple[int, int]:
        for source, count in enumerate(self.counts):
            if record < count:
                return source, record
            record -= count
        raise AssertionError("a number beyond the last source")


def _size(count: int, weight: float) -> int:
    return int(weight) * count + round((weight - int(weight)) * count)


@functools.lru_cache(maxsize=4)
def _epoch(counts: tuple[int, ...], weights: tuple[float, ...], seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The records of an epoch in their order, numbered through all sources: int64 [N]."""
    parts, first = [], 0
    for source, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        parts.append(first + np.tile(np.arange(count), int(weight)))
        if rest := _size(count, weight) - len(parts[-1]):
            parts.append(first + np.sort(_permutation(count, seed, epoch, source + 1)[:rest]))
        first += count
    numbers = np.concatenate(parts)
    return numbers[_permutation(len(numbers), seed, epoch, 0)] if shuffle else numbers


def _permutation(count: int, *key: int) -> np.ndarray:
    """A permutation that no version of numpy will change: raw Philox bits are stable, Generator methods are not."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")
