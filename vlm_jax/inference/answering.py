"""Answers many questions: those whose shapes are alike share a batch, and the answers come in the questions' order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.data.records import BadRecord
from vlm_jax.inference.questions import Answer, Question
from vlm_jax.inference.vlm import VLM, Encoded, Request, as_messages
from vlm_jax.models.sampling import GREEDY, Sampling

AHEAD = 8  # batches that may be encoded and wait for others of their bucket


def answer_all(
    vlm: VLM,
    questions: Sequence[Question],
    folder: Path,
    *,
    batch: int,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Iterator[list[Answer]]:
    """Answers in the order of the questions, in lists as they become ready.

    A question waits until `batch` of its bucket are there, or until it holds up `AHEAD` batches; one that cannot be
    asked is answered with its error. `folder` holds the images; `seed` plus the question's number is the seed of its
    draws.
    """
    waiting: dict[Any, list[tuple[Question, Encoded]]] = {}
    bucket_of: dict[int, Any] = {}
    ready: dict[int, Answer] = {}
    order: deque[Question] = deque()  # those that were taken up and not given back yet

    def run(bucket: Any) -> None:
        asked = waiting.pop(bucket)
        texts = vlm.answer_encoded(
            [encoded for _, encoded in asked], rows=batch, max_new_tokens=max_new_tokens, sampling=sampling
        )
        ready.update({one.number: Answer(one, text) for (one, _), text in zip(asked, texts, strict=True)})

    def take() -> list[Answer]:
        taken = []
        while order and order[0].number in ready:
            taken.append(ready.pop(order.popleft().number))
        return taken

    for question in questions:
        order.append(question)
        try:
            messages = as_messages(question.text, len(question.images))
            encoded = vlm.encode(Request(messages, question.images, str(folder), seed + question.number))
        except BadRecord as error:
            ready[question.number] = Answer(question, "", str(error))
        else:
            bucket_of[question.number] = encoded.bucket
            waiting.setdefault(encoded.bucket, []).append((question, encoded))
            if len(waiting[encoded.bucket]) == batch:
                run(encoded.bucket)
        if len(order) >= AHEAD * batch and order[0].number not in ready:
            run(bucket_of[order[0].number])
        if taken := take():
            yield taken
    while order:
        if order[0].number not in ready:
            run(bucket_of[order[0].number])
        yield take()
