"""Batches: every sample once, whatever the hosts, workers and restarts; and what happens to bad records."""

from __future__ import annotations

import functools
import json
import multiprocessing
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import ImageSettings, SourceSpec
from vlm_jax.data.loader import HostBatch, Loader, in_background
from vlm_jax.errors import UsageError

MakeSet = Callable[..., Path]
PATCHES = 2


@pytest.fixture
def load(tokenizer: Any) -> Callable[..., Loader]:
    def make(source: Any, **settings: Any) -> Loader:
        fixed = {"template": "plain", "images": ImageSettings(8, PATCHES)}
        return Loader(source, tokenizer=tokenizer, **(fixed | {"samples": 4, "lengths": (16,), "seed": 3} | settings))

    return make


def simulate(make: Callable[..., Loader], hosts: int) -> list[list[HostBatch]]:
    """Runs the loaders of several hosts side by side, with a gather between threads. A host's error ends all."""
    barrier = threading.Barrier(hosts)
    box: list[Any] = [None] * hosts
    results: list[Any] = [None] * hosts

    def agree(host: int) -> Callable[[np.ndarray], np.ndarray]:
        def gather(numbers: np.ndarray) -> np.ndarray:
            box[host] = numbers
            barrier.wait()
            gathered = np.stack(box)
            barrier.wait()
            return gathered

        return gather

    def run(host: int) -> None:
        batches: list[HostBatch] = []
        try:
            for batch in make(process_index=host, process_count=hosts, agree=agree(host)):
                batches.append(batch)
            results[host] = batches
        except UsageError as error:
            results[host] = (len(batches), str(error))

    threads = [threading.Thread(target=run, args=(host,)) for host in range(hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def joined(hosts: list[list[HostBatch]]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The global batches."""
    for parts in zip(*hosts, strict=True):
        assert len({(part.step, part.bucket, part.samples, part.tokens, part.real_tokens) for part in parts}) == 1
        arrays = {name: np.concatenate([part.arrays[name] for part in parts], 1) for name in parts[0].arrays}
        yield parts[0].step, arrays


def same(a: HostBatch, b: HostBatch) -> bool:
    return (a.step, a.bucket, a.delivered) == (b.step, b.bucket, b.delivered) and all(
        np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays
    )


def test_each_sample_once_per_epoch_with_threads_and_with_workers(make_set: MakeSet, load: Any) -> None:
    file = make_set(11)
    threads = load(file, epochs=2)
    assert threads.num_samples == 11 and threads.steps == 6
    batches = list(threads)
    assert [batch.step for batch in batches] == list(range(6))
    for epoch in (batches[:3], batches[3:]):
        delivered = sorted(sample.index for batch in epoch for sample in batch.delivered)
        assert delivered == list(range(11))
        assert [batch.samples for batch in epoch] == [4, 4, 3]
        assert epoch[-1].arrays["segment_ids"][0, -1].max() == 0  # the empty slot is a row of padding
    with_workers = list(load(file, epochs=2, workers=2))
    assert len(with_workers) == 6 and all(map(same, batches, with_workers))
    assert not multiprocessing.active_children()


def test_a_row_is_what_was_said(make_set: MakeSet, load: Any, tokenizer: Any) -> None:
    batch = next(iter(load(make_set(5), shuffle=False, samples=5)))
    rows = {name: array[0] for name, array in batch.arrays.items()}
    assert batch.samples == 5 and batch.tokens == 5 * 16 and batch.real_tokens == 5 * (1 + PATCHES + 2)
    for i in range(5):
        assert rows["tokens"][i].tolist()[:5] == [1, 0, 0, *tokenizer.convert_tokens_to_ids([str(i), "\n"])]
        assert rows["labels"][i].tolist()[:5] == [-100, -100, *rows["tokens"][i][3:5].tolist(), -100]
        assert rows["visual_index"][i].tolist()[:5] == [-1, 0, 1, -1, -1]
        assert rows["visual_inverse"][i].tolist() == [1, 2]
        assert (rows["tiles"][i] == 10 * i).all()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_resuming_at_any_step_on_any_number_of_hosts_gives_the_same_batches(
    make_set: MakeSet, load: Any, hosts: int
) -> None:
    file = make_set(13, images=lambda i: i % 3)
    settings = {"samples": 7, "micro_batches": 2, "rows": 4, "epochs": 2, "lengths": (5, 7), "tiles": (1, 2)}
    expected = [(batch.step, batch.arrays) for batch in load(file, **settings)]
    assert len(expected) == 4
    for start in range(4):
        found = list(joined(simulate(functools.partial(load, file, start_step=start, **settings), hosts)))
        assert [step for step, _ in found] == list(range(start, 4))
        for (_, arrays), (_, wanted) in zip(found, expected[start:], strict=True):
            assert all(np.array_equal(arrays[name], wanted[name]) for name in wanted)


def test_slots_fill_the_micro_batches_in_order(make_set: MakeSet, load: Any) -> None:
    file = make_set(6)
    settings = {"samples": 5, "micro_batches": 2, "rows": 4, "shuffle": False, "steps": 1}
    (batch,) = load(file, **settings)
    rows = batch.arrays["tiles"][..., 0, 0, 0].reshape(2, 4)
    assert rows.tolist() == [[0, 10, 20, 30], [40, 0, 0, 0]]
    assert batch.arrays["segment_ids"].max(-1).tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    halves = simulate(lambda **k: load(file, **settings, **k), 2)
    assert [half[0].arrays["tokens"].shape for half in halves] == [(2, 2, 16)] * 2
    assert [[sample.slot for sample in half[0].delivered] for half in halves] == [[0, 1, 4], [2, 3]]


def test_the_bucket_is_the_smallest_that_holds_all_hosts_rows(make_set: MakeSet, load: Any) -> None:
    # Records of 0, 1 and 3 images; the long one is the last of its batch, so it is the second host's.
    file = make_set(6, images=lambda i: {3: 1, 5: 3}.get(i, 0), words=lambda i: 1)
    settings = {"samples": 2, "shuffle": False, "lengths": (16, 3, 5), "tiles": (4, 1)}
    assert [batch.bucket for batch in load(file, **settings)] == [(3, 1), (5, 1), (16, 4)]
    hosts = simulate(lambda **k: load(file, **settings, **k), 2)
    assert [[batch.bucket for batch in host] for host in hosts] == [[(3, 1), (5, 1), (16, 4)]] * 2


ANYRES = ImageSettings(8, 4, "anyres", "spatial_unpad", ((16, 8), (8, 16), (16, 16)), several="pad")


def test_images_of_wildly_different_sizes_share_a_batch(make_set: MakeSet, load: Any) -> None:
    """A wide one, a high one, text alone, two of one record (which are padded), and a large one."""
    file = make_set(5, images=lambda i: [1, 1, 0, 2, 1][i], words=lambda i: 1)
    for name, size in {"0-0": (300, 150), "1-0": (30, 60), "3-0": (300, 2), "3-1": (1, 1), "4-0": (400, 300)}.items():
        Image.new("RGB", size, (10, 20, 30)).save(file.parent / f"{name}.png")
    settings = {"images": ANYRES, "shuffle": False, "samples": 5, "lengths": (16, 32), "tiles": (1, 5)}
    (batch,) = load(file, **settings, template="bare")
    assert batch.bucket == (32, 5) and batch.samples == 5
    index = batch.arrays["visual_index"][0]
    assert (index == 5 * 4).sum(1).tolist() == [2, 4, 0, 2, 4]  # newlines
    assert (index >= 0).sum(1).tolist() == [4 + 2 * 5, 4 + 4 * 3, 0, 2 * 5, 4 + 4 * 5]
    assert (batch.arrays["visual_inverse"][0] >= 0).sum(1).tolist() == [12, 12, 0, 8, 20]
    with pytest.raises(UsageError, match=r"add 5 to buckets\.tiles"):
        load(file, **{**settings, "tiles": (1, 4)})


def test_a_sample_that_is_too_long_is_not_decoded(make_set: MakeSet, load: Any) -> None:
    file = make_set(2)
    image = file.parent / "1-0.png"
    Image.new("RGB", (400, 400)).save(image)
    image.write_bytes(image.read_bytes()[:60])  # the header is whole, the pixels are not
    settings = {"images": ANYRES, "shuffle": False, "samples": 2, "tiles": (5,), "max_bad_fraction": 1.0}
    for length, kind in (26, "too_long"), (64, "broken_image"):
        (batch,) = load(file, **settings, lengths=(length,))
        assert [sample.kind for sample in batch.delivered] == ["", kind]


def test_a_mixture_names_its_sources(make_set: MakeSet, load: Any) -> None:
    sources = [SourceSpec(str(make_set(4, "a")), weight=0.5), SourceSpec(str(make_set(3, "b")), weight=2.0)]
    loader = load(sources)
    assert loader.num_samples == 8
    delivered = Counter(sample.id for batch in loader for sample in batch.delivered)
    assert sorted(delivered.values()) == [1, 1, 2, 2, 2] and all(delivered[f"b-{i}"] == 2 for i in range(3))


# ----------------------------------------------------------------------------------------------------- bad records

FAULTS = {  # of record i: what is done to it
    1: "missing_image",
    2: "broken_image",
    3: "unsafe_path",
    4: "image_too_large",
    5: "malformed",
    6: "no_trainable_token",
    7: "too_long",
}


@pytest.fixture
def faulty(make_set: MakeSet) -> Path:
    """Twelve records, seven of them bad, each in its own way."""
    file = make_set(12)
    records = json.loads(file.read_text())
    records[1]["image"] = ["none.png"]
    (file.parent / "2-0.png").write_bytes((file.parent / "2-0.png").read_bytes()[:45])
    records[3]["image"] = ["../set.png"]
    Image.new("1", (8000, 8000)).save(file.parent / "4-0.png")
    records[5]["conversations"][0]["from"] = "humna"
    del records[6]["conversations"][1]
    records[6]["conversations"].append({"from": "gpt", "value": ""})
    records[7]["conversations"][1]["value"] = "Yes " * 50
    file.write_text(json.dumps(records))
    return file


def lines(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("bad_records-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_each_kind_of_fault_is_counted_and_listed_and_the_others_train(faulty: Path, load: Any, tmp_path: Path) -> None:
    log = tmp_path / "run"
    batches = list(load(faulty, bad_records=log, max_bad_fraction=1.0, shuffle=False, template="bare"))
    listed = {int(line["id"].removeprefix("set-")): line for line in lines(log)}
    assert {i: line["kind"] for i, line in listed.items()} == FAULTS
    assert all(line["step"] == i // 4 and line["source"] == str(faulty) for i, line in listed.items())
    assert all(line["message"] for line in listed.values())
    assert {kind: n for kind, n in batches[-1].bad.items() if n} == dict.fromkeys(FAULTS.values(), 1)
    assert [batch.samples for batch in batches] == [1, 0, 4]
    for batch in batches:
        good = {sample.slot for sample in batch.delivered if not sample.kind}
        for slot in range(4):
            assert (batch.arrays["segment_ids"][0, slot].max() > 0) == (slot in good)
            assert (batch.arrays["labels"][0, slot].max() >= 0) == (slot in good)
            assert batch.arrays["tiles"][0, slot].max() == (10 * (4 * batch.step + slot) if slot in good else 0)


@pytest.fixture(autouse=True)
def _bare_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that trains nothing but the answer, so that an empty answer trains nothing."""
    from vlm_jax.data.templates import TEMPLATES, Template, Trained

    bare = Template(user=("{content}",), assistant=(Trained("{content}"),), prompt="")
    monkeypatch.setitem(TEMPLATES, "bare", bare)


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_run_stops_at_the_same_step_everywhere_when_too_many_are_bad(
    make_set: MakeSet, load: Any, tmp_path: Path, hosts: int
) -> None:
    file = make_set(20)
    for i in (4, 9, 10):
        (file.parent / f"{i}-0.png").unlink()
    settings = {"shuffle": False, "max_bad_fraction": 0.1, "bad_records": tmp_path / "run"}
    results = simulate(lambda **k: load(file, **settings, **k), hosts)
    for step, message in results:
        assert step == 2  # 3 bad ones at the third step: more than a tenth of the 20
        assert message.startswith("3 of 12 records") and "3 missing_image (check the images folder" in message
        assert "\n" not in message and "bad_records-*.jsonl" in message
    assert sum("'set-4'" in message and "4-0.png" in message for _, message in results) == 1
    assert sorted(line["id"] for line in lines(tmp_path / "run")) == ["set-10", "set-4", "set-9"]


def test_a_restart_lists_nothing_twice_and_remembers_the_counts(faulty: Path, load: Any, tmp_path: Path) -> None:
    log = tmp_path / "run"
    settings = {"bad_records": log, "max_bad_fraction": 1.0, "shuffle": False, "template": "bare", "epochs": 2}
    batches = iter(load(faulty, **settings))
    for _ in range(3):
        next(batches)
    batches.close()
    assert len(lines(log)) == 7
    with open(log / "bad_records-0.jsonl", "a") as file:
        file.write('{"step": 9')  # killed while writing
    resumed = list(load(faulty, start_step=1, **settings))
    assert resumed[0].bad["missing_image"] == 1 and sum(resumed[0].bad.values()) == 7
    assert sum(resumed[-1].bad.values()) == 14
    assert Counter((line["step"], line["id"]) for line in lines(log)).most_common(1)[0][1] == 1
    # Two hosts after one, and one after two: the files are divided among those there are.
    simulate(lambda **k: load(faulty, start_step=2, **settings, **k), 2)
    assert len(lines(log)) == 14
    assert sum(next(iter(load(faulty, start_step=6, steps=7, **{**settings, "epochs": None}))).bad.values()) == 17
    assert len(lines(log)) == 17


@pytest.mark.parametrize("compat", [False, True])
def test_what_llava_would_drop_is_counted_and_listed_and_stops_no_run(
    make_set: MakeSet, load: Any, tmp_path: Path, compat: bool
) -> None:
    file, log = make_set(6), tmp_path / "run"
    records = json.loads(file.read_text())
    records[1]["conversations"][1]["value"] = "Yes </s> No"
    records[2]["conversations"].insert(0, {"from": "gpt", "value": "cat"})
    file.write_text(json.dumps(records))
    settings = {
        "bad_records": log,
        "max_bad_fraction": 0.0,
        "shuffle": False,
        "template": "vicuna_v1",
        "lengths": (64,),
    }
    batches = list(load(file, compat_drop_mismatch=compat, **settings))
    trained = [batch.arrays["labels"][0].max(-1) >= 0 for batch in batches]
    assert np.concatenate(trained).tolist() == [True, not compat, *[True] * 4, False, False]
    expected = {"set-2": "assistant_first"} | ({"set-1": "mismatch"} if compat else {})
    assert {line["id"]: line["kind"] for line in lines(log)} == expected
    assert {kind: n for kind, n in batches[-1].bad.items() if n} == dict.fromkeys(expected.values(), 1)


def test_random_placement_depends_on_the_step_and_not_on_the_hosts(make_set: MakeSet, load: Any) -> None:
    file = make_set(16)
    settings = {"template": "vicuna_v1", "lengths": (64,), "samples": 8, "epochs": 4, "image_placement": "random"}
    one = [arrays for _, arrays in joined(simulate(lambda **k: load(file, **settings, **k), 1))]
    for hosts in (2, 4):
        several = simulate(lambda **k: load(file, **settings, **k), hosts)
        for (_, arrays), expected in zip(joined(several), one, strict=True):
            assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    (again,) = simulate(lambda **k: load(file, start_step=5, **settings, **k), 1)
    assert np.array_equal(again[0].arrays["visual_index"], one[5]["visual_index"])
    places = np.concatenate([(arrays["visual_index"][0] >= 0).argmax(-1) for arrays in one])
    assert 0.25 < (places == places.min()).mean() < 0.75  # before the question as often as behind it


def test_nothing_is_listed_before_it_is_delivered(faulty: Path, load: Any, tmp_path: Path) -> None:
    log = tmp_path / "run"
    batches = iter(load(faulty, bad_records=log, max_bad_fraction=1.0, shuffle=False, template="bare"))
    next(batches)
    assert {line["step"] for line in lines(log)} == {0}
    batches.close()


# ------------------------------------------------------------------------------------------------------ the rest


def test_closing_stops_threads_and_workers(make_set: MakeSet, load: Any) -> None:
    before = threading.active_count()
    batches = iter(load(make_set(8), workers=1, epochs=1000))
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if thread.name == "vlm_jax-data"]
    assert threading.active_count() <= before + 1  # grain keeps a helper for shared memory


def test_an_error_in_the_background_is_raised_in_front() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise UsageError("broken")

    background = in_background(items(), 2)
    assert next(background) == 1
    with pytest.raises(UsageError, match="broken"):
        next(background)


TWO_PROCESSES = """
import json, sys
import jax
from transformers import AutoTokenizer
from vlm_jax.data import ImageSettings
from vlm_jax.data.loader import Loader

file, tokenizer, address, process = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(process))
loader = Loader(file, tokenizer=AutoTokenizer.from_pretrained(tokenizer), template="plain", images=ImageSettings(8, 2),
                samples=2, lengths=(3, 5, 16), tiles=(1, 4), shuffle=False)
print(json.dumps([[batch.bucket, batch.samples, batch.arrays["tokens"].shape] for batch in loader]))
"""


def test_two_processes_agree_through_their_devices(
    make_set: MakeSet, tokenizer: Any, tmp_path: Path, run_processes: Callable[..., list[str]]
) -> None:
    file = make_set(5, images=lambda i: {3: 1}.get(i, 0))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for out in run_processes(TWO_PROCESSES, str(file), str(tmp_path / "tokenizer")):
        # The image is the second process's, and the last step has one sample, the first's.
        assert json.loads(out.splitlines()[-1]) == [[[b, 1], n, [1, 1, b]] for b, n in ((3, 2), (5, 2), (3, 1))]


def test_settings_that_do_not_fit_say_so(make_set: MakeSet, load: Any) -> None:
    file = make_set(4)
    for settings, says in [
        ({"template": "vicuna"}, "did you mean 'vicuna_v1'"),
        ({"lengths": ()}, "buckets.lengths"),
        ({"tiles": (0, 1)}, "buckets.tiles"),
        ({"rows": 3, "micro_batches": 1}, "cannot hold 4 samples"),
        ({"process_count": 3, "process_index": 0}, "do not divide among 3"),
    ]:
        with pytest.raises(UsageError, match=says):
            load(file, **settings)
    with pytest.raises(UsageError, match=r"data\.workers"):
        next(iter(load(file, workers=-1)))
