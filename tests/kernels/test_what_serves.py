"""The tables of docs/kernels.md against what is chosen."""

from __future__ import annotations

import pytest

from tests.kernels.serving import KINDS, choice, table
from vlm_jax.kernels.attention.shapes import SHAPES as ATTENTION

WORDS = {"xla": "blocks", "pallas": "packed"}  # what the tables call them


@pytest.mark.parametrize("kind", KINDS.values())
def test_attention(kind, monkeypatch, with_cudnn) -> None:
    documented = table("Attention")
    assert documented.keys() == {name for name, shape in ATTENTION.items() if not shape.small}
    dtype = "float32" if kind in (KINDS["T4"], KINDS["CPU"]) else "bfloat16"
    served = {name: choice(monkeypatch, kind, name, dtype) for name in documented}
    assert {name: WORDS.get(chosen, chosen) for name, chosen in served.items()} == {
        name: row[kind] for name, row in documented.items()
    }
