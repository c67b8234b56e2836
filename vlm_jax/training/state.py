"""The train state and the step: one pure function from a state and a batch to the next state and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

Params = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run must keep. `mutable` holds what the model itself updates (batch statistics, queues)."""

    step: jax.Array
    trained: Params
    frozen: Params
    mutable: dict[str, jax.Array]
    ema: Params | None
    opt_state: optax.OptState

    @property
    def params(self) -> Params:
        return {**self.trained, **self.frozen}


class Loss(Protocol):
    """`(params, mutable, micro_batch, weights, key) -> (weighted_sum, metrics, mutable)`.

    `weights` is what `weigh` gave for this micro-batch; the sum over the micro-batches of a step is divided by their
    total weight, which is known from the labels before anything is computed.
    """

    def __call__(
        self, params: Params, mutable: dict[str, jax.Array], batch: Batch, weights: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]: ...


Weigh = Callable[[Batch], tuple[jax.Array, jax.Array]]
"""`batch [A, R, ...] -> (weights [A, R, ...], total weight)`."""


def init_state(
    params: Params,
    rates: Mapping[str, float | None],
    optimizer: optax.GradientTransformation,
    *,
    frozen_dtype: jnp.dtype,
    ema: bool,
) -> TrainState:
    """Splits `params` by `rates` (None: frozen, cast to `frozen_dtype`). Frozen parameters get no optimizer state.

    Trained ones are float32, also where the stage before had frozen them in another type.
    """
    trained = {path: params[path].astype(jnp.float32) for path, rate in rates.items() if rate is not None}
    frozen = {path: params[path].astype(frozen_dtype) for path, rate in rates.items() if rate is None}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        frozen=frozen,
        mutable={},
        ema=jax.tree.map(jnp.copy, trained) if ema else None,
        opt_state=optimizer.init(trained),
    )


def make_train_step(
    loss: Loss,
    weigh: Weigh,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float | None,
    on_trace: Callable[[], None] = lambda: None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step over a batch whose arrays are [A, R, ...]: A micro-batches of R rows.

    The gradient is that of Σ weighted losses / Σ weights over the whole batch, so accumulation changes nothing. Keys
    are folded from the seed, the step and the micro-batch; none is stored. `on_trace` is called at each compilation.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        on_trace()
        weights, total = weigh(batch)
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)

        def value(trained: Params, mutable: dict, micro: Batch, weights: jax.Array, index: jax.Array) -> Any:
            key = jax.random.fold_in(step_key, index)
            weighted, metrics, mutable = loss({**trained, **state.frozen}, mutable, micro, weights, key)
            return weighted / total, (metrics, mutable)

        gradient = jax.value_and_grad(value, has_aux=True)

        def micro_step(carry: Any, inputs: Any) -> tuple[Any, Any]:
            summed, mutable = carry
            micro, weights, index = inputs
            (part, (metrics, mutable)), grads = gradient(state.trained, mutable, micro, weights, index)
            return (jax.tree.map(jnp.add, summed, grads), mutable), (part, metrics)

        count = weights.shape[0]
        if count == 1:
            first = jax.tree.map(lambda a: a[0], dict(batch))
            (part, (metrics, mutable)), grads = gradient(
                state.trained, state.mutable, first, weights[0], jnp.zeros((), jnp.int32)
            )
            value_sum = part
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.trained)
            (grads, mutable), (parts, metrics) = jax.lax.scan(
                micro_step, (zeros, state.mutable), (dict(batch), weights, jnp.arange(count))
            )
            value_sum, metrics = jnp.sum(parts), jax.tree.map(lambda a: jnp.sum(a, axis=0), metrics)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        ema = state.ema
        if ema is not None and ema_decay is not None:
            ema = jax.tree.map(lambda a, b: ema_decay * a + (1 - ema_decay) * b, ema, trained)
        metrics = {"loss": value_sum, "grad_norm": optax.tree.norm(grads), **metrics}
        return dataclasses.replace(
            state, step=state.step + 1, trained=trained, mutable=mutable, ema=ema, opt_state=opt_state
        ), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(loss: Loss, weigh: Weigh) -> Callable[[Params, dict, Batch], tuple[jax.Array, jax.Array]]:
    """`(params, mutable, batch) -> (weighted sum of the loss, weight)` without dropout or gradients."""

    def step(params: Params, mutable: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
        weights, total = weigh(batch)

        def micro(carry: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
            one, weights = inputs
            return carry + loss(params, mutable, one, weights, None)[0], None

        summed, _ = jax.lax.scan(micro, jnp.zeros(()), (dict(batch), weights))
        return summed, total

    return jax.jit(step)
