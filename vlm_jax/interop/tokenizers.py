"""Tokenizers of models on disk, and the token that stands for an image in Hugging Face's ids."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vlm_jax.errors import UsageError
from vlm_jax.interop.hf_config import WHOLE
from vlm_jax.interop.hub import local_folder
from vlm_jax.interop.huggingface import Checkpoint, read_json
from vlm_jax.interop.layout import CONFIG, HF_CONFIG, MODEL

IMAGE, PADDING = "<image>", "<pad>"


def has_tokenizer(folder: str) -> bool:
    return any(
        os.path.exists(os.path.join(folder, name)) for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )


def open_tokenizer(path: str) -> Any:
    """The tokenizer of a model (any path that `load` takes) or of a folder; no code of the repository is run."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # such as that torch is not installed
    from transformers import AutoTokenizer

    if not os.path.isdir(path) and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise UsageError(f"no tokenizer at {path}: the folder does not exist; correct --config.tokenizer")
    folder = _folder(path)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"no tokenizer at {path}: {first}; give --config.tokenizer=FOLDER or a hub id") from error


def _folder(path: str | os.PathLike[str]) -> str:
    """Where the tokenizer of the model at `path` is; a folder that is no model may hold one as well."""
    folder = os.path.expanduser(local_folder(path, weights=False))
    inner = os.path.join(folder, MODEL)
    return inner if os.path.exists(os.path.join(inner, CONFIG)) else folder


def image_token_id(found: Checkpoint, tokenizer: Any = None) -> int:
    """The token that stands for an image: that of the config of Hugging Face's that was imported; otherwise the
    tokenizer's `<image>`, or the one that export would add, which is the next."""
    raw = read_json(found.files[HF_CONFIG]) if HF_CONFIG in found.files else {}
    if raw.get("model_type") in WHOLE and "text_config" in raw:
        return int(raw.get("image_token_index") or raw.get("image_token_id") or 32_000)
    if tokenizer is None:
        return int(found.config["model"]["decoder"]["vocab_size"])
    return int(tokenizer.get_vocab().get(IMAGE, len(tokenizer)))


def add_image_token(tokenizer: Any) -> None:
    """Adds `<image>` and, where there is no padding, `<pad>`, as the official conversion does."""
    from transformers import AddedToken

    if IMAGE not in tokenizer.get_vocab():
        tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PADDING})


def drop_tokens(folder: str | os.PathLike[str], count: int) -> None:
    """Removes from the tokenizer's files in `folder` every added token whose id is not below `count`; padding is then
    the unknown token, as LLaVA has it."""
    place = Path(folder)
    gone: set[str] = set()
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        if not (place / name).exists():
            continue
        values = read_json(place / name)
        if name == "tokenizer.json":
            gone |= {one["content"] for one in values.get("added_tokens", ()) if one["id"] >= count}
            values["added_tokens"] = [one for one in values.get("added_tokens", ()) if one["id"] < count]
        elif name == "tokenizer_config.json":
            added = values.get("added_tokens_decoder", {})
            gone |= {one["content"] for number, one in added.items() if int(number) >= count}
            values["added_tokens_decoder"] = {number: one for number, one in added.items() if int(number) < count}
            values.pop("processor_class", None)
        elif name == "added_tokens.json":
            gone |= {token for token, number in values.items() if number >= count}
            values = {token: number for token, number in values.items() if number < count}
        for key, token in list(values.items()):
            content = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(content, str) and content in gone:
                values.pop(key)
                if key == "pad_token" and "unk_token" in values:
                    values[key] = values["unk_token"]
        (place / name).write_text(json.dumps(values, indent=2, ensure_ascii=False))
