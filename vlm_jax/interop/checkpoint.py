"""Opens a model by any of its names: a workdir, a model of ours, a Hugging Face or LLaVA folder, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path

from vlm_jax.errors import UsageError
from vlm_jax.interop.hf_config import Json
from vlm_jax.interop.hub import local_folder
from vlm_jax.interop.huggingface import TOKENIZER_FILES, Checkpoint, describe_huggingface, normal, open_huggingface
from vlm_jax.interop.layout import CARRIED, CONFIG, EXTRA, find_model, is_foreign, read_config
from vlm_jax.interop.llava_artefacts import is_artefact, open_artefact
from vlm_jax.interop.native import open_entries
from vlm_jax.interop.weights import open_safetensors

__all__ = ["Checkpoint", "describe_model", "locate", "open_checkpoint"]


def locate(path: str | os.PathLike[str]) -> tuple[str, bool]:
    """The folder of the model at `path`, and whether it is one of ours. A hub id is fetched."""
    folder = os.path.expanduser(local_folder(path))
    if is_foreign(folder):
        return folder, False
    return str(find_model(folder)), True


def describe_model(path: str | os.PathLike[str]) -> Json:
    """`model`, `images` and `template` of the model at `path`; its weights are not read."""
    folder = os.path.expanduser(local_folder(path))
    if is_artefact(folder):
        return open_checkpoint(folder).config
    folder, ours = locate(folder)
    return read_config(folder) if ours else describe_huggingface(folder)


def open_checkpoint(path: str | os.PathLike[str], *, vision: str | None = None, base: str | None = None) -> Checkpoint:
    """The model at `path`, its tensors ready to be read.

    vision: where the vision tower is, for an original LLaVA that does not hold it.
    base: the model that an adapter or a connector alone belongs to, where it does not name it or it is elsewhere.
    Raises UsageError when there is none, or when it is not what it says.
    """
    folder = os.path.expanduser(local_folder(path))
    if is_artefact(folder):
        return open_artefact(folder, whole=lambda path: open_checkpoint(path, vision=vision), base=base, vision=vision)
    folder, ours = locate(folder)
    if not ours:
        return open_huggingface(folder, vision=vision)
    place = Path(folder)
    config = read_config(place)
    try:
        normal(config["model"])
        _ = config["images"]["mode"], config["template"]
    except (KeyError, TypeError) as error:
        raise UsageError(f"the {CONFIG} in {folder} is damaged: {type(error).__name__} {error}") from error
    entries, problems = open_entries(folder)
    travelling = (*TOKENIZER_FILES, *(name for name in CARRIED if name != EXTRA))
    return Checkpoint(
        folder=place,
        config=config,
        entries=entries,
        extra=open_safetensors(place / EXTRA) if (place / EXTRA).exists() else {},
        files={name: place / name for name in travelling if (place / name).is_file()},
        problems=problems,
    )
