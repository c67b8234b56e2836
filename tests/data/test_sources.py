"""Files of records and their forms."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from vlm_jax.data import BadRecord, Image, open_source, parse_record
from vlm_jax.data.sources import json_files
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
        ("mix.yaml", "datasets: a.json", "no list 'datasets'"),
        ("mix.yaml", "datasets: [{json_paht: a.json}]", "no json_path"),
        ("mix.yaml", "datasets: [{json_path: a.json, weight: 2}]", "has 'weight'"),
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


def test_a_file_is_read_in_blocks_wherever_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [LLAVA | {"id": str(i), "n": [1.5e3, True, None, -12345678901], "s": "\\u00e4" * i} for i in range(4)]
    text = "\ufeff [\n" + " ,\r\n".join(json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records))
    (tmp_path / "a.json").write_text(text + "\n]", encoding="utf-8")
    whole = open_source(tmp_path / "a.json")
    for block in (1, 2, 7, 64):
        monkeypatch.setattr(json_files, "BLOCK", block)
        source = open_source(tmp_path / "a.json")
        assert (source.places == whole.places).all() and [source[i].id for i in range(4)] == list("0123")
    for damaged in (text, text[:-1], text + ",]", text + "][]", text.replace('"image"', 'image"') + "]"):
        (tmp_path / "a.json").write_text(damaged, encoding="utf-8")
        for block in (2, 1 << 20):
            monkeypatch.setattr(json_files, "BLOCK", block)
            with pytest.raises(UsageError, match="not valid JSON"):
                open_source(tmp_path / "a.json")


def numbered(folder: Path, name: str, count: int) -> Path:
    (folder / name).write_text(json.dumps([LLAVA | {"id": f"{name[0]}{i}"} for i in range(count)]))
    return folder / name


def test_a_mixture_takes_what_its_strategies_say(tmp_path: Path) -> None:
    numbered(tmp_path, "a.json", 9)
    numbered(tmp_path, "b.json", 9)

    def ids(*strategies: tuple[str, str]) -> list[str]:
        lines = [f"  - {{json_path: {file}, sampling_strategy: '{how}'}}\n" for file, how in strategies]
        (tmp_path / "mix.yaml").write_text("datasets:\n" + "".join(lines))
        source = pickle.loads(pickle.dumps(open_source(tmp_path / "mix.yaml")))
        return [source[i].id for i in range(len(source))]

    every = [f"a{i}" for i in range(9)]
    assert ids(("a.json", "all")) == ids(("a.json", "first:20")) == ids(("a.json", "random:100%")) == every
    assert ids(("a.json", "first:2"), ("b.json", "end:2")) == ["a0", "a1", "b7", "b8"]
    assert ids(("a.json", "first:30%")) == every[:3]  # 2.7, rounded up
    drawn = ids(("a.json", "random:4"), ("b.json", "random:4"))
    assert drawn == ids(("a.json", "random:4"), ("b.json", "random:4")) and len(set(drawn)) == 8
    assert [one[1] for one in drawn[:4]] != [one[1] for one in drawn[4:]]
    assert drawn == ["a0", "a3", "a7", "a8", "b0", "b1", "b2", "b4"]  # the same with every version of numpy
    for how, says in (("some", "give all, first:N"), ("first:0", "takes no record"), ("random:-3", "give all")):
        with pytest.raises(UsageError, match=says):
            ids(("a.json", how))
    with pytest.raises(UsageError, match="No such file"):
        ids(("c.json", "all"))


def test_parquet_is_read_at_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    user, assistant = CHAT["messages"]
    turns = [user, assistant | {"content": [{"type": "text", "text": assistant["content"]}]}]
    rows = [{"id": str(i), "messages": turns} for i in range(10)]
    for number, part in enumerate((rows[:7], rows[7:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"train-{number}.parquet", row_group_size=3)
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    assert len(source) == 10
    for index in (9, 0, 6, 7, 2, 3):
        record = source[index]
        assert record.id == str(index) and record.messages == parse_record(CHAT).messages
        assert record.images == ("a.png", "b.png")


def test_lists_of_llama_factory_name_columns_and_say_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"ask": "What?", "say": "This.", "rule": "Be kind."}) + "\n")
    listed = {
        "mine": {"file_name": "a.jsonl", "columns": {"prompt": "ask", "response": "say", "system": "rule"}},
        "far": {"hf_hub_url": "x/y"},
        "odd": {"file_name": "a.jsonl", "formatting": "sharegpt", "columns": {"message": "ask"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(listed))
    (record,) = [open_source(f"{tmp_path}/dataset_info.json:mine")[0]]
    assert [(m.role, m.text) for m in record.messages] == [
        ("system", "Be kind."),
        ("user", "What?"),
        ("assistant", "This."),
    ]
    for name, says in (("mein", "did you mean 'mine'"), ("far", "download it"), ("odd", "did you mean 'messages'")):
        with pytest.raises(UsageError, match=says):
            open_source(f"{tmp_path}/dataset_info.json:{name}")
