"""LLaVAs of transformers, tiny and of odd shapes, whose every weight matters; and what their processors would yield."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from vlm_jax.sharding import make_mesh

IMAGE_TOKEN = 61
PINPOINTS = [[14, 28], [28, 14], [28, 28], [42, 14], [14, 42]]
VISION = {
    "clip": {"model_type": "clip_vision_model", "image_size": 14, "patch_size": 7, "hidden_act": "quick_gelu"},
    "siglip": {"model_type": "siglip_vision_model", "image_size": 14, "patch_size": 7, "vision_use_head": False},
}
VISION = {
    name: {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3, **more}
    for name, more in VISION.items()
}
# Heads, their sizes and key-value heads that no other setting tells.
TEXT: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "yi": {"model_type": "llama", "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "theta": 5e6},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 6, "sliding_window": 9, "theta": 1e6},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "theta": 1e6},
    "qwen2_tied": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "theta": 1e6},
}


def text_settings(name: str, changes: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Any]:
    sizes = {"vocab_size": 66, "hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 2}
    settings = {**sizes, "num_attention_heads": 4, "max_position_embeddings": 512, **TEXT[name], **changes}
    theta = settings.pop("theta", 1e4)
    return {**settings, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def build(
    kind: str,
    vision: str,
    text: str,
    *,
    vision_changes: Mapping[str, Any] = types.MappingProxyType({}),
    text_changes: Mapping[str, Any] = types.MappingProxyType({}),
    **more: Any,
) -> Any:
    """A `llava` or `llava_next` with drawn weights, in float32."""
    import transformers

    name = {"llava": "Llava", "llava_next": "LlavaNext"}[kind]
    settings: dict[str, Any] = {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -2}
    settings["vision_feature_select_strategy"] = "default" if vision == "clip" else "full"
    settings["tie_word_embeddings"] = bool(TEXT[text].get("tie_word_embeddings"))
    if kind == "llava_next":
        settings["image_grid_pinpoints"] = PINPOINTS
    config = getattr(transformers, f"{name}Config")(
        vision_config={**VISION[vision], **vision_changes},
        text_config=text_settings(text, text_changes),
        **{**settings, **more},
    )
    config._attn_implementation = "eager"
    return enlarge(getattr(transformers, f"{name}ForConditionalGeneration")(config))


def enlarge(model: Any, seed: int = 0) -> Any:
    """Draws every weight anew so that it matters: kernels 1.5 / sqrt(fan-in), norm scales 1 ± 0.3, the rest ± 0.5."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = torch.randn(weight.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.3 * draw)
            elif weight.ndim in (2, 4) and "embed_tokens" not in name and "position" not in name:
                weight.copy_(draw * 1.5 * weight[0].numel() ** -0.5)
            else:
                weight.copy_(0.5 * draw)
    return model.eval()


def inputs_of(kind: str, model: Any, seed: int = 0, *, images: tuple[int, ...] = (1, 2)) -> dict[str, np.ndarray]:
    """Rows as a processor yields them, with so many `images` of random sizes and text; padded on the right."""
    random = np.random.default_rng(seed)
    config = model.config
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    total = sum(images)
    sizes = random.integers(5, 60, (total, 2))
    if kind == "llava_next":
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        points = config.image_grid_pinpoints
        tiles = [image_size_to_num_patches(one, points, size) for one in sizes]
        pixels = np.zeros((total, max(tiles), 3, size, size), np.float32)
        for target, count in zip(pixels, tiles, strict=True):
            target[:count] = random.normal(size=target[:count].shape)
        counts = [features(one, size, patch, points) for one in sizes]
    else:
        pixels = random.normal(size=(total, 3, size, size)).astype(np.float32)
        clip = config.vision_config.model_type == "clip_vision_model"
        counts = [(size // patch) ** 2 + (clip and config.vision_feature_select_strategy == "full")] * total
    text = lambda n: random.integers(0, 60, n).tolist()  # noqa: E731
    left = iter(counts)
    rows = []
    for number in images:
        row = text(4 - number)
        for _ in range(number):
            row += [*[IMAGE_TOKEN] * next(left), *text(3)]
        rows.append([*row, *text(2)])
    length = max(map(len, rows))
    given = {
        "input_ids": np.array([row + [0] * (length - len(row)) for row in rows], np.int64),
        "attention_mask": np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int64),
        "pixel_values": pixels,
    }
    return {**given, "image_sizes": sizes.astype(np.int64)} if kind == "llava_next" else given


def features(shown: np.ndarray, size: int, patch: int, points: list[list[int]]) -> int:
    """Places of an image (height, width), counted by transformers' processor."""
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    counter = types.SimpleNamespace(
        patch_size=patch, image_processor=types.SimpleNamespace(image_grid_pinpoints=points)
    )
    counter._get_unpadded_features = types.MethodType(LlavaNextProcessor._get_unpadded_features, counter)
    counter.vision_feature_select_strategy = "full"
    counter.num_additional_image_tokens = 0
    return int(LlavaNextProcessor._get_number_of_features(counter, *shown.tolist(), size, size))


def torch_inputs(given: Mapping[str, np.ndarray]) -> dict[str, Any]:
    import torch

    return {name: torch.tensor(value) for name, value in given.items()}


def state_of(folder: Path) -> dict[str, tuple[str, bytes]]:
    """(dtype and shape, bytes) of every tensor in the safetensors of a folder, by name."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                value = tensors.get_tensor(name)
                import torch

                raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                found[name] = (f"{value.dtype} {list(value.shape)}", raw)
    return found


@pytest.fixture
def hf() -> types.SimpleNamespace:
    """What is above, for the tests of this folder."""
    return types.SimpleNamespace(
        build=build,
        enlarge=enlarge,
        inputs=inputs_of,
        torch=torch_inputs,
        state=state_of,
        text=text_settings,
        vision=VISION,
        PINPOINTS=PINPOINTS,
        IMAGE_TOKEN=IMAGE_TOKEN,
        no_tokenizer=types.SimpleNamespace(save_pretrained=lambda folder: None),
    )


@pytest.fixture
def one_device() -> Iterator[None]:
    """A mesh of one device, for tests that ask for it."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield
