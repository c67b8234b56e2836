"""Vision transformer (Dosovitskiy et al., 2021), in the variants of CLIP, SigLIP and AugReg."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UsageError
from vlm_jax.layers.attention import Mask, SelfAttention
from vlm_jax.layers.linear import Linear
from vlm_jax.layers.mlp import MLP
from vlm_jax.layers.norms import LayerNorm
from vlm_jax.layers.scope import Scope, child_key, normal, use
from vlm_jax.layers.stack import scan_layers
from vlm_jax.sharding import reshape, spec_of


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """`feature_layer` selects a hidden state: 0 is the embedding, i the output of layer i, negative from the end
    (-1 the last layer). Layers above it are not computed. `post_norm` normalises what is selected."""

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str = "gelu"
    class_token: bool = False
    keep_class_token: bool = False  # among the features (LLaVA's "full" instead of "default")
    pre_norm: bool = False  # a norm after the embedding (CLIP)
    patch_bias: bool = True
    post_norm: bool = False
    norm_eps: float = 1e-6
    feature_layer: int = -1
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        if not 1 <= self.patch_size <= self.image_size:
            raise UsageError(
                f"vision.image_size {self.image_size} does not hold a patch of patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise UsageError(f"vision.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if not -self.num_layers - 1 <= self.feature_layer <= self.num_layers:
            raise UsageError(
                f"vision.feature_layer {self.feature_layer} does not exist: there are {self.num_layers} layers, "
                f"so it lies in {-self.num_layers - 1}..{self.num_layers}"
            )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def features_per_tile(self) -> int:
        return self.patches + (self.class_token and self.keep_class_token)

    @property
    def layers_used(self) -> int:
        return self.feature_layer if self.feature_layer >= 0 else self.num_layers + 1 + self.feature_layer


class Block(nnx.Module):
    def __init__(self, scope: Scope, config: ViTConfig):
        features = config.hidden_size
        self.attention_norm = LayerNorm(scope / "attention_norm", features, eps=config.norm_eps)
        self.attention = SelfAttention(
            scope / "attention",
            features,
            heads=config.num_heads,
            kv_heads=config.num_heads,
            head_dim=features // config.num_heads,
            causal=False,
            qkv_bias=True,
            out_bias=True,
        )
        self.mlp_norm = LayerNorm(scope / "mlp_norm", features, eps=config.norm_eps)
        self.mlp = MLP(scope / "mlp", features, config.intermediate_size, activation=config.activation)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), Mask(), key=child_key(key, "attention"))[0]
        return x + self.mlp(self.mlp_norm(x), child_key(key, "mlp"))


class ViT(nnx.Module):
    """`tiles uint8 [N, H, W, 3] -> features [N, P, Dv]`, without the class token unless it is kept."""

    def __init__(self, scope: Scope, config: ViTConfig):
        self.config = config
        features = config.hidden_size
        self.patch_embed = Linear(
            scope / "patch_embed",
            3 * config.patch_size**2,
            features,
            axes=(None, "embed"),
            bias=config.patch_bias,
        )
        count = config.patches + config.class_token
        self.position_embedding = scope.param("position_embedding", (count, features), (None, "embed"), sincos2d)
        self.class_token = (
            scope.param("class_token", (features,), ("embed",), normal(features**-0.5)) if config.class_token else None
        )
        self.pre_norm = LayerNorm(scope / "pre_norm", features, eps=config.norm_eps) if config.pre_norm else None
        self.layers = Block(scope.stacked(config.num_layers) / "layers", config)
        self.post_norm = LayerNorm(scope / "post_norm", features, eps=config.norm_eps) if config.post_norm else None

    def __call__(
        self, tiles: jax.Array, dtype: jnp.dtype, *, remat: str = "none", key: jax.Array | None = None
    ) -> jax.Array:
        """`key` turns dropout on; it is folded with the index of each layer. Tiles of floats are normalised already."""
        config = self.config
        raw = not jnp.issubdtype(tiles.dtype, jnp.floating)
        pixels = (normalise(tiles, config.mean, config.std) if raw else tiles).astype(dtype)
        x = self.patch_embed(patchify(pixels, config.patch_size), child_key(key, "patch_embed"))
        if self.class_token is not None:
            token = jnp.broadcast_to(use(self.class_token, dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([jax.reshard(token, spec_of(x)), x], axis=1)
        x = x + use(self.position_embedding, dtype)
        if self.pre_norm is not None:
            x = self.pre_norm(x)

        def apply(layer: Block, x: jax.Array, index: jax.Array, _: None) -> tuple[jax.Array, None]:
            return layer(x, None if key is None else jax.random.fold_in(key, index)), None

        x, _ = scan_layers(self.layers, x, apply, first=config.layers_used, remat=remat)
        if self.post_norm is not None:
            x = self.post_norm(x)
        if self.class_token is not None and not config.keep_class_token:
            x = x[:, 1:]
        return x


def sincos2d(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype, spec: P) -> jax.Array:
    """Sines and cosines of row and column, [P, D] or, with a zero row for the class token, [1 + P, D]: a start from
    which small sets are learnt faster than from noise (Beyer et al., 2022)."""
    del key
    count, features = shape
    side = math.isqrt(count)
    quarter = -(-features // 4)
    rates = 1.0 / 10_000 ** (np.arange(quarter) / max(quarter - 1, 1))
    angles = np.arange(side)[:, None] * rates
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # [side, D / 2]
    table = np.concatenate([np.repeat(waves, side, axis=0), np.tile(waves, (side, 1))], axis=1)[:, :features]
    table = np.concatenate([np.zeros((count - side**2, features)), table])
    return jax.reshard(jnp.asarray(table, dtype), spec)


def normalise(tiles: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """`uint8 [..., 3] -> float32`, `(x / 255 - mean) / std` as one multiplication and one addition."""
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    return tiles.astype(jnp.float32) * scale - jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """`[N, H, W, 3] -> [N, P, patch * patch * 3]`, row-major patches; within one: row, column, channel.

    Pixels at the right and the bottom that fill no patch are left out, as a convolution does (384 = 27 * 14 + 6).
    """
    n, height, width, channels = x.shape
    rows, columns = height // patch, width // patch
    x = x[:, : rows * patch, : columns * patch]
    batch = spec_of(x)[0]
    x = reshape(x, (n, rows, patch, columns, patch, channels), P(batch, None, None, None, None, None))
    x = einops.rearrange(x, "n h p w q c -> n h w p q c")
    return reshape(x, (n, rows * columns, patch * patch * channels), P(batch, None, None))
