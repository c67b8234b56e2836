"""Figures of a data set from the sizes of its records: how they are spread, how many are too long, how rows fill."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data.packing import FITS, Packing, pack

SAMPLED = 50_000  # records, at most, of which rows are packed to see how full they are


def spread(values: np.ndarray) -> dict[str, float]:
    """Least, median, mean, 95th percentile and greatest; nothing of no values."""
    if not len(values):
        return {}
    median, high = np.percentile(values, [50, 95])
    figures = {
        "min": values.min(),
        "median": median,
        "mean": values.mean(),
        "p95": high,
        "max": values.max(),
    }
    return {name: round(float(value), 1) for name, value in figures.items()}


@dataclasses.dataclass(frozen=True)
class Filling:
    """How full rows of `length` tokens get: the shares of their tokens that are real.

    tiles: room for tiles in a packed row. left_out: the share of records that are longer than the row.
    padded: each record in a row of its own, batches padded to the longest. packed: by the ways of `packing.fit`.
    per_row: records in a row packed the best way.
    """

    length: int
    tiles: int
    left_out: float
    padded: float
    packed: dict[str, float]
    per_row: float

    def as_json(self) -> dict[str, Any]:
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in (dataclasses.asdict(self) | self.packed).items()
            if name != "packed"
        }


def fill(
    tokens: np.ndarray, tiles: np.ndarray, lengths: Sequence[int], *, samples: int, seed: int, truncate: bool = False
) -> list[Filling]:
    """For each length of a row. tokens, tiles: int [N], of the records that can be used. samples: of a batch.
    truncate: whether a record that is longer than the row is cut off; else it is left out.

    Rows have room for as many tiles as their tokens need on average, and a quarter more.
    """
    shuffled = np.random.default_rng(seed).permutation(len(tokens))[:SAMPLED]
    tokens, tiles = tokens[shuffled], tiles[shuffled]
    window, result = Packing().window, []
    for length in lengths:
        fits = (tokens <= length) | truncate
        some, some_tiles = np.minimum(tokens[fits], length), tiles[fits]
        if not len(some):
            continue
        need = 1.25 * length * some_tiles.sum() / some.sum()
        room = max(math.ceil(need), int(some_tiles.max()), 1)
        batches = [some[at : at + samples] for at in range(0, len(some), samples)]
        padded = some.sum() / sum(batch.max() * len(batch) for batch in batches)
        rows = {
            fit: sum(
                len(pack(*pair, budget_tokens=length, budget_tiles=room, fit=fit))
                for pair in zip(_windows(some, window), _windows(some_tiles, window), strict=True)
            )
            for fit in sorted(FITS, reverse=True)
        }
        packed = {fit: float(some.sum() / (count * length)) for fit, count in rows.items()}
        per_row = len(some) / min(rows.values())
        result.append(Filling(length, room, float(1 - fits.mean()), float(padded), packed, per_row))
    return result


def _windows(values: np.ndarray, window: int) -> list[np.ndarray]:
    return np.array_split(values, -(-len(values) // window))
