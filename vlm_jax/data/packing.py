"""Packing: rows of several records, filled close to their budgets of tokens and of tiles.

A pure function of the index and the seed. The global order of an epoch is cut into windows; each window is packed
alone, and nothing is carried over. So every host, and every restart at any step, has the same rows, and their number
is known before the first step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from vlm_jax.data.order import Order
from vlm_jax.errors import UsageError, suggest

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Packing:
    """`config.packing`.

    fit: "best_fit", "first_fit" (see `pack`), or None: each record has a row of its own, which is padded. "auto" stands
      for best_fit or None until the trainer has chosen (`training/packing_fit.py`).
    window: records, at most, that are packed together; more fill rows better, and mix the order within a window more.
    """

    fit: str | None = None
    window: int = 4096

    def __post_init__(self) -> None:
        known = (*FITS, AUTO)
        if self.fit is not None and self.fit not in known:
            hint = suggest(str(self.fit), known)
            raise UsageError(
                f"config.packing.fit is {self.fit!r}{hint}; give {', '.join(known)}, or None for padded rows"
            )
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise UsageError(f"config.packing.window is {self.window!r}; give a number of records, such as 4096")


def pack(
    tokens: np.ndarray, tiles: np.ndarray, *, budget_tokens: int, budget_tiles: int, fit: str = "best_fit"
) -> list[np.ndarray]:
    """Puts records into rows, each record into exactly one, such that no row exceeds a budget.

    tokens, tiles: int [N], what each record takes.
    fit: "first_fit" puts the records in their order each into the first row that has room for it. "best_fit" fills a
      row at a time: with the largest record that fits, again and again, but the room that is left for the last one or
      two goes to those one or two that fill most of it.
    Returns the records of each row, ascending. The rows stand in the order of their largest records, which is as random
      as that of the records: small ones do not gather at one end.
    Raises ValueError for a record that exceeds a budget.
    """
    tokens, tiles = np.asarray(tokens, np.int64), np.asarray(tiles, np.int64)
    if len(tokens) and (tokens.max() > budget_tokens or tiles.max() > budget_tiles):
        raise ValueError(f"a record exceeds the budget of {budget_tokens} tokens and {budget_tiles} tiles")
    rows = [np.sort(row) for row in FITS[fit](tokens, tiles, budget_tokens, budget_tiles)]
    return sorted(rows, key=lambda row: int(row[tokens[row].argmax()]))


def _first_fit(tokens: np.ndarray, tiles: np.ndarray, budget_tokens: int, budget_tiles: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room, room_tiles = np.full(len(tokens), budget_tokens), np.full(len(tokens), budget_tiles)
    for record, (size, images) in enumerate(zip(tokens.tolist(), tiles.tolist(), strict=True)):
        fits = (room[: len(rows) + 1] >= size) & (room_tiles[: len(rows) + 1] >= images)  # a new row fits always
        row = int(fits.argmax())
        if row == len(rows):
            rows.append([])
        rows[row].append(record)
        room[row] -= size
        room_tiles[row] -= images
    return rows


def _best_fit(tokens: np.ndarray, tiles: np.ndarray, budget_tokens: int, budget_tiles: int) -> list[list[int]]:
    # Records of one size are alike: what is chosen is a kind, by its size, and its first record is taken.
    kinds, kind_of, left = np.unique(np.stack([tokens, tiles], 1), axis=0, return_inverse=True, return_counts=True)
    sizes, images = kinds[:, 0], kinds[:, 1]
    members = np.argsort(kind_of.reshape(-1), kind="stable")
    after = np.cumsum(left)  # where the members of a kind end
    present, present_sizes = np.arange(len(kinds)), sizes  # kinds of which a record is left, by size
    most_images = images.max(initial=0)
    rows = []
    while len(present):
        row: list[int] = []
        room, room_tiles = budget_tokens, budget_tiles
        while len(present):
            fitting = present[: present_sizes.searchsorted(room, "right")]
            if room_tiles < most_images:
                fitting = fitting[images[fitting] <= room_tiles]
            if not len(fitting):
                break
            chosen = [fitting[-1]]
            if sizes[chosen[0]] < room <= 2 * sizes[chosen[0]]:
                chosen = _fullest(fitting, sizes, images, left, room, room_tiles)
            for kind in chosen:
                row.append(int(members[after[kind] - left[kind]]))
                left[kind] -= 1
                room -= int(sizes[kind])
                room_tiles -= int(images[kind])
            if not all(left[kind] for kind in chosen):
                present = present[left[present] > 0]
                present_sizes = sizes[present]
        rows.append(row)
    return rows


def _fullest(
    fitting: np.ndarray, sizes: np.ndarray, images: np.ndarray, left: np.ndarray, room: int, room_tiles: int
) -> list[int]:
    """The one or two kinds that fill most of the room: the largest alone, or with each kind the largest beside it."""
    size = sizes[fitting]
    beside = size.searchsorted(room - size, "right") - 1
    beside -= (beside == np.arange(len(size))) & (left[fitting] < 2)
    possible = (beside >= 0) & (images[fitting] + images[fitting[beside]] <= room_tiles)
    together = np.where(possible, size + size[beside], 0)
    best = int(together.argmax())
    return [fitting[best], fitting[beside[best]]] if together[best] > size[-1] else [fitting[-1]]


Fit = Callable[[np.ndarray, np.ndarray, int, int], Sequence[Sequence[int]]]
FITS: dict[str, Fit] = {"best_fit": _best_fit, "first_fit": _first_fit}


@dataclasses.dataclass(eq=False, kw_only=True)
class PackedOrder(Order):
    """An `Order` whose rows hold several records.

    A record that cannot be used takes no room: it stands in a row to be counted there.

    tokens, tiles: int [N], of the records of all sources (`Index.limited`). budget: tokens and tiles of a row.
    """

    tokens: np.ndarray
    tiles: np.ndarray
    budget: tuple[int, int]
    packing: Packing
    _starts: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def slots(self) -> int:
        """As many rows as hold `samples` records on average."""
        return max(1, round(self.samples * self.rows(0) / self.num_samples))

    def rows(self, epoch: int) -> int:
        return int(self._rows_before(epoch)[-1])

    def row(self, epoch: int, number: int) -> Sequence[int]:
        starts = self._rows_before(epoch)
        window = int(np.searchsorted(starts, number, "right")) - 1
        return _packed(self, epoch, window)[number - int(starts[window])].tolist()

    def room(self, record: int) -> tuple[int, int]:
        return int(self.tokens[record]), int(self.tiles[record])

    def seen_in(self, epoch: int, rows: int) -> int:
        starts = self._rows_before(epoch)
        if rows >= starts[-1]:
            return self.num_samples
        window = int(np.searchsorted(starts, rows, "right")) - 1
        inside = _packed(self, epoch, window)[: rows - int(starts[window])]
        return int(self._cuts[window]) + sum(map(len, inside))

    @functools.cached_property
    def _cuts(self) -> np.ndarray:
        """Where the windows of an epoch begin, and its end: windows of equal sizes."""
        windows = -(-self.num_samples // self.packing.window)
        return np.arange(windows + 1) * self.num_samples // windows

    def _rows_before(self, epoch: int) -> np.ndarray:
        """The rows before each window of an epoch, and of all of it. It takes packing them all, once: the table travels
        to the workers."""
        if epoch not in self._starts:
            rows = [len(_packed(self, epoch, window)) for window in range(len(self._cuts) - 1)]
            self._starts[epoch] = np.cumsum([0, *rows])
        return self._starts[epoch]

    def pack_window(self, epoch: int, window: int) -> list[np.ndarray]:
        """The rows of a window, each the numbers of its records."""
        records = self.records(epoch)[self._cuts[window] : self._cuts[window + 1]]
        rows = pack(
            self.tokens[records],
            self.tiles[records],
            budget_tokens=self.budget[0],
            budget_tiles=self.budget[1],
            fit=str(self.packing.fit),
        )
        return [records[row] for row in rows]

    def describe(self) -> str:
        """How full the rows of the first epoch are."""
        records, rows = self.records(0), self.rows(0)
        shares = [
            a[records].sum() / (rows * room) for a, room in zip((self.tokens, self.tiles), self.budget, strict=True)
        ]
        return (
            f"packed by {self.packing.fit}: {rows:,} rows of {self.budget[0]:,} tokens ({shares[0]:.1%} real) and "
            f"{self.budget[1]:,} tiles ({shares[1]:.1%} real); {self.slots:,} rows a step, for {self.samples:,} samples"
        )


@functools.lru_cache(maxsize=8)
def _packed(order: PackedOrder, epoch: int, window: int) -> list[np.ndarray]:
    return order.pack_window(epoch, window)
