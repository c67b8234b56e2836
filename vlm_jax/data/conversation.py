"""Conversations become token ids and labels.

The text is rendered once, as pieces that are trained or not; it is cut at the images, each stretch is tokenised alone
(as LLaVA does, llava/mm_utils.py tokenizer_image_token), and a token is trained if it covers a character of a trained
piece. Nothing is tokenised twice and counted, which is where the reference loses samples ("tokenization mismatch").
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.formats import parse_turns
from vlm_jax.data.mismatch import mismatched
from vlm_jax.data.records import BadRecord, Image, Message, Part, Record
from vlm_jax.data.templates import DOCUMENT, Template, Trained, get_template
from vlm_jax.errors import UsageError, suggest

IMAGE_ID = -200
UNTRAINED = -100
PLACEMENTS = ("as_is", "first", "last", "random")


class Muted(Trained):
    """A piece that is tokenised as a trained one and is not trained: of an answer whose `train` is false."""


SLOT = re.compile(r"(\{(?:content|images|system|bos|eos)\})")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model continues, and where it stops.

    input_ids: int32 [L], an image is one position holding -200.
    images: the images in the messages, in the order of their positions; None for one that the messages do not name.
    stop_ids: a generated token that ends the answer. stop_strings: text that does; a tokenizer may have no token for
      it, or more than one.
    """

    input_ids: np.ndarray
    images: tuple[Any, ...]
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]


def encode_conversation(
    conversation: Any,
    template: str = "vicuna_v1",
    *,
    tokenizer: Any,
    image_placement: str = "first",
    seed: int | Sequence[int] = 0,
    compat_drop_mismatch: bool = False,
) -> dict[str, np.ndarray]:
    """Token ids and labels of a whole conversation.

    conversation: LLaVA's [{"from", "value"}, ...], chat messages, or a Record. Of an answer whose `train` is false
      (`loss` in the data) nothing is trained. An interleaved document is trained as it stands: BOS, all of it, EOS,
      with no template around it.
    tokenizer: a fast tokenizer of transformers. Its BOS stands first if it adds one itself.
    image_placement: where the only image of a message stands. "first" moves it before the text, with a newline between,
      and strips the text (LLaVA's preprocess_multimodal); "last" moves it behind; "random" is one of these, drawn for
      the conversation from `seed` (LLaVA 1.0, section 4.2 of the paper); "as_is" leaves it. Several images in a message
      always stay where they are.
    compat_drop_mismatch: masks what LLaVA masks wholly because it counts its tokens otherwise (`data/mismatch.py`).
    Returns input_ids int32 [L] and labels int32 [L], aligned: an image is one position holding -200, an untrained label
      is -100.
    Raises UsageError for an unknown template or placement; BadRecord("malformed") for a conversation that does not
      alternate, or that the template cannot hold.
    """
    shape, said = get_template(template), _messages(conversation)[0]
    document = said[0].role == "document"
    shape = DOCUMENT if document else shape
    messages = _placed(said, "as_is" if document else image_placement, seed)
    _check(messages, shape, template)
    encoded = _encode(list(_pieces(messages, shape, tokenizer)), shape, tokenizer)
    if compat_drop_mismatch and shape.rounds is not None:
        pieces = list(_pieces(messages, shape, tokenizer, silent=shape.rounds.silent))
        if mismatched(pieces, shape.rounds, tokenizer, begins=_begins(tokenizer)):
            encoded["labels"][:] = UNTRAINED
    return encoded


def encode_prompt(
    conversation: Any, template: str = "vicuna_v1", *, tokenizer: Any, image_placement: str = "first"
) -> Prompt:
    """Token ids up to where the assistant's answer begins, for generation; the last message is the user's.

    Arguments and errors as for `encode_conversation`; with "random" placement images stand first.
    """
    shape = get_template(template)
    shape = shape.prompted or shape
    given, images = _messages(conversation)
    messages = _placed(given, "first" if image_placement == "random" else image_placement)
    _check(messages, shape, template, prompt=True)
    ids = _encode([*_pieces(messages, shape, tokenizer, end=False), shape.prompt], shape, tokenizer)["input_ids"]
    stops = [stop for stop in (_fill(stop, tokenizer) for stop in shape.stop) if stop]
    numbers = {stop: _token(tokenizer, stop) for stop in stops}
    known = dict.fromkeys(number for number in numbers.values() if number is not None)
    # A mark of the tokenizer's own is always that one token; other text may be made of several.
    marks = tokenizer.added_tokens_decoder
    strings = tuple(stop for stop in stops if numbers[stop] not in marks)
    return Prompt(ids, images, tuple(known), strings)


def begin_with_user(record: Record) -> tuple[Record, str]:
    """The record without an assistant's message before the user's first, as LLaVA trains on it, and what was left out
    (empty if nothing was). A message with an image is not left out: such a record stays, and is malformed."""
    at = 1 if record.messages and record.messages[0].role == "system" else 0
    first = record.messages[at] if at < len(record.messages) else None
    if first is None or first.role != "assistant" or any(isinstance(part, Image) for part in first.content):
        return record, ""
    kept = dataclasses.replace(record, messages=record.messages[:at] + record.messages[at + 1 :])
    return kept, f"its first message is the assistant's and is left out: {first.text:.60}"


def _messages(conversation: Any) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    if isinstance(conversation, Record):
        return conversation.messages, conversation.images
    return parse_turns(conversation, given=None)


def check_placement(placement: str) -> None:
    """Raises UsageError that suggests the nearest."""
    if placement not in PLACEMENTS:
        raise UsageError(
            f"unknown image placement {placement!r}{suggest(placement, PLACEMENTS)}; known: {', '.join(PLACEMENTS)}"
        )


def check_conversation(record: Record, template: str) -> None:
    """What `encode_conversation` would find wrong before it needs a tokenizer. Raises BadRecord("malformed")."""
    _check(record.messages, get_template(template), template)
    for message in record.messages:
        _check_unicode(message.text)


def _placed(messages: Sequence[Message], placement: str, seed: int | Sequence[int] = 0) -> list[Message]:
    check_placement(placement)
    if placement == "random":
        # Raw Philox bits, which no version of numpy will change.
        placement = ("first", "last")[int(np.random.Philox(np.random.SeedSequence(seed)).random_raw()) & 1]
    return list(messages) if placement == "as_is" else [_moved(message, placement) for message in messages]


def _moved(message: Message, placement: str) -> Message:
    images = [part for part in message.content if isinstance(part, Image)]
    if len(images) != 1:
        return message
    text = message.text.strip()
    if not text:
        return dataclasses.replace(message, content=(images[0],))
    content = (images[0], "\n" + text) if placement == "first" else (text + "\n", images[0])
    return dataclasses.replace(message, content=content)


def _check(messages: Sequence[Message], template: Template, name: str, prompt: bool = False) -> None:
    turns = [message.role for message in messages if message.role != "system"]
    if turns == ["document"] == [message.role for message in messages] and not prompt:
        return
    if any(message.role == "system" for message in messages[1:]):
        raise BadRecord("malformed", "a system message is not the first message")
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2):
        raise BadRecord("malformed", f"its turns do not alternate, the user's first: {', '.join(turns) or 'none'}")
    if prompt and turns[-1:] != ["user"]:
        raise BadRecord("malformed", "the last message of a prompt is the user's")
    if template.one_turn:
        if len(turns) != (1 if prompt else 2):
            raise BadRecord("malformed", f"template {name!r} takes one image and one caption, not {len(turns)} turns")
    elif len(turns) != len(messages) and not any("{system}" in piece for piece in template.begin):
        raise BadRecord("malformed", f"template {name!r} has no place for a system message")


def _pieces(
    messages: Sequence[Message],
    template: Template,
    tokenizer: Any,
    end: bool = True,
    silent: tuple[str, str] | None = None,
) -> Iterator[Part]:
    """The rendered conversation in order: texts (Trained or not) and images. `silent` stands for an empty user's and
    assistant's turn."""
    system, turns = template.system, messages
    if messages[0].role == "system":
        system, turns = messages[0].text, messages[1:]
    formats = {"user": template.user, "assistant": template.assistant, "document": template.assistant}
    rendered: list[tuple[tuple[str, ...], tuple[Part, ...]]] = [(template.begin if system else template.bare, ())]
    for number, turn in enumerate(turns):
        formatted = formats[turn.role]
        if number == 0 and template.first_user is not None:
            formatted = template.first_user
        if silent is not None and not turn.content:
            formatted = (silent[number % 2],)
        if not turn.train:
            formatted = tuple(Muted(piece) if isinstance(piece, Trained) else piece for piece in formatted)
        rendered.append((formatted, turn.content))
    if end:
        rendered.append((template.end, ()))
    before, _, after = template.image.partition("{image}")
    for formatted, content in rendered:
        for piece in formatted:
            kind = type(piece)
            for text in SLOT.split(piece):
                if text in ("{content}", "{images}"):
                    for part in content:
                        if isinstance(part, Image):
                            yield from (kind(before), part, kind(after))
                        elif text == "{content}":
                            yield kind(part)
                else:
                    yield kind(system if text == "{system}" else _fill(text, tokenizer))


def _fill(text: str, tokenizer: Any) -> str:
    if "{" not in text:  # the attributes of a tokenizer are slow to read
        return text
    return text.replace("{bos}", tokenizer.bos_token or "").replace("{eos}", tokenizer.eos_token or "")


def _encode(pieces: Sequence[Part], template: Template, tokenizer: Any) -> dict[str, np.ndarray]:
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            f"{type(tokenizer).__name__} does not say which characters a token covers; load the tokenizer with "
            "transformers.AutoTokenizer, which gives the fast one"
        )
    begins = _begins(tokenizer)
    ids = [tokenizer.bos_token_id] if begins else []
    labels, muted = [UNTRAINED] * len(ids), [False] * len(ids)
    for stretch in _stretches(pieces, template.apart):
        if isinstance(stretch, Image):
            ids.append(IMAGE_ID)
            labels.append(UNTRAINED)
            muted.append(False)
            continue
        text = "".join(stretch)
        _check_unicode(text)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        kinds = [type(piece) for piece in stretch for _ in piece]
        ids += encoded["input_ids"]
        for number, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            covered = kinds[start : max(stop, start + 1)]
            labels.append(number if Trained in covered or Muted in covered else UNTRAINED)
            muted.append(Muted in covered and Trained not in covered)
    if template.late and begins:
        labels = _late(ids, labels)
    labels = [UNTRAINED if mute else label for label, mute in zip(labels, muted, strict=True)]
    if template.always:
        always = _numbers(tokenizer, template.always)
        labels = [number if number in always else label for number, label in zip(ids, labels, strict=True)]
    return {"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)}


def _stretches(pieces: Sequence[Part], apart: bool) -> Iterator[Image | list[str]]:
    """The images, and between them the texts that are tokenised together."""
    together: list[str] = []
    for piece in pieces:
        turned = together and isinstance(piece, Trained) != isinstance(together[-1], Trained)
        cut = isinstance(piece, Image) or (apart and turned)
        if cut and together:
            yield together
            together = []
        if isinstance(piece, Image):
            yield piece
        elif piece:
            together.append(piece)
    if together:
        yield together


def _late(ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Labels with the untrained part of each user's turn where the reference's count puts it (`Template.late`)."""
    moved = [UNTRAINED if number == IMAGE_ID else number for number in ids]
    edges = [i for i in range(1, len(labels)) if (labels[i] == UNTRAINED) != (labels[i - 1] == UNTRAINED)]
    header, *edges = [*edges, len(labels)]
    moved[:header] = [UNTRAINED] * header
    for turn, (start, stop) in enumerate(zip(edges[::2], edges[1::2], strict=False)):
        start, stop = start + 2 * turn, min(stop + 2 * turn + 1, len(moved))
        moved[start:stop] = [UNTRAINED] * (stop - start)
    return moved


def _check_unicode(text: str) -> None:
    """JSON may hold half of a surrogate pair (a text that was cut there); no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("malformed", f"its text has half a character, \\u{ord(text[error.start]):04x}") from None


@functools.lru_cache(maxsize=8)
def _begins(tokenizer: Any) -> bool:
    """Whether texts begin with BOS: if the tokenizer adds one itself, and for Llama's opened from a bare
    `tokenizer.model`, whose documented default transformers 5 forgets."""
    bare = "Llama" in type(tokenizer).__name__ and "add_bos_token" not in tokenizer.init_kwargs
    return bare or tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]


@functools.lru_cache(maxsize=8)
def _numbers(tokenizer: Any, texts: tuple[str, ...]) -> frozenset[int]:
    """The ids of those texts that are one token."""
    encoded = tokenizer(list(texts), add_special_tokens=False).input_ids
    return frozenset(ids[0] for ids in encoded if len(ids) == 1)


def _token(tokenizer: Any, text: str) -> int | None:
    """The id of the one token that is this text, if there is one."""
    number = tokenizer.convert_tokens_to_ids(text)
    return None if number is None or number == tokenizer.unk_token_id else int(number)
