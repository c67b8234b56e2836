"""Vision features stand where the host's index says, and gradients find their way back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.layers.linear import Embedding
from vlm_jax.layers.scope import normal
from vlm_jax.models.binding import Bound
from vlm_jax.models.fusion import place_visual

ROWS, LENGTH, PLACES, WIDTH = 3, 10, 6, 4


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
