"""One record of any data set, and what may be wrong with it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_jax.errors import UsageError

# What may be wrong with a record, and what the user can do about it.
BAD_KINDS: dict[str, str] = {
    "missing_image": "check the images folder (--config.data.images)",
    "broken_image": "replace the files or remove the records",
    "unsafe_path": "give paths relative to the images folder, without '..', links out of it or URLs",
    "image_too_large": "scale the images down",
    "malformed": "correct the records",
    "no_trainable_token": "give each record an answer, before the place where a row ends",
    "too_long": "raise --config.buckets.lengths or --config.buckets.tiles, shorten the records, or cut off their ends "
    "(--config.data.truncate=true)",
    "truncated": "their ends are cut off, the rest is trained on; raise --config.buckets.lengths to keep all of them",
    "changed": "they have grown since they were measured for packing: remove ~/.cache/vlm_jax/index and begin anew",
    "mismatch": "LLaVA drops them; set compat_drop_mismatch=False in the stage to train on them",
    "assistant_first": "their first message is the assistant's; it is left out, the rest is trained on",
}
USED = ("truncated", "assistant_first")  # a part is left out, the rest is used; a record with both is of the first kind
TOLERATED = ("mismatch", *USED)  # counted and listed, but they stop no run: they were asked for, or are used


class BadRecord(UsageError):
    """A record that cannot be used. `kind` is one of `BAD_KINDS`; a loader counts it and trains on the others."""

    def __init__(self, kind: str, message: str):
        if kind not in BAD_KINDS:
            raise ValueError(f"unknown kind {kind!r}")
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Image:
    """A place in a message where image number `index` of the record stands."""

    index: int


@dataclasses.dataclass(frozen=True)
class AnyPath(os.PathLike[str]):
    """The path of an image that the user allows to lie outside of the images folder: absolute, or relative to it."""

    path: str

    def __fspath__(self) -> str:
        return self.path


Part = str | Image


@dataclasses.dataclass(frozen=True)
class Message:
    """What one side says: texts and images in their order.

    role: "user", "assistant", "system"; or "document", the only message of an interleaved document.
    train: whether an answer is trained; True for what others say, which never is.
    """

    role: str
    content: tuple[Part, ...]
    train: bool = True

    @property
    def text(self) -> str:
        """The texts alone."""
        return "".join(part for part in self.content if isinstance(part, str))


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample of any source, before anything is read or tokenised.

    images: paths relative to the source's images folder, `AnyPath`s, or images in memory (encoded bytes, pixels, PIL
      images). Each stands exactly once in `messages`, in this order.
    texts, regions: what dual encoders (C texts of the same images) and single streams (given region features
      [K, F]) train on; empty for conversations. An interleaved document is one message with many parts.
    extra: the source's other keys, for evaluation and inspection.
    """

    id: str
    messages: tuple[Message, ...] = ()
    images: tuple[Any, ...] = ()
    texts: tuple[str, ...] = ()
    regions: np.ndarray | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
