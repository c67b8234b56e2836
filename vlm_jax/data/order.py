"""The order of a run: which record stands in which slot of which step, as a pure function of the settings.

There is no state but the number of the step, and the order knows nothing of processes, workers or devices; so a run
goes on exactly, on any number of hosts.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from vlm_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Order:
    """Mixes sources, shuffles each epoch, and cuts it into steps; the last step of an epoch may have empty slots.

    counts, weights: records of each source, and how often each is seen per epoch.
    samples: slots of a step.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    samples: int
    seed: int
    shuffle: bool = True

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
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.samples)

    def seen(self, steps: int) -> int:
        """Samples in the first `steps` steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.num_samples + min(rest * self.samples, self.num_samples)

    def at(self, step: int, slot: int) -> tuple[int, int] | None:
        """(number of the source, number of the record in it), or None where an epoch's last step has no more."""
        epoch, within = divmod(step, self.steps_per_epoch)
        place = within * self.samples + slot
        if slot >= self.samples or place >= self.num_samples:
            return None
        number = int(_epoch(self.counts, self.weights, self.seed, epoch, self.shuffle)[place])
        for source, count in enumerate(self.counts):
            if number < count:
                return source, number
            number -= count
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
