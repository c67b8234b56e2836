"""Generation on the device: one prefill of the prompts, then a loop over a key-value cache.

Prompts are padded on the right. Every row counts its own positions and has its own random key, so its answer does not
depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vlm_jax.layers.attention import Cache
from vlm_jax.models.binding import Bound, Params
from vlm_jax.models.llava import Batch, Llava
from vlm_jax.sharding import BATCH, spec_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """`token [B]` comes next in each row and will stand at `position [B]`; rows with `done [B]` have stopped."""

    cache: Cache
    token: jax.Array
    position: jax.Array
    done: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. `top_p` keeps the smallest set of tokens whose probability reaches it."""

    temperature: float = 0.0
    top_p: float = 1.0


def sample(logits: jax.Array, seeds: jax.Array, position: jax.Array, sampling: Sampling) -> jax.Array:
    """Next tokens [B] from `logits [B, V]`; the draw of a row depends on its seed and position alone."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        below = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        smallest = jnp.min(jnp.where(below < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)

    def draw(seed: jax.Array, position: jax.Array, row: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jnp.argmax(row + jax.random.gumbel(key, row.shape)).astype(jnp.int32)

    return jax.vmap(draw)(seeds, position, logits)


def make_prefill(
    bound: Bound[Llava], *, dtype: jnp.dtype, new_tokens: int, sampling: Sampling
) -> Callable[[Params, Batch, jax.Array], tuple[DecodeState, jax.Array]]:
    """`(params, batch, seeds [B]) -> (state, logits float32 [B, V])` of the first new token; the cache has room for
    `new_tokens` more. The batch's rows hold one segment each and end where their `segment_ids` turn 0."""

    def prefill(params: Params, batch: Batch, seeds: jax.Array) -> tuple[DecodeState, jax.Array]:
        model = bound.bind(params)
        hidden, cache = model(batch, dtype=dtype, keep_kv=True)
        assert cache is not None
        lengths = jnp.sum(batch["segment_ids"] != 0, axis=-1, dtype=jnp.int32)
        last = jax.vmap(lambda row, i: row.at[i].get(mode="clip"))(hidden, jnp.maximum(lengths - 1, 0))
        logits = model.decoder.logits(last[:, None])[:, 0]
        room = [(0, 0), (0, 0), (0, new_tokens), (0, 0), (0, 0)]
        cache = jax.tree.map(lambda a: jnp.pad(a, room), cache)
        state = DecodeState(
            cache=cache,
            token=sample(logits, seeds, lengths, sampling),
            position=lengths,
            done=lengths == 0,
        )
        return state, logits

    return jax.jit(prefill)


def make_decode(
    bound: Bound[Llava], *, steps: int, stop_ids: Sequence[int], sampling: Sampling
) -> Callable[[Params, DecodeState, jax.Array], tuple[DecodeState, jax.Array]]:
    """`(params, state, seeds) -> (state, tokens int32 [B, steps])`: the next tokens of each row, -1 after its end.

    The token that stops a row is given. The loop ends early when all rows have stopped.
    """

    def decode(params: Params, state: DecodeState, seeds: jax.Array) -> tuple[DecodeState, jax.Array]:
        decoder = bound.bind(params).decoder
        stops = jnp.asarray(list(stop_ids), jnp.int32)
        out = jax.reshard(jnp.full((state.token.shape[0], steps), -1, jnp.int32), P(*BATCH, None))

        def going(carry: tuple[Any, ...]) -> jax.Array:
            i, state, _ = carry
            return (i < steps) & ~jnp.all(state.done)

        def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            i, state, out = carry
            emitted = jnp.where(state.done, -1, state.token)
            out = jax.lax.dynamic_update_slice(out, emitted[:, None], (0, i))
            done = state.done | jnp.any(state.token[:, None] == stops, axis=-1)
            slot = jnp.minimum(state.position, state.cache.keys.shape[2] - 1)
            logits, cache = decoder.decode(state.token, state.cache, slot)
            position = state.position + 1
            token = sample(logits, seeds, position, sampling)
            return i + 1, DecodeState(cache=cache, token=token, position=position, done=done), out

        _, state, out = jax.lax.while_loop(going, one, (0, state, out))
        assert spec_of(out)[0] == BATCH[0]
        return state, out

    return jax.jit(decode, donate_argnums=1)
