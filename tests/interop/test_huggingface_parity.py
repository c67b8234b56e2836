"""LLaVAs compute here what they compute in transformers, from the files that transformers wrote.

The weights are drawn large, and each test first shows that the reference reacts to every input and every weight.
"""

from __future__ import annotations

import itertools
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax.inference.apply_hf import hf_batch, place_inputs
from vlm_jax.interop.tables import FORMS, canonical, names

torch = pytest.importorskip("torch")

LOGITS, GRADIENTS = 1e-4, 1e-3  # of the largest value: float32, summed in another order

# (kind, tower, decoder, more settings); `make test` runs these, `make test-all` the ones with drawn shapes too.
FEW: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llava", "clip", "llama", {}),
    ("llava", "siglip", "qwen2_tied", {"vision_feature_layer": -1}),
    ("llava_next", "clip", "mistral", {}),
]


def drawn(kind: str, vision: str, text: str) -> dict[str, Any]:
    """Settings of odd shapes: patches that do not fill the image, odd widths, few and many heads, layers of either
    sign, either choice of features, windows shorter than a row."""
    random = np.random.default_rng(zlib.crc32(f"{kind} {vision} {text}".encode()))
    pick = lambda *choices: choices[random.integers(len(choices))]  # noqa: E731
    number = lambda low, high: int(random.integers(low, high + 1))  # noqa: E731
    patch, layers, width = number(3, 7), number(2, 4), pick(1, 2, 3, 5)
    image = patch * number(2, 4) + number(0, 2)
    tower = {
        "image_size": image,
        "patch_size": patch,
        "hidden_size": width * pick(6, 7, 9, 12),
        "num_attention_heads": width,
        "intermediate_size": number(29, 61),
        "num_hidden_layers": layers,
        "layer_norm_eps": pick(1e-5, 1e-6),
    }
    heads, kv_heads = pick((4, 1), (4, 2), (5, 5), (6, 2), (6, 3), (9, 3)) if text != "llama" else pick((3, 3), (5, 5))
    head_dim = pick(4, 6, 10)
    decoder: dict[str, Any] = {
        "vocab_size": number(63, 97),
        "hidden_size": heads * (head_dim if text.startswith("qwen2") else number(7, 11)),
        "intermediate_size": number(37, 71),
        "num_hidden_layers": number(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": 1 if text == "yi" else kv_heads,
        "rms_norm_eps": pick(1e-5, 1e-6),
        "theta": pick(1e4, 1e6, 5e6),
    }
    if not text.startswith("qwen2"):
        decoder["head_dim"] = head_dim
    if text == "mistral":
        decoder["sliding_window"] = number(5, 17)
    settings = {"vision_changes": tower, "text_changes": decoder}
    settings["vision_feature_layer"] = pick(-1, -2, *range(1, layers + 1))
    if kind == "llava" and vision == "clip":
        settings["vision_feature_select_strategy"] = pick("default", "full")
    if kind == "llava_next":
        shapes = random.permutation([(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3)])[: number(3, 6)]
        settings["image_grid_pinpoints"] = (image * shapes).tolist()
    return settings


KINDS, TOWERS = ("llava", "llava_next"), ("clip", "siglip")
DECODERS = ("llama", "yi", "mistral", "qwen2", "qwen2_tied", "qwen3")
CASES = [pytest.param(*case, (1, 2), id="-".join(case[:3])) for case in FEW]
CASES += [
    pytest.param(*case, drawn(*case), (2, 0, 1, 3), id="drawn-" + "-".join(case), marks=pytest.mark.slow)
    for case in itertools.product(KINDS, TOWERS, DECODERS)
]

# Weights that no feature of the layer in use depends on, and key biases, which add the same to all scores of a query
# where there is no RoPE.
NEVER = re.compile(r".*vision_tower.*(k_proj\.bias|post_layernorm\..*|head\..*)")


def never(name: str, config: Any) -> bool:
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    used = layer if layer >= 0 else layers + 1 + layer
    return bool(NEVER.fullmatch(name)) or any(f"encoder.layers.{n}." in name for n in range(used, layers))


@pytest.mark.parametrize(("kind", "vision", "text", "more", "images"), CASES)
def test_logits_and_gradients_equal_transformers(
    hf, tmp_path: Path, one_device, kind: str, vision: str, text: str, more: dict[str, Any], images: tuple[int, ...]
) -> None:
    model = hf.build(kind, vision, text, **more)
    model.save_pretrained(tmp_path)
    given = hf.inputs(kind, model, images=images)
    inputs = hf.torch(given)
    inputs["pixel_values"].requires_grad_()
    logits = model(**inputs).logits
    real = given["attention_mask"].astype(bool)
    out = logits[torch.tensor(real)]
    weigh = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weigh).sum().backward()
    still = {n for n, w in model.named_parameters() if w.grad is None or w.grad.abs().max() < 1e-3}
    assert {name for name in still if not never(name, model.config)} == set()
    pixels = inputs["pixel_values"].grad.numpy()
    used = given["pixel_values"] != 0
    assert (np.abs(pixels).max(axis=(-1, -2, -3)) > 1e-3).sum() >= 3 and np.abs(pixels[used]).max() > 1e-2

    vlm = vlm_jax.load(tmp_path)
    batch = place_inputs(hf_batch(given, vlm.images, vlm.image_token_id))
    weights = np.zeros(logits.shape, np.float32)
    weights[real] = weigh.numpy()

    def forward(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        bound = vlm.family.bound.bind(params)
        out = bound.decoder.logits(bound(batch)[0])
        return (out * weights).sum(), out

    (_, ours), found = jax.jit(jax.value_and_grad(forward, has_aux=True))(vlm.params)
    expected = logits.detach().numpy()
    assert ours.shape == expected.shape
    assert np.abs(np.asarray(ours) - expected)[real].max() <= LOGITS * np.abs(expected[real]).max()
    theirs = {canonical(name): w.grad for name, w in model.named_parameters()}
    compared = set()
    for tensor in names(vlm.family.settings):
        grad = theirs[tensor.hf]
        if grad is None or never(tensor.hf, model.config):
            continue
        mine = np.asarray(found[tensor.path] if tensor.layer is None else found[tensor.path][tensor.layer])
        expected = FORMS[tensor.form].ours(grad.numpy())
        assert np.abs(mine - expected).max() <= GRADIENTS * np.abs(expected).max(), tensor.hf
        compared.add(tensor.path.split("/")[0])
    assert compared >= {"vision", "connector", "decoder"} | ({"newline"} if kind == "llava_next" else set())


def test_apply_hf_gives_the_logits_of_transformers(hf, tmp_path: Path) -> None:
    """On eight devices, which the two rows do not fill, with padding on the left."""
    model = hf.build("llava", "clip", "llama")
    model.save_pretrained(tmp_path)
    given = hf.inputs("llava", model)
    short = int(given["attention_mask"][0].sum())
    for name in ("input_ids", "attention_mask"):
        given[name][0] = np.roll(given[name][0], -short)
    with torch.no_grad():
        expected = model(**hf.torch(given)).logits.numpy()
    ours = vlm_jax.load(tmp_path).apply_hf(**given)
    real = given["attention_mask"].astype(bool)
    assert ours.dtype == np.float32 and ours.shape == expected.shape and not real[0, 0]
    assert np.abs(ours - expected)[real].max() <= LOGITS * np.abs(expected[real]).max()
