"""The smallest LLaVA with every part in it, batches made by hand."""

from __future__ import annotations

import functools
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
import pytest

from vlm_jax.families import LlavaFamily, make_family
from vlm_jax.models import presets
from vlm_jax.sharding import make_mesh
from vlm_jax.training.state import TrainState, init_state, make_train_step

IMAGE, PATCH = 8, 4
PATCHES = (IMAGE // PATCH) ** 2
VOCABULARY = 32


def settings(
    vision: str = "clip_vit",
    connector: str = "mlp2x_gelu",
    decoder: str = "llama3",
    *,
    vision_changes: Mapping[str, Any] = types.MappingProxyType({}),
    decoder_changes: Mapping[str, Any] = types.MappingProxyType({}),
    **changes: Any,
) -> presets.Settings:
    """`config.model` of a tiny LLaVA; every part has the width 16, so that `identity` fits too."""
    tower = {"image_size": IMAGE, "patch_size": PATCH, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    language = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    return presets.llava(
        vision=getattr(presets, vision)(**tower | {"intermediate_size": 32} | dict(vision_changes)),
        connector=connector,
        decoder=getattr(presets, decoder)(**language | dict(decoder_changes)),
    ) | dict(changes)


def batch(seed: int = 0, *, micro: int = 1, rows: int = 8, length: int = 16, tiles: int = 2) -> dict[str, np.ndarray]:
    """Arrays [A, R, ...] as the pipeline makes them: rows with one image, with several, of text alone, of two segments,
    and one of padding only (the last, where there are at least four)."""
    rng = np.random.default_rng(seed)
    count, places = micro * rows, tiles * PATCHES
    tokens = rng.integers(1, VOCABULARY, (count, length), dtype=np.int32)
    labels = np.roll(tokens, -1, axis=1)
    positions = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    segments = np.ones((count, length), np.int32)
    index = np.full((count, length), -1, np.int32)
    inverse = np.full((count, places), -1, np.int32)
    tile_image = np.zeros((count, tiles), np.int32)
    for row in range(count):
        images = (1, 0, tiles)[row % 3]
        for image in range(images):
            start = 1 + image * (PATCHES + 1)
            at = np.arange(start, start + PATCHES)
            index[row, at] = np.arange(PATCHES) + image * PATCHES
            inverse[row, image * PATCHES : (image + 1) * PATCHES] = at
            tile_image[row, image] = image
            index[row, start + PATCHES] = places  # the newline
            tokens[row, start : start + PATCHES + 1] = 0
            labels[row, start - 1 : start + PATCHES] = -100
        labels[row, : 2 + row % 5] = -100
        end = length - row % 3  # the rest is padding
        if images == 0:
            cut = length // 2
            segments[row, cut:], positions[row, cut:], labels[row, cut - 1] = 2, np.arange(length - cut), -100
        if row == count - 1 and count >= 4:
            end, index[row], inverse[row] = 0, -1, -1
        tokens[row, end:] = segments[row, end:] = positions[row, end:] = 0
        labels[row, max(end - 1, 0) :] = -100
    arrays = {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segments,
        "labels": labels,
        "tiles": rng.integers(0, 256, (count, tiles, IMAGE, IMAGE, 3), dtype=np.uint8),
        "tile_image": tile_image,
        "visual_index": index,
        "visual_inverse": inverse,
    }
    return {name: a.reshape(micro, rows, *a.shape[1:]) for name, a in arrays.items()}


def random_params(abstract: Mapping[str, jax.ShapeDtypeStruct], seed: int = 0) -> dict[str, jax.Array]:
    """Weights that follow from their paths, biases and scales too; made on the host, where nothing is compiled."""

    def make(path: str, a: jax.ShapeDtypeStruct) -> jax.Array:
        draw = np.random.default_rng([seed, zlib.crc32(path.encode())]).standard_normal(a.shape, np.float32)
        leaf = path.rsplit("/", 1)[-1]
        value = draw * a.shape[-2] ** -0.5 if leaf in ("kernel", "lora_a", "lora_b") else 0.3 * draw
        return jax.device_put(value + 1 if leaf == "scale" else value, a.sharding)

    return {path: make(path, a) for path, a in abstract.items()}


def train_step(
    family: LlavaFamily,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trains: str = "",
    norm: str = "global_tokens",
    ranks: int = 1,
    seed: int = 0,
    **more: Any,
) -> tuple[TrainState, Any]:
    """A state with random weights, and the step. Only paths that hold `trains` are trained.

    Plain gradient descent with rate 1, so that the change of a weight is its gradient.
    """
    optimizer = optimizer or optax.sgd(1.0)
    params = random_params(family.bound.abstract, seed)
    rates = {path: 1.0 if trains in path else None for path in params}
    state = init_state(params, rates, optimizer, frozen_dtype=np.dtype("float32"), ema=False)
    weigh = functools.partial(family.weigh, norm=norm, ranks=ranks)
    step = make_train_step(family.loss, weigh, optimizer, seed=0, ema_decay=None, **more)
    return state, step


def on_host(params: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    return {path: np.asarray(a) for path, a in params.items()}


@pytest.fixture
def tiny() -> types.SimpleNamespace:
    """What is above, for the tests of this folder."""
    return types.SimpleNamespace(
        settings=settings,
        family=lambda *args, dtype="float32", remat="none", **changes: make_family(
            settings(*args, **changes), dtype=dtype, remat=remat
        ),
        batch=batch,
        params=random_params,
        train_step=train_step,
        on_host=on_host,
        PATCHES=PATCHES,
    )


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    """Every test of this folder begins on a mesh of one device."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield
