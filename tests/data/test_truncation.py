"""`config.data.truncate`: what is longer than the longest row loses its end, in the row, the index, the plan of rows
and the counts alike; nothing else changes."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import conversation
from tests.data.test_loader import joined, lines, same, simulate
from tests.data.test_packing import unpacked
from vlm_jax.data import BadRecord, ImageSettings, Message, open_source
from vlm_jax.data import Image as Shown
from vlm_jax.data.conversation import begin_with_user
from vlm_jax.data.index import KINDS, build_index
from vlm_jax.data.loader import HostBatch, Loader
from vlm_jax.data.packing import Packing
from vlm_jax.data.reading import FusionEncoder
from vlm_jax.errors import UsageError

CANVASES = ((16, 8), (8, 16), (16, 16))
IMAGES = {
    "flat": ImageSettings(8, 4),
    "anyres": ImageSettings(8, 4, "anyres", "spatial_unpad", CANVASES),
    "interpolated": ImageSettings(8, 4, "anyres", "spatial_unpad", CANVASES, max_tiles=2),
}
UNCUT = 1000  # tokens; no record of these has so many


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """48 records of one to three turns, short or long, with none to three images of all sizes before the questions."""
    draw, records = np.random.default_rng(7), []
    for i in range(48):
        count = int(draw.choice([0, 1, 1, 2, 3]))
        files = [f"{i}-{j}.png" for j in range(count)]
        for file in files:
            Image.new("RGB", tuple(draw.integers(4, 60, 2).tolist()), (i, 1, 2)).save(tmp_path / file)
        said = [" ".join(draw.choice(["cat", "dog", "And"], draw.integers(1, 16))) for _ in range(2 * (1 + i % 3))]
        for question in draw.integers(0, 1 + i % 3, count).tolist():
            said[2 * question] = "<image>" + said[2 * question]
        records.append({"id": str(i), "image": files, "conversations": conversation(*said)})
        if i % 11 == 5:
            records[-1]["conversations"].insert(0, {"from": "gpt", "value": "Yes"})
    file = tmp_path / "some.json"
    file.write_text(json.dumps(records))
    return file


@pytest.fixture
def encoder(tokenizer: Any) -> FusionEncoder:
    return FusionEncoder(tokenizer, "vicuna_v1", IMAGES["anyres"], longest=60, most_tiles=12, truncate=True)


def cut(row: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """The first positions of a row. The target of the last is gone; a feature that stood behind it stands nowhere."""
    kept = {
        name: value if name.startswith(("tile", "visual_inverse")) else value[:length] for name, value in row.items()
    }
    kept["labels"] = np.append(kept["labels"][:-1], -100)
    gone = row["visual_inverse"] >= length
    kept["visual_inverse"] = np.where(gone, -1, row["visual_inverse"])
    if "visual_inverse_weight" in row:
        kept["visual_inverse_weight"] = np.where(gone, 0, row["visual_inverse_weight"])
    return kept


@pytest.mark.parametrize("images", IMAGES)
def test_a_truncated_row_is_the_first_positions_of_the_whole_one(
    some: Path, encoder: FusionEncoder, images: str
) -> None:
    """Cut in a text, within an image and before one, at every length at which something is still trained."""
    source = open_source(some)
    encoder = dataclasses.replace(encoder, images=IMAGES[images], most_tiles=100)
    cuts, hidden = 0, 0
    for number in range(0, len(source), 5):
        record = begin_with_user(source[number])[0]
        whole, note = dataclasses.replace(encoder, longest=UNCUT)(record, source.images)
        assert not note
        least = 2 + int(np.flatnonzero(whole["labels"] >= 0)[0])
        for length in range(least, len(whole["tokens"]), 3):
            row, note = dataclasses.replace(encoder, longest=length)(record, source.images)
            expected = cut(whole, length)
            assert row.keys() == expected.keys()
            for name in row:
                assert row[name].dtype == whole[name].dtype
                np.testing.assert_array_equal(row[name], expected[name], err_msg=f"{name} at {length}")
            lost = (whole["labels"] >= 0).sum() - (row["labels"] >= 0).sum()
            assert f"the first {length} of its {len(whole['tokens'])} tokens" in note and f"; {lost} trained" in note
            cuts += 1
            hidden += (row["visual_inverse"] >= 0).sum() < (whole["visual_inverse"] >= 0).sum()
        with pytest.raises(BadRecord, match=rf"none of the first {least - 1} of its") as error:
            dataclasses.replace(encoder, longest=least - 1)(record, source.images)
        assert error.value.kind == "no_trainable_token"
    assert cuts > 50 and hidden > 5


def test_an_image_may_be_cut_through_and_left_out(make_set: Callable[..., Path], tokenizer: Any) -> None:
    """In an interleaved document images stand behind what is trained: here after 3 tokens, and after 3 + 4 + 1."""
    source = open_source(make_set(1))
    folder = source.images
    record = dataclasses.replace(source[0], images=(source[0].images[0],) * 2)
    record = dataclasses.replace(record, messages=(Message("document", ("cat dog", Shown(0), "cat", Shown(1), "dog")),))
    encoder = FusionEncoder(tokenizer, "vicuna_v1", IMAGES["flat"], longest=5, most_tiles=2, truncate=True)
    row, note = encoder(record, folder)
    assert row["tokens"].tolist()[3:] == [0, 0] and "2 trained ones" not in note
    assert row["visual_index"].tolist() == [-1, -1, -1, 0, 1]
    assert row["visual_inverse"].tolist() == [3, 4, *[-1] * 6] and row["tile_image"].tolist() == [0, 1]
    row, _ = dataclasses.replace(encoder, longest=3)(record, folder)
    assert (row["visual_index"] == -1).all() and (row["visual_inverse"] == -1).all() and len(row["tiles"]) == 2


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("longest", [40, 60, 75, UNCUT])
def test_the_index_agrees_with_the_rows(some: Path, encoder: FusionEncoder, longest: int, truncate: bool) -> None:
    source = open_source(some)
    encoder = dataclasses.replace(encoder, longest=longest, truncate=truncate)
    whole = build_index([source], encoder)
    index = whole.limited(encoder)
    assert whole.tokens.max() > 75, "the index knows no limit"
    found = []
    for number in range(len(source)):
        record, left_out = begin_with_user(source[number])
        try:
            row, note = encoder(record, source.images)
            kind = "truncated" if note else "assistant_first" if left_out else ""
            found.append((len(row["tokens"]), len(row["tiles"]), kind))
        except BadRecord as error:
            found.append((0, 0, error.kind))
    measured = zip(index.tokens.tolist(), index.tiles.tolist(), [KINDS[kind] for kind in index.kinds], strict=True)
    assert list(measured) == found
    kinds = Counter(kind for _, _, kind in found)
    assert {kind: count for kind, count in index.bad.items() if count} == {k: n for k, n in kinds.items() if k}
    assert kinds["too_long"] and kinds["assistant_first"], "too many tiles are never cut off"
    if longest < UNCUT:
        assert (kinds["truncated"] > 3) == truncate
    assert (kinds["no_trainable_token"] > 0) == (truncate and longest < 75)


# ---------------------------------------------------------------------------------------------------------- the loader


@pytest.fixture
def load(tokenizer: Any) -> Callable[..., Loader]:
    def make(source: Any, **settings: Any) -> Loader:
        fixed = {"template": "plain", "images": ImageSettings(8, 2), "lengths": (8, 12), "tiles": (1, 4), "seed": 3}
        run = {"samples": 6, "epochs": 1, "truncate": True, "max_bad_fraction": 0.0}
        return Loader(source, tokenizer=tokenizer, **{**fixed, **run, **settings})

    return make


@pytest.fixture
def captions(make_set: Callable[..., Path]) -> Path:
    """26 captions of none to two images; every third has more than 12 tokens, the others fewer."""
    file = make_set(26, images=lambda i: (1, 0, 2)[i % 3])
    records = json.loads(file.read_text())
    for i, record in enumerate(records):
        words = 14 + i if i % 3 == 1 else 1 + i % 4
        record["conversations"][1]["value"] = " ".join(["cat", "dog", "No"][(i + j) % 3] for j in range(words))
    file.write_text(json.dumps(records))
    return file


LONG = {f"set-{i}": "truncated" for i in range(1, 26, 3)}


def samples(batches: list[HostBatch]) -> Counter[str]:
    return Counter(json.dumps(one, sort_keys=True) for batch in batches for one in unpacked(batch.arrays))


@pytest.mark.parametrize("packing", [None, Packing("best_fit", 9), Packing("first_fit", 9)])
def test_batches_hold_the_first_positions_are_counted_and_stop_no_run(
    captions: Path, load: Any, packing: Packing | None, tmp_path: Path
) -> None:
    """Padded and packed rows hold the samples of a run with longer rows, each cut at 12; also where no bad record is
    allowed."""
    whole = list(load(captions, truncate=False, lengths=(64,)))
    expected: Counter[str] = Counter()
    for text, count in samples(whole).items():
        one = json.loads(text)
        if len(one["tokens"]) > 12:
            one = one | {"tokens": one["tokens"][:12], "labels": [*one["labels"][:11], -100]}
        expected[json.dumps(one, sort_keys=True)] += count
    loader = load(captions, packing=packing, bad_records=tmp_path / "run")
    batches = list(loader)
    assert len(batches) == loader.steps and loader.num_samples == 26
    assert samples(batches) == expected
    assert sum(batch.samples for batch in batches) == 26 == sum(len(batch.delivered) for batch in batches)
    assert all(batch.real_tokens == (batch.arrays["segment_ids"] > 0).sum() for batch in batches)
    assert {sample.id: sample.kind for batch in batches for sample in batch.delivered if sample.kind} == LONG
    assert {kind: count for kind, count in batches[-1].bad.items() if count} == {"truncated": len(LONG)}
    listed = lines(tmp_path / "run")
    assert {line["id"]: line["kind"] for line in listed} == LONG and "trained ones are cut off" in listed[0]["message"]
    with pytest.raises(UsageError, match=rf"{len(LONG) if packing else '[1-9]'} of .* too_long .*data.truncate"):
        list(load(captions, packing=packing, truncate=False))


@pytest.mark.parametrize("packing", [None, Packing("best_fit", 9)])
def test_a_resumed_run_and_other_hosts_cut_alike(
    captions: Path, load: Any, packing: Packing | None, tmp_path: Path
) -> None:
    settings = {"packing": packing, "epochs": 2, "shards": 2, "bad_records": tmp_path / "run"}
    alone = list(load(captions, **settings))
    assert len(lines(tmp_path / "run")) == 2 * len(LONG)
    for start in range(len(alone)):
        resumed = list(load(captions, start_step=start, **settings))
        assert len(resumed) == len(alone) - start and all(map(same, resumed, alone[start:]))
        assert resumed[-1].bad == alone[-1].bad and len(lines(tmp_path / "run")) == 2 * len(LONG)
    hosts = simulate(functools.partial(load, captions, start_step=1, **settings), 2)
    for (_, arrays), batch in zip(joined(hosts), alone[1:], strict=True):
        assert all(np.array_equal(arrays[name], batch.arrays[name]) for name in arrays)


@pytest.mark.parametrize("packing", [None, Packing("best_fit", 9)])
def test_a_sample_that_keeps_no_trained_token_is_bad(captions: Path, load: Any, packing: Packing | None) -> None:
    """Two images and BOS take five positions; the captions of these records are never reached."""
    settings = {"packing": packing, "lengths": (5,), "tiles": (4,)}
    batches = list(load(captions, max_bad_fraction=1.0, **settings))
    kinds = Counter(sample.kind for batch in batches for sample in batch.delivered)
    assert kinds["no_trainable_token"] == 8 and sum(batch.samples for batch in batches) == 18
    assert batches[-1].bad["no_trainable_token"] == 8 and batches[-1].bad["truncated"] == kinds["truncated"] > 8
    with pytest.raises(UsageError, match=r"no_trainable_token \(give each record an answer"):
        list(load(captions, **settings))


def test_a_first_message_of_the_assistant_is_told_too(captions: Path, load: Any) -> None:
    records = json.loads(captions.read_text())
    records[1]["conversations"].insert(0, {"from": "gpt", "value": "cat"})
    captions.write_text(json.dumps(records))
    batches = list(load(captions, shuffle=False))
    (sample,) = [one for batch in batches for one in batch.delivered if one.index == 1]
    assert sample.kind == "truncated" and "are cut off; its first message is the assistant's" in sample.message
