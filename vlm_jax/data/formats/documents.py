"""Interleaved documents: one message with texts and images in the order in which a page shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vlm_jax.data.formats.turns import PLACEHOLDER, image_of, is_list, malformed
from vlm_jax.data.records import Image, Message, Part

IMAGE_NAMES = ("image_base64", "image_name", "raw_url")


def parse_obelics(texts: Any, images: Any) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """OBELICS: two lists of one length; at each place stands a text or an image, and None in the other list."""
    if not is_list(images) or len(images) != len(texts):
        found = len(images) if is_list(images) else 0
        raise malformed(f"it has {len(texts)} texts and {found} images; a document has both lists of one length")
    items: list[Any] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True), 1):
        if (text is None) == (image is None):
            raise malformed(
                f"place {number} of the document has {'neither' if text is None else 'both'} of text and image"
            )
        items.append(text if image is None else (image,))
    return _document(items, "\n\n")


def parse_mmc4(sentences: Any, found: Any) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """MMC4: sentences, and images that each stand before the sentence that they match (as OpenFlamingo trains)."""
    if not is_list(sentences) or not is_list(found):
        raise malformed("its text_list and image_info are not lists")
    before: dict[int, list[Any]] = {}
    for number, info in enumerate(found, 1):
        if not isinstance(info, Mapping):
            raise malformed(f"image {number} of image_info is a {type(info).__name__}, not an object")
        key = next((key for key in IMAGE_NAMES if info.get(key) is not None), None)
        at = info.get("matched_text_index")
        if key is None or not isinstance(at, int) or not 0 <= at < len(sentences):
            raise malformed(
                f"image {number} of image_info needs {' or '.join(IMAGE_NAMES)}, and a matched_text_index below "
                f"{len(sentences)}"
            )
        before.setdefault(at, []).append(({"base64": info[key]} if key == "image_base64" else info[key],))
    items = [item for at, sentence in enumerate(sentences) for item in (*before.get(at, ()), sentence)]
    return _document(items, " ")


def _document(items: Iterable[Any], between: str) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """items: texts, and images in tuples. between: joins texts that follow one another."""
    parts: list[Part] = []
    images: list[Any] = []
    for item in items:
        if isinstance(item, tuple):
            parts.append(Image(len(images)))
            images.append(image_of(item[0]))
            continue
        if not isinstance(item, str) or PLACEHOLDER in item:
            what = f"holds {PLACEHOLDER}" if isinstance(item, str) else f"is a {type(item).__name__}"
            raise malformed(f"a text of the document {what}")
        if parts and isinstance(parts[-1], str):
            parts[-1] += between + item
        elif item:
            parts.append(item)
    if not parts:
        raise malformed("the document is empty")
    return (Message("document", tuple(parts)),), tuple(images)
