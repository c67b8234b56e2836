"""Where a model of ours is on disk, readable without jax: a wrong path is refused before anything heavy is imported."""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath

from vlm_jax.errors import UsageError

FORMAT = "vlm_jax"
MODEL = "model"  # the folder of a workdir that holds the model of its newest finished stage
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
EXTRA = "hf_extra.safetensors"  # tensors of an imported tower that LLaVA does not compute with, in hub layout
HF_CONFIG = "hf_config.json"  # the config.json that was imported
# Files of an imported model that training passes on and export writes again; the tokenizer's are not among them.
CARRIED = (
    EXTRA,
    HF_CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "chat_template.json",
)
PARTIAL = ".partial"  # the folder in which a model is written before its files are moved into place


def find_model(path: str | os.PathLike[str]) -> epath.Path:
    """The folder of the model at `path`: `path` itself, or `path/model` of a workdir. Raises UsageError."""
    folder = epath.Path(path).expanduser()
    if not folder.exists():
        raise UsageError(f"no model at {folder}: the folder does not exist")
    if not folder.is_dir():
        raise UsageError(f"no model at {folder}: it is a file; give the folder of a run or of a model")
    for candidate in (folder / MODEL, folder):
        if (candidate / CONFIG).exists():
            if _read(candidate / CONFIG).get("format") == FORMAT:
                return candidate
        elif (candidate / INDEX).exists() or (candidate / PARTIAL).exists():
            raise UsageError(
                f"the model in {candidate} is not complete (no {CONFIG}): repeat the command that wrote it"
            )
    if (folder / "checkpoints").is_dir():
        raise UsageError(f"{folder} is the workdir of a run that has not finished a stage: repeat its command to go on")
    kind = _read(folder / CONFIG).get("model_type") if (folder / CONFIG).exists() else None
    found = f"; its {CONFIG} says model_type {kind!r}" if kind else ""
    raise UsageError(f"{folder} holds neither a workdir nor a model of ours{found}")


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that holds a model of Hugging Face's or of the original LLaVA."""
    folder = epath.Path(path)
    if not (folder / CONFIG).exists() or (folder / MODEL / CONFIG).exists():
        return False
    config = _read(folder / CONFIG)
    return config.get("format") != FORMAT and ("model_type" in config or "mm_vision_tower" in config)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The `config.json` of one of our checkpoints. Raises UsageError when it is not one."""
    file = epath.Path(directory) / CONFIG
    if not file.exists():
        raise UsageError(f"{directory} holds no {CONFIG}: it is not a model, or not completely written")
    config = _read(file)
    if config.get("format") != FORMAT:
        raise UsageError(f"{file} is not of a {FORMAT} checkpoint (model_type {config.get('model_type')!r})")
    return config


def _read(file: epath.Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is damaged or cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{file} is damaged: it holds a {type(config).__name__}, not an object")
    return config
