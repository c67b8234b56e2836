"""A vision-language model that answers: weights, tokenizer, template and image settings in one object."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from vlm_jax.data import UNTRAINED, BadRecord, ImageSettings, Record, encode_prompt, process
from vlm_jax.data.images import Picture, layout
from vlm_jax.data.rows import Row, collate, fusion_fields, fusion_row
from vlm_jax.data.templates import TEMPLATES
from vlm_jax.errors import UsageError
from vlm_jax.families import LlavaFamily
from vlm_jax.inference.apply_hf import hf_batch, make_logits, place_inputs
from vlm_jax.inference.files import open_file
from vlm_jax.models.binding import Params
from vlm_jax.models.generation import DecodeState, for_decode, make_decode, make_prefill
from vlm_jax.models.sampling import GREEDY, Sampling
from vlm_jax.sharding import RULES, batch_shards, place

STREAM = 8  # tokens between two looks at a stream, at most
LOOK = 0.1  # seconds between two looks at a stream, about


@dataclasses.dataclass(frozen=True)
class Request:
    """One question.

    messages: LLaVA's or chat messages, the last of them the user's, or a Record.
    images: those that the messages show without naming them, in their order: pixels, PIL images, encoded bytes, or
      paths relative to `folder`. Unused for a Record, which has its own.
    seed: of sampling. The same request with the same seed gets the same answer, whatever else is in its batch.
    """

    messages: Any
    images: Sequence[Any] = ()
    folder: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A request as the model takes it. Requests of one `bucket` (T, K) run the same program."""

    row: Row
    bucket: tuple[int, int]
    seed: int
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]


class VLM:
    """Answers requests, alone or in batches, on the mesh that was in use when it was made.

    There is one compilation per bucket: rows, tiles and new tokens are rounded up to powers of two, or tiles to a power
    of two times the most that an image may have, and lengths above 512 also to 3/4 of one. `compiled` counts them.
    """

    def __init__(
        self,
        family: LlavaFamily,
        params: Params,
        *,
        tokenizer: Any,
        template: str | None,
        images: ImageSettings,
        image_placement: str = "first",
        image_token_id: int | None = None,
    ):
        self.family, self.params = family, params
        self.tokenizer, self.template, self.images = tokenizer, template, images
        self.image_placement, self.image_token_id = image_placement, image_token_id
        self.mesh = jax.sharding.get_mesh()
        self.compiled: collections.Counter[str] = collections.Counter()
        count = lambda name: functools.partial(self.compiled.update, (name,))  # noqa: E731
        self._prefill = make_prefill(family.bound, dtype=family.dtype, on_trace=count("prefill"))
        self._decode = make_decode(family.bound, on_trace=count("decode"))
        self._logits = make_logits(family.bound, dtype=family.dtype)

    def with_params(self, params: Params) -> VLM:
        """The same model with other weights; what is compiled is kept."""
        other = copy.copy(self)
        other.params = params
        vars(other).pop("_to_decode", None)
        return other

    @functools.cached_property
    def _to_decode(self) -> Params:
        with jax.set_mesh(self.mesh):
            params = for_decode(self.params)
        return params

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
        """The answer to a question, or to chat messages with image parts. Greedy unless `temperature` is above 0.

        images: PIL images, encoded bytes, pixels uint8 [H, W, 3], or paths of files. Each stands where the prompt has
          an `<image>` or a message a part {"type": "image"} that names none; those that a question does not place
          come first.
        """
        given = images if isinstance(images, (list, tuple)) else [images]
        opened = [open_file(image) if isinstance(image, (str, os.PathLike)) else image for image in given]
        request = Request(as_messages(prompt, len(opened)), opened, seed=seed)
        (answer,) = self.answer([request], max_new_tokens=max_new_tokens, sampling=Sampling(temperature, top_p))
        return answer

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 256, sampling: Sampling = GREEDY
    ) -> list[str]:
        """Answers a batch with any mix of lengths and numbers of images."""
        return self.answer_encoded(
            [self.encode(request) for request in requests], max_new_tokens=max_new_tokens, sampling=sampling
        )

    def answer_encoded(
        self, encoded: Sequence[Encoded], *, rows: int = 1, max_new_tokens: int = 256, sampling: Sampling = GREEDY
    ) -> list[str]:
        """Answers a batch, padded to at least `rows`."""
        if not encoded:
            return []
        tokens = self.tokens(encoded, rows=rows, max_new_tokens=max_new_tokens, sampling=sampling)
        return [self._text(row, one).strip() for row, one in zip(tokens.tolist(), encoded, strict=True)]

    def tokens(
        self, encoded: Sequence[Encoded], *, rows: int = 1, max_new_tokens: int = 256, sampling: Sampling = GREEDY
    ) -> np.ndarray:
        """Answers int32 [len(encoded), max_new_tokens], each with the token that stops it and then -1."""
        state, seeds, first, _ = self._start(encoded, rows, max_new_tokens, sampling)
        parts = [first]
        if max_new_tokens > 1:
            room = _power(max_new_tokens)
            parts.append(self._go_on(state, seeds, max_new_tokens - 1, room, encoded[0], sampling)[1])
        return np.concatenate(parts, axis=1)[: len(encoded), :max_new_tokens]

    def stream(self, request: Request, *, max_new_tokens: int = 256, sampling: Sampling = GREEDY) -> Iterator[str]:
        """The same answer in pieces as it is made; a piece never ends within a character."""
        one = self.encode(request)
        state, seeds, first, _ = self._start([one], 1, max_new_tokens, sampling)
        ids = first[0].tolist()
        shown, look = "", 1
        while True:
            text = self._text(ids, one)
            finished = len(ids) >= max_new_tokens or bool(np.asarray(state.done)[0])
            finished = finished or text != self._text(ids, one, stop=False)
            settled = text.strip() if finished else _settled(text, one.stop_strings).lstrip()
            if len(settled) > len(shown) and settled.startswith(shown):
                yield settled[len(shown) :]
                shown = settled
            if finished:
                return
            began = time.monotonic()
            state, tokens = self._go_on(state, seeds, min(look, max_new_tokens - len(ids)), STREAM, one, sampling)
            ids += [token for token in tokens[0].tolist() if token >= 0]
            look = max(1, min(STREAM, round(look * LOOK / (time.monotonic() - began + 1e-9))))

    def logits(self, requests: Sequence[Request]) -> np.ndarray:
        """Logits float32 [len(requests), V] of the first token of each answer."""
        encoded = [self.encode(request) for request in requests]
        return np.asarray(self._start(encoded, 1, 1, GREEDY)[3])[: len(requests)]

    def apply_hf(self, **inputs: Any) -> np.ndarray:
        """Logits float32 [B, T, V] of what the Hugging Face processor of this model yields, as numpy arrays: input_ids
        with an image token for each feature, attention_mask, pixel_values and, of llava_next, image_sizes.

        Raises UsageError where they do not fit the model or one another.
        """
        if self.image_token_id is None:
            raise UsageError("which token stands for an image is not known: this model is not from Hugging Face")
        batch = hf_batch(inputs, self.images, self.image_token_id)
        with jax.set_mesh(self.mesh):
            logits = self._logits(self.params, place_inputs(batch))
        return np.asarray(logits)[: len(batch["tokens"])]

    def encode(self, request: Request) -> Encoded:
        """Tokens and tiles of a request. Raises BadRecord: malformed messages, or an image that cannot be opened."""
        if self.tokenizer is None:
            raise UsageError("the model came without a tokenizer: put its files beside the weights and load it again")
        if self.template is None:
            raise UsageError(
                "the conversation template of this model is not known: give it, as in load(path, template=NAME) or "
                f"--template=NAME, one of {', '.join(TEMPLATES)}"
            )
        prompt = encode_prompt(
            request.messages, self.template, tokenizer=self.tokenizer, image_placement=self.image_placement
        )
        unnamed = [] if isinstance(request.messages, Record) else list(request.images)
        places = sum(image is None for image in prompt.images)
        if len(unnamed) != places:
            raise BadRecord("malformed", f"the messages have {places} place(s) for the {len(unnamed)} image(s) given")
        rest = iter(unnamed)
        images = [next(rest) if image is None else image for image in prompt.images]
        settings = self.images.of(len(images))
        pictures = [Picture(image, request.folder) for image in images]
        layouts = [layout(picture.size, settings) for picture in pictures]
        tiles = [process(picture.pixels(), settings) for picture in pictures]
        labels = np.full_like(prompt.input_ids, UNTRAINED)
        row = fusion_row(prompt.input_ids, labels, tiles, layouts, self.images)
        bucket = _longer(len(row["tokens"])), _more(len(row["tile_image"]), self.images.most_tiles)
        return Encoded(row, bucket, request.seed, prompt.stop_ids, prompt.stop_strings)

    def _start(
        self, encoded: Sequence[Encoded], rows: int, new_tokens: int, sampling: Sampling
    ) -> tuple[DecodeState, jax.Array, np.ndarray, jax.Array]:
        """(state, seeds, first tokens [B, 1], their logits) of a batch."""
        length, tiles = (max(sizes) for sizes in zip(*(one.bucket for one in encoded), strict=True))
        size = self.images.size
        budgets = {"T": length, "K": tiles, "P": self.images.features_per_tile, "H": size, "W": size}
        with jax.set_mesh(self.mesh):
            shards = batch_shards()
            padding = -(-_power(max(len(encoded), rows)) // shards) * shards - len(encoded)
            arrays = collate([*(one.row for one in encoded), *[None] * padding], fusion_fields(self.images), budgets)
            batch = {name: place(a, self.mesh, P(RULES.batch)) for name, a in arrays.items() if name != "labels"}
            numbers = np.array([one.seed % (1 << 32) for one in encoded] + [0] * padding, np.uint32)
            seeds = place(numbers, self.mesh, P(RULES.batch))
            state, logits = self._prefill(
                self.params, batch, seeds, room=_power(new_tokens), stop_ids=encoded[0].stop_ids, sampling=sampling
            )
        # A copy: the buffer is given to the decode loop.
        return state, seeds, np.array(state.token)[:, None], logits

    def _go_on(
        self, state: DecodeState, seeds: jax.Array, limit: int, steps: int, one: Encoded, sampling: Sampling
    ) -> tuple[DecodeState, np.ndarray]:
        """At most `limit` more tokens of each row, [B, steps]."""
        with jax.set_mesh(self.mesh):
            state, tokens = self._decode(
                self._to_decode, state, seeds, limit, steps=steps, stop_ids=one.stop_ids, sampling=sampling
            )
        return state, np.asarray(tokens)

    def _text(self, tokens: Sequence[int], one: Encoded, stop: bool = True) -> str:
        """The text of an answer up to where it stops."""
        ids = [token for token in tokens if token >= 0]
        ends = [i for i, token in enumerate(ids) if token in one.stop_ids]
        text = self.tokenizer.decode(
            ids[: ends[0]] if ends else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for string in one.stop_strings if stop else ():
            text = text.split(string)[0]
        return text


def as_messages(prompt: str | Sequence[Mapping[str, Any]], images: int) -> Sequence[Mapping[str, Any]]:
    """A question as chat messages; images that it does not place stand first."""
    if not isinstance(prompt, str):
        return prompt
    placed = prompt.count("<image>")
    if placed > images:
        raise BadRecord("malformed", f"the prompt has {placed} place(s) <image>, but {images} image(s) were given")
    return [{"role": "user", "content": "<image>\n" * (images - placed) + prompt}]


def _settled(text: str, stop_strings: Sequence[str]) -> str:
    """What of an unfinished answer will not change any more: half of a character waits for its other half, the begin
    of a stop string for its end, and white space for what follows it."""
    text = text.rstrip("\ufffd")
    for string in stop_strings:
        begins = [string[:length] for length in range(len(string), 0, -1)]
        text = text.removesuffix(next((begin for begin in begins if text.endswith(begin)), ""))
    return text.rstrip()


def _power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def _longer(length: int) -> int:
    """The bucket's T. An image of 576 features and a question would fill just over half of 1,024."""
    whole = _power(length, least=16)
    return whole * 3 // 4 if 512 < length <= whole * 3 // 4 else whole


def _more(tiles: int, of_image: int) -> int:
    """The bucket's K: a power of two, or that many times the most tiles of one image if this is less."""
    return min(_power(tiles), of_image * _power(-(-tiles // of_image)))
