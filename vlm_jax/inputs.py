"""What a run reads, as its config describes it: the tokenizer, and the batches of a stage. The trainer and the commands
that look at data make both here, so that they see the same."""

from __future__ import annotations

import os
from typing import Any

from vlm_jax.data.images import ImageSettings
from vlm_jax.data.loader import Loader
from vlm_jax.data.sources import cache_folder, resolve
from vlm_jax.errors import UsageError
from vlm_jax.interop.tokenizers import open_tokenizer
from vlm_jax.recipe import Stage
from vlm_jax.sharding import batch_shards


def run_tokenizer(config: Any, vocab_size: int) -> Any:
    """The tokenizer of a run. Raises UsageError when there is none, or it has more tokens than the model embeds."""
    path = config.tokenizer or config.init_from or config.parts.decoder
    if not path:
        raise UsageError("the config names no tokenizer: give --config.tokenizer=FOLDER or a hub id")
    local = ":" in path or os.path.isdir(os.path.expanduser(path))
    tokenizer = open_tokenizer(str(resolve(path)[0]) if local else path)
    if len(tokenizer) > vocab_size:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, but config.model.decoder.vocab_size is {vocab_size}"
        )
    return tokenizer


def stage_loader(
    config: Any, stage: Stage, number: int, *, tokenizer: Any, images: ImageSettings, **changes: Any
) -> Loader:
    """The training data of stage `number` of a config, on the mesh in use; with `changes` to the arguments of `Loader`,
    other data read the same way."""
    shards = batch_shards()
    per_device = config.batch.per_device
    settings: dict[str, Any] = {
        "sources": stage.train,
        "tokenizer": tokenizer,
        "template": stage.template,
        "image_placement": stage.image_placement,
        "compat_drop_mismatch": stage.compat_drop_mismatch,
        "truncate": config.data.truncate,
        "images": images,
        "samples": stage.samples,
        "rows": per_device * shards if per_device else None,
        "shards": shards,
        "lengths": config.buckets.lengths,
        "tiles": config.buckets.tiles,
        "packing": stage.packing,
        "index_cache": cache_folder() / "index",
        "seed": config.seed + number,
        "epochs": stage.epochs,
        "steps": stage.steps,
        "workers": config.data.workers,
        "threads": config.data.threads,
        "max_bad_fraction": config.data.max_bad_fraction,
        "stage": stage.name,
    }
    return Loader(**{**settings, **changes})
