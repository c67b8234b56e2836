"""Files of questions and of answers, in LLaVA's formats (haotian-liu/LLaVA llava/eval/model_vqa.py).

    {"question_id": 7, "image": "cat.jpg", "text": "What is this?"}
    {"question_id": 7, "prompt": "What is this?", "text": "A cat", "answer_id": "...", "model_id": "w1", "metadata": {}}

`image` is relative to the images folder; it may be a list, or absent. `category` is allowed and ignored. An answer
that could not be given has an empty `text` and says why in `error`. Benchmarks (MME) repeat a `question_id`, so that
it is the pair with the text that tells questions apart.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.errors import UsageError, suggest

FIELDS = ("question_id", "image", "text", "category")
ELSEWHERE = "choose another --output"

Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Question:
    """`number` counts the questions of the file from 0."""

    number: int
    id: Any
    text: str
    images: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return json.dumps(self.id), self.text


@dataclasses.dataclass(frozen=True)
class Answer:
    """`error` is empty where there is one."""

    question: Question
    text: str
    error: str = ""


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a JSONL file. Raises UsageError that names the line which is not one."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"the questions {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the questions {file} are not UTF-8 text") from None
    if lines[0].lstrip().startswith("["):
        raise UsageError(f"the questions {file} are a JSON list: put each question on a line of its own")
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            questions.append(_question(line, len(questions), f"line {number} of {file}"))
    if not questions:
        raise UsageError(f"{file} holds no questions")
    return questions


def _question(line: str, number: int, where: str) -> Question:
    raw = _parse(line, where)
    for field in raw:
        if field not in FIELDS:
            raise UsageError(f"{where} has a field {field!r}{suggest(field, FIELDS)}; known: {', '.join(FIELDS)}")
    for field in ("question_id", "text"):
        if field not in raw:
            raise UsageError(f"{where} has no {field!r}")
    image = raw.get("image")
    images = image if isinstance(image, list) else [] if image is None else [image]
    if not isinstance(raw["text"], str) or not all(isinstance(name, str) for name in images):
        raise UsageError(f"{where}: 'text' is a string, and 'image' a path or a list of paths")
    return Question(number, raw["question_id"], raw["text"], tuple(images))


def _parse(line: str, where: str) -> Mapping[str, Any]:
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{where} is not an object")
    return raw


class AnswerFile:
    """Answers on disk, a line each, appended as they come. `left` are the questions that it does not answer yet.

    An interrupted run leaves half a line at worst; opening the file again drops it, and the answers that ended in an
    error, so that their questions are asked again. Raises UsageError for a file with anything else in it.
    """

    def __init__(self, path: str | os.PathLike[str], questions: Sequence[Question], model_id: str):
        self.path, self.model_id = Path(path).expanduser(), model_id
        self.total = len(questions)
        self.numbers: dict[Key, list[int]] = {}
        for question in questions:
            self.numbers.setdefault(question.key, []).append(question.number)
        try:
            before = self.path.read_bytes() if self.path.exists() else b""
            good = [(key, line) for key, line, error in self._lines(before) if not error]
            seen = Counter(key for key, _ in good)
            self.left = []
            for question in questions:
                if seen[question.key]:
                    seen[question.key] -= 1
                else:
                    self.left.append(question)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._replace(before, [line for _, line in good])
            with open(self.path, "ab"):
                pass  # that it can be written shows here, before a model is loaded
        except OSError as error:
            raise UsageError(f"cannot write the answers to {self.path}: {error.strerror}") from None

    def write(self, answers: Sequence[Answer]) -> None:
        """Appends answers."""
        try:
            with open(self.path, "ab") as file:
                file.write(b"".join(map(self._line, answers)))
        except OSError as error:
            raise UsageError(f"cannot write the answers to {self.path}: {error.strerror}") from None

    def sort(self) -> None:
        """Puts the lines into the order of the questions, where a question was asked again later."""
        before = self.path.read_bytes()
        places = {key: iter(numbers) for key, numbers in self.numbers.items()}
        numbered = sorted((next(places[key]), line) for key, line, _ in self._lines(before))
        self._replace(before, [line for _, line in numbered])

    def _replace(self, before: bytes, lines: Sequence[bytes]) -> None:
        if before != b"".join(lines):
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_bytes(b"".join(lines))
            temporary.replace(self.path)

    def _line(self, answer: Answer) -> bytes:
        question = answer.question
        line = {
            "question_id": question.id,
            "prompt": question.text,
            "text": answer.text,
            # Of what was asked, not by chance: the same command writes the same file.
            "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, f"{self.model_id} {question.number} {question.key}").hex,
            "model_id": self.model_id,
            "metadata": {},
            **({"error": answer.error} if answer.error else {}),
        }
        return json.dumps(line).encode() + b"\n"

    def _lines(self, content: bytes) -> Iterator[tuple[Key, bytes, bool]]:
        """(key, line, whether it is an error) of each whole line."""
        seen: Counter[Key] = Counter()
        *whole, half = content.split(b"\n")
        start = b'{"question_id": '
        if half[: len(start)] != start[: len(half)]:
            raise UsageError(f"{self.path} is not a file of answers; choose another --output")
        for number, line in enumerate(whole, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {self.path}"
            raw = _parse(line.decode("utf-8", "replace"), where)
            if not isinstance(raw.get("prompt"), str) or not {"question_id", "text", "model_id"} <= set(raw):
                raise UsageError(f"{where} is not an answer; choose another --output")
            key = (json.dumps(raw["question_id"]), raw["prompt"])
            seen[key] += 1
            if raw["model_id"] != self.model_id:
                raise UsageError(f"{where} is an answer of {raw['model_id']!r}, not {self.model_id!r}; {ELSEWHERE}")
            if seen[key] > len(self.numbers.get(key, ())):
                raise UsageError(f"{where} answers question {key[0]}, which was not asked; {ELSEWHERE}")
            yield key, line + b"\n", "error" in raw
