"""What the commands need to know of a family of models: its parameters, its loss, its cost. A new one is a class here.

`config.model.family` names the class; nothing else looks at that word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.data import ImageSettings
from vlm_jax.errors import UsageError, suggest
from vlm_jax.kernels.attention.cost import equal_pairs
from vlm_jax.layers.stack import check_remat
from vlm_jax.models.binding import Params
from vlm_jax.models.flops import Costs, llava_costs
from vlm_jax.models.llava import Batch, LlavaConfig, bind_llava
from vlm_jax.models.schema import from_dict
from vlm_jax.objectives.language_modeling import next_token_loss, token_weights, total_weight

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class LlavaFamily:
    """Prefix fusion trained on next tokens. `settings` is `config.model` without its family.

    Raises UsageError for settings that do not exist or contradict each other.
    """

    def __init__(self, settings: Mapping[str, Any], *, dtype: str = "float32", remat: str = "none"):
        check_remat(remat)
        self.settings = dict(settings)
        self.config = from_dict(LlavaConfig, settings, "config.model")
        self.dtype, self.remat = dtype_of(dtype), remat
        self.bound = bind_llava(self.config)

    def images(self, settings: Mapping[str, Any]) -> ImageSettings:
        """The image settings of `config.images` for this model.

        Raises UsageError for a key or a value that does not exist, or that the model cannot take.
        """
        vision = self.config.vision
        own = {
            "size": vision.image_size,
            "features_per_tile": self.features_per_tile,
            "mean": vision.mean,
            "std": vision.std,
        }
        known = [field.name for field in dataclasses.fields(ImageSettings) if field.name not in own]
        for key in settings:
            if key not in known:
                has = ", ".join(known)
                raise UsageError(f"config.images has no setting {key!r}{suggest(key, known)}; it has {has}")
        images = from_dict(ImageSettings, {**settings, **own}, "config.images")
        if images.merge == "spatial_unpad" and not self.config.newline:
            raise UsageError(
                "images.merge 'spatial_unpad' ends rows of patches with a learnt vector, which this model has not: set "
                "config.model.newline to True, or images.merge to 'flat' or 'spatial'"
            )
        return images

    @property
    def features_per_tile(self) -> int:
        return self.config.features_per_tile

    @property
    def vocab_size(self) -> int:
        return self.config.decoder.vocab_size

    def loss(
        self,
        params: Params,
        mutable: dict[str, jax.Array],
        batch: Batch,
        weights: jax.Array,
        key: jax.Array | None,
        *,
        packed: bool = True,
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """`training.state.Loss`: the weighted sum of the cross-entropy of one micro-batch; `packed` as in `Llava`."""
        model = self.bound.bind(params)
        hidden, _ = model(batch, dtype=self.dtype, remat=self.remat, key=key, packed=packed)
        total = next_token_loss(hidden, model.decoder.head(self.dtype), batch["labels"], weights)
        return total, {}, mutable

    def weigh(self, batch: Batch, *, norm: str, ranks: int) -> tuple[jax.Array, jax.Array]:
        """`training.state.Weigh`, by `config.loss_norm` and `config.loss_ranks`."""
        weights = token_weights(batch["labels"], batch["segment_ids"], norm=norm, ranks=ranks)
        return weights, total_weight(batch["labels"], weights)

    def costs(self, rates: Mapping[str, float | None]) -> Costs:
        """FLOPs of training with these learning-rate multipliers."""
        return llava_costs(self.config, self.bound.abstract, rates)

    def equal_pairs(self, rows: Sequence[Sequence[int]], length: int, *, packed: bool) -> float:
        """As `kernels.attention.cost.equal_pairs`, of the decoder."""
        decoder = self.config.decoder
        return equal_pairs(
            rows,
            length,
            heads=decoder.num_heads,
            kv_heads=decoder.num_kv_heads,
            features=decoder.head_dim,
            sliding_window=decoder.sliding_window,
            dtype=self.dtype,
            packed=packed,
        )


FAMILIES = {"llava": LlavaFamily}


def make_family(model: Mapping[str, Any], *, dtype: str = "float32", remat: str = "none") -> LlavaFamily:
    """The family of `config.model`, under the mesh in use."""
    settings = dict(model)
    name = settings.pop("family", None)
    if name not in FAMILIES:
        raise UsageError(
            f"config.model.family is {name!r}, not one of {', '.join(FAMILIES)}{suggest(str(name), FAMILIES)}"
        )
    return FAMILIES[name](settings, dtype=dtype, remat=remat)


def dtype_of(name: str) -> jnp.dtype:
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not one of {', '.join(DTYPES)}{suggest(name, DTYPES)}")
    return jnp.dtype(DTYPES[name])
