"""Opens a model by its path and makes it answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

from vlm_jax.errors import UsageError
from vlm_jax.families import make_family
from vlm_jax.inference.vlm import VLM
from vlm_jax.interop.layout import MODEL, find_model
from vlm_jax.interop.native import load_params, read_config, save_model
from vlm_jax.sharding import make_mesh

__all__ = ["MODEL", "find_model", "load", "open_tokenizer", "save"]


def load(path: str | os.PathLike[str], *, dtype: str = "float32") -> VLM:
    """Opens a workdir or one of our checkpoints, on the mesh in use (default: one over all devices).

    dtype: "float32" or "bfloat16", of the weights in memory and of the computation.
    Raises UsageError when there is no model at `path`, or when its weights do not fit its config.
    """
    folder = str(find_model(path))
    config = read_config(folder)
    mesh = make_mesh() if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()
    with jax.set_mesh(mesh):
        try:
            family = make_family(config["model"], dtype=dtype)
            images, template = family.images(config["images"]), str(config["template"])
        except (KeyError, TypeError) as error:
            raise UsageError(f"the config.json in {folder} is damaged: {type(error).__name__} {error}") from error
        abstract = {
            path: jax.ShapeDtypeStruct(a.shape, family.dtype, sharding=a.sharding)
            for path, a in family.bound.abstract.items()
        }
        params = load_params(folder, abstract)
        return VLM(family, params, tokenizer=open_tokenizer(folder), template=template, images=images)


def open_tokenizer(path: str) -> Any:
    """A tokenizer from a folder or hub id; no code of the repository is run."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # such as that torch is not installed
    from transformers import AutoTokenizer

    if not os.path.isdir(path) and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise UsageError(f"no tokenizer at {path}: the folder does not exist; correct --config.tokenizer")
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
    images: Mapping[str, Any],
    template: str,
    tokenizer: Any,
) -> None:
    """Writes what `load` opens. Every process calls it; the first writes."""
    config = {"model": dict(model), "images": dict(images), "template": template}
    save_model(str(folder), params, config, tokenizer=tokenizer)
