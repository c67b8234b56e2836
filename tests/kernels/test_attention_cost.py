"""The model of what attention costs, against numbers by hand, on devices that are not there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.devices import A100, H200, absent_mesh
from vlm_jax.kernels.attention.cost import equal_pairs

SEEN, FULL = 100 * 101 // 2 + 50 * 51 // 2, 256 * 257 // 2
KERNEL = 14 / 12 / 0.6
MEMORY = 10 * (4 + 2) / 2 * 160 / (12 * 64)  # 10 passes over scores, half of them in bfloat16


@pytest.mark.parametrize(
    ("kind", "rows", "packed", "want"),
    [
        (H200, [[100, 50]], True, KERNEL * (SEEN + 150 * 128)),
        (H200, [[100], [50]], False, KERNEL * 2 * (FULL + 256 * 128)),  # cuDNN
        (A100, [[100, 50]], True, (KERNEL + MEMORY) * (SEEN + 150 * 256)),
        (A100, [[100], [50]], False, KERNEL * 2 * (FULL + 256 * 128)),
        ("cpu", [[100], [50]], False, KERNEL * (SEEN + 150 * 256)),
        ("TPU v5 lite", [[100, 50]], True, KERNEL * 256**2),
    ],
)
def test_what_is_computed_counts(kind, rows, packed, want, with_cudnn) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "features": 64, "sliding_window": None, "dtype": jnp.bfloat16}
    with jax.sharding.use_abstract_mesh(absent_mesh(kind)):
        assert equal_pairs(rows, 256, **sizes, packed=packed) == pytest.approx(want)
