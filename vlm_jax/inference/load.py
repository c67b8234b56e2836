"""Opens a model by its path and makes it answer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

from vlm_jax.errors import UsageError
from vlm_jax.families import make_family
from vlm_jax.inference.vlm import VLM
from vlm_jax.interop.checkpoint import open_checkpoint
from vlm_jax.interop.layout import MODEL, find_model
from vlm_jax.interop.native import load_entries, save_model
from vlm_jax.interop.tokenizers import has_tokenizer, image_token_id, open_tokenizer
from vlm_jax.sharding import make_mesh

__all__ = ["MODEL", "find_model", "load", "open_tokenizer", "save"]


def load(path: str | os.PathLike[str], *, dtype: str = "float32", template: str | None = None) -> VLM:
    """Opens a workdir, a model of ours, a Hugging Face or LLaVA folder, or a hub id `owner/name[@revision]`, on the
    mesh in use (default: one over all devices). Weights go straight into their sharding.

    dtype: "float32" or "bfloat16", of the weights in memory and of the computation.
    template: of the conversations, where the model does not tell its own.
    Raises UsageError when there is no model at `path`, or when its weights do not fit its config.
    """
    found = open_checkpoint(path)
    folder, config = str(found.folder), found.config
    mesh = make_mesh() if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()
    with jax.set_mesh(mesh):
        try:
            family = make_family(config["model"], dtype=dtype)
            images, template = family.images(config["images"]), template or config["template"]
            placement = str(config.get("image_placement", "first"))
        except (KeyError, TypeError) as error:
            raise UsageError(f"the config.json in {folder} is damaged: {type(error).__name__} {error}") from error
        abstract = {
            path: jax.ShapeDtypeStruct(a.shape, family.dtype, sharding=a.sharding)
            for path, a in family.bound.abstract.items()
        }
        params = load_entries(found.entries, abstract, folder, found.problems)
        tokenizer = open_tokenizer(folder) if has_tokenizer(folder) else None
        return VLM(
            family,
            params,
            tokenizer=tokenizer,
            template=template,
            images=images,
            image_placement=placement,
            image_token_id=image_token_id(found, tokenizer),
        )


def save(
    folder: str | os.PathLike[str],
    params: Mapping[str, jax.Array],
    *,
    model: Mapping[str, Any],
    images: Mapping[str, Any],
    template: str,
    image_placement: str = "first",
    tokenizer: Any,
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
) -> None:
    """Writes what `load` opens; `extra` and `files` are carried along (`save_model`). Every process calls it; the first
    writes."""
    config = {
        "model": dict(model),
        "images": dict(images),
        "template": template,
        "image_placement": image_placement,
    }
    save_model(str(folder), params, config, tokenizer=tokenizer, extra=extra, files=files)
