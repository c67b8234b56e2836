"""Vision features stand where the host's index says, and gradients find their way back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.layers.linear import Embedding
from vlm_jax.layers.scope import normal
from vlm_jax.models.binding import Bound
from vlm_jax.models.fusion import place_visual
from vlm_jax.sharding import RULES, make_mesh, place

ROWS, LENGTH, PLACES, WIDTH = 3, 10, 6, 4
SHARDED = 8


def layout() -> tuple[np.ndarray, np.ndarray]:
    """`index [B, T]` and `inverse [B, K*P]`: features in any order, some nowhere, newlines, a row of text alone."""
    index = np.full((ROWS, LENGTH), -1, np.int32)
    index[0, [1, 2, 4, 5]] = [3, 0, 5, 1]
    index[0, [3, 6]] = index[1, 9] = PLACES  # newlines
    index[1, :PLACES] = np.arange(PLACES)
    inverse = np.full((ROWS, PLACES), -1, np.int32)
    for row, position in zip(*np.nonzero((index >= 0) & (index < PLACES)), strict=True):
        inverse[row, index[row, position]] = position
    return index, inverse


def test_values_and_gradients_are_those_of_a_plain_gather() -> None:
    index, inverse = layout()
    rng = np.random.default_rng(0)
    shapes = (ROWS, LENGTH, WIDTH), (ROWS, PLACES, WIDTH), (WIDTH,)
    arrays = tuple(rng.standard_normal(shape, np.float32) for shape in shapes)
    direction = rng.standard_normal(shapes[0], np.float32)

    def plain(embeddings, features, newline):
        table = jnp.concatenate([features, jnp.broadcast_to(newline, (ROWS, 1, WIDTH))], axis=1)
        visual = jnp.take_along_axis(table, jnp.maximum(index, 0)[..., None], axis=1)
        return jnp.where(index[..., None] < 0, embeddings, visual)

    def ours(embeddings, features, newline):
        return place_visual(embeddings, features, newline, jnp.asarray(index), jnp.asarray(inverse))

    @jax.jit
    def both(*arrays):
        return [(f(*arrays), jax.vjp(f, *arrays)[1](direction)) for f in (ours, plain)]

    (value, gradients), (wanted_value, wanted) = both(*arrays)
    np.testing.assert_array_equal(value, wanted_value)
    assert all(np.abs(g).max() > 0.1 for g in wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), gradients, wanted)


def weighted_layout() -> tuple[np.ndarray, ...]:
    """`index`, `weight [B, T, 4]`, `inverse`, `inverse_weight [B, K*P, 4]`: rows and columns of a random matrix with at
    most four entries in each, a newline per row, and a row of text alone."""
    rng = np.random.default_rng(1)
    index, weight = np.full((SHARDED, LENGTH, 4), -1, np.int32), np.zeros((SHARDED, LENGTH, 4), np.float32)
    inverse = np.full((SHARDED, PLACES, 4), -1, np.int32)
    inverse_weight = np.zeros((SHARDED, PLACES, 4), np.float32)
    for row in range(SHARDED - 1):
        for position in range(1, LENGTH - 2):
            index[row, position] = 0
            free = np.flatnonzero((inverse[row] < 0).any(1))
            for slot, feature in enumerate(rng.permutation(free)[: rng.integers(1, 4)]):
                place = int((inverse[row, feature] >= 0).sum())
                value = rng.random(dtype=np.float32)
                index[row, position, slot], weight[row, position, slot] = feature, value
                inverse[row, feature, place], inverse_weight[row, feature, place] = position, value
        index[row, LENGTH - 2], weight[row, LENGTH - 2, 0] = PLACES, 1
    return index, inverse, weight, inverse_weight


@pytest.mark.parametrize("devices", [1, 8])
def test_interpolated_features_are_a_sparse_product_and_its_transpose(devices: int) -> None:
    """Also where the rows of the batch lie on different devices: none of it needs another row."""
    placing = weighted_layout()
    index, _, weight, _ = placing
    dense = np.zeros((SHARDED, LENGTH, PLACES + 1), np.float32)
    for b, t, slot in zip(*np.nonzero((index >= 0) & (weight > 0)), strict=True):
        dense[b, t, index[b, t, slot]] += weight[b, t, slot]
    rng = np.random.default_rng(0)
    embeddings, features, direction = (
        rng.standard_normal((SHARDED, n, WIDTH), np.float32) for n in (LENGTH, PLACES, LENGTH)
    )
    newline = rng.standard_normal(WIDTH, np.float32)
    mesh = make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        rows = [place(a, mesh, P(RULES.batch)) for a in (embeddings, features, direction, *placing)]
        value, back = jax.jit(
            lambda e, f, d, n, *p: (lambda v, pull: (v, pull(d)))(*jax.vjp(lambda *x: place_visual(*x, *p), e, f, n))
        )(*rows[:3], jax.device_put(newline, NamedSharding(mesh, P())), *rows[3:])
    text = index[..., :1] < 0
    table = np.concatenate([features, np.broadcast_to(newline, (SHARDED, 1, WIDTH))], axis=1)
    wanted = np.where(text, embeddings, dense @ table)
    np.testing.assert_allclose(value, wanted, atol=1e-6)
    d_table = dense.transpose(0, 2, 1) @ np.where(text, 0, direction)
    wanted_back = np.where(text, direction, 0), d_table[:, :-1], d_table[:, -1].sum(0)
    assert all(np.abs(one).max() > 0.1 for one in wanted_back)
    for ours, theirs in zip(back, wanted_back, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_sums_of_many_bfloat16_gradients_are_made_in_float32() -> None:
    """In bfloat16 a sum of ones stops at 256."""
    count, dtype = 2048, jnp.bfloat16
    bound = Bound(lambda scope: Embedding(scope / "embed", 8, WIDTH, init=normal(1.0)))
    table = {"embedding": jnp.ones((8, WIDTH))}
    tokens, newlines = jnp.full((1, count), 5), jnp.ones((1, count), jnp.int32)
    nowhere = jnp.full((1, 1), -1, jnp.int32)

    @jax.jit
    def gradients(table, newline):
        embed = jax.grad(lambda table: bound.bind(table)(tokens, dtype).astype(jnp.float32).sum())
        place = jax.grad(
            lambda newline: (
                place_visual(
                    jnp.zeros((1, count, WIDTH), dtype), jnp.zeros((1, 1, WIDTH), dtype), newline, newlines, nowhere
                )
                .astype(jnp.float32)
                .sum()
            )
        )
        return embed(table)["embedding"], place(newline)

    assert list(bound.abstract) == ["embedding"]
    embedding, newline = gradients(table, jnp.ones(WIDTH, dtype))
    assert embedding.dtype == jnp.float32
    np.testing.assert_array_equal(embedding, np.where(np.arange(8)[:, None] == 5, count, 0) * np.ones(WIDTH))
    np.testing.assert_array_equal(newline.astype(jnp.float32), np.full(WIDTH, count))
