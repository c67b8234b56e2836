"""Any vision tower, connector and decoder fit together: each combination builds and learns."""

from __future__ import annotations

import itertools
import math

import pytest

TOWERS = {
    "clip": ("clip_vit", {}),
    "siglip": ("siglip_vit", {}),
    "vit": ("vit", {"class_token": True, "num_layers": 1}),  # with its last norm
}
CONNECTORS = ("identity", "linear", "mlp2x_gelu")
DECODERS = {
    "llama3": {},
    "mistral": {"sliding_window": 5},
    "yi": {},
    "qwen2": {"tie_embeddings": True},
    "qwen3": {},
}


@pytest.mark.parametrize(("tower", "connector", "decoder"), list(itertools.product(TOWERS, CONNECTORS, DECODERS)))
def test_every_combination_takes_a_step(tiny, tower: str, connector: str, decoder: str) -> None:
    vision, vision_changes = TOWERS[tower]
    family = tiny.family(
        vision,
        connector,
        decoder,
        vision_changes=vision_changes,
        decoder_changes={"num_layers": 1, **DECODERS[decoder]},
    )
    import optax

    state, step = tiny.train_step(family, optimizer=optax.sgd(0.05))
    batch = tiny.batch(rows=3)
    state, first = step(state, batch)
    state, second = step(state, batch)
    assert math.isfinite(first["loss"]) and first["grad_norm"] > 0
    assert second["loss"] < first["loss"]
