"""The index: sizes of the records before anything is decoded, and when it is made anew."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import BadRecord, ImageSettings, open_source
from vlm_jax.data import index as indexes
from vlm_jax.data.index import KINDS, Index, build_index
from vlm_jax.data.reading import FusionEncoder

ANYRES = ImageSettings(8, 4, "anyres", "spatial_unpad", ((16, 8), (8, 16), (16, 16)), several="pad")


@pytest.fixture
def encoder(tokenizer: Any) -> FusionEncoder:
    return FusionEncoder(tokenizer, "vicuna_v1", ANYRES, longest=200, most_tiles=9)


@pytest.fixture
def some(make_set: Callable[..., Path]) -> Path:
    """Records of text, of one image and of several; three that are bad, one that begins with the assistant."""
    file = make_set(24, images=lambda i: (1, 0, 3)[i % 3], words=lambda i: 1 + i % 7)
    records = json.loads(file.read_text())
    Image.new("RGB", (40, 9)).save(file.parent / "0-0.png")
    (file.parent / "3-0.png").unlink()
    (file.parent / "6-0.png").write_bytes(b"no picture")
    records[7]["conversations"] = []
    records[10]["conversations"].insert(0, {"from": "gpt", "value": "cat"})
    file.write_text(json.dumps(records))
    return file


def test_the_sizes_are_those_of_the_rows(some: Path, encoder: FusionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "CHUNK", 5)
    source = open_source(some)
    index = build_index([source, source], encoder)
    assert len(index) == 48 and (index.tokens[:24] == index.tokens[24:]).all()
    wrong = {i: KINDS[kind] for i, kind in enumerate(index.kinds[:24]) if kind}
    assert wrong == {3: "missing_image", 6: "broken_image", 7: "malformed", 10: "assistant_first"}
    assert np.flatnonzero(~index.usable[:24]).tolist() == [3, 6, 7]
    for i in (0, 1, 2, 4, 23):
        row, _ = encoder(source[i], source.images)
        sizes = len(row["tokens"]), len(row["tiles"]), (row["labels"] >= 0).sum()
        assert (index.tokens[i], index.tiles[i], index.trained[i]) == sizes
    assert index.tiles[:3].tolist() == [3, 0, 3]
    with_workers = build_index([source, source], encoder, workers=1)
    assert with_workers.digest == index.digest and (with_workers.kinds == index.kinds).all()


def test_random_placement_has_room_for_both_forms(some: Path, encoder: FusionEncoder) -> None:

    source = open_source(some)
    drawn = dataclasses.replace(encoder, image_placement="random")
    index = build_index([source], drawn)
    for i in (0, 9):
        longest = max(drawn.measure(source[i], source.images, (seed,)).tokens for seed in range(8))
        assert index.tokens[i] == longest


def test_an_index_is_found_again_until_something_changes(
    some: Path, encoder: FusionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    cache, measured = tmp_path / "cache", []
    sizes = indexes.Measurer._sizes

    def counted(self: Any, number: int) -> Any:
        measured.append(number)
        return sizes(self, number)

    monkeypatch.setattr(indexes.Measurer, "_sizes", counted)

    def build(**changes: Any) -> tuple[Index, int]:
        measured.clear()
        index = build_index([open_source(some)], dataclasses.replace(encoder, **changes), cache=cache)
        return index, len(measured)

    first, all_of_them = build()
    again, bad = build(longest=9, most_tiles=1)
    assert (all_of_them, bad) == (24, 3) and again.digest == first.digest
    # What was bad is looked at again, and may be mended.
    Image.new("RGB", (16, 16)).save(some.parent / "3-0.png")
    mended, bad = build()
    assert bad == 3 and mended.usable[3] and KINDS[mended.kinds[6]] == "broken_image"
    assert build()[1] == 2
    # Everything that the sizes depend on.
    assert build(template="mistral_instruct")[1] == build(image_placement="as_is")[1] == 24
    assert build(images=dataclasses.replace(ANYRES, several=None))[1] == 24
    assert build()[1] == 2
    os.utime(some, (1, 1))
    assert build()[1] == 24
    # A damaged file is made anew.
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert build()[1] == 24
    assert not list(cache.glob("*.tmp"))


def test_hosts_measure_a_share_each_and_agree(some: Path, encoder: FusionEncoder, tmp_path: Path) -> None:
    """Also when one of them has an older index, from before a record was mended."""
    source = open_source(some)
    build_index([source], encoder, cache=tmp_path / "1")
    Image.new("RGB", (16, 16)).save(some.parent / "3-0.png")
    expected = build_index([source], encoder)
    barrier, box, found = threading.Barrier(2), [None, None], [None, None]

    def run(host: int) -> None:
        def agree(numbers: np.ndarray) -> np.ndarray:
            box[host] = numbers
            barrier.wait(30)
            return np.stack(box)

        found[host] = build_index(
            [source], encoder, cache=tmp_path / str(host), process_index=host, process_count=2, agree=agree
        )

    threads = [threading.Thread(target=run, args=(host,)) for host in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index in found:
        assert index.digest == expected.digest and (index.kinds == expected.kinds).all()


def test_measuring_knows_no_limit(some: Path, encoder: FusionEncoder) -> None:

    source = open_source(some)
    small = dataclasses.replace(encoder, longest=10)
    assert small.measure(source[0], source.images).tokens > 10
    with pytest.raises(BadRecord, match="the largest bucket holds 10"):
        small(source[0], source.images)
