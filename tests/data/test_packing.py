"""Packing: every record in exactly one row, rows within their budgets, the same rows on every host and after a kill."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import pickle
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.test_loader import joined, lines, same, simulate
from vlm_jax.data import ImageSettings, SourceSpec
from vlm_jax.data.index import Index
from vlm_jax.data.loader import Loader
from vlm_jax.data.packing import FITS, PackedOrder, Packing, pack
from vlm_jax.errors import UsageError

MakeSet = Callable[..., Path]


def sizes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles of photos, of small pictures and of text, roughly as LLaVA-1.6 has them."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, count, p=[0.7, 0.2, 0.1])
    tokens = np.array([2340, 1476, 0])[kind] + rng.integers(50, 600, count)
    return tokens, np.array([5, 3, 0])[kind]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("budget", [(4096, 8), (8192, 16), (8192, 11), (16384, 40)])
def test_each_record_stands_in_one_row_and_no_row_exceeds_a_budget(fit: str, budget: tuple[int, int]) -> None:
    tokens, tiles = sizes(1000)
    tokens[:20], tiles[:20] = 0, 0  # cannot be used
    rows = pack(tokens, tiles, budget_tokens=budget[0], budget_tiles=budget[1], fit=fit)
    assert sorted(np.concatenate(rows)) == list(range(1000))
    for row in rows:
        assert 0 < len(row) and (np.diff(row) > 0).all()
        assert tokens[row].sum() <= budget[0] and tiles[row].sum() <= budget[1]
    again = pack(tokens, tiles, budget_tokens=budget[0], budget_tiles=budget[1], fit=fit)
    assert [row.tolist() for row in rows] == [row.tolist() for row in again]


def test_first_fit_is_first_fit() -> None:
    rows = pack([6, 5, 4, 5, 1], [1, 0, 0, 2, 0], budget_tokens=10, budget_tiles=2, fit="first_fit")
    assert [row.tolist() for row in rows] == [[0, 2], [1, 3], [4]]
    rows = pack([6, 5, 4, 5], [1, 2, 2, 0], budget_tokens=10, budget_tiles=2, fit="first_fit")
    assert [row.tolist() for row in rows] == [[0], [1, 3], [2]]


def test_best_fit_fills_the_rest_of_a_row_with_the_two_that_fill_it_best() -> None:
    # Largest first would take 7 + 2; 7 + 5 + 4 fills all of it.
    rows = pack([7, 5, 4, 8, 8], [0] * 5, budget_tokens=16, budget_tiles=1)
    assert sorted(row.tolist() for row in rows) == [[0, 1, 2], [3, 4]]
    with pytest.raises(ValueError, match="exceeds the budget"):
        pack([17], [0], budget_tokens=16, budget_tiles=1)
    assert pack([], [], budget_tokens=16, budget_tiles=1) == []


def test_a_window_takes_milliseconds_and_is_well_filled() -> None:
    tokens, tiles = sizes(4096)
    start = time.process_time()
    rows = pack(tokens, tiles, budget_tokens=16384, budget_tiles=40)
    assert time.process_time() - start < 1.0  # some 0.05 s where nothing else runs
    assert tokens.sum() / (len(rows) * 16384) > 0.99


def test_rows_of_a_window_are_as_mixed_as_its_records() -> None:
    """Text alone and small pictures do not gather at its end."""
    tokens, tiles = sizes(4096)
    rows = pack(tokens, tiles, budget_tokens=8192, budget_tiles=16)
    counts = np.array([len(row) for row in rows])
    quarters = [part.mean() for part in np.array_split(counts, 4)]
    assert max(quarters) - min(quarters) < 0.25 * np.mean(quarters)


# ------------------------------------------------------------------------------------------------------------ the order


def order(count: int = 300, **changes: Any) -> PackedOrder:
    tokens, tiles = sizes(count)
    fixed = {"counts": (count,), "weights": (1.0,), "samples": 32, "seed": 5, "shuffle": True}
    packed = {"tokens": tokens, "tiles": tiles, "budget": (8192, 16), "packing": Packing("best_fit", 64)}
    return PackedOrder(**{**fixed, **packed, **changes})


def test_rows_and_steps_of_every_epoch_are_known_before_the_first() -> None:
    one = order()
    assert one.slots == round(32 * one.rows(0) / 300)
    assert one.steps(3) == sum(-(-one.rows(epoch) // one.slots) for epoch in range(3))
    assert one.steps(2) <= one.steps(2.5) <= one.steps(3)
    seen = 0
    for epoch in range(3):
        delivered: Counter[int] = Counter()
        for step in range(one.steps(epoch), one.steps(epoch + 1)):
            assert one.seen(step) == seen
            places = [place for slot in range(one.slots) for place in one.at(step, slot)]
            delivered.update(place.record for place in places)
            seen += len(places)
        assert delivered == dict.fromkeys(range(300), 1)
    assert one.seen(one.steps(3)) == 900 and one.at(0, one.slots) == ()
    rows = [[place.record for place in one.at(step, 0)] for step in (0, one.steps(1))]
    assert rows[0] != rows[1]  # each epoch is packed anew


def test_an_order_is_the_same_elsewhere_and_wherever_it_is_entered() -> None:
    here = order()
    everything = [here.at(step, slot) for step in range(here.steps(2)) for slot in range(here.slots)]
    there = pickle.loads(pickle.dumps(here))
    late = order()
    last = here.steps(2) - 1
    assert [late.at(last, slot) for slot in range(here.slots)] == everything[-here.slots :]
    assert [there.at(step, slot) for step in range(there.steps(2)) for slot in range(there.slots)] == everything
    assert order(seed=6).at(0, 0) != here.at(0, 0)


def test_what_cannot_be_used_takes_no_room_and_is_still_delivered() -> None:
    tokens, tiles = sizes(50)
    tokens[3:5], tiles[3:5] = 0, 0
    one = order(50, tokens=tokens, tiles=tiles)
    places = [
        place for slot in range(one.slots * one.steps(1)) for place in one.at(slot // one.slots, slot % one.slots)
    ]
    rooms = {place.record: place.room for place in places}
    assert len(places) == 50 and rooms[3] == rooms[4] == (0, 0) and rooms[5] == (tokens[5], tiles[5])


# ----------------------------------------------------------------------------------------------------------- the loader

PACKED = {"packing": Packing("best_fit", 8), "samples": 6, "lengths": (8, 16), "tiles": (1, 4), "epochs": 2}


@pytest.fixture
def load(tokenizer: Any) -> Callable[..., Loader]:
    def make(source: Any, **settings: Any) -> Loader:
        fixed = {"template": "plain", "images": ImageSettings(8, 2), "seed": 3}
        return Loader(source, tokenizer=tokenizer, **{**fixed, **PACKED, **settings})

    return make


@pytest.fixture
def mixed(make_set: MakeSet) -> Path:
    """Records of one image, of text alone and of two images."""
    return make_set(23, images=lambda i: (1, 0, 2)[i % 3], words=lambda i: 1 + i % 5)


def unpacked(arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The samples of a batch, each as it would be in a row of its own."""
    rows = {name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()}
    places = rows["visual_inverse"].shape[1]
    samples = []
    for row in range(len(rows["tokens"])):
        for segment in range(1, rows["segment_ids"][row].max() + 1):
            at = np.flatnonzero(rows["segment_ids"][row] == segment)
            assert (np.diff(at) == 1).all() and rows["positions"][row][at].tolist() == list(range(len(at)))
            assert rows["labels"][row][at[-1]] == -100
            index = rows["visual_index"][row][at]
            shown = np.flatnonzero((index >= 0) & (index < places))
            assert (rows["visual_inverse"][row][index[shown]] == at[shown]).all()
            tiles = list(dict.fromkeys((index[shown] // 2).tolist()))
            samples.append(
                {
                    "tokens": rows["tokens"][row][at].tolist(),
                    "labels": rows["labels"][row][at].tolist(),
                    "colours": [int(rows["tiles"][row][tile].max()) for tile in tiles],
                    "images": len({int(rows["tile_image"][row][tile]) for tile in tiles}),
                    "shown": shown.tolist(),
                }
            )
        assert (rows["visual_inverse"][row] >= 0).sum() == (rows["visual_index"][row] >= 0).sum()
    return samples


def test_a_packed_epoch_holds_exactly_the_samples_of_a_padded_one(mixed: Path, load: Any) -> None:
    padded, packed = load(mixed, packing=None), load(mixed)
    assert packed.steps < padded.steps or packed.order.slots < padded.order.slots
    key = functools.partial(json.dumps, sort_keys=True)
    batches = list(packed)
    assert len(batches) == packed.steps and {batch.bucket for batch in batches} == {(16, 4)}
    first = packed.order.steps(1)
    expected = Counter(key(one) for batch in load(mixed, packing=None, epochs=1) for one in unpacked(batch.arrays))
    for epoch in (batches[:first], batches[first:]):
        assert Counter(key(one) for batch in epoch for one in unpacked(batch.arrays)) == expected
        assert sorted(sample.index for batch in epoch for sample in batch.delivered) == list(range(23))
    for batch in batches:
        assert batch.samples == len(unpacked(batch.arrays)) == len(batch.delivered)
        assert batch.real_tokens == (batch.arrays["segment_ids"] > 0).sum()
    assert sum(b.real_tokens for b in batches) / sum(b.tokens for b in batches) > 0.6
    assert packed.notes and "rows a step, for 6 samples" in packed.notes[0]


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_rows_are_the_same_on_any_number_of_hosts_and_after_a_kill(
    mixed: Path, load: Any, hosts: int, tmp_path: Path
) -> None:
    settings = {"shards": 4, "index_cache": tmp_path / "cache", "image_placement": "random"}
    alone = list(load(mixed, **settings))
    for start in (0, len(alone) // 2, len(alone) - 1):
        found = list(joined(simulate(functools.partial(load, mixed, start_step=start, **settings), hosts)))
        assert [step for step, _ in found] == list(range(start, len(alone)))
        for (_, arrays), batch in zip(found, alone[start:], strict=True):
            assert all(np.array_equal(arrays[name], batch.arrays[name]) for name in arrays)
    if hosts == 2:
        resumed = list(load(mixed, start_step=3, workers=1, **settings))
        assert len(resumed) == len(alone) - 3 and all(map(same, resumed, alone[3:]))


def test_what_fails_at_load_leaves_its_place_empty_and_is_counted(mixed: Path, load: Any, tmp_path: Path) -> None:
    """Broken since it was measured, grown since, and bad all along: nobody's neighbour is touched."""
    settings = {"shuffle": False, "epochs": 1, "max_bad_fraction": 1.0, "bad_records": tmp_path / "run"}
    (mixed.parent / "6-0.png").unlink()
    loader = load(mixed, **settings)
    before = {batch.step: unpacked(batch.arrays) for batch in loader}
    broken = mixed.parent / "3-0.png"
    broken.write_bytes(broken.read_bytes()[:45])
    tall = {"images": ImageSettings(8, 2, several="pad", merge="flat")}
    grown = Index(*(np.array(getattr(loader.index, name)) for name in ("tokens", "tiles", "trained", "least", "kinds")))
    grown.tokens[2] -= 1
    batches = list(load(mixed, index=grown, **settings, **tall))
    wrong = {sample.index: sample.kind for batch in batches for sample in batch.delivered if sample.kind}
    assert wrong == {6: "missing_image", 3: "broken_image", 2: "changed"}
    assert {line["id"]: line["kind"] for line in lines(tmp_path / "run")} == {f"set-{i}": k for i, k in wrong.items()}
    assert sum(batch.samples for batch in batches) == 20 == sum(map(len, before.values())) - 2
    assert sorted(sample.index for batch in batches for sample in batch.delivered) == list(range(23))
    key = functools.partial(json.dumps, sort_keys=True)
    left = Counter(key(one) for batch in batches for one in unpacked(batch.arrays))
    assert not left - Counter(key(one) for samples in before.values() for one in samples)


def test_a_set_with_too_many_bad_records_is_told_before_the_first_step(mixed: Path, load: Any) -> None:
    for i in (0, 3, 6):
        (mixed.parent / f"{i}-0.png").unlink()
    with pytest.raises(UsageError, match=r"3 of 23 records cannot be used.*3 missing_image"):
        load(mixed)
    with pytest.raises(UsageError, match=r"23 records, but 22 were measured"):
        load(mixed, index=Index(*np.ones((5, 22), np.int32)))


def test_mixtures_are_packed_together(make_set: MakeSet, load: Any) -> None:
    sources = [SourceSpec(str(make_set(8, "a")), weight=0.5), SourceSpec(str(make_set(5, "b")), weight=2.0)]
    batches = list(load(sources, epochs=1))
    delivered = Counter(sample.id for batch in batches for sample in batch.delivered)
    assert sorted(delivered.values()) == [1] * 4 + [2] * 5
    assert any(len({sample.id[0] for sample in batch.delivered}) == 2 for batch in batches)


HOSTS = """
import hashlib, json, sys
import jax
from transformers import AutoTokenizer
from vlm_jax.data import ImageSettings
from vlm_jax.data.loader import Loader
from vlm_jax.data.packing import Packing

file, tokenizer, processes, address, process = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, int(processes), int(process))
loader = Loader(file, tokenizer=AutoTokenizer.from_pretrained(tokenizer), template="plain", images=ImageSettings(8, 2),
                samples=6, lengths=(16,), tiles=(4,), seed=3, packing=Packing("best_fit", 8), shards=4)
rows = loader.rows // loader.process_count
parts = [[b"".join(a[:, row].tobytes() for a in batch.arrays.values()) for row in range(rows)] for batch in loader]
print(json.dumps([loader.steps, [[hashlib.sha256(part).hexdigest() for part in batch] for batch in parts]]))
"""


def test_one_two_and_four_real_processes_see_the_same_rows(
    mixed: Path, load: Any, tokenizer: Any, tmp_path: Path, run_processes: Callable[..., list[str]]
) -> None:
    """Each process measures its share of the records; the processes exchange them through their devices."""

    def row_digests(batch: Any, rows: int) -> list[str]:
        parts = [b"".join(a[:, row].tobytes() for a in batch.arrays.values()) for row in range(rows)]
        return [hashlib.sha256(part).hexdigest() for part in parts]

    alone = load(mixed, shards=4, epochs=1)
    expected = [row_digests(batch, alone.rows) for batch in alone]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for processes in (2, 4):
        printed = run_processes(HOSTS, str(mixed), str(tmp_path / "tokenizer"), str(processes), count=processes)
        found = [json.loads(out.splitlines()[-1]) for out in printed]
        assert {steps for steps, _ in found} == {alone.steps}
        together = [list(itertools.chain(*parts)) for parts in zip(*(batches for _, batches in found), strict=True)]
        assert together == expected


def test_settings_that_do_not_fit_say_so() -> None:
    for settings, says in [
        ({"fit": "bestfit"}, r"config.packing.fit is 'bestfit' \(did you mean 'best_fit'\?\)"),
        ({"fit": "best_fit", "window": 0}, "config.packing.window is 0"),
        ({"fit": "best_fit", "window": 1.5}, r"config.packing.window is 1\.5"),
    ]:
        with pytest.raises(UsageError, match=says):
            Packing(**settings)


def test_a_photo_in_a_packed_row_is_cut_like_one_alone(make_set: MakeSet, load: Any) -> None:
    """Anyres with newlines: they are the batch's last place in a packed row too."""
    anyres = ImageSettings(8, 4, "anyres", "spatial_unpad", ((16, 8), (8, 16), (16, 16)), several="pad")
    file = make_set(4, images=lambda i: [1, 1, 0, 2][i])
    for name, size in {"0-0": (300, 150), "1-0": (30, 60)}.items():
        Image.new("RGB", size, (10, 20, 30)).save(file.parent / f"{name}.png")
    loader = load(file, images=anyres, samples=4, lengths=(120,), tiles=(12,), epochs=1, shuffle=False)
    (batch,) = loader
    index, inverse = batch.arrays["visual_index"][0], batch.arrays["visual_inverse"][0]
    newline = 12 * 4
    assert (index == newline).sum() == 2 + 4 + 2 and batch.arrays["tiles"].shape[2] == 12
    shown = np.argwhere((index >= 0) & (index != newline))
    assert len(shown) == 12 + 12 + 8
    assert all(inverse[row, index[row, at]] == at for row, at in shown)
    assert batch.arrays["tile_image"][0].max() == 3
