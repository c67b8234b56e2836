"""The texts of the templates, their names, and their Jinja form."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vlm_jax.data import (
    IMAGE_ID,
    UNTRAINED,
    chat_template,
    encode_conversation,
    encode_prompt,
    template_of,
)
from vlm_jax.data.templates import ALIASES, TEMPLATES, get_template
from vlm_jax.errors import UsageError

# What LLaVA's registry (llava/conversation.py) makes of the two turns of TURNS: whole, and up to the second answer.
REFERENCE = json.loads((Path(__file__).parent / "llava_prompts.json").read_text())
TURNS = [
    {"from": "human", "value": "<image>\nQ1"},
    {"from": "gpt", "value": "A1"},
    {"from": "human", "value": "Q2"},
    {"from": "gpt", "value": "A2"},
]
# The same turns in the templates that others made of LLaVA's, and what is trained of them.
CURIOUS = get_template("vicuna_v1").system
HUMAN = get_template("llava_v1").system
VARIANTS = {
    "vicuna_v1_hf": "USER: <image>\nQ1 ASSISTANT:| A1</s>|USER: Q2 ASSISTANT:| A2</s>",
    "mistral_instruct_hf": "[INST] <image>\nQ1 [/INST]| A1</s>|[INST] Q2 [/INST]| A2</s>",
    "llava": f"{CURIOUS} USER: <image>\nQ1 ASSISTANT:|A1</s>|USER: Q2 ASSISTANT:|A2</s>",
    "llava_next_mistral": "[INST] <image>\nQ1[/INST]| A1</s>|[INST] Q2[/INST]| A2</s>",
    "llava_next_yi": "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\n|A1<|im_end|>\n|"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n|A2<|im_end|>\n",
    "llava1_5_hf": "USER: <image>\nQ1\nASSISTANT:|A1</s>|USER: Q2\nASSISTANT:|A2</s>",
    "llava1_6_mistral_hf": "[INST] <image>\nQ1 [/INST]|A1</s>|[INST] Q2 [/INST]|A2</s>",
    "llava1_6_vicuna_hf": f"{HUMAN} USER: <image>\nQ1 ASSISTANT:|A1</s>|USER: Q2 ASSISTANT:|A2</s>",
    "llava_llama_3": "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n|A1<|eot_id|>|<|start_header_id|>user<|end_header_id|>\n\nQ2"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n|A2<|eot_id|>",
    "mistral_zephyr": "<|system|>\nYou are a helpful AI assistant.</s><|user|>\n<image>\nQ1</s><|assistant|>\n|A1</s>|"
    "<|user|>\nQ2</s><|assistant|>\n|A2</s>",
    # LLaVA-NeXT trains the assistant's header, and marks and newlines everywhere.
    "qwen_1_5": "|<|im_start|>|system|\n|You are a helpful assistant.|<|im_end|>\n<|im_start|>|user|\n|<image>|\n|Q1|"
    "<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>|user|\n|Q2|<|im_end|>\n<|im_start|>assistant\n"
    "A2<|im_end|>\n",
    # What is trained of v0; what is asked is in REFERENCE. Without a BOS, LLaVA's mask does not move from turn to turn.
    "llava_v0": f"{HUMAN}\n\n|### Human|: <image>\nQ1\n|### Assistant: A1\n### Human|: Q2\n|### Assistant: A2\n### ",
}


@pytest.fixture(scope="module")
def letters() -> Any:
    """One token per byte and per mark of a template, so that ids are text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    marks = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in ("<s>", "</s>", *marks)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def text(tokenizer: Any, ids: Any) -> str:
    pieces: list[Any] = [[]]
    for number in ids.tolist():
        if number == IMAGE_ID:
            pieces.append([])
        else:
            pieces[-1].append(number)
    return "<image>".join(tokenizer.decode(piece) for piece in pieces)


def spans(tokenizer: Any, encoded: dict[str, Any]) -> str:
    """The text, with | where training begins and ends."""
    ids, trained = encoded["input_ids"], encoded["labels"] != UNTRAINED
    cuts = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
    parts = [text(tokenizer, ids[start:stop]) for start, stop in itertools.pairwise(cuts)]
    return "|" * bool(trained[0]) + "|".join(parts)


@pytest.mark.parametrize("name", REFERENCE)
def test_prompts_and_conversations_are_llavas(letters: Any, name: str) -> None:
    assert text(letters, encode_prompt(TURNS[:3], name, tokenizer=letters).input_ids) == REFERENCE[name]["open"]
    if get_template(name).prompted is None:
        whole = text(letters, encode_conversation(TURNS, name, tokenizer=letters)["input_ids"])
        assert whole == REFERENCE[name]["whole"]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_differ_where_their_makers_do(letters: Any, name: str) -> None:
    assert spans(letters, encode_conversation(TURNS, name, tokenizer=letters)) == VARIANTS[name]


@pytest.mark.parametrize("name", sorted({*TEMPLATES} - {"plain"}))
def test_a_prompt_is_the_beginning_and_every_answer_is_trained(letters: Any, name: str) -> None:
    encoded = encode_conversation(TURNS, name, tokenizer=letters)
    whole, shape = text(letters, encoded["input_ids"]), get_template(name)
    prompt = encode_prompt(TURNS[:3], name, tokenizer=letters)
    assert shape.prompted is not None or whole.startswith(text(letters, prompt.input_ids))
    trained = text(letters, encoded["labels"][encoded["labels"] != UNTRAINED])
    assert all(answer in trained for answer in ("A1", "A2")) and "Q" not in trained
    assert prompt.stop_ids or prompt.stop_strings
    stops = [stop.replace("{eos}", letters.eos_token) for stop in shape.stop]
    assert any(stop in trained.rpartition("A2")[2] for stop in stops)


def test_a_records_system_message_stands_where_the_templates_own_does(letters: Any) -> None:
    for name in TEMPLATES:
        turns = [{"from": "system", "value": "S."}, *TURNS[:3]]
        if any("{system}" in piece for piece in get_template(name).begin):
            rendered = text(letters, encode_prompt(turns, name, tokenizer=letters).input_ids)
            assert rendered.count("S.") == 1 and (get_template(name).system or "<image>") not in rendered.split("S.")[0]
    mistral = text(letters, encode_prompt(turns, "mistral_instruct", tokenizer=letters).input_ids)
    assert mistral.startswith("[INST] <<SYS>>\nS.\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s>[INST] Q2")


def test_every_name_of_llava_is_there() -> None:
    llava = """chatml_direct default llama_2 llava_llama_2 llava_v0 llava_v1 mistral_direct mistral_instruct mpt plain
    v0 v0_mmtag v0_plain v1 v1_mmtag vicuna_v1""".split()
    assert all(get_template(name) for name in llava)
    same = {"default": "v0", "v1": "vicuna_v1", "mistral_direct": "chatml_direct", "v0_plain": "plain"}
    assert all(get_template(a) is get_template(b) for a, b in same.items())
    assert not ALIASES.keys() & TEMPLATES.keys()
    with pytest.raises(UsageError, match="did you mean 'chatml_direct'"):
        get_template("chatml_dirct")


IMAGE = {"type": "image"}
CHATS = {
    "an image and two turns": [
        ("user", [IMAGE, {"type": "text", "text": "What is it? "}]),
        ("assistant", [{"type": "text", "text": 'A "cat"\n<|im_end|> {{ x }}'}]),
        ("user", "And that?"),
    ],
    "several images stay": [("user", [IMAGE, {"type": "text", "text": "or "}, IMAGE, {"type": "text", "text": "?"}])],
    "an image alone": [("user", [IMAGE])],
    "an image in a later turn": [
        ("user", "Hello."),
        ("assistant", "Hi."),
        ("user", [{"type": "text", "text": "Why?\n"}, IMAGE]),
    ],
    "a system message": [("system", "Be brief."), ("user", [{"type": "text", "text": " No image. "}])],
}


@pytest.mark.parametrize("case", CHATS)
def test_the_jinja_form_renders_what_we_render(letters: Any, case: str) -> None:
    chat = [{"role": role, "content": content} for role, content in CHATS[case]]
    whole = [*chat, {"role": "assistant", "content": "That's it — 42."}]
    for name in TEMPLATES:
        jinja, shape = chat_template(name), get_template(name)
        assert (jinja is None) == shape.apart
        assert jinja is None or chat_template(template_of(jinja)) == jinja
        turns = sum(message["role"] != "system" for message in chat)
        if jinja is None or (shape.one_turn and turns > 1):
            continue
        if chat[0]["role"] == "system" and not (shape.one_turn or any("{system}" in piece for piece in shape.begin)):
            continue
        rendered = letters.apply_chat_template(chat, chat_template=jinja, tokenize=False, add_generation_prompt=True)
        assert rendered == text(letters, encode_prompt(chat, name, tokenizer=letters).input_ids), name
        if shape.prompted is None:
            rendered = letters.apply_chat_template(whole, chat_template=jinja, tokenize=False)
            assert rendered == text(letters, encode_conversation(whole, name, tokenizer=letters)["input_ids"]), name


def test_the_page_of_templates_lists_all_of_them(repository: Path) -> None:
    page = (repository / "docs/reference/templates.md").read_text()
    names = dict(re.findall(r"^\| `(\w+)` \| (?:`(\w+)` )?\|", page, re.MULTILINE))
    assert names.keys() == TEMPLATES.keys()
    assert {also: name for name, also in names.items() if also} == ALIASES
