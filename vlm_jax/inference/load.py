"""Opens a model by its path and makes it answer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vlm_jax.errors import UsageError
from vlm_jax.families import make_family
from vlm_jax.inference.vlm import VLM
from vlm_jax.interop.native import FORMAT, load_params, read_config, save_model
from vlm_jax.sharding import make_mesh

MODEL = "model"  # the folder of a workdir that holds the finished model


def load(path: str | os.PathLike[str], *, dtype: str = "float32") -> VLM:
    """Opens a workdir or one of our checkpoints, on the mesh in use (default: one over all devices).

    Raises UsageError when there is no model at `path`, or when its weights do not fit its config.
    """
    folder = find_model(path)
    if jax.sharding.get_abstract_mesh().empty:
        jax.set_mesh(make_mesh())
    config = read_config(str(folder))
    family = make_family(config["model"], dtype=dtype)
    params = load_params(str(folder), family.bound.abstract)
    images = family.images(config["images"]["mode"])
    return VLM(family, params, tokenizer=open_tokenizer(str(folder)), template=config["template"], images=images)


def find_model(path: str | os.PathLike[str]) -> Path:
    """The folder with the `config.json` of a model: `path` itself, or `path/model` of a workdir."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UsageError(f"no model at {folder}: the folder does not exist")
    for candidate in (folder / MODEL, folder):
        config = candidate / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("format") == FORMAT:
            return candidate
    if (folder / "checkpoints").is_dir():
        raise UsageError(f"{folder} is the workdir of a run that has not finished a stage: repeat its command to go on")
    raise UsageError(f"{folder} holds neither a workdir nor a model of ours")


def open_tokenizer(path: str) -> Any:
    """A tokenizer from a folder or hub id; no code of the repository is run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"no tokenizer at {path}: {first}; give --config.tokenizer=FOLDER or a hub id") from error


def save(
    folder: str | os.PathLike[str],
    params: Mapping[str, jax.Array],
    *,
    model: Mapping[str, Any],
    mode: str,
    template: str,
    tokenizer: Any,
) -> None:
    """Writes what `load` opens. Every process calls it; the first writes."""
    config = {"model": dict(model), "images": {"mode": mode}, "template": template}
    save_model(str(folder), params, config)
    if jax.process_index() == 0:
        tokenizer.save_pretrained(str(folder))
