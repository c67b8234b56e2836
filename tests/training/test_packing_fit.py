"""`packing.fit=auto`: what padded and packed rows cost, counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from vlm_jax.data.index import Index
from vlm_jax.data.order import Order
from vlm_jax.data.packing import PackedOrder, Packing
from vlm_jax.models.flops import Costs
from vlm_jax.training.packing_fit import choose_fit, operations

TOKENS, TILES = np.array([10, 20, 0, 40]), np.array([1, 0, 0, 2])  # the third cannot be used
SIZES = Index(TOKENS, TILES, TOKENS, TOKENS, np.zeros(4, np.int8))
COSTS = Costs(per_tile=1000, per_token=10, per_label=1e9, per_pair=3, sliding_window=None)


def pairs(rows, length) -> float:
    return sum(n * n for row in rows for n in row) + length


def loader(order, steps, rows, lengths, tiles) -> SimpleNamespace:
    def bucket(longest, most):
        return next(n for n in lengths if n >= longest), next(n for n in tiles if n >= most)

    return SimpleNamespace(order=order, steps=steps, micro_batches=1, rows=rows, bucket=bucket)


def test_padding_and_attention_are_counted() -> None:
    padded = Order((4,), (1.0,), 2, 0, False)
    steps = [
        2 * (32 * 10 + 1 * 1000) + 3 * (10**2 + 20**2 + 32),
        2 * (64 * 10 + 2 * 1000) + 3 * (40**2 + 64),
    ]
    assert operations(loader(padded, 6, 2, (16, 32, 64), (1, 2)), SIZES, COSTS, pairs) == 6 * sum(steps) / 2

    packed = PackedOrder(
        (4,), (1.0,), 4, 0, False, tokens=TOKENS, tiles=TILES, budget=(64, 3), packing=Packing("best_fit")
    )
    assert sorted(map(sorted, (packed.row(0, i) for i in range(packed.rows(0))))) == [[0], [1, 2, 3]]
    step = 4 * (64 * 10 + 3 * 1000) + 3 * (40**2 + 10**2 + 20**2 + 64)  # two rows more than hold something
    assert operations(loader(packed, 5, 4, (64,), (3,)), SIZES, COSTS, pairs) == 5 * step


def test_the_cheaper_one_is_chosen_and_said() -> None:
    assert choose_fit({"best_fit": 200.0, None: 100.0}) == (
        None,
        "packing.fit=auto chose None: by a model of the device packed rows take 2.00 times as long",
    )
    fit, note = choose_fit({"best_fit": 100.0, None: 137.0})
    assert fit == "best_fit" and note.endswith("padded rows take 1.37 times as long")
