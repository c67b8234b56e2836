"""The audit finds what is planted, invents nothing, and mends it without touching the original."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import audit, open_image, open_source
from vlm_jax.data.cleaning import upright
from vlm_jax.data.duplicates import marks, same_picture
from vlm_jax.data.statistics import fill
from vlm_jax.errors import UsageError

SIZES = {(64, 48): 0.5, (48, 64): 0.4, (120, 90): 0.1}


@pytest.fixture(scope="module")
def bench(repository: Path) -> dict[str, Any]:
    """The benchmark's module, whose sets are made for these tests too, only smaller."""
    sys.path.insert(0, str(repository / "benchmarks"))
    try:
        return runpy.run_path(str(repository / "benchmarks" / "audit.py"))
    finally:
        sys.path.remove(str(repository / "benchmarks"))


def digests(folder: Path) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def run(*words: str) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """The error of the command (empty if it ends well), its report and its faults."""
    output = Path(next(word.partition("=")[2] for word in words if word.startswith("--output=")))
    error = ""
    try:
        audit.main([*words, "--workers=0"])
    except UsageError as raised:
        error = str(raised)
    lines = (output / "faults.jsonl").read_text().splitlines()
    return error, json.loads((output / "audit.json").read_text()), [json.loads(line) for line in lines]


def test_all_planted_faults_are_found_and_none_invented_and_fix_mends_them(
    bench: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    train, held_out, planted = bench["make_set"](folder, 160, 40, SIZES)
    before = digests(folder)
    own = [f"--data={train}", f"--eval={held_out}", f"--images={folder / 'photos'}"]
    error, report, faults = run(*own, f"--output={tmp_path / 'report'}", "--fix")
    assert {(line["record"], line["kind"]) for line in faults} == planted
    assert all(line["source"] == str(train) and line["message"] for line in faults)
    counts = Counter(kind for _, kind in planted)
    assert {kind: fault["records"] for kind, fault in report["faults"].items()} == counts and len(counts) == 8
    assert sum(report["malformed"].values()) == counts["malformed"] and len(report["malformed"]) > 2
    # A picture in two files is a note; everything else is bad, and far more than 1 %.
    bad = sum(counts.values()) - counts["duplicate_image"]
    assert report["bad"] == bad and f"{bad} of 160 records are bad" in error
    assert Image.open(tmp_path / "report" / "histograms.png").width > 1000
    assert "exif_rotated" in capsys.readouterr().out

    clean = tmp_path / "report" / "clean"
    assert digests(folder) == before, "the original was touched"
    source = open_source(clean / "train.json", clean / "train_images")
    assert len(source) == 152 - bad + counts["exif_rotated"]
    again = [f"--data={clean / 'train.json'}", f"--images={clean / 'train_images'}"]
    error, report, faults = run(*again, f"--output={tmp_path / 'again'}")
    assert not error and report["bad"] == 0
    assert {line["kind"] for line in faults} == {"duplicate_image"}
    with pytest.raises(UsageError, match="never overwrites"):
        audit.main([*own, f"--output={tmp_path / 'report'}", "--fix"])


def test_a_config_adds_lengths_as_training_counts_them(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same index as packing's; what only a tokenizer or a bucket shows is a fault too."""
    monkeypatch.setattr(audit, "cache_folder", lambda: tmp_path / "cache")
    file = tmp_path / "few.jsonl"
    turns = [{"from": "human", "value": "Which digit is this?"}, {"from": "gpt", "value": "4"}]
    long = [{"from": "human", "value": "Which digit is this? " * 40}, {"from": "gpt", "value": "5"}]
    lines = [{"id": "short", "conversations": turns}, {"id": "long", "conversations": long}]
    file.write_text("\n".join(map(json.dumps, lines)))
    config = f"--config={repository / 'configs' / 'quickstart.py'}:tiny"
    error, report, faults = run(config, f"--data={file}", f"--output={tmp_path / 'report'}")
    assert [(line["id"], line["kind"]) for line in faults] == [("long", "too_long")]
    assert "the largest bucket holds 42 and 1" in faults[0]["message"] and "1 of 2 records are bad" in error
    assert report["tokens"]["max"] > 200 and report["trained"]["max"] <= 3 and report["too_long"]["42"] == 0.5
    half = {"id": "half", "conversations": [*turns, {**turns[0], "value": "Why? " * 40}, {"from": "gpt", "value": "6"}]}
    file.write_text("\n".join(map(json.dumps, [*lines, half])))
    truncate = "--config.data.truncate=true"
    error, cut, faults = run(config, truncate, f"--data={file}", f"--output={tmp_path / 'report'}")
    assert [(line["id"], line["kind"]) for line in faults] == [("long", "no_trainable_token"), ("half", "truncated")]
    assert "1 of 3 records are bad" in error and not cut["faults"]["truncated"]["bad"]
    assert cut["too_long"]["42"] == 0.6667 and cut["tokens"]["max"] > 200, "the lengths are of whole records"
    assert all(one["left_out"] == 0 for one in cut["filling"]) and report["filling"][0]["left_out"] > 0
    with pytest.raises(UsageError, match="did you mean 'align'"):
        audit.main([config, "--stage=alain", f"--output={tmp_path / 'report'}"])


def test_a_picture_stored_again_is_the_same_and_a_changed_letter_is_not(bench: dict[str, Any], tmp_path: Path) -> None:
    pixels = bench["clouds"](np.random.default_rng(1), 160, 120)
    for name, quality in (("a.jpg", 50), ("a.webp", 75), ("a.png", 0)):
        Image.fromarray(pixels).save(tmp_path / name, quality=quality)
        again = open_image(name, tmp_path)
        assert same_picture(pixels, again), name
        difference = np.frombuffer(marks(pixels), np.uint8).astype(int) - np.frombuffer(marks(again), np.uint8)
        assert abs(difference).max() <= 3, name
    changed = pixels.copy()
    changed[40:48, 60:63] = 255 - changed[40:48, 60:63]  # a stroke of 3 x 8 pixels
    assert not same_picture(pixels, changed)
    assert not same_picture(pixels, np.roll(pixels, 1, axis=1))


def test_a_photo_is_turned_as_it_asks(tmp_path: Path) -> None:
    """Orientation 6: what is stored on the left belongs at the top."""
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.jpg", quality=95, exif=exif)
    pixels = open_image(upright((tmp_path / "a.jpg").read_bytes()))
    assert pixels.shape == (64, 32, 3)
    assert pixels[:12].mean() > 240 and pixels[20:].mean() < 15


def test_the_filling_of_rows_can_be_checked_by_hand() -> None:
    (one,) = fill(np.array([60, 40, 60, 40]), np.array([1, 1, 1, 1]), [100], samples=2, seed=0)
    assert one.packed == {"first_fit": 1.0, "best_fit": 1.0} and one.per_row == 2
    assert one.padded in (200 / 240, 200 / 200)  # batches of 60 and 40, or of equals
    (short,) = fill(np.array([60, 40, 60, 40]), np.array([1, 1, 1, 1]), [50], samples=2, seed=0)
    assert short.left_out == 0.5
    (short,) = fill(np.array([60, 40, 60, 40]), np.array([1, 1, 1, 1]), [50], samples=2, seed=0, truncate=True)
    assert short.left_out == 0.0 and short.packed == {"first_fit": 0.9, "best_fit": 0.9} and short.per_row == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing to audit"),
        (["--data=x.json", "--stage=align"], "belong to --config"),
        (["--data=missing.json"], "cannot be read"),
    ],
)
def test_a_wrong_command_is_one_sentence(words: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        audit.main(words)


def test_fix_points_to_shards_for_what_is_no_json(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    pq.write_table(pa.Table.from_pylist([{"id": "1", "messages": turns}]), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"a\.parquet is none; .* python -m vlm_jax\.data\.prepare"):
        audit.main([f"--data={tmp_path}/a.parquet", f"--output={tmp_path}/report", "--fix"])
    assert not (tmp_path / "report").exists()
