"""Attention over packed rows on a Hopper GPU (compute capability 9.0). Mosaic GPU, forward and backward, no atomics.

FlashAttention-3's structure (Shah et al. 2024): in each program one warpgroup loads tiles with the TMA into a ring of
slots, and two multiply with wgmma, 64 rows each. What a row is streams past the other side: queries past keys for the
output and dq, keys past queries for dk and dv. Which blocks a tile must visit, and in which of them every query sees
every key, is worked out beforehand from the extremes of ids and positions; the rest is decided number by number.

Softmax in base 2 and float32. A row that sees nothing keeps a finite maximum and the sum 0, so no 0/0 is ever made.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from vlm_jax.kernels.attention.reference import Mask, Rule

HEAD_SIZES = (64, 128)  # to which a head is filled up; at 256 the sums for dk and dv alone would take every register
ROWS = 64  # of a warpgroup, as wgmma has them
TILE = 2 * ROWS  # of a program
SLOTS = 2  # blocks that are there or on their way
_LOADER = 2  # the third warpgroup
_LOG2E = math.log2(math.e)
_FLOOR = -1e20  # below any score, and above the -inf of a hidden one
_NOTHING = 1e30  # logsumexp of a row that sees nothing, which makes each of its weights 0
_NOBODY = jnp.iinfo(jnp.int32).min  # id of a query that sees nothing; a key that nobody sees has the next


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, rule: Rule, interpret: Any = None) -> jax.Array:
    """As `reference.attention` without a bias, in bfloat16 or float16, D at most `HEAD_SIZES[-1]`.

    interpret: jax's InterpretGPUParams, to simulate the GPU.
    """
    return _compiled(rule, interpret, q, k, v, mask.with_positions(rule, q.shape[1], k.shape[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(rule, interpret, q, k, v, mask):
    return _attention_forward(rule, interpret, q, k, v, mask)[0]


def _attention_forward(rule, interpret, q, k, v, mask):
    q_rows, kv_rows = _fill_mask(q, k, mask)
    whole_q, whole_k, whole_v = (_fill(x) for x in (q, k, v))
    batch, length, heads, features = whole_q.shape
    group = heads // k.shape[2]

    def init():
        column = jnp.zeros((ROWS,), jnp.float32)
        return jnp.zeros((ROWS, features), jnp.float32), column + _FLOOR, column

    def step(mine, theirs, carry, masked):
        (q, *q_rows), (k, v, *kv_rows), (acc, top, total) = mine, theirs, carry
        scores, _ = _scores(rule, _product(q, k, interpret))
        if masked:
            scores = _hide(rule, scores, q_rows, kv_rows, 0)
        new_top = jnp.maximum(top, scores.max(1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - _spread(new_top, scores))
        total = total * shrink + weights.sum(1)
        acc = _add_product(acc * _spread(shrink, acc), weights.astype(q.dtype), v, interpret)
        return acc, new_top, total

    def finish(carry):
        acc, top, total = carry
        sees = total > 0
        total = jnp.where(sees, total, 1.0)
        out = acc * _spread(jnp.where(sees, 1 / total, 0.0), acc)
        return out, jnp.where(sees, top + jnp.log2(total), _NOTHING)

    out, logsumexp = _run(
        step,
        init,
        finish,
        own=(whole_q, *q_rows),
        ring=(whole_k, whole_v, *kv_rows),
        visits=_visits(rule, q_rows, kv_rows, TILE, TILE),
        block=TILE,
        outputs=[_like(whole_q), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
        ring_head=lambda head, _: lax.div(head, jnp.int32(group)),
        name="attention_packed",
        interpret=interpret,
    )
    out = out[:, : q.shape[1], :, : q.shape[3]]
    return out, (q, k, v, mask, out, logsumexp)


def _attention_backward(rule, interpret, residuals, d_out):
    q, k, v, mask, out, logsumexp = residuals
    q_rows, kv_rows = _fill_mask(q, k, mask)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, logsumexp.shape[2] - delta.shape[2])))
    of_queries = (_fill(q), _fill(d_out.astype(q.dtype)), logsumexp, delta, *q_rows)
    of_keys = (_fill(k), _fill(v), *kv_rows)
    features, group = of_keys[0].shape[3], q.shape[2] // k.shape[2]

    def zeros():
        return jnp.zeros((ROWS, features), jnp.float32)

    def q_step(mine, theirs, d_q, masked):
        (q, d_out, logsumexp, delta, *q_rows), (k, v, *kv_rows) = mine, theirs
        scores, slope = _scores(rule, _product(q, k, interpret))
        if masked:
            scores = _hide(rule, scores, q_rows, kv_rows, 0)
        weights = jnp.exp2(scores - _spread(logsumexp[...], scores))
        d_scores = weights * (_product(d_out, v, interpret) - _spread(delta[...], scores))
        d_scores = d_scores if slope is None else d_scores * slope
        return _add_product(d_q, d_scores.astype(q.dtype), k, interpret)

    block = TILE if features == 64 else ROWS  # scores, their gradients and dq share the registers
    (d_q,) = _run(
        q_step,
        zeros,
        lambda d_q: (d_q * rule.scale,),
        own=of_queries,
        ring=of_keys,
        visits=_visits(rule, q_rows, kv_rows, TILE, block),
        block=block,
        outputs=[_like(of_queries[0])],
        ring_head=lambda head, _: lax.div(head, jnp.int32(group)),
        name="attention_packed_dq",
        interpret=interpret,
    )

    def kv_step(mine, theirs, carry, masked):  # scores are [keys, queries] here
        (k, v, *kv_rows), (q, d_out, logsumexp, delta, *q_rows), (d_k, d_v) = mine, theirs, carry
        scores, slope = _scores(rule, _product(k, q, interpret))
        if masked:
            scores = _hide(rule, scores, q_rows, kv_rows, 1)
        weights = jnp.exp2(scores - _spread(logsumexp[...], scores, 1))
        d_v = _add_product(d_v, weights.astype(q.dtype), d_out, interpret)
        d_scores = weights * (_product(v, d_out, interpret) - _spread(delta[...], scores, 1))
        d_scores = d_scores if slope is None else d_scores * slope
        return _add_product(d_k, d_scores.astype(q.dtype), q, interpret), d_v

    d_k, d_v = _run(
        kv_step,
        lambda: (zeros(), zeros()),
        lambda carry: (carry[0] * rule.scale, carry[1]),
        own=of_keys,
        ring=of_queries,
        visits=_visits(rule, q_rows, kv_rows, ROWS, TILE, by_keys=True),
        block=ROWS,
        outputs=[_like(of_keys[0]), _like(of_keys[1])],
        group=group,
        ring_head=lambda head, member: head * group + member,
        name="attention_packed_dkv",
        interpret=interpret,
    )
    d_q = d_q[:, : q.shape[1], :, : q.shape[3]]
    d_k, d_v = (x[:, : k.shape[1], :, : k.shape[3]] for x in (d_k, d_v))
    return d_q, d_k, d_v, None


_attention.defvjp(_attention_forward, _attention_backward)
_compiled = jax.jit(_attention, static_argnums=(0, 1))  # one trace for all layers


# ------------------------------------------------------------------------------------------ what is made before, in XLA


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _fill(array: jax.Array) -> jax.Array:
    """[B, L, H, D] with L in whole tiles and D one of `HEAD_SIZES`."""
    features = next(size for size in HEAD_SIZES if array.shape[3] <= size)
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % TILE), (0, 0), (0, features - array.shape[3])))


def _fill_mask(q: jax.Array, k: jax.Array, mask: Mask) -> tuple[list[jax.Array], list[jax.Array]]:
    """Ids and (where they matter) positions of queries and of keys, [B, L] in whole tiles. Id 0 has become two that
    differ, so that seeing is being equal."""
    q_ids, kv_ids, q_positions, kv_positions = mask
    if q_ids is None:
        q_ids, kv_ids = jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)
    q_ids, kv_ids = jnp.where(q_ids == 0, _NOBODY, q_ids), jnp.where(kv_ids == 0, _NOBODY + 1, kv_ids)

    def fill(array, **options):
        array = jnp.broadcast_to(array, (q.shape[0], array.shape[1]))
        return jnp.pad(array, ((0, 0), (0, -array.shape[1] % TILE)), **options)

    q_rows, kv_rows = [fill(q_ids, constant_values=_NOBODY)], [fill(kv_ids, constant_values=_NOBODY + 1)]
    if q_positions is not None:
        q_rows.append(fill(q_positions, mode="edge"))
        kv_rows.append(fill(kv_positions, mode="edge"))
    return q_rows, kv_rows


def _visits(rule: Rule, q_rows, kv_rows, q_block: int, kv_block: int, *, by_keys: bool = False) -> jax.Array:
    """int32 [B, tiles, 4]: a tile of queries visits the blocks of keys from the first number to the fourth, and from
    the second to the third every query sees every key. by_keys: a tile of keys visits blocks of queries."""

    def ends(q, kv):  # least and greatest of each block, [B, query blocks, 1] and [B, 1, key blocks]
        q, kv = (x.reshape(x.shape[0], -1, block) for x, block in ((q, q_block), (kv, kv_block)))
        return q.min(-1)[:, :, None], q.max(-1)[:, :, None], kv.min(-1)[:, None], kv.max(-1)[:, None]

    # The ids of nobody are the least numbers: a maximum passes over them by itself, a minimum must be told.
    real_q, real_kv = q_rows[0] > _NOBODY + 1, kv_rows[0] > _NOBODY + 1
    most = jnp.iinfo(jnp.int32).max
    q_low, _, kv_low, _ = ends(jnp.where(real_q, q_rows[0], most), jnp.where(real_kv, kv_rows[0], most))
    _, q_high, _, kv_high = ends(*(rows[0] for rows in (q_rows, kv_rows)))
    some = (q_high >= kv_low) & (kv_high >= q_low)
    q_low, q_high, kv_low, kv_high = ends(q_rows[0], kv_rows[0])
    every = (q_low == kv_high) & (kv_low == q_high)
    if rule.ordered:
        q_low, q_high, kv_low, kv_high = ends(q_rows[1], kv_rows[1])
        if rule.causal:
            some, every = some & (kv_low <= q_high), every & (kv_high <= q_low)
        if rule.sliding_window is not None:
            some &= q_low - kv_high < rule.sliding_window
            every &= q_high - kv_low < rule.sliding_window
    if by_keys:
        some, every = some.mT, every.mT

    def first(flags):
        return jnp.where(flags.any(-1), jnp.argmax(flags, -1), flags.shape[-1])

    number = jnp.arange(some.shape[-1])
    last = jnp.where(some, number + 1, 0).max(-1)
    whole_first = jnp.minimum(first(every), last)
    whole_last = jnp.minimum(first(~every & (number >= whole_first[..., None])), last)
    return jnp.stack([jnp.minimum(first(some), last), whole_first, whole_last, last], -1).astype(jnp.int32)


# ---------------------------------------------------------------------------------------------------------- the kernels


def _run(step, init, finish, *, own, ring, visits, block, outputs, group=1, ring_head, name, interpret):
    """Runs a program for each tile of `TILE` rows of the arrays `own`: it walks over the blocks of `ring` that `visits`
    names (of `group` heads, one after the other) and writes `finish`'s arrays to `outputs`.

    Arrays are [B, L, H, D], [B, H, L] or [B, L]. step(mine, theirs, carry, masked) -> carry: `mine` and `theirs` are
    blocks in shared memory, of ROWS and `block` rows; `masked` says that not every query here sees every key.
    """

    def kernel(*refs):
        *refs, own_blocks, ring_blocks, staged, ready, loaded, free = refs
        own_refs, ring_refs, (spans, *out_refs) = (
            refs[: len(own)],
            refs[len(own) : len(own) + len(ring)],
            refs[len(own) + len(ring) :],
        )
        batch, head, tile, warpgroup = (lax.axis_index(x) for x in ("batch", "heads", "tiles", "warpgroup"))
        first, whole_first, whole_last, last = (spans[batch, tile, i] for i in range(4))
        blocks = last - first
        steps = blocks * group

        def part(ref, head, start, size):
            rows = pl.ds(start, size)
            if len(ref.shape) == 4:
                return ref.at[batch, rows, head]
            return ref.at[batch, head, rows] if len(ref.shape) == 3 else ref.at[batch, rows]

        @pl.when(warpgroup == _LOADER)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, steps)
            def _(n):
                slot = lax.rem(n, jnp.int32(SLOTS))

                @pl.when(n >= SLOTS)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                member = lax.div(n, blocks) if group > 1 else 0
                start = (first + n - member * blocks) * block
                for source, target in zip(ring_refs, ring_blocks, strict=True):
                    source = part(source, ring_head(head, member), start, block)
                    plgpu.copy_gmem_to_smem(source, target.at[slot], loaded.at[slot])

        @pl.when(warpgroup != _LOADER)
        def _():
            plgpu.set_max_registers(232, action="increase")
            mine = [x.at[warpgroup] for x in own_blocks]
            start = tile * TILE + warpgroup * ROWS
            for source, target in zip(own_refs, mine, strict=True):
                plgpu.copy_gmem_to_smem(part(source, head, start, ROWS), target, ready.at[warpgroup])
            plgpu.barrier_wait(ready.at[warpgroup])

            def visit(masked, member, i, carry):
                n = member * blocks + i - first
                slot = lax.rem(n, jnp.int32(SLOTS))
                plgpu.barrier_wait(loaded.at[slot])
                carry = step(mine, [x.at[slot] for x in ring_blocks], carry, masked)

                @pl.when(n + SLOTS < steps)  # after that nobody waits for the slot
                def _():
                    plgpu.commit_smem()  # what was read (ids, logsumexps) was, before the TMA writes there again
                    plgpu.barrier_arrive(free.at[slot])

                return carry

            def walk(member, carry):
                for low, high, masked in (
                    (first, whole_first, True),
                    (whole_first, whole_last, False),
                    (whole_last, last, True),
                ):
                    carry = lax.fori_loop(low, high, functools.partial(visit, masked, member), carry)
                return carry

            carry = lax.fori_loop(0, group, walk, init()) if group > 1 else walk(0, init())
            results = [x.at[warpgroup] for x in staged]
            for target, result in zip(results, finish(carry), strict=True):
                target[...] = result.astype(target.dtype)
            plgpu.commit_smem()
            for source, target in zip(results, out_refs, strict=True):
                plgpu.copy_smem_to_gmem(source, part(target, head, start, ROWS))
            plgpu.wait_smem_to_gmem(0)

    def buffers(arrays, count, rows):
        return [plgpu.SMEM((count, rows, *x.shape[3:]), x.dtype) for x in arrays]

    batch, length, heads, _ = own[0].shape
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=[
            buffers(own, 2, ROWS),
            buffers(ring, SLOTS, block),
            buffers(outputs, 2, ROWS),
            plgpu.Barrier(num_arrivals=len(own), num_barriers=2),
            plgpu.Barrier(num_arrivals=len(ring), num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        ],
        grid=(heads, length // TILE, batch),
        grid_names=("heads", "tiles", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name=name,
        interpret=interpret,
    )(*own, *ring, visits)


def _spread(vector: jax.Array, matrix: jax.Array, axis: int = 0) -> jax.Array:
    """A number per row (axis 0) or per column (axis 1), as a matrix."""
    return lax.broadcast_in_dim(vector, matrix.shape, [axis])


def _scores(rule: Rule, scores: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores in units of log 2, and the soft cap's slope, from bare products."""
    if rule.softcap is None:
        return scores * (rule.scale * _LOG2E), None
    # tanh by way of exp2, whose approximation is good to 22 bits; that of tanh is not.
    tanh = 1 - 2 / (1 + jnp.exp2(scores * (2 * _LOG2E * rule.scale / rule.softcap)))
    return tanh * (rule.softcap * _LOG2E), 1 - tanh * tanh


def _hide(rule: Rule, scores: jax.Array, q_rows, kv_rows, q_axis: int) -> jax.Array:
    """Scores, -inf where a query does not see a key; queries are along `q_axis`."""
    q = [_spread(x[...], scores, q_axis) for x in q_rows]
    kv = [_spread(x[...], scores, 1 - q_axis) for x in kv_rows]
    seen = q[0] == kv[0]
    if rule.causal:
        seen &= kv[1] <= q[1]
    if rule.sliding_window is not None:
        seen &= q[1] - kv[1] < rule.sliding_window
    return jnp.where(seen, scores, -jnp.inf)


def _product(a, b, interpret) -> jax.Array:
    """a [M, D] · b [N, D] -> float32 [M, N], of blocks in shared memory."""
    if interpret is not None:  # which cannot multiply what is transposed
        return jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)

    def multiply(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def _add_product(acc: jax.Array, a: jax.Array, b, interpret) -> jax.Array:
    """acc + a [M, N] · b [N, D], of a in registers and b in shared memory."""
    if interpret is not None:  # which knows no accumulator that is carried on, and no factor in registers
        return acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)

    def multiply(acc):
        plgpu.wgmma(acc, a, b)

    return pl.run_state(multiply)(plgpu.ACC.init(acc))
