"""Which samples LLaVA drops: its "tokenization mismatch" (haotian-liu/LLaVA llava/train/train.py preprocess_v1,
preprocess_llama_2, preprocess_mpt). It cuts a conversation into rounds, tokenises each alone, adds the lengths up, and
masks the whole sample where the sum is not the length of the whole. Runs only under `compat_drop_mismatch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_jax.data.formats import PLACEHOLDER
from vlm_jax.data.records import Part
from vlm_jax.data.templates import Rounds


def mismatched(pieces: Sequence[Part], rounds: Rounds, tokenizer: Any, begins: bool) -> bool:
    """Whether the reference's sum differs from the length; a sample as long as the tokenizer's `model_max_length` is
    never dropped.

    pieces: the conversation as the reference writes it. begins: whether each text begins with BOS.
    """
    filled = lambda text: text.replace("{eos}", tokenizer.eos_token or "")  # noqa: E731
    end, answer = filled(rounds.end), filled(rounds.answer)
    text = "".join(piece if isinstance(piece, str) else PLACEHOLDER for piece in pieces)
    cuts = text.split(end) if end else [text]
    first, later = rounds.segments
    groups = [cuts[:first], *(cuts[i : i + later] for i in range(first, len(cuts), later))]
    counted = rounds.begun
    for number, group in enumerate(groups):
        one = end.join(group)
        if not one or one.count(answer) != 1:
            break
        counted += len(_ids(one, tokenizer, begins)) + rounds.each
        counted += (rounds.later[0] if _legacy(tokenizer) else rounds.later[1]) if number else 0
    # The reference pads with <unk>, so that a real <unk> is not counted in the length.
    length = sum(one != tokenizer.unk_token_id for one in _ids(text, tokenizer, begins))
    return counted < tokenizer.model_max_length and counted != length


def _ids(text: str, tokenizer: Any, begins: bool) -> list[int | None]:
    """The ids of a text, None for BOS and for an image."""
    ids: list[int | None] = [None] * begins
    for number, chunk in enumerate(text.split(PLACEHOLDER)):
        ids += [None] * bool(number)
        ids += tokenizer(chunk, add_special_tokens=False, verbose=False).input_ids
    return ids


def _legacy(tokenizer: Any) -> bool:
    """Whether a word after a special token is written as at the begin of a text, as sentencepiece tokenizers do in
    their `legacy` behaviour."""
    return bool(getattr(tokenizer, "legacy", tokenizer.init_kwargs.get("legacy", False)))
