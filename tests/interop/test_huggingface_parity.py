"""LLaVAs compute here what they compute in transformers, from the files that transformers wrote.

The weights are drawn large, and each test first shows that the reference reacts to every input and every weight.
"""

from __future__ import annotations

import re
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

# (kind, tower, decoder, more settings); the first of each kind are run by `make test`, all by `make test-all`.
FEW: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llava", "clip", "llama", {}),
    ("llava", "siglip", "qwen2_tied", {"vision_feature_layer": -1}),
    ("llava_next", "clip", "mistral", {}),
]
MORE: list[tuple[str, str, str, dict[str, Any]]] = [
    (kind, vision, text, {"vision_feature_layer": layer})
    for kind in ("llava", "llava_next")
    for vision, layer in (("clip", -2), ("siglip", -1))
    for text in ("llama", "yi", "mistral", "qwen2", "qwen2_tied", "qwen3")
]
CASES = [pytest.param(*case, id="-".join(case[:3])) for case in FEW]
CASES += [pytest.param(*case, id="all-" + "-".join(case[:3]), marks=pytest.mark.slow) for case in MORE]

# Weights that no feature of the layer in use depends on, and key biases, which add the same to all scores of a query
# where there is no RoPE.
NEVER = re.compile(r".*vision_tower.*(k_proj\.bias|post_layernorm\..*|head\..*)")


def never(name: str, layer: int) -> bool:
    above = {-1: (), -2: (2,)}[layer]
    return bool(NEVER.fullmatch(name)) or any(f"encoder.layers.{n}." in name for n in above)


@pytest.mark.parametrize(("kind", "vision", "text", "more"), CASES)
def test_logits_and_gradients_equal_transformers(
    hf, tmp_path: Path, one_device, kind: str, vision: str, text: str, more: dict[str, Any]
) -> None:
    model = hf.build(kind, vision, text, **more)
    model.save_pretrained(tmp_path)
    given = hf.inputs(kind, model)
    inputs = hf.torch(given)
    inputs["pixel_values"].requires_grad_()
    logits = model(**inputs).logits
    real = given["attention_mask"].astype(bool)
    out = logits[torch.tensor(real)]
    weigh = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weigh).sum().backward()
    layer = model.config.vision_feature_layer
    still = {n for n, w in model.named_parameters() if w.grad is None or w.grad.abs().max() < 1e-3}
    assert {name for name in still if not never(name, layer)} == set()
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

    (_, ours), found = hf.jit(jax.value_and_grad(forward, has_aux=True))(vlm.params)
    expected = logits.detach().numpy()
    assert ours.shape == expected.shape
    assert np.abs(np.asarray(ours) - expected)[real].max() <= LOGITS * np.abs(expected[real]).max()
    theirs = {canonical(name): w.grad for name, w in model.named_parameters()}
    compared = set()
    for tensor in names(vlm.family.settings):
        grad = theirs[tensor.hf]
        if grad is None or never(tensor.hf, layer):
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
