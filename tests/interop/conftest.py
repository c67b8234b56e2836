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


def text_settings(name: str) -> dict[str, Any]:
    sizes = {"vocab_size": 66, "hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 2}
    settings = {**sizes, "num_attention_heads": 4, "max_position_embeddings": 512, **TEXT[name]}
    theta = settings.pop("theta", 1e4)
    return {**settings, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def build(kind: str, vision: str, text: str, **more: Any) -> Any:
    """A `llava` or `llava_next` with drawn weights, in float32."""
    import transformers

    name = {"llava": "Llava", "llava_next": "LlavaNext"}[kind]
    settings: dict[str, Any] = {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -2, **more}
    settings["vision_feature_select_strategy"] = "default" if vision == "clip" else "full"
    settings["tie_word_embeddings"] = bool(TEXT[text].get("tie_word_embeddings"))
    if kind == "llava_next":
        settings["image_grid_pinpoints"] = PINPOINTS
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION[vision], text_config=text_settings(text), **settings
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


def inputs_of(kind: str, model: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Two rows as a processor yields them: one image and, longer, two images of random sizes; padded on the right."""
    random = np.random.default_rng(seed)
    size, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    sizes = random.integers(5, 60, (3, 2))
    if kind == "llava_next":
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        tiles = [image_size_to_num_patches(one, PINPOINTS, size) for one in sizes]
        pixels = np.zeros((3, max(tiles), 3, size, size), np.float32)
        for target, count in zip(pixels, tiles, strict=True):
            target[:count] = random.normal(size=target[:count].shape)
        counts = [features(one, size // patch) for one in sizes]
    else:
        pixels = random.normal(size=(3, 3, size, size)).astype(np.float32)
        counts = [(size // patch) ** 2] * 3
    text = lambda n: random.integers(0, 60, n).tolist()  # noqa: E731
    rows = [
        [*text(3), *[IMAGE_TOKEN] * counts[0], *text(4)],
        [*text(2), *[IMAGE_TOKEN] * counts[1], *text(2), *[IMAGE_TOKEN] * counts[2], *text(5)],
    ]
    length = max(map(len, rows))
    given = {
        "input_ids": np.array([row + [0] * (length - len(row)) for row in rows], np.int64),
        "attention_mask": np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int64),
        "pixel_values": pixels,
    }
    return {**given, "image_sizes": sizes.astype(np.int64)} if kind == "llava_next" else given


def features(size: np.ndarray, side: int) -> int:
    """Places of an image (height, width), counted by transformers' processor."""
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    counter = types.SimpleNamespace(patch_size=7, image_processor=types.SimpleNamespace(image_grid_pinpoints=PINPOINTS))
    counter._get_unpadded_features = types.MethodType(LlavaNextProcessor._get_unpadded_features, counter)
    counter.vision_feature_select_strategy = "full"
    counter.num_additional_image_tokens = 0
    return int(LlavaNextProcessor._get_number_of_features(counter, *size.tolist(), side * 7, side * 7))


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


def quick_jit(function: Any) -> Any:
    """Compiled several times faster than by default, which pays for programs that run once."""
    options: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
    return jax.jit(function, compiler_options=options)


@pytest.fixture
def hf() -> types.SimpleNamespace:
    """What is above, for the tests of this folder."""
    return types.SimpleNamespace(
        build=build,
        enlarge=enlarge,
        inputs=inputs_of,
        torch=torch_inputs,
        jit=quick_jit,
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
