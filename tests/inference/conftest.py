"""A tiny model of random weights that reacts to every input, and a tokenizer of bytes, made in code."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

SETTINGS = {
    "family": "llava",
    "vision": {
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "post_norm": True,
    },
    "connector": "linear",
    # Grouped queries, normalised queries and keys, and a window that is shorter than every prompt.
    "decoder": {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "qk_norm": True,
        "sliding_window": 24,
    },
    "newline": False,
    "lora": None,
}
TEMPLATE = "chatml_direct"


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """One token per byte, so that a character may be several tokens; the marks of ChatML are one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    marks = [AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", additional_special_tokens=marks
    )


@pytest.fixture(scope="session")
def random_params() -> Callable[..., dict[str, jax.Array]]:
    """Weights larger than an initialisation's, norms and biases too, so that nothing hides behind a zero."""

    def make(abstract: dict[str, jax.ShapeDtypeStruct], seed: int = 0) -> dict[str, jax.Array]:
        mesh = jax.sharding.get_mesh()
        params = {}
        for number, (path, a) in enumerate(sorted(abstract.items())):
            value = np.random.default_rng([seed, number]).normal(size=a.shape)
            name = path.split("/")[-1]
            if name == "scale":
                value = 1 + 0.3 * value
            elif name == "kernel":
                value *= 1.5 * a.shape[-2] ** -0.5
            elif name == "bias":
                value *= 0.3
            sharding = jax.sharding.NamedSharding(mesh, a.sharding.spec)
            params[path] = jax.device_put(value.astype(a.dtype), sharding)
        return params

    return make


@pytest.fixture(scope="session")
def make_vlm(byte_tokenizer: Any, random_params: Callable[..., dict[str, jax.Array]]) -> Callable[..., Any]:
    """The tiny model on a mesh, `make_vlm(devices=1, fsdp=-1, tensor=1)`; the weights are the same on any. It has a
    newline where its `images` need one."""
    from vlm_jax.families import make_family
    from vlm_jax.inference.vlm import VLM
    from vlm_jax.sharding import make_mesh

    def make(
        devices: int = 1, seed: int = 0, template: str = TEMPLATE, images: Any = types.MappingProxyType({}), **mesh: int
    ) -> VLM:
        images = {"mode": "resize", **images}
        with jax.set_mesh(make_mesh(devices=jax.devices()[:devices], **mesh)):
            family = make_family({**SETTINGS, "newline": images.get("merge") == "spatial_unpad"})
            params = random_params(family.bound.abstract, seed)
            return VLM(family, params, tokenizer=byte_tokenizer, template=template, images=family.images(images))

    return make


@pytest.fixture(scope="session")
def vlm(make_vlm: Callable[..., Any]) -> Any:
    """The tiny model on one device."""
    return make_vlm()


@pytest.fixture(scope="session")
def picture() -> Callable[[int], np.ndarray]:
    """Pixels uint8 [9, 12, 3], other ones for each number."""
    return lambda number: np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def run_piped(repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python ARGS` with these lines as its stdin."""

    def run(*args: str, lines: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "PYTHONPATH": str(repository)}
        command = [sys.executable, *args]
        return subprocess.run(command, env=environ, input=lines, capture_output=True, text=True, timeout=300)

    return run
