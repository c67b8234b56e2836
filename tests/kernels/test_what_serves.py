"""The tables of docs/kernels.md against what is chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.devices import absent_mesh
from tests.kernels.serving import KINDS, choice, table
from vlm_jax.kernels.attention.shapes import SHAPES as ATTENTION
from vlm_jax.kernels.contrastive import api as contrastive
from vlm_jax.kernels.contrastive.shapes import SHAPES as CONTRASTIVE


def dtype_of(kind: str) -> str:
    return "float32" if kind in (KINDS["T4"], KINDS["CPU"]) else "bfloat16"


@pytest.mark.parametrize("kind", KINDS.values())
def test_attention(kind, monkeypatch, with_cudnn) -> None:
    documented, words = table("Attention"), {"xla": "blocks", "pallas": "packed"}
    assert documented.keys() == {name for name, shape in ATTENTION.items() if not shape.small}
    served = {name: choice(monkeypatch, kind, name, dtype_of(kind)) for name in documented}
    assert {name: words.get(chosen, chosen) for name, chosen in served.items()} == {
        name: row[kind] for name, row in documented.items()
    }


@pytest.mark.parametrize("kind", KINDS.values())
def test_contrastive_losses(kind) -> None:
    documented, words = table("Contrastive losses"), {"xla": "tiles", "pallas": "pallas"}
    assert documented.keys() == {name for name, shape in CONTRASTIVE.items() if not shape.small}
    with jax.sharding.use_abstract_mesh(mesh := absent_mesh(kind)):
        for name, row in documented.items():
            shape = CONTRASTIVE[name]
            features = jax.ShapeDtypeStruct((shape.pairs, shape.width), jnp.dtype(dtype_of(kind)))
            for loss in ("softmax", "sigmoid"):
                assert words[contrastive._choose(loss, mesh, features, None)] == row[kind], (name, loss)
