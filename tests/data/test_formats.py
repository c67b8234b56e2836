"""The forms of records: the examples of docs/reference/formats.md, and what is refused."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image as PIL

from vlm_jax.data import (
    UNTRAINED,
    BadRecord,
    Image,
    ImageSettings,
    Message,
    Record,
    SourceSpec,
    encode_conversation,
    open_source,
    parse_record,
)
from vlm_jax.data.formats import FORMATS
from vlm_jax.data.images import Picture
from vlm_jax.data.loader import Loader
from vlm_jax.data.prepare import main as prepare
from vlm_jax.errors import UsageError

IMAGE = "photos/bus.jpg"
CONVERSATION = (Message("user", (Image(0), "What colour is the bus?")), Message("assistant", ("White and red.",)))
DOCUMENT = (Message("document", (Image(0), "White and red.")),)
# Every example of the page: what is opened, and the messages that it holds.
EXAMPLES = {
    "llava.json": CONVERSATION,
    "llava.jsonl": CONVERSATION,
    "mixture.yaml": CONVERSATION,
    "sharegpt.json": CONVERSATION,
    "dataset_info.json:bus": CONVERSATION,
    "trl.json": CONVERSATION,
    "prompts.json": CONVERSATION,
    "swift.jsonl": CONVERSATION,
    "query.json": CONVERSATION,
    "alpaca.json": CONVERSATION,
    "rows.parquet": CONVERSATION,
    "tfds:bus_photos:train": CONVERSATION,
    "obelics.json": DOCUMENT,
    "mmc4.jsonl": DOCUMENT,
}


@pytest.fixture(scope="module")
def page(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files of the page, and the photo."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("page")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    PIL.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(folder / IMAGE)
    text = (repository / "docs/reference/formats.md").read_text()
    examples = dict(re.findall(r"```\w+ (\S+)\n(.*?)```", text, re.DOTALL))
    assert set(examples) == {name.partition(":")[0] for name in EXAMPLES} | {"chats.json"}
    for name, body in examples.items():
        if name.endswith(".parquet"):
            row = json.loads(body)
            row["images"][0]["bytes"] = (folder / IMAGE).read_bytes()
            pq.write_table(pa.Table.from_pylist([row]), folder / name)
        elif name != "tfds":
            (folder / name).write_text(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code = examples["tfds"].replace("BusPhotos(file_format", 'BusPhotos(data_dir="prepared", file_format')
        exec(compile(code, "formats.md", "exec"), {"__name__": "page"})
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_form_gives_the_same_record(page: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(page / "prepared"))
    before = "tensorflow" in sys.modules
    source = open_source(name if name.startswith("tfds:") else page / name, page)
    assert len(source) == 1
    record = pickle.loads(pickle.dumps(source))[0]
    assert before == ("tensorflow" in sys.modules)
    assert record == Record("7", EXAMPLES[name], record.images)
    (image,) = record.images
    assert Picture(image, source.images).encoded == (page / IMAGE).read_bytes()


@pytest.mark.parametrize(
    "name, kind",
    [
        ("rows.parquet", "parquet"),
        ("tfds:bus_photos:train", "tfds"),
        ("bus_photos:train", "tfds"),
        ("obelics.json", "json"),
    ],
)
def test_shards_of_a_form_give_the_same_record(page: Path, tmp_path: Path, name: str, kind: str, monkeypatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(page / "prepared"))
    monkeypatch.chdir(page)
    folder = [] if kind == "tfds" else [f"--images={page}"]
    prepare([f"--from={kind}", name, f"--output={tmp_path}/out", "--validation=0", *folder])
    (record,) = open_source(tmp_path / "out/train")
    expected = EXAMPLES.get(name, CONVERSATION)
    assert record == Record("7", expected, ((page / IMAGE).read_bytes(),))


def test_every_form_is_trained_on(page: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(page / "prepared"))
    names = [name if name.startswith("tfds:") else str(page / name) for name in EXAMPLES]
    loader = Loader(
        [SourceSpec(name, str(page)) for name in names],
        tokenizer=tokenizer,
        template="vicuna_v1",
        images=ImageSettings(8, 4),
        samples=len(names),
        lengths=(64,),
        shuffle=False,
    )
    (batch,) = loader
    assert batch.samples == len(EXAMPLES) and not any(sample.kind for sample in batch.delivered)
    tokens, labels = batch.arrays["tokens"][0], batch.arrays["labels"][0]
    for kind in (CONVERSATION, DOCUMENT):
        rows = [n for n, messages in enumerate(EXAMPLES.values()) if messages is kind]
        assert (tokens[rows] == tokens[rows[0]]).all() and (labels[rows] == labels[rows[0]]).all()
        assert (labels[rows[0]] != UNTRAINED).any()


def test_tfds_says_why_a_split_cannot_be_opened(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(page / "prepared" / "bus_photos", tmp_path / "bus_photos")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UsageError, match=r"split 'test' .* it has train"):
        open_source("tfds:bus_photos:test")
    info = tmp_path / "bus_photos/1.0.0/dataset_info.json"
    assert "array_record" in info.read_text()
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UsageError, match=r"prepared as tfrecord.*--file_format=array_record"):
        open_source("tfds:bus_photos:train[:1]")


TURNS = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}]
ASKED = {"role": "user", "content": "<image>What?"}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"messages": [TURNS[0], {"role": "assistant"}]}, "turn 2 lacks what is said: it has 'role'"),
        ({"messages": [{"content": "Hi"}]}, "turn 1 lacks its speaker"),
        ({"messages": [{"role": "assitant", "content": "Hi"}]}, "did you mean 'assistant'"),
        ({"messages": []}, "has none"),
        ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": []}]}, "all its messages"),
        ({"messages": [ASKED], "image": ["a.png", "b.png"]}, r"1 <image> placeholder\(s\) for 2 image"),
        ({"messages": [ASKED]}, r"1 <image> placeholder\(s\) for 0 image"),
        ({"messages": TURNS, "image": "a.png"}, r"0 <image> placeholder\(s\) for 1 image"),
        ({"messages": [ASKED], "image": 3.5}, "an image is a float"),
        ({"messages": [ASKED], "image": {"height": 3}}, "an object with 'height'"),
        ({"messages": [ASKED], "image": "data:image/png;base64,%%"}, "not valid base64"),
        ({"messages": [TURNS[0], TURNS[1] | {"loss": 0.5}]}, "loss 0.5; give true or false"),
        ({"messages": [TURNS[0] | {"loss": True}, TURNS[1]]}, "only answers are trained"),
        ({"messages": [TURNS[0], TURNS[1] | {"tool_calls": [{}]}]}, "tools"),
        ({"messages": [{"role": "system", "content": "A"}, *TURNS], "system": "B"}, "two system messages"),
        ({"messages": TURNS, "videos": ["a.mp4"]}, "videos are not read"),
        ({"messages": TURNS, "rejected_response": "No."}, "pairs of answers"),
        ({"conversation": TURNS, "image": "a.png"}, "needs 'conversations' .did you mean 'conversation'"),
        ({"prompt": "Where?", "image": "a.png"}, r"prompt and completion \(TRL\), needs 'completion'"),
        ({"image": "a.png", "caption": "A bus."}, "which is no known form"),
        ({"images": ["a.png"], "texts": [{"user": "Where?"}]}, "needs 'user' and 'assistant'"),
        ({"images": ["a.png"], "texts": ["A"]}, "both of text and image"),
        ({"images": ["a.png"], "texts": [None, "A"]}, "2 texts and 1 images"),
        ({"text_list": ["A"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]}, "below 1"),
        ({"query": "A", "response": "B", "history": [["A"]]}, "history"),
        ([], "it is a list"),
    ],
)
def test_what_is_malformed_says_how(raw: Any, says: str) -> None:
    with pytest.raises(BadRecord, match=says) as error:
        parse_record(raw)
    assert error.value.kind == "malformed" and "\n" not in str(error.value)


WORDS = ["conversations", "messages", "prompt", "completion", "query", "response", "history", "instruction", "input"]
WORDS += ["output", "image", "images", "texts", "text_list", "image_info", "matched_text_index", "image_name", "bytes"]
WORDS += ["from", "value", "role", "content", "type", "text", "index", "loss", "user", "assistant", "system", "<image>"]
LEAVES = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=3) | st.sampled_from(WORDS)
SMALL = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from([form.needs for form in FORMATS])
VALUES = st.lists(st.dictionaries(st.sampled_from(WORDS), SMALL, max_size=4), max_size=2) | SMALL


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(KEYS, VALUES, VALUES, SMALL)
def test_whatever_stands_in_a_record_is_a_record_or_bad(keys: tuple[str, ...], one: Any, two: Any, image: Any) -> None:
    with contextlib.suppress(BadRecord):
        record = parse_record({**dict(zip(keys, (one, two), strict=False)), "image": image})
        assert all(isinstance(message, Message) for message in record.messages)
        parts = [part for message in record.messages for part in message.content]
        assert [part.index for part in parts if isinstance(part, Image)] == list(range(len(record.images)))


def test_an_image_may_be_named_by_number_or_stand_in_the_record() -> None:
    numbered = [{"type": "image", "index": number, "text": None} for number in (1, 0)]
    record = parse_record({"messages": [{"role": "user", "content": numbered}], "images": [{"path": "a.png"}, "b.png"]})
    assert record.images == ("b.png", "a.png")
    uri = "data:image/png;base64," + base64.b64encode(b"bytes").decode()
    inside = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "image", "base64": uri.partition(",")[2]}]
    assert parse_record({"messages": [{"role": "user", "content": inside}]}).images == (b"bytes", b"bytes")


def test_answers_without_loss_are_read_as_they_are_and_not_trained(tokenizer: Any) -> None:
    turns = [dict(turn) for turn in TURNS * 3]
    turns[3]["loss"] = False
    for template in ("vicuna_v1", "v0", "llava_llama_2"):
        whole = encode_conversation(TURNS * 3, template, tokenizer=tokenizer)
        some = encode_conversation(turns, template, tokenizer=tokenizer)
        assert (whole["input_ids"] == some["input_ids"]).all()
        silent = np.flatnonzero(whole["labels"] != some["labels"])
        assert (some["labels"][silent] == UNTRAINED).all() and 3 <= len(silent) <= 8
        assert silent[-1] - silent[0] == len(silent) - 1  # one stretch, the second answer
        assert "A cat ." in tokenizer.decode(whole["input_ids"][silent])


def test_the_prompt_of_a_completion_is_not_trained(tokenizer: Any) -> None:
    record = parse_record({"prompt": [*TURNS, TURNS[0]], "completion": "No dog."})
    labels = encode_conversation(record, tokenizer=tokenizer)["labels"]
    assert tokenizer.decode(labels[labels != UNTRAINED]).startswith("No dog .")


def test_a_document_is_trained_whole(tokenizer: Any) -> None:
    record = parse_record({"images": [None, "a.png", None], "texts": ["A cat .", None, "No dog ."]})
    encoded = encode_conversation(record, tokenizer=tokenizer)
    begin, *labels = encoded["labels"].tolist()
    expected = [UNTRAINED if one == -200 else one for one in encoded["input_ids"].tolist()[1:]]
    assert begin == UNTRAINED and labels == expected and labels[-1] == tokenizer.eos_token_id
