"""What `show` prints is what training makes: checked against the labels of the loader's own batches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import show
from vlm_jax.data.rendering import printable, token_texts
from vlm_jax.errors import UsageError


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    show.main(list(words))
    return capsys.readouterr().out


def test_the_quickstart_shows_its_trained_tokens(
    capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path
) -> None:
    config = f"--config={repository / 'configs' / 'quickstart.py'}"
    out = run(capsys, config, "--samples=3", "--first=5", f"--output={tmp_path}", "--html")
    rows = out.split("\nrow ")
    assert len(rows) == 3 and rows[0].startswith("row 5 (step 0, slot 5)")
    for row in rows:
        assert "<image 1: 4 features, 1 tile>" in row
        trained = re.findall(r"\[\[(.*?)\]\]", row, re.DOTALL)
        assert trained and all(text.strip().endswith("</s>") for text in trained)
        assert "USER" in row and "USER" not in "".join(trained)
    pictures = sorted(tmp_path.glob("row-*.png"))
    assert [file.name for file in pictures] == [f"row-00000{i}.png" for i in (5, 6, 7)]
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "<script" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page), "the page reaches out"


def test_anyres_tiles_lie_where_they_are_in_the_image(
    capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path
) -> None:
    """A wide image, red on the left and blue on the right, on a canvas of 3 x 1 tiles; a bad record says why; a record
    cannot send a terminal commands."""
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20, 0] = pixels[:, 40:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    turns = [{"from": "human", "value": "<image>\nWhat \x1b[2J?"}, {"from": "gpt", "value": "4"}]
    records = [
        {"id": "wide", "image": "wide.png", "conversations": turns},
        {"id": "gone", "image": "gone.png", "conversations": turns},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    config = f"--config={repository / 'configs' / 'llava16_mistral.py'}:tiny"
    data = f"--config.data.train={tmp_path / 'data.json'}"
    out = run(capsys, config, data, f"--output={tmp_path / 'out'}", "--samples=2", "--config.steps=1")
    assert "record 'gone'" in out and "missing_image: image 'gone.png' is not in" in out
    assert "60 x 20 pixels" not in out and re.search(r"<image 1: \d+ features, 4 tiles>", out)
    assert "\x1b" not in out
    (file,) = (tmp_path / "out").glob("row-*.png")
    sheet = np.asarray(Image.open(file)).astype(int)
    red = np.argwhere((sheet == (255, 0, 0)).all(-1))
    blue = np.argwhere((sheet == (0, 0, 255)).all(-1))
    orange = np.argwhere((sheet == (0xD9, 0x73, 0x0D)).all(-1))
    assert len(red) > 1000 and len(blue) > 1000
    grid = orange[:, 1].max()  # the whole image stands left of its parts
    assert red[red[:, 1] > grid][:, 1].max() < blue[blue[:, 1] > grid][:, 1].min()


def test_a_packed_row_shows_all_of_its_records(
    capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["1", "22", "333"]
    records = [
        {"id": f"r{n}", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]}
        for n, answer in enumerate(answers)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    monkeypatch.setattr("vlm_jax.inputs.cache_folder", lambda: tmp_path / "cache")
    config = f"--config={repository / 'configs' / 'llava16_mistral.py'}:tiny"
    changes = ["--config.packing.fit=best_fit", f"--config.data.train={tmp_path / 'data.json'}"]
    out = run(capsys, config, *changes, f"--output={tmp_path / 'out'}", "--samples=1")
    assert "3 records" in out
    for n in range(3):
        part = out.partition(f"record 'r{n}'")[2].partition("\nrecord '")[0]
        assert part.count("[[") == 1, part
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_record_whose_end_is_cut_off_shows_what_is_left(
    capsys: pytest.CaptureFixture[str], repository: Path, tmp_path: Path
) -> None:
    """The tiles of the second image stay, its features have no place; the answer ends before its end."""
    for name in ("one", "two"):
        Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / f"{name}.png")
    turns = ["<image>\nWhat?", "1 and 2 and 3 and 4 " * 3, "<image>\nWhat?", "5"]
    record = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    records = [{"id": "long", "image": ["one.png", "two.png"], "conversations": record}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    config = f"--config={repository / 'configs' / 'llava16_mistral.py'}:tiny"
    words = [config, f"--config.data.train={tmp_path / 'data.json'}", f"--output={tmp_path / 'out'}", "--samples=1"]
    words.append("--config.buckets.lengths=30")
    out = run(capsys, *words, "--config.data.truncate=true", "--html")
    assert "30 of 30 tokens" in out and "30 tokens, " in out and "the first 30 of its" in out
    assert "<image 1: 5 features, 1 tile>" in out and "<image 2" not in out and "2 tiles" in out
    assert "</s>" not in out and out.count("[[") == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert "the first 30 of its" in page and page.count("data:image/png;base64,") == 1
    refused = run(capsys, *words, "--config.data.truncate=false")
    assert "too_long: it has" in refused and "<image 1" not in refused


def test_the_texts_of_tokens_add_up_to_the_text(mistral) -> None:
    tokenizer = mistral(True)
    ids = tokenizer("naïve café → 漢字 🦜 done", add_special_tokens=False).input_ids
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids) and "" in texts
    assert "\ufffd" not in "".join(texts)


def test_control_characters_are_spelled_out() -> None:
    assert printable("a\x1b[31m\nb\x07é漢") == "a\\x1b[31m\nb\\x07é漢"


def test_a_wrong_word_names_the_nearest(repository: Path) -> None:
    config = f"--config={repository / 'configs' / 'quickstart.py'}"
    with pytest.raises(UsageError, match="did you mean 'finetune'"):
        show.main([config, "--stage=fintune"])
    with pytest.raises(UsageError, match="--samples is 0"):
        show.main([config, "--samples=0"])
