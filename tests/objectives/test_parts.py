"""A contrastive batch in parts: the gradient of the whole, in the memory of one part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.kernels import sigmoid_contrastive_loss, softmax_contrastive_loss
from vlm_jax.objectives.parts import in_parts

PARTS, ROWS, WIDTH, HIDDEN = 6, 8, 12, 32


def encode(params, part):
    def tower(name, x):
        x = jnp.tanh(x @ params[name]["in"]) @ params[name]["out"]
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return {name: tower(name, part[name]) for name in ("image", "text")}


def made(parts=PARTS, rows=ROWS, hidden=HIDDEN):
    rng = np.random.default_rng(0)
    params = {
        name: {
            "in": rng.standard_normal((WIDTH, hidden), np.float32),
            "out": rng.standard_normal((hidden, 10), np.float32),
        }
        for name in ("image", "text")
    }
    batch = {name: rng.standard_normal((parts, rows, WIDTH), np.float32) for name in ("image", "text")}
    return {**params, "scale": np.float32(10), "bias": np.float32(-3)}, batch


def loss(kind, params, embeddings):
    if kind == "softmax":
        return softmax_contrastive_loss(**embeddings, scale=params["scale"])
    return sigmoid_contrastive_loss(**embeddings, scale=params["scale"], bias=params["bias"])


def whole(params, batch):
    return encode(params, {name: x.reshape(-1, WIDTH) for name, x in batch.items()})


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("devices", [None, 8])
def test_parts_give_the_gradient_of_the_whole(kind, devices) -> None:
    params, batch = made()
    want = jax.value_and_grad(lambda p: loss(kind, p, whole(p, batch)))(params)
    if devices:
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Explicit,))
        batch = jax.device_put(batch, NamedSharding(mesh, P(None, "data", None)))
        params = jax.device_put(params, NamedSharding(mesh, P()))
    got = jax.jit(jax.value_and_grad(lambda p: loss(kind, p, in_parts(encode, p, batch))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


def test_sample_a_r_is_row_r_times_parts_plus_a() -> None:
    batch = np.arange(6).reshape(3, 2, 1)  # three parts of two
    rows = in_parts(lambda _, part: part, None, batch)
    assert rows[:, 0].tolist() == [0, 2, 4, 1, 3, 5] == batch.swapaxes(0, 1).reshape(-1).tolist()
    with pytest.raises(ValueError, match=r"encode must return arrays \[R, ...\].*returned a scalar"):
        in_parts(lambda _, part: part.sum(), None, batch)


def test_memory_is_that_of_one_part() -> None:
    params, batch = made(parts=32, rows=64, hidden=2048)

    def temporary(embed):
        gradient = jax.jit(jax.grad(lambda p, batch: loss("softmax", p, embed(p, batch))))
        return gradient.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(lambda p, batch: in_parts(encode, p, batch)) < temporary(whole) / 4
