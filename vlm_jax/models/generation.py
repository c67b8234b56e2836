"""Generation on the device: one prefill of the prompts, then a loop over a key-value cache.

Prompts are padded on the right. Every row counts its own positions and has its own random key, so its answer does not
depend on the rows beside it.

    prompt   p0 p1 p2 .  .  .  .  .       slots of the cache; a row writes its next token at its own `position`
    prefill  k0 k1 k2                     -> token t3
    decode            k3                  -> token t4, ...
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vlm_jax.layers.stack import apart, layers_apart
from vlm_jax.models.binding import Bound, Params
from vlm_jax.models.llava import Batch, Llava
from vlm_jax.models.sampling import Sampling
from vlm_jax.models.towers.decoder import Caches
from vlm_jax.sharding import BATCH


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """`token [B]` is the last of each row and stands at `position [B]`, which the cache does not hold yet; rows with
    `done [B]` have stopped."""

    cache: Caches
    token: jax.Array
    position: jax.Array
    done: jax.Array


def sample(logits: jax.Array, seeds: jax.Array, position: jax.Array, sampling: Sampling) -> jax.Array:
    """Next tokens [B] from `logits [B, V]`; the draw of a row depends on its seed and position alone."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of the tokens that are likelier
        first = jnp.arange(logits.shape[-1]) == 0
        smallest = jnp.min(jnp.where(first | (before < sampling.top_p), ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)

    def draw(seed: jax.Array, position: jax.Array, row: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jnp.argmax(row + jax.random.gumbel(key, row.shape)).astype(jnp.int32)

    return jax.vmap(draw)(seeds, position, logits)


def make_prefill(
    bound: Bound[Llava], *, dtype: jnp.dtype, on_trace: Callable[[], None] = lambda: None
) -> Callable[..., tuple[DecodeState, jax.Array]]:
    """`(params, batch, seeds [B], *, room, stop_ids, sampling) -> (state, logits float32 [B, V])` of the first token.

    The cache has room for `room` tokens beyond the batch's T. The batch's rows hold one segment each and end where
    their `segment_ids` turn 0; a row of padding is done from the start. `on_trace` is called at each compilation.
    """

    @functools.partial(jax.jit, static_argnames=("room", "stop_ids", "sampling"))
    def prefill(
        params: Params, batch: Batch, seeds: jax.Array, *, room: int, stop_ids: tuple[int, ...], sampling: Sampling
    ) -> tuple[DecodeState, jax.Array]:
        on_trace()
        model = bound.bind(params)
        hidden, cache = model(batch, dtype=dtype, keep_kv=True, packed=False)
        assert cache is not None
        lengths = jnp.sum(batch["segment_ids"] != 0, axis=-1, dtype=jnp.int32)
        last = jax.vmap(lambda row, i: row.at[i].get(mode="clip"))(hidden, jnp.maximum(lengths - 1, 0))
        logits = model.decoder.logits(last[:, None])[:, 0]
        token = sample(logits, seeds, lengths, sampling)
        cache = jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (0, 0), (0, 0), (0, room), (0, 0)]), cache)
        layers = range(cache.keys.shape[0])
        state = DecodeState(
            cache=tuple(jax.tree.map(lambda a, i=i: a[i : i + 1], cache) for i in layers) if apart() else cache,
            token=token,
            position=lengths,
            done=(lengths == 0) | _among(token, stop_ids),
        )
        return state, logits

    return prefill


def for_decode(params: Params) -> Params:
    """The parameters as the decoding step reads them fastest; they share their memory with those given."""
    return layers_apart(params, "decoder/layers/") if apart() else params


def make_decode(
    bound: Bound[Llava], *, on_trace: Callable[[], None] = lambda: None
) -> Callable[..., tuple[DecodeState, jax.Array]]:
    """`(params, state, seeds, limit, *, steps, stop_ids, sampling) -> (state, tokens int32 [B, steps])`.

    `params` are those of `for_decode`. The tokens that follow `state.token`, at most `limit <= steps` of them (another
    limit needs no compilation), -1 after a row's end. The token that stops a row is given. The loop ends early when all
    rows have stopped.
    """

    @functools.partial(jax.jit, static_argnames=("steps", "stop_ids", "sampling"), donate_argnums=1)
    def decode(
        params: Params,
        state: DecodeState,
        seeds: jax.Array,
        limit: jax.Array,
        *,
        steps: int,
        stop_ids: tuple[int, ...],
        sampling: Sampling,
    ) -> tuple[DecodeState, jax.Array]:
        on_trace()
        decoder = bound.bind(params).decoder
        keys = jax.tree.leaves(state.cache)[0]
        size, dtype = keys.shape[3], keys.dtype
        tokens = jax.reshard(jnp.full((state.token.shape[0], steps), -1, jnp.int32), P(*BATCH, None))

        def going(carry: tuple[Any, ...]) -> jax.Array:
            i, state, _ = carry
            return (i < limit) & ~jnp.all(state.done)

        def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            i, state, tokens = carry
            # A row that is done goes on with the others and may leave its cache.
            slot = jnp.minimum(state.position, size - 1)
            logits, cache = decoder.decode(state.token, state.cache, slot, dtype)
            position = state.position + 1
            token = sample(logits, seeds, position, sampling)
            tokens = jax.lax.dynamic_update_slice(tokens, jnp.where(state.done, -1, token)[:, None], (0, i))
            done = state.done | _among(token, stop_ids)
            return i + 1, DecodeState(cache=cache, token=token, position=position, done=done), tokens

        _, state, tokens = jax.lax.while_loop(going, one, (0, state, tokens))
        return state, tokens

    return decode


def _among(tokens: jax.Array, ids: Sequence[int]) -> jax.Array:
    return jnp.any(tokens[:, None] == jnp.asarray(list(ids), jnp.int32), axis=-1)
