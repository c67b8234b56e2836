"""The quickstart's data set: right answers, held-out scans, the same bytes every time, a tokenizer that fits it."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoTokenizer

from vlm_jax.data import digits
from vlm_jax.errors import UsageError

SAMPLES = {"train_samples": 400, "eval_samples": 200, "align_samples": 60}
SPLITS = ("align", "train", "eval")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return digits.make_digits(tmp_path_factory.mktemp("made") / "digits", **SAMPLES)


@pytest.fixture(scope="module")
def records(directory) -> dict[str, list[dict]]:
    return {split: json.loads((directory / f"{split}.json").read_text()) for split in SPLITS}


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory / "tokenizer")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def every(records: dict[str, list[dict]]) -> list[dict]:
    return [record for split in SPLITS for record in records[split]]


def turns(record: dict) -> list[tuple[str, str]]:
    values = [message["value"] for message in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def answer_by_hand(question: str, layout: list[list[int]]) -> str:
    """The answer, read from the layout by another way than the maker's; fails if the question is ambiguous."""
    shown = {digits.CELLS[cell]: digit for cell, digit, _ in layout}
    if question in ("Which digit is this?", "Is this digit odd or even?"):
        (digit,) = shown.values()
        return str(digit) if question.startswith("Which") else ("even", "odd")[digit % 2]
    if named := re.fullmatch(r"Which digit is (.+)\?", question):
        return str(shown[named[1]])
    if named := re.fullmatch(r"Is the (.+) digit odd or even\?", question):
        return ("even", "odd")[shown[named[1]] % 2]
    if named := re.fullmatch(r"Where is the (\d)\?", question):
        (cell,) = [cell for cell, digit in shown.items() if digit == int(named[1])]
        return cell
    if question == "How many digits are there?":
        return str(len(shown))
    if question == "What is the sum?" and len(shown) > 1:
        return str(sum(shown.values()))
    assert question in ("Describe the image.", "")
    return re.sub(r", ([^,]+)$", r" and \1", ", ".join(f"{cell} {digit}" for cell, digit in shown.items()))


def sorted_by_digit(record: dict) -> list[list[int]]:
    return sorted(record["layout"], key=lambda glyph: (glyph[1], glyph[0]))


def caption(question: str, listed: str) -> list[str]:
    """The second form of a caption, which has no question."""
    return [] if question else [re.sub(r", ([^,]+)$", r" and \1", listed)]


def test_records_are_llava_records(directory, records):
    for split, count in zip(SPLITS, (60, 400, 200), strict=True):
        assert len(records[split]) == count == len({record["id"] for record in records[split]})
        for record in records[split]:
            first, *rest = turns(record)
            assert first[0] == "<image>" if split == "align" else first[0].startswith("<image>\n")
            assert not any("<image>" in question for question, _ in rest)
            assert [message["from"] for message in record["conversations"]] == ["human", "gpt"] * (1 + len(rest))
            assert (directory / "images" / record["image"]).is_file()
    assert {len(turns(record)) for record in records["train"]} == {1, 2, 3}
    assert {len(turns(record)) for record in records["eval"]} == {1}


def test_every_answer_is_right(records):
    scans = load_digits().target
    for record in every(records):
        assert [cell for cell, _, _ in record["layout"]] == sorted({cell for cell, _, _ in record["layout"]})
        assert len(record["layout"]) == record["scans"]
        assert all(scans[scan] == digit for _, digit, scan in record["layout"])
        questions = [question.removeprefix("<image>").lstrip("\n") for question, _ in turns(record)]
        assert len(set(questions)) == len(questions)
        for question, (_, answer) in zip(questions, turns(record), strict=True):
            by_digit = ", ".join(f"{digit} {digits.CELLS[cell]}" for cell, digit, _ in sorted_by_digit(record))
            assert answer in (answer_by_hand(question, record["layout"]), *caption(question, by_digit))


def test_the_mixture_is_the_stated_one(records):
    asked = Counter((record["kind"], record["scans"]) for record in records["eval"])
    stated = {(kind, n): 2 * row[n - 1] for kind, row in digits.MIXTURE.items() for n in digits.SCANS if row[n - 1]}
    assert asked == stated  # 200 records for 100 percent
    assert sum(map(sum, digits.MIXTURE.values())) == 100
    for kind, columns in re.findall(r"^    (\w+)((?: +[-\d]+){5})", digits.__doc__, re.MULTILINE):
        row = [0 if word == "-" else int(word) for word in columns.split()]
        totals = [sum(column) for column in zip(*digits.MIXTURE.values(), strict=True)]
        expected = totals if kind == "all" else digits.MIXTURE[kind]
        assert row == [*expected, sum(expected)]


def test_digits_are_balanced(records):
    """Dealt digits differ by at most one in each group; `where` may deal a canvas anew, hence the tolerance of 2."""
    for split, groups in (("train", [(None, None)]), ("eval", [("which", 1), ("parity", 2), ("where", 4)])):
        for kind, size in groups:
            chosen = [r for r in records[split] if kind is None or (r["kind"], r["scans"]) == (kind, size)]
            count = Counter(digit for record in chosen for _, digit, _ in record["layout"])
            assert max(count.values()) - min(count[d] for d in range(10)) <= 2


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_scans_are_never_trained_on(records, tmp_path, seed):
    if seed:
        made = digits.make_digits(tmp_path / "digits", **SAMPLES, seed=seed)
        records = {split: json.loads((made / f"{split}.json").read_text()) for split in SPLITS}
    shown = {split: {glyph[2] for r in records[split] for glyph in r["layout"]} for split in SPLITS}
    assert not shown["eval"] & (shown["train"] | shown["align"])
    kept, held_out = digits.split_scans(load_digits().target, seed)
    assert [len(numbers) for numbers in held_out] == [digits.HELD_OUT_PER_DIGIT] * 10
    assert sorted(np.concatenate(kept + held_out)) == list(range(1797))
    assert shown["eval"] <= set(np.concatenate(held_out).tolist())


def test_images_are_small_rgb_with_ink_in_the_cells_of_the_layout(directory, records):
    for record in every(records):
        image = Image.open(directory / "images" / record["image"])
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (digits.CANVAS_SIDE, digits.CANVAS_SIDE))
        grey = np.asarray(image.convert("L"), np.float32).reshape(2, digits.CELL_SIDE, 2, digits.CELL_SIDE)
        spread = np.ptp(grey.transpose(0, 2, 1, 3).reshape(4, -1), axis=1)
        drawn = {cell for cell, _, _ in record["layout"]}
        # Empty paper spans at most 2 x 4.5 sigma = 54 grey levels of noise, the faintest pen 0.75 x 90 = 67 of ink.
        assert drawn == set(np.flatnonzero(spread > 57).tolist())


def test_two_makes_are_byte_equal_and_a_seed_changes_all(directory, tmp_path):
    again = contents(digits.make_digits(tmp_path / "again", **SAMPLES))
    assert again == contents(directory)
    other = contents(digits.make_digits(tmp_path / "other", **SAMPLES, seed=1))
    assert other.keys() == again.keys()
    same = {name for name in again if again[name] == other[name]}
    assert {name for name in same if not name.startswith("tokenizer")} == set()


def test_a_finished_directory_is_reused_and_another_setting_replaces_it(tmp_path):
    small = {"train_samples": 3, "eval_samples": 2, "align_samples": 1}
    made = digits.make_digits(tmp_path / "digits", **small)
    marker = made / "images" / "marker"
    marker.write_text("")
    assert digits.make_digits(made, **small) == made and marker.exists()
    digits.make_digits(made, **small, seed=1)
    assert not marker.exists() and len(json.loads((made / "train.json").read_text())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_makers_at_the_same_time_do_not_clash(tmp_path):
    small = {"train_samples": 30, "eval_samples": 20, "align_samples": 10}
    alone = contents(digits.make_digits(tmp_path / "alone", **small))
    failures = []

    def make():
        try:
            digits.make_digits(tmp_path / "shared", **small)
        except Exception as error:
            failures.append(error)

    makers = [threading.Thread(target=make) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert not failures and contents(tmp_path / "shared") == alone
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "shared"}


def test_it_replaces_nothing_that_it_did_not_make(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="was not made by make_digits"):
        digits.make_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="eval_samples is 0"):
        digits.make_digits(tmp_path / "digits", eval_samples=0)


def test_the_tokenizer_knows_every_word_and_gives_the_answers_back(records, tokenizer):
    assert len(tokenizer) <= 80  # as small as the data set allows: its embedding is trained from scratch
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    for record in every(records):
        for question, answer in turns(record):
            text = f"{digits.VICUNA_SYSTEM} USER: {question.removeprefix('<image>')} ASSISTANT: {answer}</s>"
            ids = tokenizer(text).input_ids
            assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(tokenizer(answer, add_special_tokens=False).input_ids) == answer
            caption = tokenizer(answer + "\n", add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in caption and len(caption) <= 12


def test_pieces_of_a_prompt_give_the_tokens_of_the_whole(tokenizer):
    """Encoders cut a prompt at the image, and label masks cut it at the answer: neither may change a token."""
    pieces = [f"{digits.VICUNA_SYSTEM} USER: ", "\nWhich digit is top left?", " ASSISTANT: ", "7 top left", "</s>USER:"]
    whole = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
    apart = [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
    assert whole.input_ids == list(itertools.chain.from_iterable(apart))
    text = "".join(pieces)
    words = [text[start:end] for start, end in whole.offset_mapping]
    assert words == tokenizer.convert_ids_to_tokens(whole.input_ids)
    assert words[:4] == [digits.VICUNA_SYSTEM, "USER:", "\n", "Which"]


def test_importing_the_module_imports_no_scikit_learn(run_python):
    code = "import sys, vlm_jax.data.digits; assert 'sklearn' not in sys.modules"
    assert run_python("-c", code).returncode == 0


def test_the_chat_tokenizer_adds_the_words_of_the_other_templates(directory, tokenizer):
    chat = AutoTokenizer.from_pretrained(directory / "tokenizer_chat")
    assert tokenizer.get_vocab().items() < chat.get_vocab().items()
    text = "<|im_start|>system\nAnswer the questions.<|im_end|>[INST] Which digit is this? [/INST] 7</s>"
    words = chat.tokenize(text)
    assert words[:5] == ["<|im_start|>", "system", "\n", "Answer the questions.", "<|im_end|>"]
    assert words[5] == "[INST]" and words[-3:] == ["[/INST]", "7", "</s>"] and chat.unk_token not in words
