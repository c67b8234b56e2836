"""Decoder of the Llama family: Llama, Mistral, Yi, Qwen2 (biases on q, k, v) and Qwen3 (normalised q and k)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UsageError
from vlm_jax.layers.attention import Cache, Mask, SelfAttention
from vlm_jax.layers.linear import Embedding, Linear
from vlm_jax.layers.mlp import SwiGLU
from vlm_jax.layers.norms import RMSNorm
from vlm_jax.layers.rope import RopeScaling, rope_table
from vlm_jax.layers.scope import Scope, child_key, normal
from vlm_jax.layers.stack import each_layer, scan_layers
from vlm_jax.sharding import RULES

Caches = Cache | tuple[Cache, ...]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    sliding_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"decoder.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"decoder.head_dim {self.head_dim} is odd, but rotary embeddings need halves")


class Block(nnx.Module):
    def __init__(self, scope: Scope, config: DecoderConfig):
        self.attention_norm = RMSNorm(scope / "attention_norm", config.hidden_size, eps=config.norm_eps)
        self.attention = SelfAttention(
            scope / "attention",
            config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            causal=True,
            qkv_bias=config.qkv_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            sliding_window=config.sliding_window,
        )
        self.mlp_norm = RMSNorm(scope / "mlp_norm", config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(scope / "mlp", config.hidden_size, config.intermediate_size)

    def __call__(
        self, x: jax.Array, mask: Mask, rope: tuple[jax.Array, jax.Array], key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        attended, kv = self.attention(self.attention_norm(x), mask, rope, child_key(key, "attention"))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x), child_key(key, "mlp")), kv

    def decode(
        self,
        x: jax.Array,
        cache: Cache,
        layer: jax.Array | int,
        positions: jax.Array,
        rope: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, Cache]:
        attended, cache = self.attention.decode(self.attention_norm(x), cache, layer, positions, rope)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """Token embeddings in, normalised hidden states out; `head` gives the projection to the vocabulary."""

    def __init__(self, scope: Scope, config: DecoderConfig):
        self.config = config
        width = config.hidden_size
        self.embed = Embedding(scope / "embed", config.vocab_size, width, init=normal(width**-0.5))
        self.layers = Block(scope.stacked(config.num_layers) / "layers", config)
        self.final_norm = RMSNorm(scope / "final_norm", width, eps=config.norm_eps)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear(scope / "lm_head", width, config.vocab_size, axes=("embed", "vocab"))
        )

    def __call__(
        self, x: jax.Array, mask: Mask, *, key: jax.Array | None = None, remat: str = "none", keep_kv: bool = False
    ) -> tuple[jax.Array, Cache | None]:
        """`x [B, T, D] -> hidden [B, T, D]`, and with `keep_kv` the cache of its T positions.

        `key` turns dropout on; it is folded with the index of each layer.
        """
        assert mask.positions is not None
        rope = self._rope(mask.positions)

        def apply(layer: Block, x: jax.Array, index: jax.Array, _: None) -> tuple[jax.Array, object]:
            layer_key = None if key is None else jax.random.fold_in(key, index)
            x, kv = layer(x, mask, rope, layer_key)
            return x, kv if keep_kv else None

        x, kv = scan_layers(self.layers, x, apply, remat=remat)
        return self.final_norm(x), Cache(*(a.swapaxes(2, 3) for a in kv)) if keep_kv else None

    def decode(
        self, tokens: jax.Array, cache: Caches, positions: jax.Array, dtype: jnp.dtype
    ) -> tuple[jax.Array, Caches]:
        """The next token of each row: `tokens [B]` at `positions [B]` -> logits float32 [B, V].

        `cache` is one of each layer, with L = 1, where the layers stand apart (`layers_apart`).
        """
        x = self.embed(tokens[:, None], dtype)
        rope = self._rope(positions[:, None])
        if not isinstance(cache, Cache):
            caches = []
            for layer, own in zip(each_layer(self.layers), cache, strict=True):
                x, own = layer.decode(x, own, 0, positions, rope)
                caches.append(own)
            return self.logits(self.final_norm(x))[:, 0], tuple(caches)

        def apply(layer: Block, carry: tuple[jax.Array, Cache], index: jax.Array, _: None) -> tuple[object, None]:
            x, cache = carry
            return layer.decode(x, cache, index, positions, rope), None

        (x, cache), _ = scan_layers(self.layers, (x, cache), apply)
        return self.logits(self.final_norm(x))[:, 0], cache

    def head(self, dtype: jnp.dtype) -> jax.Array:
        """Output projection [D, V]."""
        return self.embed.as_head(dtype) if self.lm_head is None else self.lm_head.merged(dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`hidden [B, T, D] -> float32 [B, T, V]`."""
        out = P(RULES.batch, None, None)
        return jnp.einsum(
            "btd,dv->btv", hidden, self.head(hidden.dtype), preferred_element_type=jnp.float32, out_sharding=out
        )

    def _rope(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        config = self.config
        return rope_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)
