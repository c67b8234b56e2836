"""The order of a run."""

from __future__ import annotations

from collections import Counter

import pytest

from vlm_jax.data.order import Order
from vlm_jax.errors import UsageError


def epoch(order: Order, number: int) -> list[tuple[int, int] | None]:
    steps = range(order.steps(number), order.steps(number + 1))
    slots = [order.at(step, slot) for step in steps for slot in range(order.slots)]
    return [slot[0][:2] if slot else None for slot in slots]


def test_each_record_once_per_epoch_and_empty_slots_at_its_end() -> None:
    order = Order((11,), (1.0,), samples=4, seed=1)
    assert order.num_samples == 11 and order.steps(1.0) == 3 and order.steps(1.5) == 5
    for number in range(3):
        places = epoch(order, number)
        assert places[-1] is None and sorted(places[:-1]) == [(0, i) for i in range(11)]
    assert epoch(order, 0) != epoch(order, 1) != epoch(order, 2)
    assert epoch(order, 1) == epoch(Order((11,), (1.0,), samples=4, seed=1), 1)
    assert epoch(order, 0) != epoch(Order((11,), (1.0,), samples=4, seed=2), 0)
    assert order.at(0, 4) == ()  # a row beyond the batch
    assert [order.seen(step) for step in (0, 1, 2, 3, 4)] == [0, 4, 8, 11, 15]


def test_weights_are_times_per_epoch() -> None:
    order = Order((10, 6, 4), (0.5, 2.0, 1.25), samples=22, seed=0)
    assert order.num_samples == 5 + 12 + 5
    halves = []
    for number in range(4):
        counts = Counter(place for place in epoch(order, number) if place)
        of = [[counts[source, i] for i in range(order.counts[source])] for source in range(3)]
        assert sorted(of[0]) == [0] * 5 + [1] * 5 and of[1] == [2] * 6 and sorted(of[2]) == [1, 1, 1, 2]
        halves.append(tuple(of[0]))
    assert len(set(halves)) > 1


def test_without_shuffling_the_order_is_the_files() -> None:
    order = Order((3, 2), (1.0, 1.0), samples=5, seed=0, shuffle=False)
    assert epoch(order, 0) == epoch(order, 1) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_the_order_is_a_promise_to_runs_that_resume() -> None:
    order = Order((8,), (1.0,), samples=8, seed=7)
    assert [place[1] for place in epoch(order, 0) if place] == [4, 3, 6, 2, 1, 0, 5, 7]


def test_settings_that_make_no_order_say_so() -> None:
    for weights, seed, samples, says in [
        ((0.0,), 0, 1, "weight 0.0"),
        ((0.01,), 0, 1, "none of its 5 records"),
        ((1.0,), -1, 1, "seed is -1"),
        ((1.0,), 0, 0, "0 samples"),
    ]:
        with pytest.raises(UsageError, match=says):
            Order((5,), weights, samples, seed)
