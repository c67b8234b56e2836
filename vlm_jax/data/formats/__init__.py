"""The forms in which records come, and the one form that we use.

LLaVA's JSON (haotian-liu/LLaVA docs/Finetune_Custom_Data.md): `id`, `image` (a path, a list, or absent) and
`conversations` of `{"from": "human" | "gpt", "value"}` with `<image>` where an image stands. Chat `messages` (Hugging
Face, TRL, LLaMA-Factory): `{"role", "content"}`, the content a string with `<image>` or a list of `{"type": "text",
"text"}` and `{"type": "image"}`, the images inside the parts or in the record's `images` (or `image`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_jax.data.formats.columns import Columns
from vlm_jax.data.records import BadRecord, Image, Message, Part, Record
from vlm_jax.errors import suggest

PLACEHOLDER = "<image>"
ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_TYPES = ("image", "image_url")
USED = ("id", "image", "images", "conversations", "messages")


def parse_record(raw: Any, name: str = "record", columns: Columns | None = None) -> Record:
    """A record from its JSON form; `name` is its id if it has none. Raises BadRecord("malformed")."""
    if columns is not None and isinstance(raw, Mapping):
        raw = columns.translate(raw)
    if not isinstance(raw, Mapping):
        raise _malformed(f"it is a {type(raw).__name__}, not an object with conversations or messages")
    turns = raw.get("conversations", raw.get("messages"))
    if turns is None:
        raise _malformed("it has neither 'conversations' nor 'messages'")
    messages, images = parse_turns(turns, _listed(raw.get("image", raw.get("images"))))
    extra = {key: value for key, value in raw.items() if key not in USED}
    return Record(str(raw.get("id", name)), messages, images, extra=extra)


def parse_turns(turns: Any, given: Sequence[Any] | None = ()) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """The messages of a conversation and the images in them, in order of appearance.

    given: the images of the record, for placeholders that name none. None if they are not known: each placeholder
      then stands for an image that the caller has.
    Raises BadRecord("malformed"): not a list of turns, an unknown role, or placeholders and images that do not match.
    """
    if isinstance(turns, (str, Mapping)) or not isinstance(turns, Sequence) or not turns:
        raise _malformed("its conversation is not a list of turns")
    unnamed = iter(given if given is not None else ())
    images: list[Any] = []
    messages, wanted = [], 0
    for turn in turns:
        role, content = _turn(turn)
        parts: list[Part] = []
        for part in _parts(content):
            if isinstance(part, str):
                parts.append(part)
                continue
            parts.append(Image(len(images)))
            wanted += part is None
            images.append(next(unnamed, None) if part is None else part[0])
        messages.append(Message(role, tuple(part for part in parts if part != "")))
    if given is not None and wanted != len(given):
        raise _malformed(f"it has {wanted} {PLACEHOLDER} placeholder(s) for {len(given)} image(s)")
    return tuple(messages), tuple(images)


def _turn(turn: Any) -> tuple[str, Any]:
    if not isinstance(turn, Mapping):
        raise _malformed(f"a turn is a {type(turn).__name__}, not an object")
    said_by, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if said_by is None or content is None:
        raise _malformed("a turn lacks its speaker ('from' or 'role') or what is said ('value' or 'content')")
    if said_by not in ROLE_OF:
        raise _malformed(f"a turn is by {said_by!r}, not by {', '.join(ROLE_OF)}{suggest(str(said_by), ROLE_OF)}")
    return ROLE_OF[said_by], content


def _parts(content: Any) -> Iterator[str | tuple[Any] | None]:
    """The parts of a message: a text, an image (in a tuple), or None for an image that is named elsewhere."""
    if isinstance(content, str):
        first, *rest = content.split(PLACEHOLDER)
        yield first
        for text in rest:
            yield None
            yield text
        return
    if not isinstance(content, Sequence):
        raise _malformed(f"the content of a turn is a {type(content).__name__}, not a text or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind in IMAGE_TYPES:
            image = part.get("image_url") if kind == "image_url" else part.get("image", part.get("path"))
            if isinstance(image, Mapping):  # OpenAI's {"url": ...}; that it is no URL is checked where files are opened
                image = image.get("url", image.get("path"))
            yield None if image is None else (image,)
        else:
            raise _malformed(f"a part of a turn is {part!r:.80}; parts are texts and images")


def _listed(images: Any) -> Sequence[Any]:
    if images is None:
        return ()
    return images if isinstance(images, (list, tuple)) else (images,)


def _malformed(message: str) -> BadRecord:
    return BadRecord("malformed", message)
