"""The forms in which records come, and the one form that we use: a `Record`.

`FORMATS` is the table of them; docs/reference/formats.md has an example of each. Sources: haotian-liu/LLaVA
docs/Finetune_Custom_Data.md; hiyouga/LLaMA-Factory data/README.md; huggingface/trl docs/source/dataset_formats.md;
modelscope/ms-swift docs Custom-dataset; HuggingFaceM4/the_cauldron and FineVision; allenai/mmc4; HuggingFaceM4/OBELICS.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_jax.data.formats.columns import Columns
from vlm_jax.data.formats.documents import parse_mmc4, parse_obelics
from vlm_jax.data.formats.turns import PLACEHOLDER, images_of, is_list, malformed, parse_turns
from vlm_jax.data.records import Message, Record
from vlm_jax.errors import suggest

__all__ = ["FORMATS", "PLACEHOLDER", "Columns", "Format", "parse_record", "parse_turns"]

Content = tuple[tuple[Message, ...], tuple[Any, ...]]  # messages, and the images in them


def _conversations(raw: Mapping[str, Any]) -> Content:
    return parse_turns(raw["conversations"], images_of(raw), raw.get("system"))


def _messages(raw: Mapping[str, Any]) -> Content:
    return parse_turns(raw["messages"], images_of(raw), raw.get("system"))


def _prompt(raw: Mapping[str, Any]) -> Content:
    prompt, completion = _turns(raw["prompt"], "user"), _turns(raw["completion"], "assistant")
    messages, images = parse_turns([*prompt, *completion], images_of(raw), raw.get("system"))
    asked = len(messages) - len(completion)
    before = [dataclasses.replace(one, train=one.role != "assistant") for one in messages[:asked]]
    return (*before, *messages[asked:]), images


def _query(raw: Mapping[str, Any]) -> Content:
    return _asked(raw, raw["query"], raw["response"])


def _instruction(raw: Mapping[str, Any]) -> Content:
    question, given = raw["instruction"], raw.get("input") or ""
    if not isinstance(question, str) or not isinstance(given, str):
        raise malformed("its instruction or its input is not a text")
    return _asked(raw, f"{question}\n{given}" if given else question, raw["output"])


def _texts(raw: Mapping[str, Any]) -> Content:
    texts = raw["texts"]
    if not texts or not is_list(texts):
        raise malformed("its texts are not a list, or an empty one")
    if not isinstance(texts[0], Mapping):
        return parse_obelics(texts, raw["images"])
    turns = []
    for number, pair in enumerate(texts, 1):
        if not isinstance(pair, Mapping) or not isinstance(pair.get("user"), str) or "assistant" not in pair:
            raise malformed(f"text {number} is {pair!r:.80}; it needs 'user' and 'assistant'")
        turns += [{"role": role, "content": pair[role]} for role in ("user", "assistant")]
    images = images_of(raw)
    if images and not any(PLACEHOLDER in str(turn["content"]) for turn in turns):
        turns[0]["content"] = PLACEHOLDER * len(images) + turns[0]["content"]  # this format's images stand first
    return parse_turns(turns, images)


def _documents(raw: Mapping[str, Any]) -> Content:
    return parse_mmc4(raw["text_list"], raw["image_info"])


@dataclasses.dataclass(frozen=True)
class Format:
    """needs: the keys that tell it. takes: those that it reads besides. read: a record of it -> messages and images."""

    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Content]


IMAGES = ("image", "images")
FORMATS = (
    Format("conversations (LLaVA, ShareGPT)", ("conversations",), (*IMAGES, "system"), _conversations),
    Format("messages (TRL, LLaMA-Factory, ms-swift)", ("messages",), (*IMAGES, "system"), _messages),
    Format("prompt and completion (TRL)", ("prompt", "completion"), (*IMAGES, "system"), _prompt),
    Format("query and response (ms-swift)", ("query", "response"), (*IMAGES, "system", "history"), _query),
    Format(
        "instruction and output (Alpaca)",
        ("instruction", "output"),
        (*IMAGES, "system", "history", "input"),
        _instruction,
    ),
    Format("images and texts (FineVision, the_cauldron, OBELICS)", ("images", "texts"), (), _texts),
    Format("text_list and image_info (MMC4)", ("text_list", "image_info"), (), _documents),
)
# What a record may hold that would be lost if the rest were trained on.
UNREAD = {
    "video": "videos are not read",
    "videos": "videos are not read",
    "audio": "sound is not read",
    "audios": "sound is not read",
    "tools": "calls of tools are not read",
    "objects": "boxes are not filled in; write them into the texts",
    "chosen": "pairs of answers to choose between are not read",
    "rejected": "pairs of answers to choose between are not read",
    "rejected_response": "pairs of answers to choose between are not read",
}


def parse_record(raw: Any, name: str = "record", columns: Columns | None = None) -> Record:
    """A record of any of the `FORMATS`.

    name: its id if it has none. columns: what it calls its keys, where these are not the format's.
    Raises BadRecord("malformed"), for an unknown form with the nearest and what is missing.
    """
    if not isinstance(raw, Mapping):
        raise malformed(f"it is a {type(raw).__name__}, not an object with conversations or messages")
    if columns is not None:
        raw = columns.translate(raw)
    given = {key: value for key, value in raw.items() if value is not None}
    form = next((form for form in FORMATS if all(key in given for key in form.needs)), None)
    for key, why in UNREAD.items():
        if given.get(key):
            raise malformed(f"it has {key!r}: {why}")
    if form is None:
        raise malformed(_nearest(given))
    try:
        messages, images = form.read(given)
    except RecursionError:
        raise malformed("it is nested too deeply") from None
    used = ("id", *form.needs, *form.takes)
    extra = {key: value for key, value in raw.items() if key not in used}
    return Record(str(given.get("id", name)), messages, images, extra=extra)


def _nearest(given: Mapping[str, Any]) -> str:
    """What a record of no known form has, which form comes nearest, and what it lacks."""

    def fit(form: Format) -> tuple[float, int]:
        near = sum(bool(difflib.get_close_matches(key, given, 1, cutoff=0.8)) for key in form.needs)
        return near / len(form.needs), sum(key in given for key in form.takes)

    form = max(FORMATS, key=fit)
    lacking = [f"{key!r}{suggest(key, given)}" for key in form.needs if key not in given]
    has = ", ".join(repr(key) for key in given)[:200] or "nothing"
    return f"it has {has}, which is no known form (docs/reference/formats.md); the nearest, {form.name}, needs " + (
        " and ".join(lacking)
    )


def _turns(said: Any, role: str) -> Sequence[Any]:
    if not isinstance(said, str) and not is_list(said):
        raise malformed(f"what the {role} says is a {type(said).__name__}, not a text or a list of turns")
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _asked(raw: Mapping[str, Any], question: Any, answer: Any) -> Content:
    history = raw.get("history", ())
    if not is_list(history) or any(not is_list(pair) or len(pair) != 2 for pair in history):
        raise malformed("its history is not a list of (question, answer) pairs")
    pairs = [*history, (question, answer)]
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return parse_turns(turns, images_of(raw), raw.get("system"))
