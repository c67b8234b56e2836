"""Conversations become token ids and labels.

The text is rendered once, as pieces that are trained or not; it is cut at the images, each stretch is tokenised alone
(as LLaVA does, llava/mm_utils.py tokenizer_image_token), and a token is trained if it covers a character of a trained
piece. Nothing is tokenised twice and counted, which is where the reference loses samples ("tokenization mismatch").
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.formats import parse_turns
from vlm_jax.data.records import BadRecord, Image, Message, Part, Record
from vlm_jax.data.templates import Template, Trained, get_template
from vlm_jax.errors import UsageError, suggest

IMAGE_ID = -200
UNTRAINED = -100

SLOT = re.compile(r"(\{(?:content|images|system|eos)\})")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model continues, and where it stops.

    input_ids: int32 [L], an image is one position holding -200.
    images: the images in the messages, in the order of their positions; None for one that the messages do not name.
    stop_ids: a generated token that ends the answer. stop_strings: the same where a tokenizer has no token for it.
    """

    input_ids: np.ndarray
    images: tuple[Any, ...]
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]


def encode_conversation(
    conversation: Any, template: str = "vicuna_v1", *, tokenizer: Any, image_placement: str = "first"
) -> dict[str, np.ndarray]:
    """Token ids and labels of a whole conversation.

    conversation: LLaVA's [{"from", "value"}, ...], chat messages, or a Record.
    tokenizer: a fast tokenizer of transformers. Its BOS stands first if it adds one itself.
    image_placement: "first" moves the only image of a message before its text, with a newline between, and strips the
      text (LLaVA's preprocess_multimodal); "as_is" leaves it. Several images in a message always stay where they are.
    Returns input_ids int32 [L] and labels int32 [L], aligned: an image is one position holding -200, an untrained label
      is -100.
    Raises UsageError for an unknown template or placement; BadRecord("malformed") for a conversation that does not
      alternate, or that the template cannot hold.
    """
    shape = get_template(template)
    messages = _placed(_messages(conversation)[0], image_placement)
    _check(messages, shape, template)
    return _encode(list(_pieces(messages, shape, tokenizer)), tokenizer)


def encode_prompt(
    conversation: Any, template: str = "vicuna_v1", *, tokenizer: Any, image_placement: str = "first"
) -> Prompt:
    """Token ids up to where the assistant's answer begins, for generation; the last message is the user's.

    Arguments and errors as for `encode_conversation`.
    """
    shape = get_template(template)
    given, images = _messages(conversation)
    messages = _placed(given, image_placement)
    _check(messages, shape, template, prompt=True)
    ids = _encode([*_pieces(messages, shape, tokenizer, end=False), shape.prompt], tokenizer)["input_ids"]
    stops = {stop: _token(tokenizer, stop) for stop in (_fill(stop, tokenizer) for stop in shape.stop) if stop}
    known = dict.fromkeys(number for number in stops.values() if number is not None)
    return Prompt(ids, images, tuple(known), tuple(stop for stop, number in stops.items() if number is None))


def _messages(conversation: Any) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    if isinstance(conversation, Record):
        return conversation.messages, conversation.images
    return parse_turns(conversation, given=None)


def _placed(messages: Sequence[Message], placement: str) -> list[Message]:
    if placement not in ("first", "as_is"):
        raise UsageError(f"unknown image placement {placement!r}{suggest(placement, ('first', 'as_is'))}")
    return [_image_first(message) if placement == "first" else message for message in messages]


def _image_first(message: Message) -> Message:
    images = [part for part in message.content if isinstance(part, Image)]
    if len(images) != 1:
        return message
    text = message.text.strip()
    return Message(message.role, (images[0], "\n" + text) if text else (images[0],))


def _check(messages: Sequence[Message], template: Template, name: str, prompt: bool = False) -> None:
    turns = [message.role for message in messages if message.role != "system"]
    if any(message.role == "system" for message in messages[1:]):
        raise BadRecord("malformed", "a system message is not the first message")
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
        raise BadRecord("malformed", f"its turns do not alternate, the user's first: {', '.join(turns) or 'none'}")
    if prompt and turns[-1:] != ["user"]:
        raise BadRecord("malformed", "the last message of a prompt is the user's")
    if template.one_turn and len(turns) != (1 if prompt else 2):
        raise BadRecord("malformed", f"template {name!r} takes one image and one caption, not {len(turns)} turns")


def _pieces(messages: Sequence[Message], template: Template, tokenizer: Any, end: bool = True) -> Iterator[Part]:
    """The rendered conversation in order: texts (Trained or not) and images."""
    system, turns = template.system, messages
    if messages[0].role == "system":
        system, turns = messages[0].text, messages[1:]
    formats = {"user": template.user, "assistant": template.assistant}
    begin = template.begin if system else ()
    rendered = [(begin, ())] + [(formats[turn.role], turn.content) for turn in turns]
    if template.first_user is not None:
        rendered[1] = (template.first_user, turns[0].content)
    if end:
        rendered.append((template.end, ()))
    for formatted, content in rendered:
        for piece in formatted:
            kind = type(piece)
            for text in SLOT.split(piece):
                if text == "{content}":
                    yield from (part if isinstance(part, Image) else kind(part) for part in content)
                elif text == "{images}":
                    yield from (part for part in content if isinstance(part, Image))
                elif text == "{system}":
                    yield kind(system)
                else:
                    yield kind(_fill(text, tokenizer))


def _fill(text: str, tokenizer: Any) -> str:
    return text.replace("{eos}", tokenizer.eos_token or "")


def _encode(pieces: Sequence[Part], tokenizer: Any) -> dict[str, np.ndarray]:
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{type(tokenizer).__name__} does not say which characters a token covers; load the tokenizer with "
            "transformers.AutoTokenizer, which gives the fast one"
        )
    ids = [tokenizer.bos_token_id] if _begins(tokenizer) else []
    labels = [UNTRAINED] * len(ids)
    text, trained = "", []  # the stretch since the last image, and whether each of its characters is trained
    for piece in [*pieces, None]:
        if isinstance(piece, str):
            text += piece
            trained += [isinstance(piece, Trained)] * len(piece)
            continue
        if text:
            _check_unicode(text)
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids += encoded["input_ids"]
            labels += [
                number if any(trained[start : max(stop, start + 1)]) else UNTRAINED
                for number, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            ]
        if piece is not None:
            ids.append(IMAGE_ID)
            labels.append(UNTRAINED)
        text, trained = "", []
    return {"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)}


def _check_unicode(text: str) -> None:
    """JSON may hold half of a surrogate pair (a text that was cut there); no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("malformed", f"its text has half a character, \\u{ord(text[error.start]):04x}") from None


def _begins(tokenizer: Any) -> bool:
    """Whether texts begin with BOS: if the tokenizer adds one itself, and for Llama's opened from a bare
    `tokenizer.model`, whose documented default transformers 5 forgets."""
    bare = "Llama" in type(tokenizer).__name__ and "add_bos_token" not in tokenizer.init_kwargs
    return bare or tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]


def _token(tokenizer: Any, text: str) -> int | None:
    """The id of the one token that is this text, if there is one."""
    number = tokenizer.convert_tokens_to_ids(text)
    return None if number is None or number == tokenizer.unk_token_id else int(number)
