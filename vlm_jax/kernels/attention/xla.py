"""Attention in blocks, in plain XLA: no [T, S] array exists, not even backward, and each product is a batched matmul.

The online softmax of Milakov & Gimelshein 2018 and the recomputing backward of FlashAttention-2 (Dao 2023), written as
loops over blocks of heads, of queries and of keys. Blocks of keys that no query of a block sees (beyond the diagonal,
outside the window, in another packed sample) are skipped. On a CPU the blocks are sized for its cache, which makes the
products run at the speed of a large matmul; on an accelerator all heads go at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlm_jax.kernels.attention.reference import Mask, Rule, visible
from vlm_jax.kernels.placement import vary_like, zero_like
from vlm_jax.kernels.tiles import tile_size


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a block: rows of the batch, key-value heads (with their query heads), queries, keys."""

    rows: int
    kv_heads: int
    queries: int
    keys: int


def choose_blocks(q_shape: tuple[int, ...], kv_shape: tuple[int, ...], *, ordered: bool, device: str) -> Blocks:
    """Blocks for q [B, T, H, D] and k [B, S, K, D], as large as `tiles.tile_size` lets them be on the device.

    `ordered` (causal or windowed) asks for shorter blocks of a long sequence, of which more can be skipped. Heads with
    few scores each have a bound of their own on how many go together: there the loop is what costs.
    """
    batch, queries, heads, features = q_shape
    keys, kv_heads = kv_shape[1:3]
    group = heads // kv_heads
    few = 1 < queries and queries * keys <= 2**14
    budget = tile_size(f"attention.xla.{'few_scores' if few else 'scores'}", device)
    limit = tile_size(f"attention.xla.{'ordered_block' if ordered and keys > 1024 else 'block'}", device)
    block_keys = _even(keys, limit if queries > 1 else tile_size("attention.xla.decode_block", device))
    block_queries = _even(queries, max(64, min(limit, budget // (group * block_keys))))
    cost = group * block_queries * block_keys + 2 * keys * features
    fitting = max(1, budget // cost)
    block_heads = _divisor(kv_heads, fitting)
    rows = _divisor(batch, fitting // kv_heads) if block_heads == kv_heads else 1
    return Blocks(rows, block_heads, block_queries, block_keys)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, bias: jax.Array | None, *, rule: Rule, device: str
) -> jax.Array:
    """As `reference.attention`, in memory O(T * block) and with products in q's dtype accumulated in float32."""
    blocks = choose_blocks(q.shape, k.shape, ordered=rule.ordered, device=device)
    mask = mask.with_positions(rule, q.shape[1], k.shape[1])
    if k.shape[1] % blocks.keys and mask.q_segment_ids is None:  # the keys that fill the last block must not be seen
        mask = mask._replace(
            q_segment_ids=jnp.ones((1, q.shape[1]), jnp.int32), kv_segment_ids=jnp.ones((1, k.shape[1]), jnp.int32)
        )
    zero = zero_like((q, k, v, bias, *mask))
    q, k, v, bias = (vary_like(x, zero) for x in (q, k, v, bias))
    return _compiled(rule, blocks, q, k, v, mask, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(rule, blocks, q, k, v, mask, bias):
    return _forward(rule, blocks, q, k, v, mask, bias)[0]


def _attention_forward(rule, blocks, q, k, v, mask, bias):
    out, logsumexp = _forward(rule, blocks, q, k, v, mask, bias)
    return out, (q, k, v, mask, bias, out, logsumexp)


def _attention_backward(rule, blocks, residuals, d_out):
    q, k, v, mask, bias, out, logsumexp = residuals
    d_q, d_k, d_v, d_bias = _backward(rule, blocks, q, k, v, mask, bias, out, logsumexp, d_out)
    return d_q, d_k, d_v, None, d_bias


_attention.defvjp(_attention_forward, _attention_backward)
_compiled = jax.jit(_attention, static_argnums=(0, 1))  # one trace for all layers, and none for a repeated eager call


def _forward(rule, blocks, q, k, v, mask, bias):
    """-> out [B, T, H, D] and logsumexp [B, T, H, 1]; the latter is 0 where nothing is seen."""
    cut = _Cut(rule, blocks, q, k, mask, bias)
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    def head_block(i, carry):
        queries, keys, values = cut.queries(q, i), cut.keys(k, i), cut.keys(v, i)

        def query_block(j, carry):
            out, logsumexp = carry

            def key_block(n, carry):
                top, total, acc = carry
                scores, _ = cut.scores(i, j, n, queries[j], keys[n])
                new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
                base = jnp.where(new_top == -jnp.inf, 0, new_top)
                weights = jnp.exp(scores - base)
                product = _dot("nrs,nsd->nrd", weights.astype(v.dtype), values[n])
                if cut.n_keys == 1:
                    return new_top, weights.sum(-1, keepdims=True), product
                shrink = jnp.exp(top - base)
                return new_top, total * shrink + weights.sum(-1, keepdims=True), acc * shrink + product

            column = jnp.full_like(q, -jnp.inf, dtype=dtype, shape=(*queries.shape[1:3], 1))
            acc = jnp.full_like(q, 0, dtype=dtype, shape=queries.shape[1:])
            top, total, acc = cut.over_keys(i, j, key_block, (column, jnp.zeros_like(column), acc))
            seen = total > 0
            total = jnp.where(seen, total, 1)
            row = jnp.where(seen, top + jnp.log(total), 0)
            return _put(out, (acc / total).astype(q.dtype), j), _put(logsumexp, row, j)

        shape = (cut.n_queries, *queries.shape[1:3])
        init = jnp.zeros_like(queries), jnp.full_like(q, 0, dtype=dtype, shape=(*shape, 1))
        outs = _loop(cut.n_queries, query_block, init)
        return tuple(cut.put_queries(whole, part, i) for whole, part in zip(carry, outs, strict=True))

    init = jnp.zeros_like(q), jnp.full_like(q, 0, dtype=dtype, shape=(*q.shape[:3], 1))
    return _loop(cut.n_heads, head_block, init)


def _backward(rule, blocks, q, k, v, mask, bias, out, logsumexp, d_out):
    cut = _Cut(rule, blocks, q, k, mask, bias)
    dtype = logsumexp.dtype
    delta = (d_out.astype(dtype) * out.astype(dtype)).sum(-1, keepdims=True)

    def head_block(i, carry):
        whole_q, whole_k, whole_v, d_bias = carry
        queries, keys, values = cut.queries(q, i), cut.keys(k, i), cut.keys(v, i)
        d_outs, rows, deltas = (cut.queries(x, i) for x in (d_out, logsumexp, delta))

        def query_block(j, carry):
            d_queries, d_keys, d_values, d_bias = carry

            def key_block(n, carry):
                d_query, d_keys, d_values, d_bias = carry
                scores, slope = cut.scores(i, j, n, queries[j], keys[n])
                weights = jnp.exp(scores - rows[j])
                d_scores = weights * (_dot("nrd,nsd->nrs", d_outs[j], values[n]) - deltas[j])
                d_bias = cut.add_bias(d_bias, d_scores, i, j, n)
                d_scores = (d_scores * (rule.scale if slope is None else rule.scale * slope)).astype(q.dtype)
                # Gradients of keys and values are made transposed, [D, S]: so no large factor is transposed.
                d_value = _dot("ndr,nrs->nds", d_outs[j].mT, weights.astype(q.dtype))
                d_key = _dot("ndr,nrs->nds", queries[j].mT, d_scores)
                d_query = d_query + _dot("nrs,nsd->nrd", d_scores, keys[n])
                return d_query, _put(d_keys, d_keys[n] + d_key, n), _put(d_values, d_values[n] + d_value, n), d_bias

            d_query = jnp.full_like(q, 0, dtype=dtype, shape=queries.shape[1:])
            d_query, *rest = cut.over_keys(i, j, key_block, (d_query, d_keys, d_values, d_bias))
            return _put(d_queries, d_query.astype(q.dtype), j), *rest

        transposed = (*keys.shape[:2], keys.shape[3], keys.shape[2])
        zeros = jnp.full_like(q, 0, dtype=dtype, shape=transposed)
        d_queries, d_keys, d_values, d_bias = _loop(
            cut.n_queries, query_block, (jnp.zeros_like(queries), zeros, zeros, d_bias)
        )
        whole_q = cut.put_queries(whole_q, d_queries, i)
        whole_k = cut.put_keys(whole_k, d_keys.mT.astype(k.dtype), i)
        whole_v = cut.put_keys(whole_v, d_values.mT.astype(v.dtype), i)
        return whole_q, whole_k, whole_v, d_bias

    d_bias = None if bias is None else jnp.full_like(cut.bias, 0, dtype=dtype)
    init = jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), d_bias
    d_q, d_k, d_v, d_bias = _loop(cut.n_heads, head_block, init)
    if bias is not None:
        d_bias = d_bias[tuple(slice(size) for size in bias.shape)].astype(bias.dtype)
    return d_q, d_k, d_v, d_bias


class _Cut:
    """The arrays of one call, cut into blocks.

    Head block `i`, query block `j`, key block `n`. A block has N = rows * kv_heads matrices; the R = G * queries rows
    of a query matrix are the queries of all G heads that share the key-value head.
    """

    def __init__(self, rule: Rule, blocks: Blocks, q: jax.Array, k: jax.Array, mask: Mask, bias: jax.Array | None):
        self.rule, self.blocks = rule, blocks
        self.batch, self.length, heads, _ = q.shape
        self.key_length, kv_heads = k.shape[1:3]
        self.group = heads // kv_heads
        self.per_row = kv_heads // blocks.kv_heads
        self.n_heads = self.batch // blocks.rows * self.per_row
        self.n_queries = math.ceil(self.length / blocks.queries)
        self.n_keys = math.ceil(self.key_length / blocks.keys)
        q_pad = self.n_queries * blocks.queries - self.length
        k_pad = self.n_keys * blocks.keys - self.key_length

        def chunks(array, pad, size, mode):  # [B or 1, T] -> [B or 1, blocks, size]
            if array is None:
                return None
            return jnp.pad(array, ((0, 0), (0, pad)), mode=mode).reshape(array.shape[0], -1, size)

        self.mask = Mask(
            chunks(mask.q_segment_ids, q_pad, blocks.queries, "constant"),
            chunks(mask.kv_segment_ids, k_pad, blocks.keys, "constant"),
            chunks(mask.q_positions, q_pad, blocks.queries, "edge"),
            chunks(mask.kv_positions, k_pad, blocks.keys, "edge"),
        )
        self.bias = bias
        if bias is not None:
            pads = (q_pad if bias.shape[2] > 1 else 0, k_pad if bias.shape[3] > 1 else 0)
            self.bias = jnp.pad(bias, ((0, 0), (0, 0), (0, pads[0]), (0, pads[1])))
        self.ranges = self._key_ranges() if self.n_keys > 1 else None

    # --- arrays to blocks, and back ---

    def queries(self, array: jax.Array, i) -> jax.Array:
        """[B, T, H, X] -> [query blocks, N, R, X]."""
        rows, heads, size = self.blocks.rows, self.blocks.kv_heads, self.blocks.queries
        part = self._part(array, i, heads * self.group)
        part = jnp.pad(part, ((0, 0), (0, self.n_queries * size - self.length), (0, 0), (0, 0)))
        part = part.reshape(rows, self.n_queries, size, heads, self.group, -1).transpose(1, 0, 3, 4, 2, 5)
        return part.reshape(self.n_queries, rows * heads, self.group * size, -1)

    def put_queries(self, whole: jax.Array, blocks: jax.Array, i) -> jax.Array:
        """Writes what `queries` reads."""
        rows, heads, size = self.blocks.rows, self.blocks.kv_heads, self.blocks.queries
        part = blocks.reshape(self.n_queries, rows, heads, self.group, size, -1).transpose(1, 0, 4, 2, 3, 5)
        part = part.reshape(rows, self.n_queries * size, heads * self.group, -1)[:, : self.length]
        return self._put_part(whole, part, i)

    def keys(self, array: jax.Array, i) -> jax.Array:
        """[B, S, K, D] -> [key blocks, N, keys, D]."""
        rows, heads, size = self.blocks.rows, self.blocks.kv_heads, self.blocks.keys
        part = self._part(array, i, heads)
        part = jnp.pad(part, ((0, 0), (0, self.n_keys * size - self.key_length), (0, 0), (0, 0)))
        part = part.reshape(rows, self.n_keys, size, heads, -1).transpose(1, 0, 3, 2, 4)
        return part.reshape(self.n_keys, rows * heads, size, -1)

    def put_keys(self, whole: jax.Array, blocks: jax.Array, i) -> jax.Array:
        """Writes what `keys` reads."""
        rows, heads, size = self.blocks.rows, self.blocks.kv_heads, self.blocks.keys
        part = blocks.reshape(self.n_keys, rows, heads, size, -1).transpose(1, 0, 3, 2, 4)
        return self._put_part(whole, part.reshape(rows, self.n_keys * size, heads, -1)[:, : self.key_length], i)

    def _part(self, array, i, heads):
        if self.n_heads == 1:
            return array
        start = (i // self.per_row * self.blocks.rows, 0, i % self.per_row * heads, 0)
        return jax.lax.dynamic_slice(array, start, (self.blocks.rows, array.shape[1], heads, array.shape[3]))

    def _put_part(self, whole, part, i):
        if self.n_heads == 1:
            return part
        start = (i // self.per_row * self.blocks.rows, 0, i % self.per_row * part.shape[2], 0)
        return jax.lax.dynamic_update_slice(whole, part, start)

    # --- one block of scores ---

    def scores(self, i, j, n, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scores [N, R, keys], -inf where unseen, and the soft cap's derivative (None without one)."""
        scores, slope = _dot("nrd,nsd->nrs", queries, keys) * self.rule.scale, None
        if self.rule.softcap is not None:
            capped = jnp.tanh(scores / self.rule.softcap)
            scores, slope = capped * self.rule.softcap, 1 - capped**2
        flat, rows = scores.shape, self.blocks.rows
        scores = scores.reshape(rows, self.blocks.kv_heads, self.group, self.blocks.queries, self.blocks.keys)
        if self.bias is not None:
            start, size = self._bias_block(i, j, n)
            part = jax.lax.dynamic_slice(self.bias, start, size).astype(scores.dtype)
            scores = scores + part.reshape(size[0], *self._split_heads(size[1]), *size[2:])
        seen = visible(self.rule, self._mask_block(i, j, n))
        if seen is not None:
            scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        return scores.reshape(flat), slope

    def add_bias(self, d_bias: jax.Array | None, d_scores: jax.Array, i, j, n) -> jax.Array | None:
        """Adds the gradient of one block of scores to the bias's, summed over the axes that the bias does not have."""
        if d_bias is None:
            return None
        start, size = self._bias_block(i, j, n)
        rows, blocks = self.blocks.rows, self.blocks
        part = d_scores.reshape(rows, blocks.kv_heads * self.group, blocks.queries, blocks.keys)
        missing = tuple(axis for axis in range(4) if self.bias.shape[axis] == 1)
        part = part.sum(missing, keepdims=True) if missing else part
        part = part + jax.lax.dynamic_slice(d_bias, start, size)
        return jax.lax.dynamic_update_slice(d_bias, part, start)

    def _bias_block(self, i, j, n):
        heads = self.blocks.kv_heads * self.group
        full = (self.blocks.rows, heads, self.blocks.queries, self.blocks.keys)
        index = (i // self.per_row, i % self.per_row, j, n)
        has = [size > 1 for size in self.bias.shape]
        start = tuple(at * block if there else 0 for at, block, there in zip(index, full, has, strict=True))
        return start, tuple(block if there else 1 for block, there in zip(full, has, strict=True))

    def _split_heads(self, size):
        return (1, 1) if size == 1 else (self.blocks.kv_heads, self.group)

    def _mask_block(self, i, j, n) -> Mask:
        def block(array, at):
            if array is None:
                return None
            array = array[:, at]
            if array.shape[0] == 1 or self.n_heads == 1:
                return array
            return jax.lax.dynamic_slice_in_dim(array, i // self.per_row * self.blocks.rows, self.blocks.rows, 0)

        m = self.mask
        return Mask(
            block(m.q_segment_ids, j),
            block(m.kv_segment_ids, n),
            block(m.q_positions, j),
            block(m.kv_positions, n),
        )

    # --- which blocks of keys to visit ---

    def over_keys(self, i, j, body: Callable, carry):
        """Runs `body(n, carry)` over the key blocks of which query block `j` may see something."""
        if self.n_keys == 1:
            return body(0, carry)
        if self.ranges is None:
            return jax.lax.fori_loop(0, self.n_keys, body, carry)
        first, last = (x[i // self.per_row if x.shape[0] > 1 else 0, j] for x in self.ranges)
        return jax.lax.fori_loop(first, last, body, carry)

    def _key_ranges(self) -> tuple[jax.Array, jax.Array] | None:
        """First and one-past-last key block [row blocks or 1, query blocks], from the extremes of ids and positions."""
        m, terms = self.mask, []
        if m.q_segment_ids is not None:
            q_low, q_high = _extremes(m.q_segment_ids, m.q_segment_ids != 0)
            kv_low, kv_high = _extremes(m.kv_segment_ids, m.kv_segment_ids != 0)
            terms.append((q_high[:, :, None] >= kv_low[:, None]) & (kv_high[:, None] >= q_low[:, :, None]))
        if self.rule.ordered:
            q_low, q_high = _extremes(m.q_positions)
            kv_low, kv_high = _extremes(m.kv_positions)
            if self.rule.causal:
                terms.append(q_high[:, :, None] >= kv_low[:, None])
            if self.rule.sliding_window is not None:
                terms.append(q_low[:, :, None] - kv_high[:, None] < self.rule.sliding_window)
        if not terms:
            return None
        seen = functools.reduce(jnp.logical_and, terms)
        rows = self.blocks.rows if seen.shape[0] > 1 else 1
        seen = seen.reshape(-1, rows, *seen.shape[1:]).any(1)
        first = jnp.argmax(seen, -1)
        last = self.n_keys - jnp.argmax(seen[..., ::-1], -1)
        return first, jnp.where(seen.any(-1), last, first)


def _extremes(array: jax.Array, where: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Least and greatest over the last axis; of nothing, the greatest integer and the least."""
    info = jnp.iinfo(array.dtype)
    if where is None:
        return array.min(-1), array.max(-1)
    return jnp.where(where, array, info.max).min(-1), jnp.where(where, array, info.min).max(-1)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _loop(steps: int, body: Callable, carry):
    return body(0, carry) if steps == 1 else jax.lax.fori_loop(0, steps, body, carry)


def _put(array: jax.Array, block: jax.Array, index) -> jax.Array:
    if array.shape[0] == 1:
        return block[None]
    return jax.lax.dynamic_update_index_in_dim(array, block, index, 0)


def _even(length: int, limit: int) -> int:
    """The size of the fewest equal blocks of at most `limit` that cover `length`; in whole eights if several."""
    blocks = math.ceil(length / limit)
    return length if blocks == 1 else math.ceil(length / blocks / 8) * 8


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit` (at least 1)."""
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)
