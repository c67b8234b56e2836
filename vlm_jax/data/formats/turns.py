"""Conversations: lists of turns as LLaVA, ShareGPT, Hugging Face and ms-swift write them, and the images in them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as PIL

from vlm_jax.data.records import BadRecord, Image, Message, Part
from vlm_jax.errors import suggest

PLACEHOLDER = "<image>"
ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_TYPES = ("image", "image_url")
IMAGE_KEYS = ("image", "image_url", "bytes", "path", "url", "base64", "source", "data")
TRAINED_KEYS = ("loss", "train", "weight")  # ms-swift's, and what others call the same
TOOL_KEYS = ("tool_calls", "function_call")


def parse_turns(
    turns: Any, given: Sequence[Any] | None = (), system: str | None = None
) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """The messages of a conversation and the images in them, in order of appearance.

    given: the images of the record, for placeholders that name none. None if they are not known: each placeholder
      then stands for an image that the caller has.
    system: a system message that stands beside the turns.
    Raises BadRecord("malformed"): not a list of turns, an unknown role, or placeholders and images that do not match.
    """
    if not turns or not is_list(turns):
        raise malformed("its conversation is not a list of turns, or has none")
    images: list[Any] = []
    places: list[int] = []  # the numbers of the given images, as placeholders name them
    messages = []
    for number, turn in enumerate(turns, 1):
        role, content, train = _turn(turn, number)
        parts: list[Part] = []
        for part in _parts(content, number):
            if isinstance(part, str):
                parts.append(part)
                continue
            parts.append(Image(len(images)))
            if isinstance(part, tuple):
                images.append(image_of(part[0]))
                continue
            places.append(len(places) if part is None else part)
            known = given is not None and 0 <= places[-1] < len(given)
            images.append(image_of(given[places[-1]]) if known and given is not None else None)
        messages.append(Message(role, tuple(part for part in parts if part != ""), train))
    if given is not None and sorted(set(places)) != list(range(len(given))):
        raise malformed(f"it has {len(places)} {PLACEHOLDER} placeholder(s) for {len(given)} image(s)")
    if not any(message.content for message in messages):
        raise malformed("all its messages are empty")
    return (*_system(system, messages), *messages), tuple(images)


def images_of(raw: Mapping[str, Any]) -> Sequence[Any]:
    """The images that a record lists in `image` or `images`."""
    listed = raw.get("images") if raw.get("image") is None else raw["image"]
    if listed is None:
        return ()
    return listed if isinstance(listed, (list, tuple)) else (listed,)


def image_of(value: Any) -> Any:
    """A path, or the image itself, from any of the forms in which a record names one: a path, a data: URI, encoded
    bytes, a PIL image, pixels, or an object that holds one of these (`{"bytes", "path"}`, `{"url"}`, ...)."""
    if isinstance(value, (bytes, bytearray, np.ndarray, PIL.Image)):
        return value
    if isinstance(value, str):
        head, comma, body = value.partition(",") if value.startswith("data:") else (value, "", "")
        return _unpacked(body) if comma and head.endswith(";base64") else value
    if isinstance(value, Mapping):
        key = next((key for key in IMAGE_KEYS if value.get(key) is not None), None)
        if key in ("base64", "data") and isinstance(value[key], str):
            return _unpacked(value[key].rpartition(",")[2])
        if key is not None:
            return image_of(value[key])
        raise malformed(f"an image is an object with {_names(value)}; it needs bytes or a path")
    raise malformed(f"an image is a {type(value).__name__}; give a path or the bytes of a file")


def is_list(value: Any) -> bool:
    """Whether it is a list of things, not a text or an object."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def malformed(message: str) -> BadRecord:
    return BadRecord("malformed", message)


def _unpacked(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise malformed("an image is not valid base64") from None


def _system(system: str | None, messages: Sequence[Message]) -> tuple[Message, ...]:
    if not system:
        return ()
    if not isinstance(system, str):
        raise malformed(f"its system message is a {type(system).__name__}, not a text")
    if messages[0].role != "system":
        return (Message("system", (system,)),)
    if messages[0].text != system:
        raise malformed("it has two system messages: 'system', and the first turn")
    return ()


def _turn(turn: Any, number: int) -> tuple[str, Any, bool]:
    if not isinstance(turn, Mapping):
        raise malformed(f"turn {number} is a {type(turn).__name__}, not an object")
    said_by, content = _first(turn, "from", "role"), _first(turn, "value", "content")
    if said_by is None:
        raise malformed(f"turn {number} lacks its speaker: it has {_names(turn)}, but neither 'from' nor 'role'")
    if content is None:
        raise malformed(f"turn {number} lacks what is said: it has {_names(turn)}, but neither 'value' nor 'content'")
    if not isinstance(said_by, str) or said_by not in ROLE_OF:
        known = ", ".join(ROLE_OF)
        raise malformed(f"turn {number} is by {said_by!r:.80}, not by {known}{suggest(str(said_by), ROLE_OF)}")
    if tool := next((key for key in TOOL_KEYS if turn.get(key)), None):
        raise malformed(f"turn {number} has {tool!r}; calls of tools are not read")
    mark = next((key for key in TRAINED_KEYS if turn.get(key) is not None), None)
    if mark is None:
        return ROLE_OF[said_by], content, True
    if turn[mark] not in (0, 1):
        raise malformed(f"turn {number} has {mark} {turn[mark]!r:.80}; give true or false")
    if turn[mark] and ROLE_OF[said_by] != "assistant":
        raise malformed(f"turn {number} has {mark} true, but is the {ROLE_OF[said_by]}'s; only answers are trained")
    return ROLE_OF[said_by], content, bool(turn[mark]) or ROLE_OF[said_by] != "assistant"


def _parts(content: Any, number: int) -> Iterator[str | tuple[Any] | int | None]:
    """The parts of a message: a text, an image (in a tuple), the number of one of the given images, or None for the
    next of these."""
    if isinstance(content, str):
        first, *rest = content.split(PLACEHOLDER)
        yield first
        for text in rest:
            yield None
            yield text
        return
    if not is_list(content):
        found = type(content).__name__
        raise malformed(f"the content of turn {number} is a {found}, not a text or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield from _parts(part["text"], number)
        elif kind in IMAGE_TYPES:
            named = any(part.get(key) is not None for key in IMAGE_KEYS)
            index = part.get("index")
            yield (part,) if named else index if isinstance(index, int) else None
        else:
            raise malformed(f"a part of turn {number} is {part!r:.80}; parts are texts and images")


def _first(turn: Mapping[str, Any], *keys: str) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _names(value: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in value)[:200] or "no key"
