"""Exact match by generation: the model answers the last question of each record, and the answer must be the truth."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlm_jax.data.conversation import begin_with_user
from vlm_jax.data.records import BadRecord, Message, Record


class Records(Protocol):
    """Reads one record at a time; raises BadRecord for one that is malformed."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


Answer = Callable[[Sequence[Record]], list[str]]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One answered question. `extra` are the record's other keys."""

    id: str
    question: str
    answer: str
    truth: str
    correct: bool
    images: tuple[Any, ...]
    extra: Mapping[str, Any]


def questions(source: Records, limit: int | None = None) -> Iterator[tuple[Record, Message]]:
    """(the record without its last answer, that answer), evenly spread over the source if there are more than `limit`.

    Records that are malformed or do not end with an answer are left out; training counts and lists those.
    """
    count = len(source)
    wanted = range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]
    for i in wanted:
        try:
            record, _ = begin_with_user(source[i])
        except BadRecord:
            continue
        if len(record.messages) > 1 and record.messages[-1].role == "assistant":
            yield dataclasses.replace(record, messages=record.messages[:-1]), record.messages[-1]


def exact_match(source: Records, answer: Answer, *, batch: int, limit: int | None = None) -> list[Prediction]:
    """Answers up to `limit` questions, `batch` at a time. Case and surrounding space do not count."""
    asked = list(questions(source, limit))
    predictions = []
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        for (record, truth), given in zip(some, answer([record for record, _ in some]), strict=True):
            predictions.append(
                Prediction(
                    id=record.id,
                    question=record.messages[-1].text.strip(),
                    answer=given,
                    truth=truth.text.strip(),
                    correct=given.strip().lower() == truth.text.strip().lower(),
                    images=record.images,
                    extra=record.extra,
                )
            )
    return predictions


def write_predictions(predictions: Sequence[Prediction], images: Path, path: Path) -> None:
    """One JSON line each, the record's other keys among them; `images` is the folder of the images' names."""
    with open(path, "w") as file:
        for one in predictions:
            row = {field.name: getattr(one, field.name) for field in dataclasses.fields(one) if field.name != "extra"}
            shown = [str(images / image) for image in one.images if isinstance(image, str)]
            file.write(json.dumps({**one.extra, **row, "images": shown}) + "\n")


def read_predictions(path: Path) -> list[Prediction]:
    names = [field.name for field in dataclasses.fields(Prediction) if field.name != "extra"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Prediction(**{name: row.pop(name) for name in names}, extra=row) for row in rows]


def accuracy(predictions: Sequence[Prediction]) -> float:
    return sum(one.correct for one in predictions) / len(predictions) if predictions else float("nan")


def table(predictions: Sequence[Prediction], by: Sequence[str]) -> str:
    """Accuracy in percent: rows by the first key of the records, columns by the second, with totals."""
    row_key, column_key = (*by, None, None)[:2]

    def label(one: Prediction, key: str | None) -> str:
        return str(one.extra.get(key, "-")) if key else "accuracy"

    cells: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
    for one in predictions:
        for row in {label(one, row_key), "all"}:
            for column in {label(one, column_key), "all"} if column_key else {"accuracy"}:
                cells[row, column].append(one)
    rows = [*sorted({row for row, _ in cells} - {"all"}), "all"] if row_key else ["all"]
    columns = sorted({column for _, column in cells} - {"all"}) + (["all"] if column_key else [])
    head = f"{row_key or '':<12}" + "".join(f"{column:>10}" for column in columns) + f"{'questions':>12}"
    lines = [f"{'':<12}{column_key:>10}" if column_key else "", head]
    for row in rows:
        shown = [f"{accuracy(cells[row, c]):.1%}" if cells[row, c] else "-" for c in columns]
        lines.append(f"{row:<12}" + "".join(f"{text:>10}" for text in shown) + f"{len(cells[row, columns[-1]]):>12}")
    return "\n".join(line for line in lines if line)
