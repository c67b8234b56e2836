"""The loss is the mean over the trained tokens of the batch, or the mean of the ranks' means, as LLaVA trains."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import UsageError
from vlm_jax.objectives.language_modeling import next_token_loss, token_weights, total_weight
from vlm_jax.sharding import make_mesh

MICRO, ROWS, LENGTH, WIDTH, VOCABULARY = 2, 4, 12, 8, 20


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield


def made() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, VOCABULARY, (MICRO, ROWS, LENGTH))
    for row, untrained in enumerate((1, 10, 3, 5, 0, 11, 8, 2)):  # rows that weigh differently
        labels.reshape(-1, LENGTH)[row, :untrained] = -100
    hidden = rng.standard_normal((MICRO, ROWS, LENGTH, WIDTH), np.float32)
    return hidden, rng.standard_normal((WIDTH, VOCABULARY), np.float32), labels


def per_token(hidden: np.ndarray, head: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy float64 [A, R, T], by its definition; 0 where untrained."""
    logits = (hidden @ head).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return np.where(labels == -100, 0, loss)


@functools.partial(jax.jit, static_argnames=("norm", "ranks"))
def ours(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, segments: jax.Array | None = None, *, norm: str, ranks: int
) -> jax.Array:
    weights = token_weights(labels, jnp.ones_like(labels) if segments is None else segments, norm=norm, ranks=ranks)
    parts = [next_token_loss(hidden[i], head, labels[i], weights[i]) for i in range(len(labels))]
    return sum(parts) / total_weight(labels, weights)


def test_both_normalisations_by_their_definition() -> None:
    hidden, head, labels = made()
    loss, trained = per_token(hidden, head, labels), labels != -100
    mean = loss.sum() / trained.sum()
    assert ours(hidden, head, labels, norm="global_tokens", ranks=1) == pytest.approx(mean, rel=1e-6)
    assert ours(hidden, head, labels, norm="rank_mean", ranks=1) == pytest.approx(mean, rel=1e-6)
    groups = loss.reshape(4, -1).sum(1) / trained.reshape(4, -1).sum(1)
    assert ours(hidden, head, labels, norm="rank_mean", ranks=4) == pytest.approx(groups.mean(), rel=1e-6)
    assert abs(groups.mean() - mean) > 0.01  # they are not the same thing


def test_a_rank_without_a_trained_token_counts_nothing() -> None:
    hidden, head, labels = made()
    labels[0, 2:] = -100  # the second of four ranks
    loss, trained = per_token(hidden, head, labels).reshape(4, -1), (labels != -100).reshape(4, -1)
    groups = [loss[i].sum() / trained[i].sum() for i in (0, 2, 3)]
    assert ours(hidden, head, labels, norm="rank_mean", ranks=4) == pytest.approx(np.mean(groups), rel=1e-6)


@pytest.mark.parametrize("ranks", [4, 3])
def test_samples_that_share_rows_keep_their_ranks(ranks: int) -> None:
    """Eight samples in rows of one, two and three, and rows that are not filled, in the same order."""
    hidden, head, labels = made()
    expected = ours(hidden, head, labels, norm="rank_mean", ranks=ranks)
    packed = [[0], [1, 2], [3, 4, 5], [6, 7]]
    shape = (2, 2, 3 * LENGTH)
    rows = np.zeros((4, 3 * LENGTH, WIDTH), np.float32), np.full((4, 3 * LENGTH), -100), np.zeros((4, 3 * LENGTH), int)
    for row, samples in enumerate(packed):
        for place, sample in enumerate(samples):
            at = slice(place * LENGTH, (place + 1) * LENGTH)
            rows[0][row, at], rows[1][row, at] = hidden.reshape(8, LENGTH, WIDTH)[sample], labels.reshape(8, -1)[sample]
            rows[2][row, at] = place + 1
    together = (rows[0].reshape(*shape, WIDTH), head, rows[1].reshape(shape), rows[2].reshape(shape))
    assert ours(*together, norm="rank_mean", ranks=ranks) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("norm", "ranks"), [("global_tokens", 1), ("rank_mean", 4)])
def test_nothing_to_train_is_zero(norm: str, ranks: int) -> None:
    hidden, head, labels = made()
    assert ours(hidden, head, np.full_like(labels, -100), norm=norm, ranks=ranks) == 0


def test_mistakes_are_one_sentence() -> None:
    labels = jnp.zeros((1, 6, 4), int)
    with pytest.raises(UsageError, match=r"loss_norm 'rank-mean' is not one of .*did you mean 'rank_mean'"):
        token_weights(labels, labels, norm="rank-mean", ranks=1)
