"""Files of records and their forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_jax.data import BadRecord, Image, open_source, parse_record
from vlm_jax.errors import UsageError

LLAVA = {
    "id": 7,
    "image": ["a.png", "b.png"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat? <image>"},
        {"from": "gpt", "value": "Käse, 5 €."},
    ],
    "kind": "which",
}
CHAT = {
    "id": "7",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "\nWhat? "},
                {"type": "image_url", "image_url": {"url": "b.png"}},
            ],
        },
        {"role": "assistant", "content": "Käse, 5 €."},
    ],
    "kind": "which",
}


def test_both_forms_give_the_same_record() -> None:
    record = parse_record(LLAVA)
    assert record == parse_record(CHAT)
    assert record.id == "7" and record.images == ("a.png", "b.png") and record.extra == {"kind": "which"}
    assert record.messages[0].content == (Image(0), "\nWhat? ", Image(1))
    unnamed = {**CHAT, "images": ["a.png", "b.png"]}
    unnamed["messages"] = [{"role": "user", "content": LLAVA["conversations"][0]["value"]}, CHAT["messages"][1]]
    assert parse_record(unnamed) == record


@pytest.mark.parametrize(
    "change",
    [
        {"image": "a.png"},  # two placeholders
        {"image": None},
        {"image": ["a.png", "b.png", "c.png"]},
        {"conversations": None},
        {"conversations": []},
        {"conversations": [{"from": "human", "value": 3}]},
        {"conversations": ["Hello"]},
        {"conversations": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
    ],
)
def test_malformed_records_say_so(change: dict[str, Any]) -> None:
    with pytest.raises(BadRecord) as error:
        parse_record(LLAVA | change)
    assert error.value.kind == "malformed"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_and_jsonl_are_read_one_record_at_a_time(tmp_path: Path, mark: str) -> None:
    records = [LLAVA | {"id": str(i)} for i in range(5)]
    (tmp_path / "a.json").write_text(mark + json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    lines = "\r\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "a.jsonl").write_text(mark + lines, encoding="utf-8")
    for name in ("a.json", "a.jsonl"):
        source = open_source(tmp_path / name)
        assert len(source) == 5 and source.images == tmp_path
        assert source[3].id == "3" and source[3].messages == parse_record(LLAVA).messages


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", None, "No such file"),
        ("a.json", "", "list of records"),
        ("a.json", "[]", "no records"),
        ("a.json", '{"id": 1}', "list of records"),
        ("a.json", '[{"id": 1}', "not valid JSON"),
        ("a.json", '[{"id": 1} {"id": 2}]', "not valid JSON"),
        ("a.json", "[{'id': 1}]", "not valid JSON"),
        ("a.jsonl", '{"id": 1}\n{"id"\n', "line 2 of"),
        ("a.jsonl", "\n\n", "no records"),
        ("a.csv", "id,image", "no known kind"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=says) as error:
        open_source(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_missing_images_folder_and_a_misspelt_part(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([LLAVA]))
    with pytest.raises(UsageError, match="images folder"):
        open_source(tmp_path / "a.json", tmp_path / "photos")
    with pytest.raises(UsageError, match="did you mean 'train'"):
        open_source("digits:trian")


def test_a_made_set_is_made_where_it_is_first_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_jax.data import sources
    from vlm_jax.data.digits import make_digits

    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path))
    few = {"train_samples": 4, "eval_samples": 2, "align_samples": 2}
    monkeypatch.setitem(
        sources.MADE, "digits", (lambda folder: make_digits(folder, **few), *sources.MADE["digits"][1:])
    )
    source = open_source("digits:train")
    assert len(source) == 4 and (source.images / source[0].images[0]).is_file()
    assert sources.resolve("digits:tokenizer")[0].is_dir()
