"""Files of questions and answers: what is refused, what survives an interruption, and in which order answers come."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vlm_jax.data.records import BadRecord
from vlm_jax.errors import UsageError
from vlm_jax.inference.answering import AHEAD, answer_all
from vlm_jax.inference.questions import Answer, AnswerFile, Question, read_questions


def write(folder: Path, *lines: Any, name: str = "questions.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def asked(count: int, **changes: Any) -> list[Question]:
    return [dataclasses.replace(Question(i, i, f"text {i}"), **changes) for i in range(count)]


def lines_of(file: AnswerFile) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.path.read_text().splitlines()]


def test_llavas_questions_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"question_id": 7, "image": "a.png", "text": "Who?", "category": "default"},
        "",
        {"question_id": "b/c.png", "text": "Why?"},
        {"question_id": "b/c.png", "image": ["a.png", "b.png"], "text": "Wherefore?"},
    )
    first, second, third = read_questions(file)
    assert first == Question(0, 7, "Who?", ("a.png",))
    assert second == Question(1, "b/c.png", "Why?", ())
    assert third.images == ("a.png", "b.png") and third.number == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"question_id": 1, "text": "Why?", "img": "a.png"}, "line 2 .* has a field 'img' .did you mean 'image'"),
        ({"question_id": 1, "image": "a.png"}, "line 2 .* has no 'text'"),
        ({"text": "Why?"}, "line 2 .* has no 'question_id'"),
        ({"question_id": 1, "text": 5}, "line 2 .*'text' is a string"),
        ({"question_id": 1, "text": "Why?", "image": [5]}, "line 2 .*'image' a path or a list"),
        ('{"question_id": 1, ', "line 2 .* is not JSON"),
        ("7", "line 2 .* is not an object"),
    ],
)
def test_what_is_no_question_is_named_with_its_line(tmp_path: Path, line: Any, says: str) -> None:
    file = write(tmp_path, {"question_id": 0, "text": "Who?"}, line)
    with pytest.raises(UsageError, match=says):
        read_questions(file)


def test_what_is_no_file_of_questions_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    for file, says in [
        (tmp_path / "none.jsonl", "cannot be read"),
        (tmp_path, "cannot be read"),
        (binary, "not UTF-8"),
        (write(tmp_path, [{"question_id": 1}], name="list.json"), "a JSON list"),
        (write(tmp_path, "", name="empty.jsonl"), "holds no questions"),
    ]:
        with pytest.raises(UsageError, match=says):
            read_questions(file)


def test_answers_have_llavas_fields_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    questions = [*asked(2), Question(2, "é", "half \ud83d")]
    contents = []
    for name in ("a", "b"):
        file = AnswerFile(tmp_path / "new" / name, questions, "model")
        assert file.left == questions
        file.write([Answer(question, "猫") for question in questions])
        contents.append(file.path.read_bytes())
    assert contents[0] == contents[1]
    first, _, third = lines_of(file)
    assert list(first) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (first["question_id"], first["prompt"], first["text"]) == (0, "text 0", "猫")
    assert (third["question_id"], third["prompt"]) == ("é", "half \ud83d")
    assert len({line["answer_id"] for line in lines_of(file)}) == 3


def test_an_interrupted_file_is_mended_wherever_it_was_cut(tmp_path: Path) -> None:
    questions = asked(4)
    file = AnswerFile(tmp_path / "a", questions, "m")
    file.write([Answer(question, f"so {question.id}") for question in questions])
    whole = file.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        file.path.write_bytes(whole[:cut])
        again = AnswerFile(file.path, questions, "m")
        kept = sum(end <= cut for end in ends)
        assert again.left == questions[kept:]
        again.write([Answer(question, f"so {question.id}") for question in again.left])
        assert file.path.read_bytes() == whole


def test_errors_are_asked_again_and_end_in_their_place(tmp_path: Path) -> None:
    questions = asked(3)
    file = AnswerFile(tmp_path / "a", questions, "m")
    file.write([Answer(questions[0], "so"), Answer(questions[1], "", "no image"), Answer(questions[2], "so")])
    assert lines_of(file)[1]["error"] == "no image" and lines_of(file)[1]["text"] == ""
    again = AnswerFile(file.path, questions, "m")
    assert again.left == questions[1:2] and len(lines_of(again)) == 2
    again.write([Answer(questions[1], "so")])
    again.sort()
    assert [line["question_id"] for line in lines_of(again)] == [0, 1, 2]
    assert "error" not in lines_of(again)[1]


def test_questions_that_share_their_id_are_told_apart(tmp_path: Path) -> None:
    questions = [Question(0, "a.png", "Is it?"), Question(1, "a.png", "Isn't it?"), Question(2, "a.png", "Is it?")]
    file = AnswerFile(tmp_path / "a", questions, "m")
    file.write([Answer(questions[1], "no"), Answer(questions[0], "yes")])
    again = AnswerFile(file.path, questions, "m")
    assert again.left == questions[2:]
    again.write([Answer(questions[2], "still yes")])
    again.sort()
    assert [line["text"] for line in lines_of(again)] == ["yes", "no", "still yes"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question_id": 0, "text": "text 0"}\n', "line 1 .* is not an answer"),
        ("dear diary", "is not a file of answers"),
        ("dear diary\n", "line 1 .* is not JSON"),
        ('{"question_id": 0, "prompt": "text 0", "text": "", "model_id": "other"}\n', "an answer of 'other', not 'm'"),
        ('{"question_id": 9, "prompt": "text 9", "text": "", "model_id": "m"}\n', "answers question 9, which was not"),
        ('{"question_id": 0, "prompt": "text 1", "text": "", "model_id": "m"}\n', "answers question 0, which was not"),
        ('{"question_id": 0, "prompt": ["a"], "text": "", "model_id": "m"}\n', "is not an answer"),
    ],
)
def test_a_file_with_anything_else_is_refused_and_left_alone(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "a"
    file.write_text(content)
    with pytest.raises(UsageError, match=says):
        AnswerFile(file, asked(2), "m")
    assert file.read_text() == content
    with pytest.raises(UsageError, match="cannot write"):
        AnswerFile(tmp_path, asked(2), "m")


@dataclasses.dataclass
class Encoded:
    text: str

    @property
    def bucket(self) -> int:
        return len(self.text.split()[0])


class FakeVLM:
    """Buckets by the length of the first word; cannot read "bad"."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode(self, request: Any) -> Encoded:
        text = request.messages[0]["content"].split("\n")[-1]
        if text.startswith("bad"):
            raise BadRecord("missing_image", "there is none")
        return Encoded(f"{text} {request.seed}")

    def answer_encoded(self, encoded: Sequence[Encoded], *, rows: int, **settings: Any) -> list[str]:
        assert len(encoded) <= rows and len({one.bucket for one in encoded}) == 1
        self.batches.append([one.text for one in encoded])
        return [f"re: {one.text}" for one in encoded]


def test_answers_come_in_order_from_full_batches_of_one_bucket() -> None:
    words = ["a", "bb", "bad", "a", "a", "bb", "a", "ccc", "a", "bad"]
    questions = [Question(i, i, f"{word} {i}") for i, word in enumerate(words)]
    vlm = FakeVLM()
    parts = list(answer_all(vlm, questions, Path("."), batch=2, seed=100))
    answers = [answer for part in parts for answer in part]
    assert [answer.question for answer in answers] == questions
    for answer, word in zip(answers, words, strict=True):
        number = answer.question.number
        # The seed of a question is its own, wherever an interrupted run goes on.
        expected = ("", "there is none") if word == "bad" else (f"re: {word} {number} {100 + number}", "")
        assert (answer.text, answer.error) == expected
    assert sorted(map(len, vlm.batches)) == [1, 1, 2, 2, 2]
    assert len(parts[0]) == 1  # the first is given out as soon as its batch is full


def test_a_rare_bucket_does_not_hold_up_the_rest_for_ever() -> None:
    words = ["rare", *["a"] * 200]
    questions = [Question(i, i, f"{word} {i}") for i, word in enumerate(words)]
    vlm, taken = FakeVLM(), 0

    def count(questions: Sequence[Question]) -> Any:
        nonlocal taken
        for question in questions:
            taken += 1
            yield question

    for part in answer_all(vlm, count(questions), Path("."), batch=2):
        assert taken <= 2 * AHEAD and part
        break
