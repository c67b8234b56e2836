"""LLaVA (Liu et al., 2023): a vision tower, a connector and a decoder, fused by prefix.

tiles [B,K,H,W,3] → vision [B·K,P,Dv] → connector [B,K·P,D] → placed by visual_index [B,T,D] → decoder [B,T,D]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.layers.attention import Cache, Mask
from vlm_jax.layers.scope import LoRA, Scope, child_key, normal, use
from vlm_jax.models.binding import Bound
from vlm_jax.models.connectors import make_connector
from vlm_jax.models.fusion import place_visual
from vlm_jax.models.towers.decoder import Decoder, DecoderConfig
from vlm_jax.models.towers.vit import ViT, ViTConfig
from vlm_jax.sharding import reshape, spec_of

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """`newline`: a learnt vector that ends each row of patches (LLaVA 1.6)."""

    vision: ViTConfig
    connector: str
    decoder: DecoderConfig
    newline: bool = False
    lora: LoRA | None = None

    @property
    def features_per_tile(self) -> int:
        return self.vision.features_per_tile


class Llava(nnx.Module):
    def __init__(self, scope: Scope, config: LlavaConfig):
        self.config = config
        width = config.decoder.hidden_size
        self.vision = ViT(scope / "vision", config.vision)
        self.connector = make_connector(config.connector, scope / "connector", config.vision.hidden_size, width)
        self.newline = scope.param("newline", (width,), (None,), normal(width**-0.5)) if config.newline else None
        self.decoder = Decoder(scope / "decoder", config.decoder)

    def see(
        self, tiles: jax.Array, *, dtype: jnp.dtype, remat: str = "none", key: jax.Array | None = None
    ) -> jax.Array:
        """`tiles uint8 [B, K, H, W, 3] -> features [B, K*P, D]`."""
        rows, tiles_per_row = tiles.shape[:2]
        batch = spec_of(tiles)[0]
        tiles = reshape(tiles, (rows * tiles_per_row, *tiles.shape[2:]), P(batch, None, None, None))
        features = self.vision(tiles, dtype, remat=remat, key=child_key(key, "vision"))
        features = self.connector(features, child_key(key, "connector"))
        return reshape(features, (rows, tiles_per_row * features.shape[1], features.shape[2]), P(batch, None, None))

    def embed(self, batch: Batch, *, dtype: jnp.dtype, remat: str = "none", key: jax.Array | None = None) -> jax.Array:
        """Token embeddings with vision features in their places, [B, T, D]."""
        embeddings = self.decoder.embed(batch["tokens"], dtype)
        newline = jnp.zeros(embeddings.shape[-1], dtype) if self.newline is None else use(self.newline, dtype)
        features = self.see(batch["tiles"], dtype=dtype, remat=remat, key=key)
        return place_visual(
            embeddings,
            features,
            newline,
            batch["visual_index"],
            batch["visual_inverse"],
            batch.get("visual_weight"),
            batch.get("visual_inverse_weight"),
        )

    def __call__(
        self,
        batch: Batch,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        key: jax.Array | None = None,
        keep_kv: bool = False,
        packed: bool = True,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states [B, T, D] of a batch of prefix fusion (docs/design.md), and with `keep_kv` their cache.

        `key` turns dropout on. `packed`: rows may hold several samples, or begin with padding; False promises one
        sample from the first position on, which more attention kernels serve.
        """
        ids = batch["segment_ids"]
        seen = {"segment_ids": ids} if packed else {"lengths": jnp.sum(ids != 0, axis=-1, dtype=jnp.int32)}
        mask = Mask(**seen, positions=batch["positions"])
        x = self.embed(batch, dtype=dtype, remat=remat, key=key)
        return self.decoder(x, mask, key=child_key(key, "decoder"), remat=remat, keep_kv=keep_kv)


def bind_llava(config: LlavaConfig, *, param_dtype: jnp.dtype = jnp.float32) -> Bound[Llava]:
    return Bound(lambda scope: Llava(scope, config), param_dtype=param_dtype, lora=config.lora)
