"""Templates, token ids and labels."""

from __future__ import annotations

from typing import Any

import pytest

from vlm_jax.data import IMAGE_ID, UNTRAINED, BadRecord, encode_conversation, encode_prompt, parse_record
from vlm_jax.errors import UsageError

IMAGE = "<IMAGE>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant . The assistant gives helpful , detailed , "
    "and polite answers to the user's questions ."
).split()
TURNS = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "And that?"},
    {"from": "gpt", "value": "No dog."},
]


def words(tokenizer: Any, ids: Any) -> list[str]:
    return [
        {IMAGE_ID: IMAGE, UNTRAINED: "-"}.get(int(i)) or tokenizer.convert_ids_to_tokens(int(i)) for i in ids.tolist()
    ]


def test_vicuna_v1_two_turns_token_by_token(tokenizer: Any) -> None:
    encoded = encode_conversation(TURNS, "vicuna_v1", tokenizer=tokenizer)
    first = ["<s>", *SYSTEM, "USER", ":", IMAGE, "\n", "What", "is", "this", "?", "ASSISTANT", ":"]
    second = ["USER", ":", "And", "that", "?", "ASSISTANT", ":"]
    answers = ["A", "cat", ".", "</s>"], ["No", "dog", ".", "</s>"]
    assert words(tokenizer, encoded["input_ids"]) == [*first, *answers[0], *second, *answers[1]]
    expected = ["-"] * len(first) + answers[0] + ["-"] * len(second) + answers[1]
    assert words(tokenizer, encoded["labels"]) == expected
    assert encoded["input_ids"].dtype == encoded["labels"].dtype == "int32"


def test_plain_drops_the_instruction_and_trains_the_caption_and_its_newline(tokenizer: Any) -> None:
    encoded = encode_conversation(TURNS[:2], "plain", tokenizer=tokenizer)
    assert words(tokenizer, encoded["input_ids"]) == ["<s>", IMAGE, "A", "cat", ".", "\n"]
    assert words(tokenizer, encoded["labels"]) == ["-", "-", "A", "cat", ".", "\n"]


def test_a_chatml_template_trains_the_answer_and_its_end(tokenizer: Any) -> None:
    encoded = encode_conversation(TURNS[:2], "chatml_direct", tokenizer=tokenizer)
    trained = [word for word in words(tokenizer, encoded["labels"]) if word != "-"]
    assert trained[:3] == ["A", "cat", "."]


def test_llava_turns_and_chat_messages_and_records_are_the_same(tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "And that?"},
        {"role": "assistant", "content": "No dog."},
    ]
    record = parse_record({"image": "a.png", "conversations": TURNS})
    reference = encode_conversation(TURNS, tokenizer=tokenizer)
    for form in (chat, record):
        encoded = encode_conversation(form, tokenizer=tokenizer)
        assert all((encoded[name] == reference[name]).all() for name in reference)


def test_one_image_moves_before_its_question_and_several_stay(tokenizer: Any) -> None:
    def ids(value: str, placement: str = "first") -> list[str]:
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "Yes"}]
        encoded = encode_conversation(turns, tokenizer=tokenizer, image_placement=placement)
        return words(tokenizer, encoded["input_ids"])[len(SYSTEM) + 3 : -4]

    assert ids("What is this?\n<image>") == [IMAGE, "\n", "What", "is", "this", "?"]
    assert ids("What is this?\n<image>", "as_is") == ["What", "is", "this", "?", "\n", IMAGE]
    assert ids("What <image>is <image>this?") == ["What", IMAGE, "is", IMAGE, "this", "?"]


def test_a_system_message_replaces_the_templates(tokenizer: Any) -> None:
    turns = [{"from": "system", "value": "The dog."}, *TURNS[2:]]
    encoded = encode_conversation(turns, tokenizer=tokenizer)
    assert words(tokenizer, encoded["input_ids"])[:6] == ["<s>", "The", "dog", ".", "USER", ":"]


@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
def test_a_prompt_is_the_beginning_of_what_was_trained(tokenizer: Any, template: str) -> None:
    trained = encode_conversation(TURNS[:2], template, tokenizer=tokenizer)
    prompt = encode_prompt(TURNS[:1], template, tokenizer=tokenizer)
    begin = len(prompt.input_ids)
    assert (trained["input_ids"][:begin] == prompt.input_ids).all()
    assert (trained["labels"][:begin] == UNTRAINED).all() and trained["labels"][begin] != UNTRAINED
    stop = {"vicuna_v1": "</s>", "plain": "\n"}[template]
    assert prompt.stop_ids[0] == tokenizer.convert_tokens_to_ids(stop) == trained["labels"][-1]


def test_a_stop_that_is_no_token_is_a_string(tokenizer: Any) -> None:
    prompt = encode_prompt(TURNS[:1], "chatml_direct", tokenizer=tokenizer)
    assert prompt.stop_strings == ("<|im_end|>",) and prompt.stop_ids == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(
    ("turns", "template"),
    [
        (TURNS[1:], "vicuna_v1"),  # the assistant's first
        ([TURNS[0], TURNS[0]], "vicuna_v1"),
        (TURNS, "plain"),  # two captions
        ([TURNS[0], {"from": "system", "value": "A"}], "vicuna_v1"),
        ([], "vicuna_v1"),
        ("What is this?", "vicuna_v1"),
        ([{"from": "humna", "value": "A"}], "vicuna_v1"),
        ([{"from": "human"}], "vicuna_v1"),
    ],
)
def test_malformed_conversations_say_so(tokenizer: Any, turns: Any, template: str) -> None:
    with pytest.raises(BadRecord) as error:
        encode_conversation(turns, template, tokenizer=tokenizer)
    assert error.value.kind == "malformed"


def test_a_misspelt_template_suggests_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="did you mean 'vicuna_v1'"):
        encode_conversation(TURNS, "vicuna_v2", tokenizer=tokenizer)
    with pytest.raises(UsageError, match="did you mean 'first'"):
        encode_conversation(TURNS, tokenizer=tokenizer, image_placement="frist")
