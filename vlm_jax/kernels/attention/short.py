"""Attention on a TPU over keys that fit into its fast memory: vision towers, cross-attention, prefixes of a language
model. Pallas, forward and backward.

A program has all keys of a few heads and a block of queries, so the softmax needs no second look at any key. Heads lie
side by side in the lanes, [B, T, H * D], as a projection makes them: nothing is transposed or padded in main memory,
whatever the head size; lengths are filled up in fast memory alone.

Scores are kept as [S, queries]. What belongs to a query (its maximum, sum, logsumexp, ids) is then a row, which costs
nothing to broadcast, and the gradients of keys and values are products of factors as they lie.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlm_jax.kernels.attention.reference import Mask, Rule
from vlm_jax.kernels.tiles import tile_size

MOST_KEYS = 2048
FEWEST_QUERIES = 8  # fewer (decoding) would mostly be padding
_LANES = 128
_UNSEEN = -1e30
_MEGABYTE = 2**20


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, rule: Rule, device: str, interpret: bool = False
) -> jax.Array:
    """As `reference.attention` without a bias, of at most `MOST_KEYS` keys."""
    plan = Plan.make(q.shape, k.shape, device)
    mask = mask.with_positions(rule, plan.queries, plan.keys)
    filled = [
        None if row is None else jnp.pad(row, ((0, 0), (0, length - row.shape[1])))[:, None]
        for row, length in zip(mask, (plan.all_queries, plan.all_keys) * 2, strict=True)
    ]
    flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    return _attention(rule, plan, interpret, *flat, Mask(*filled)).reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a call. batch, queries (T), keys (S), heads (H), kv_heads (K), features (D) are its own.

    block: queries of a program. per_program: key heads of a program, several where a head has few scores; together
    whole lanes, or all heads.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    features: int
    block: int
    per_program: int

    @classmethod
    def make(cls, q_shape: tuple[int, ...], kv_shape: tuple[int, ...], device: str) -> Plan:
        batch, queries, heads, features = q_shape
        keys, kv_heads = kv_shape[1:3]
        of_head = tile_size("attention.short.scores", device)
        most = max(_LANES, of_head // _whole(keys) // _LANES * _LANES)
        block = _whole(math.ceil(queries / math.ceil(queries / most)))
        whole = [n for n in range(1, kv_heads) if kv_heads % n == 0 and n * features % _LANES == 0] or [kv_heads]
        scores = heads // kv_heads * block * _whole(keys)
        fitting = [n for n in whole if n * scores <= 4 * of_head]
        return cls(batch, queries, keys, heads, kv_heads, features, block, max(fitting, default=whole[0]))

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def blocks(self) -> int:
        return math.ceil(self.queries / self.block)

    @property
    def all_queries(self) -> int:
        return self.blocks * self.block

    @property
    def all_keys(self) -> int:
        return _whole(self.keys)

    @property
    def programs(self) -> int:
        """Over the heads."""
        return self.kv_heads // self.per_program

    def shape(self, kind: str) -> tuple[int, ...]:
        """Of an array of queries [B, T, H * D], of keys [B, S, K * D], or with a number per query and head."""
        return {
            "queries": (self.batch, self.queries, self.heads * self.features),
            "keys": (self.batch, self.keys, self.kv_heads * self.features),
            "numbers": (self.batch, self.programs, self.per_program * self.group, self.all_queries),
        }[kind]

    def block_of(self, kind: str) -> tuple[int, ...]:
        lanes = self.per_program * self.features
        return {
            "queries": (self.block, lanes * self.group),
            "keys": (self.all_keys, lanes),
            "numbers": (self.per_program * self.group, self.block),
        }[kind]

    def fast_memory(self, itemsize: int) -> int:
        """Bytes that the backward pass may take: blocks, twice since one is on its way, its own arrays, and some dozen
        of scores."""
        of_queries, of_keys = (math.prod(self.block_of(kind)) * itemsize for kind in ("queries", "keys"))
        per_head = self.all_keys * _whole(self.features)
        own = self.per_program * per_head * (3 * itemsize + 2 * 4)
        return 2 * (3 * of_queries + 4 * of_keys) + own + 16 * self.all_keys * self.block * 4


def _whole(length: int) -> int:
    return math.ceil(length / _LANES) * _LANES


def _run(kernel, rule, plan: Plan, interpret, mask, arrays, outputs, *, name, scratch, products) -> list[jax.Array]:
    """Runs `kernel(mask, *arrays, *outputs, *scratch)` over (row of the batch, heads, block of queries).

    arrays: (kind, array) as in `Plan.shape`; outputs: (kind, dtype).
    """
    place = {
        "queries": lambda b, h, i: (b, i, h),
        "keys": lambda b, h, i: (b, 0, h),
        "numbers": lambda b, h, i: (b, h, 0, i),
    }

    def spec(kind):
        outer = len(plan.shape(kind)) - 2
        return pl.BlockSpec((*[None] * outer, *plan.block_of(kind)), place[kind])

    def mask_spec(row, length, of_queries):
        if row is None:
            return None
        own = row.shape[0] > 1
        return pl.BlockSpec((None, 1, length), lambda b, h, i: (b if own else 0, 0, i if of_queries else 0))

    lengths = (plan.block, True), (plan.all_keys, False)
    mask_specs = Mask(*(mask_spec(row, *length) for row, length in zip(mask, lengths * 2, strict=True)))
    pairs = plan.batch * plan.heads * plan.queries * plan.keys
    return pl.pallas_call(
        functools.partial(kernel, plan=plan, rule=rule),
        name=name,
        grid=(plan.batch, plan.programs, plan.blocks),
        in_specs=[mask_specs, *(spec(kind) for kind, _ in arrays)],
        out_specs=[spec(kind) for kind, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(plan.shape(kind), dtype) for kind, dtype in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=max(16 * _MEGABYTE, plan.fast_memory(arrays[0][1].dtype.itemsize)),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * plan.features,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for _, x in arrays),
        ),
        interpret=interpret,
    )(mask, *(x for _, x in arrays))


# ------------------------------------------------------------------------------------------------------------ gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(rule: Rule, plan: Plan, interpret: bool, q, k, v, mask: Mask):
    return _forward(rule, plan, interpret, q, k, v, mask)[0]


def _forward(rule, plan, interpret, q, k, v, mask):
    out, logsumexp = _run(
        _forward_kernel,
        rule,
        plan,
        interpret,
        mask,
        [("queries", q), ("keys", k), ("keys", v)],
        [("queries", q.dtype), ("numbers", jnp.float32)],
        name="attention_short",
        scratch=[
            pltpu.VMEM((plan.per_program, plan.features, plan.all_keys), v.dtype),
            pltpu.VMEM((2, plan.all_keys, _LANES), jnp.int32),
        ],
        products=2,
    )
    return out, (q, k, v, mask, out, logsumexp)


def _backward(rule, plan, interpret, residuals, d_out):
    q, k, v, mask, out, logsumexp = residuals
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).reshape(*q.shape[:2], plan.heads, -1).sum(-1)
    delta = jnp.pad(delta.swapaxes(1, 2), ((0, 0), (0, 0), (0, plan.all_queries - plan.queries)))
    delta = delta.reshape(plan.shape("numbers"))
    heads = plan.per_program, plan.all_keys, plan.features
    d_q, d_k, d_v = _run(
        _backward_kernel,
        rule,
        plan,
        interpret,
        mask,
        [("queries", q), ("keys", k), ("keys", v), ("queries", d_out), ("numbers", logsumexp), ("numbers", delta)],
        [("queries", q.dtype), ("keys", k.dtype), ("keys", v.dtype)],
        name="attention_short_gradients",
        scratch=[
            pltpu.VMEM(heads, k.dtype),
            pltpu.VMEM(heads, v.dtype),
            pltpu.VMEM((plan.per_program, plan.features, plan.all_keys), k.dtype),
            pltpu.VMEM(heads, jnp.float32),
            pltpu.VMEM(heads, jnp.float32),
            pltpu.VMEM((2, plan.all_keys, _LANES), jnp.int32),
        ],
        products=5,
    )
    return d_q, d_k, d_v, None


_attention.defvjp(_forward, _backward)


# -------------------------------------------------------------------------------------------------------------- kernels


def _forward_kernel(mask, q, k, v, out, logsumexp, v_turned, columns, *, plan: Plan, rule: Rule):
    @pl.when(pl.program_id(2) == 0)
    def _():
        _keep_columns(mask, columns)
        for n in range(plan.per_program):
            v_turned[n] = _of_head(v, n, plan.features, plan.keys).T

    seen, left = _seen(plan, rule, mask, columns), _left(plan)

    def begin(h):
        query = _scaled(_of_head(q, h, plan.features, left), rule)
        return _scores(_of_head(k, h // plan.group, plan.features), query, rule, seen)[0]

    heads = plan.per_program * plan.group
    begun = begin(0)
    for h in range(heads):  # a head is begun before the last one's softmax, so that both units have work
        scores, begun = begun, begin(h + 1) if h + 1 < heads else None
        top = scores.max(0, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(0, keepdims=True)
        result = _dot(v_turned[h // plan.group], weights.astype(v.dtype), 1, 0) / total
        some = top > _UNSEEN / 2  # a query that sees nothing has weights of 1 everywhere
        result = jnp.where(some, result, 0)
        out[:, _lanes(h, plan.features)] = result.T.astype(out.dtype)
        logsumexp[h : h + 1] = jnp.where(some, top + jnp.log(total), 0)


def _backward_kernel(
    mask, q, k, v, d_out, logsumexp, delta, d_q, d_k, d_v, keys, values, k_turned, d_keys, d_values, columns,
    *, plan: Plan, rule: Rule,
):  # fmt: skip
    i, features = pl.program_id(2), plan.features

    @pl.when(i == 0)
    def _():
        _keep_columns(mask, columns)
        for n in range(plan.per_program):
            keys[n] = _of_head(k, n, features, plan.keys)
            values[n] = _of_head(v, n, features, plan.keys)
            k_turned[n] = keys[n].T
            d_keys[n] = jnp.zeros_like(d_keys[n])
            d_values[n] = jnp.zeros_like(d_values[n])

    seen = _seen(plan, rule, mask, columns)
    left = _left(plan)
    for h in range(plan.per_program * plan.group):
        n = h // plan.group
        query = _scaled(_of_head(q, h, features, left), rule)
        d_result = _of_head(d_out, h, features, left)
        scores, slope = _scores(keys[n], query, rule, seen)
        weights = jnp.exp(scores - logsumexp[h : h + 1])
        d_scores = weights * (_dot(values[n], d_result, 1, 1) - delta[h : h + 1])
        if slope is not None:
            d_scores = d_scores * slope
        d_scores = d_scores.astype(k.dtype)
        d_values[n] += _dot(weights.astype(v.dtype), d_result, 1, 0)
        d_keys[n] += _dot(d_scores, query, 1, 0)
        d_query = _dot(k_turned[n], d_scores, 1, 0) * rule.scale
        d_q[:, _lanes(h, features)] = d_query.T.astype(d_q.dtype)

    @pl.when(i == pl.num_programs(2) - 1)
    def _():
        for n in range(plan.per_program):
            d_k[:, _lanes(n, features)] = d_keys[n].astype(d_k.dtype)
            d_v[:, _lanes(n, features)] = d_values[n].astype(d_v.dtype)


def _left(plan: Plan):
    """Queries from the first of this block on: beyond the end, a block holds anything. None if the blocks end there."""
    return None if plan.all_queries == plan.queries else plan.queries - pl.program_id(2) * plan.block


def _lanes(head: int, features: int) -> slice:
    return slice(head * features, (head + 1) * features)


def _of_head(array, head: int, features: int, inside=None):
    """[rows, D] of a head; with `inside`, 0 from that row on, where a block reaches beyond its array."""
    part = array[:, _lanes(head, features)]
    if inside is None or (isinstance(inside, int) and inside % part.shape[0] == 0):
        return part
    row = jax.lax.broadcasted_iota(jnp.int32, part.shape, 0)
    return jnp.where(row < inside, part, jnp.zeros_like(part))


def _scaled(query, rule: Rule):
    return (query.astype(jnp.float32) * rule.scale).astype(query.dtype)


def _keep_columns(mask, columns) -> None:
    """The keys' ids and positions, which come as rows, as columns."""
    for place, row in enumerate((mask.kv_segment_ids, mask.kv_positions)):
        if row is not None:
            columns[place] = jnp.broadcast_to(row[...], (_LANES, row.shape[1])).T


def _seen(plan: Plan, rule: Rule, mask, columns):
    """bool [S, queries], or what broadcasts to it; None if all see all."""
    seen = None
    if mask.q_segment_ids is not None:
        q = mask.q_segment_ids[...]
        seen = (columns[0, :, :1] == q) & (q != 0)
    elif plan.all_keys > plan.keys:
        seen = jax.lax.broadcasted_iota(jnp.int32, (plan.all_keys, plan.block), 0) < plan.keys
    if rule.ordered:
        ahead = mask.q_positions[...] - columns[1, :, :1]
        terms = [ahead >= 0] * rule.causal
        if rule.sliding_window is not None:
            terms.append(ahead < rule.sliding_window)
        for term in terms:
            seen = term if seen is None else seen & term
    return seen


def _scores(keys, query, rule: Rule, seen):
    """float32 [S, queries], and the soft cap's derivative (None without one)."""
    scores, slope = _dot(keys, query, 1, 1), None
    if rule.softcap is not None:
        capped = jnp.tanh(scores / rule.softcap)
        scores, slope = capped * rule.softcap, 1 - capped * capped
    return scores if seen is None else jnp.where(seen, scores, _UNSEEN), slope


def _dot(a, b, of_a: int, of_b: int):
    """The product over one axis of each, in float32; float32 factors are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((of_a,), (of_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
