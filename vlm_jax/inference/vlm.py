"""A vision-language model that answers: weights, tokenizer, template and image settings in one object."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from vlm_jax.data import ImageSettings, encode_prompt, open_image, process
from vlm_jax.data.rows import PREFIX_FUSION, Row, collate, fusion_row
from vlm_jax.errors import UsageError
from vlm_jax.families import LlavaFamily
from vlm_jax.models.binding import Params
from vlm_jax.models.generation import DecodeState, Sampling, make_decode, make_prefill
from vlm_jax.sharding import RULES, batch_shards, place

STREAM = 8  # tokens between two looks at a stream


@dataclasses.dataclass(frozen=True)
class Request:
    """One question: LLaVA's or chat messages, the last of them the user's, and the images they show, in their order
    (PIL images, encoded bytes, or paths relative to `folder`)."""

    messages: Any
    images: Sequence[Any] = ()
    folder: str | None = None
    seed: int = 0


class VLM:
    """Answers requests, alone or in batches. One compilation per bucket of lengths, tiles and rows."""

    def __init__(
        self, family: LlavaFamily, params: Params, *, tokenizer: Any, template: str, images: ImageSettings
    ):
        self.family, self.params = family, params
        self.tokenizer, self.template, self.images = tokenizer, template, images
        self._prefill = functools.cache(self._make_prefill)
        self._decode = functools.cache(self._make_decode)

    def with_params(self, params: Params) -> VLM:
        """The same model with other weights; what is compiled is kept."""
        other = object.__new__(VLM)
        other.__dict__.update(self.__dict__, params=params)
        return other

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        images: Sequence[Any] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The answer to a question, or to chat messages with image parts. Greedy unless `temperature` is above 0."""
        request = Request(as_messages(prompt, len(images)), images, seed=seed)
        (answer,) = self.answer([request], max_new_tokens=max_new_tokens, sampling=Sampling(temperature, top_p))
        return answer

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 256, sampling: Sampling = Sampling()
    ) -> list[str]:
        """Answers a batch with any mix of lengths and numbers of images."""
        rows, stop_ids, stop_strings = self._rows(requests)
        state, seeds, _ = self._start(rows, requests, max_new_tokens, sampling)
        decode = self._decode(_power(max_new_tokens), stop_ids, sampling)
        _, tokens = decode(self.params, state, seeds)
        tokens = np.asarray(tokens)[: len(requests), :max_new_tokens]
        return [self._text(row, stop_ids, stop_strings) for row in tokens]

    def stream(
        self, request: Request, *, max_new_tokens: int = 256, sampling: Sampling = Sampling()
    ) -> Iterator[str]:
        """The answer in pieces as it is made."""
        rows, stop_ids, stop_strings = self._rows([request])
        state, seeds, _ = self._start(rows, [request], max_new_tokens, sampling)
        decode = self._decode(STREAM, stop_ids, sampling)
        ids: list[int] = []
        shown = ""
        while len(ids) < max_new_tokens:
            state, tokens = decode(self.params, state, seeds)
            ids += [int(token) for token in np.asarray(tokens)[0] if token >= 0]
            finished = bool(np.asarray(state.done)[0])
            text = self._text(np.asarray(ids[:max_new_tokens]), stop_ids, stop_strings, strip=False)
            text = text if finished else text.rstrip("\ufffd")  # half of a character waits for its other half
            if text.startswith(shown) and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
            if finished:
                return

    def logits(self, requests: Sequence[Request]) -> np.ndarray:
        """Logits float32 [len(requests), V] of the first token of each answer."""
        rows, _, _ = self._rows(requests)
        return np.asarray(self._start(rows, requests, 1, Sampling())[2])[: len(requests)]

    def _rows(self, requests: Sequence[Request]) -> tuple[list[Row], tuple[int, ...], tuple[str, ...]]:
        rows = []
        stops: tuple[tuple[int, ...], tuple[str, ...]] = ((), ())
        for request in requests:
            prompt = encode_prompt(request.messages, self.template, tokenizer=self.tokenizer)
            given = [image for image in prompt.images if image is not None] or list(request.images)
            if len(given) != len(prompt.images):
                raise UsageError(f"the messages show {len(prompt.images)} image(s), but {len(given)} were given")
            tiles = [process(open_image(image, request.folder), self.images)[None] for image in given]
            labels = np.full_like(prompt.input_ids, -100)
            rows.append(
                fusion_row(prompt.input_ids, labels, tiles, self.family.features_per_tile, self.images.size)
            )
            stops = prompt.stop_ids, prompt.stop_strings
        return rows, *stops

    def _start(
        self, rows: Sequence[Row], requests: Sequence[Request], new_tokens: int, sampling: Sampling
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        budgets = {
            "T": _power(max(len(row["tokens"]) for row in rows), least=16),
            "K": _power(max(1, *(len(row["tile_image"]) for row in rows))),
            "P": self.family.features_per_tile,
            "H": self.images.size,
            "W": self.images.size,
        }
        shards = batch_shards()
        count = -(-_power(len(rows)) // shards) * shards
        arrays = collate([*rows, *[None] * (count - len(rows))], PREFIX_FUSION, budgets)
        mesh = jax.sharding.get_mesh()
        batch = {name: place(a, mesh, P(RULES.batch)) for name, a in arrays.items() if name != "labels"}
        wanted = np.array([request.seed for request in requests] + [0] * (count - len(rows)), np.uint32)
        seeds = place(wanted, mesh, P(RULES.batch))
        state, logits = self._prefill(_power(new_tokens), sampling)(self.params, batch, seeds)
        return state, seeds, logits

    def _make_prefill(self, new_tokens: int, sampling: Sampling) -> Callable[..., Any]:
        return make_prefill(self.family.bound, dtype=self.family.dtype, new_tokens=new_tokens, sampling=sampling)

    def _make_decode(self, steps: int, stop_ids: tuple[int, ...], sampling: Sampling) -> Callable[..., Any]:
        return make_decode(self.family.bound, steps=steps, stop_ids=stop_ids, sampling=sampling)

    def _text(
        self, tokens: np.ndarray, stop_ids: Sequence[int], stop_strings: Sequence[str], strip: bool = True
    ) -> str:
        ids = [int(token) for token in tokens if token >= 0]
        ends = [i for i, token in enumerate(ids) if token in stop_ids]
        text = self.tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True)
        for stop in stop_strings:
            text = text.split(stop)[0]
        return text.strip() if strip else text


def as_messages(prompt: str | Sequence[Mapping[str, Any]], images: int) -> Sequence[Mapping[str, Any]]:
    """A question as chat messages; images that it does not place stand first."""
    if not isinstance(prompt, str):
        return prompt
    missing = images - prompt.count("<image>")
    if missing < 0:
        raise UsageError(f"the prompt shows {prompt.count('<image>')} image(s), but {images} were given")
    return [{"role": "user", "content": "<image>\n" * missing + prompt}]


def _power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n`."""
    return max(least, 1 << max(0, n - 1).bit_length())
