"""Templates, token ids and labels."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from vlm_jax.data import IMAGE_ID, UNTRAINED, BadRecord, encode_conversation, encode_prompt, parse_record
from vlm_jax.data.bad_records import BadRecordList
from vlm_jax.data.conversation import begin_with_user
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
    assert ids("<image>\nWhat is this?", "last") == ["What", "is", "this", "?", "\n", IMAGE]
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


# ------------------------------------------------------------------------------- what LLaVA trains, on a real tokenizer

# Made-up conversations with the ids and trained ranges that LLaVA's own code gave for them (Mistral 7B v0.1, legacy).
# Of `chatml_direct` there is the text alone, since LLaVA masks nearly all such samples.
MASKS = json.loads((Path(__file__).parent / "llava_masks.json").read_text())


def turns_of(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def ranges(labels: np.ndarray) -> list[list[int]]:
    trained = np.concatenate([[False], labels != UNTRAINED, [False]])
    return np.flatnonzero(trained[1:] != trained[:-1]).reshape(-1, 2).tolist()


@pytest.mark.parametrize("template", ["v0", "v1", "llava_llama_2", "mistral_instruct", "plain"])
def test_ids_and_masks_are_llavas(mistral: Callable[[bool], Any], template: str) -> None:
    cases = [case for case in MASKS if case["template"] == template]
    assert len(cases) == 12
    for case, compat in itertools.product(cases, (False, True)):  # LLaVA drops none of these
        settings = {"tokenizer": mistral(True), "compat_drop_mismatch": compat}
        encoded = encode_conversation(turns_of(*case["turns"]), template, **settings)
        assert encoded["input_ids"].tolist() == case["ids"]
        assert ranges(encoded["labels"]) == case["trained"]
        trained = encoded["labels"] != UNTRAINED
        assert (encoded["labels"][trained] == encoded["input_ids"][trained]).all()


def test_chatml_trains_every_answer_and_its_end_where_llava_drops_the_sample(mistral: Callable[[bool], Any]) -> None:
    tokenizer = mistral(True)
    cases = [case for case in MASKS if case["template"] == "chatml_direct"]
    assert len(cases) == 12
    for case in cases:
        turns = turns_of(*case["turns"])
        encoded = encode_conversation(turns, "chatml_direct", tokenizer=tokenizer)
        chunks = [tokenizer(chunk, add_special_tokens=False).input_ids for chunk in case["text"].split("<image>")]
        ids = [tokenizer.bos_token_id, *chunks[0], *(i for chunk in chunks[1:] for i in (IMAGE_ID, *chunk))]
        assert encoded["input_ids"].tolist() == ids
        answers = [tokenizer.decode(encoded["labels"][start:stop]) for start, stop in ranges(encoded["labels"])]
        # The last token of a mark may hold the first letter of the next, in a vocabulary without the marks.
        assert [answer.removesuffix("<") for answer in answers] == [f"{said}<|im_end|>" for said in case["turns"][1::2]]
        settings = {"tokenizer": tokenizer, "compat_drop_mismatch": True}
        assert (encode_conversation(turns, "chatml_direct", **settings)["labels"] == UNTRAINED).all()


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    ("template", "answers"),
    [
        ("vicuna_v1", ["▁A ▁cat . </s>", "▁Black ▁and ▁white . </s>"]),
        ("llava_llama_2", ["▁A ▁cat . ▁ </s>", "▁Black ▁and ▁white . ▁ </s>"]),
        ("mistral_instruct", ["▁A ▁cat . ▁ </s>", "▁Black ▁and ▁white . ▁ </s>"]),
    ],
)
def test_the_answers_are_trained_to_the_token(
    mistral: Callable[[bool], Any], template: str, answers: list[str], legacy: bool
) -> None:
    tokenizer = mistral(legacy)
    turns = turns_of("<image>\nWhat is it?", "A cat.", "What colour?", "Black and white.")
    labels = encode_conversation(turns, template, tokenizer=tokenizer, compat_drop_mismatch=True)["labels"]
    trained = [tokenizer.convert_ids_to_tokens(labels[start:stop].tolist()) for start, stop in ranges(labels)]
    assert [" ".join(answer) for answer in trained] == answers


QUESTION = "<image>\nWhat is it?"
# (turns, whether LLaVA drops them in vicuna_v1, and in mistral_instruct)
ODD = {
    "an empty answer": ([QUESTION, ""], True, True),
    "an empty question": ([QUESTION, "A cat.", "", "Yes."], True, True),
    "an empty answer between others": ([QUESTION, "", "And?", "No."], False, False),
    "an answer with the template's words": ([QUESTION, "He said ASSISTANT: hi"], True, False),
    "an answer with </s>": ([QUESTION, "A </s> cat."], True, True),
    "a text with <unk>": ([QUESTION, "A <unk> cat."], True, True),
    "a question that ends with a space": (["Why? ", "So."], False, False),
    "an answer that starts with a space": ([QUESTION, " A cat."], False, False),
    "an answer that starts with a line": ([QUESTION, "\nA cat."], False, False),
    "an answer that ends with a space": ([QUESTION, "A cat. "], False, False),
    "an answer that ends with a line": ([QUESTION, "A cat.\n", "Why?", "So."], False, False),
    "rare characters": ([QUESTION, "🦓 ￼ ok"], False, False),
    "a question that starts with lines": ([QUESTION, "A cat.", "\n\nWhy?", "So."], False, False),
}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("case", ODD)
def test_what_llava_drops_is_kept_unless_asked_for(mistral: Callable[[bool], Any], case: str, legacy: bool) -> None:
    turns, *drops = ODD[case]
    for template, dropped in zip(("vicuna_v1", "mistral_instruct"), drops, strict=True):
        encoded = encode_conversation(turns_of(*turns), template, tokenizer=mistral(legacy))
        assert len(ranges(encoded["labels"])) == len(turns) // 2
        settings = {"tokenizer": mistral(legacy), "compat_drop_mismatch": True}
        compat = encode_conversation(turns_of(*turns), template, **settings)
        assert (compat["input_ids"] == encoded["input_ids"]).all()
        assert (compat["labels"] == (UNTRAINED if dropped else encoded["labels"])).all()


def counted(text: str, answer: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels as LLaVA's preprocess_v1 and preprocess_llama_2 make them: round by round, from token counts."""

    def ids(part: str) -> list[int]:
        chunks = [tokenizer(chunk, add_special_tokens=False).input_ids for chunk in part.split("<image>")]
        return [tokenizer.bos_token_id, *chunks[0], *(i for chunk in chunks[1:] for i in (IMAGE_ID, *chunk))]

    whole = ids(text)
    labels, at = [UNTRAINED, *whole[1:]], 1
    for one in text.split("</s>")[:-1]:
        instruction = len(ids(one.split(answer)[0] + answer)) - 2
        labels[at : at + instruction] = [UNTRAINED] * instruction
        at += len(ids(one))
    assert at == len(whole)
    return whole, labels


words_in_a_row = st.lists(
    st.sampled_from(["A", "cat", "is", "3.5", "大约", "\n", "  ", "🦓", "it's", "USER:", "[INST]"])
)
said = words_in_a_row.map(" ".join).filter(lambda text: text.strip())


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(rounds=st.lists(st.tuples(said, said), min_size=1, max_size=3), image=st.booleans())
def test_spans_train_what_counting_trains(mistral: Callable[[bool], Any], rounds: list, image: bool) -> None:
    tokenizer = mistral(True)
    turns = [text for pair in rounds for text in pair]
    turns[0] = f"<image>\n{turns[0].strip()}" if image else turns[0]
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    vicuna = " ".join([" ".join(SYSTEM), ""]) + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in pairs)
    mistral_text = "".join(f"[INST] {q} [/INST] {a} </s>" for q, a in pairs)
    system = {"from": "system", "value": " ".join(SYSTEM)}
    for template, text, answer, given in (
        ("vicuna_v1", vicuna, " ASSISTANT: ", [system, *turns_of(*turns)]),
        ("mistral_instruct", mistral_text, "[/INST] ", turns_of(*turns)),
    ):
        encoded = encode_conversation(given, template, tokenizer=tokenizer, compat_drop_mismatch=True)
        ids, labels = counted(text, answer, tokenizer)
        assert encoded["input_ids"].tolist() == ids and encoded["labels"].tolist() == labels


# ------------------------------------------------------------------------------ where an image stands, and odd records


def test_random_placement_is_first_or_last_by_the_seed_alone(tokenizer: Any) -> None:
    def ids(placement: str, seed: tuple[int, ...] = (0,)) -> list[int]:
        settings = {"tokenizer": tokenizer, "image_placement": placement, "seed": seed}
        return encode_conversation(TURNS, **settings)["input_ids"].tolist()

    first, last = ids("first"), ids("last")
    assert first != last and sorted(first) == sorted(last)
    drawn = [ids("random", (7, step, slot)) for step in range(10) for slot in range(10)]
    assert drawn == [ids("random", (7, step, slot)) for step in range(10) for slot in range(10)]
    assert 30 < sum(one == first for one in drawn) < 70 and all(one in (first, last) for one in drawn)
    assert drawn != [ids("random", (8, step, slot)) for step in range(10) for slot in range(10)]


def test_a_template_without_a_place_for_a_system_message_says_so(tokenizer: Any) -> None:
    turns = [{"from": "system", "value": "A"}, *TURNS[:2]]
    with pytest.raises(BadRecord, match="template 'llava1_5_hf' has no place for a system message"):
        encode_conversation(turns, "llava1_5_hf", tokenizer=tokenizer)


def test_an_assistants_first_message_is_left_out_and_named() -> None:
    greeting = {"from": "gpt", "value": "Hello."}
    for system in ([], [{"from": "system", "value": "A"}]):
        record = parse_record({"image": "a.png", "conversations": [*system, greeting, *TURNS]})
        kept, left_out = begin_with_user(record)
        assert kept.messages == parse_record({"image": "a.png", "conversations": [*system, *TURNS]}).messages
        assert "Hello." in left_out and begin_with_user(kept) == (kept, "")
    shown = parse_record({"image": "a.png", "conversations": [{"from": "gpt", "value": "<image>Hello."}, *TURNS[2:]]})
    assert begin_with_user(shown) == (shown, "")  # an image is not lost: the record is malformed


def test_tolerated_records_stop_no_run_unless_nothing_is_left(tmp_path: Path) -> None:
    listed = BadRecordList(tmp_path, step=0)
    counts = {"mismatch": 700, "assistant_first": 1000, "too_long": 9}
    listed.check(counts, seen=1000, samples=5000, allowed=0.01)
    with pytest.raises(UsageError, match=r"20 of 1000 records cannot be used.*20 too_long"):
        listed.check({**counts, "too_long": 20}, seen=1000, samples=5000, allowed=0.01)
    with pytest.raises(UsageError, match="compat_drop_mismatch drops all of the first 1000 records"):
        listed.check({"mismatch": 1000}, seen=1000, samples=5000, allowed=0.01)
