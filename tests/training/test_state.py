"""The train state and its step, on a loss that a person can follow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.training.state import TrainState, init_state, make_eval_step, make_train_step

SETTINGS = {"frozen_dtype": jnp.dtype("bfloat16"), "ema": True}


def weigh(batch) -> tuple[jax.Array, jax.Array]:
    return batch["weights"], jnp.maximum(batch["weights"].sum(), 1e-6)


def loss(params, mutable, batch, weights, key):
    """Σ weight (w · x + frozen), and with a key also a random number, which the metrics show."""
    noise = 0.0 if key is None else jax.random.uniform(key)
    value = jnp.sum(weights * (batch["x"] @ params["w"] + params["frozen"].astype(jnp.float32)))
    return value, {"noise": jnp.asarray(noise)}, {"seen": mutable["seen"] + 1} if mutable else {}


def state(optimizer: optax.GradientTransformation = optax.sgd(0.5)) -> TrainState:  # noqa: B008
    params = {"w": jnp.asarray([1.0, 2.0]), "frozen": jnp.asarray(1.2345678)}
    return init_state(params, {"w": 1.0, "frozen": None}, optimizer, **SETTINGS)


def batch(micro: int) -> dict[str, np.ndarray]:
    x = np.arange(8, dtype=np.float32).reshape(micro, -1, 2)
    return {"x": x, "weights": np.arange(1, 5, dtype=np.float32).reshape(micro, -1)}


def test_state_splits_what_is_trained_from_what_is_frozen() -> None:
    made = state(optax.adam(0.1))
    assert set(made.trained) == set(made.ema) == {"w"} and set(made.frozen) == {"frozen"}
    assert made.frozen["frozen"].dtype == jnp.bfloat16 and made.trained["w"].dtype == jnp.float32
    assert {leaf.shape for leaf in jax.tree.leaves(made.opt_state)} == {(), (2,)}
    assert set(made.params) == {"w", "frozen"}
    in_bfloat16 = init_state({"w": jnp.ones(2, jnp.bfloat16)}, {"w": 1.0}, optax.sgd(0.1), **SETTINGS)
    assert in_bfloat16.trained["w"].dtype == jnp.float32


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_is_the_gradient_of_the_weighted_mean(micro: int) -> None:
    step = make_train_step(loss, weigh, optax.sgd(0.5), seed=0, ema_decay=0.75)
    data = batch(micro)
    x, weights = data["x"].reshape(-1, 2), data["weights"].reshape(-1)
    gradient = weights @ x / weights.sum()
    after, metrics = step(state(), data)
    frozen = float(jnp.asarray(1.2345678, jnp.bfloat16))
    assert metrics["loss"] == pytest.approx((weights @ (x @ [1.0, 2.0] + frozen)) / weights.sum(), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-6)
    np.testing.assert_allclose(after.trained["w"], [1, 2] - 0.5 * gradient, rtol=1e-6)
    np.testing.assert_allclose(after.ema["w"], [1, 2] - 0.25 * 0.5 * gradient, rtol=1e-6)
    assert after.step == 1 and after.frozen["frozen"] == jnp.asarray(1.2345678, jnp.bfloat16)


def test_keys_follow_from_seed_step_and_micro_batch_alone() -> None:
    def noises(seed: int, micro: int, start: TrainState, steps: int) -> tuple[list[float], TrainState]:
        step = make_train_step(loss, weigh, optax.sgd(0.0), seed=seed, ema_decay=None)
        found = []
        for _ in range(steps):
            start, metrics = step(start, batch(micro))
            found.append(float(metrics["noise"]))
        return found, start

    whole, _ = noises(0, 1, state(), 3)
    first, half = noises(0, 1, state(), 1)
    rest, _ = noises(0, 1, half, 2)
    assert first + rest == whole and len(set(whole)) == 3
    assert noises(1, 1, state(), 1)[0] != first
    two = noises(0, 2, state(), 1)[0][0]  # the sum over two micro-batches, the first of them as above
    assert two != pytest.approx(2 * first[0], rel=1e-3)


def test_what_the_model_updates_itself_passes_through_every_micro_batch() -> None:
    step = make_train_step(loss, weigh, optax.sgd(0.1), seed=0, ema_decay=None)
    start = state()
    start.mutable["seen"] = jnp.asarray(0)
    for micro, seen in ((1, 1), (4, 5), (2, 7)):
        start, _ = step(start, batch(micro))
        assert start.mutable["seen"] == seen


def test_evaluation_is_the_same_sum_without_keys() -> None:
    evaluate = make_eval_step(loss, weigh)
    data = batch(2)
    x, weights = data["x"].reshape(-1, 2), data["weights"].reshape(-1)
    summed, weight = evaluate({"w": jnp.asarray([1.0, 2.0]), "frozen": jnp.asarray(0.5)}, {}, data)
    assert summed == pytest.approx(weights @ (x @ [1.0, 2.0] + 0.5), rel=1e-6) and weight == weights.sum()
