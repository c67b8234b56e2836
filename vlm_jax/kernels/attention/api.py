"""`attention`: checks a call, chooses its implementation, and places it on the mesh of its arguments."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from vlm_jax.kernels import placement
from vlm_jax.kernels.attention import gpu, packed_gpu, reference, split, tpu, xla
from vlm_jax.kernels.attention.reference import Mask, Rule
from vlm_jax.kernels.placement import partition


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    sliding_window: int | None = None,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(softcap(scale · q·k) + bias) · v over the keys that each query sees.

    A query sees a key iff their segment ids are equal and not 0, and, if `causal`, kv_position <= q_position, and, with
    a sliding window, q_position - kv_position < sliding_window. What sees nothing gives 0, and gradient 0.

    Outside `jax.shard_map` the call follows the explicit sharding of its arguments: batch and heads as q has them (or
    k, where q is replicated); a sharded T stays, a sharded S is gathered. Every device then works on its own part. Key
    heads that the head axis does not divide are replicated, and each device takes those of its queries. A sharded T
    that is causal by index is computed in another distribution, in which all devices have the same work (`split.py`).

    Args:
        q: [B, T, H, D].
        k: [B, S, K, D] where K divides H; query head h attends with key head h // (H / K).
        v: [B, S, K, D].
        causal: by `q_positions` and `kv_positions`.
        q_segment_ids: int32 [B, T]; 0 sees nothing (padding, or text before any image). Given together or not at all.
        kv_segment_ids: int32 [B, S].
        lengths: int32 [B], instead of segment ids where T = S: a row's first so many positions are one segment, the
            rest is padding. Every implementation serves it; cuDNN, which knows no segment ids, knows lengths.
        q_positions: int32 [B, T], the order for `causal` and `sliding_window` (unused without them; RoPE has its own).
            Default: the index. Prefix-LM gives the whole prefix 0. Needed where T != S.
        kv_positions: int32 [B, S]. Default: the index.
        sliding_window: number of positions that a query sees, itself included.
        bias: broadcastable to [B, H, T, S], added after the soft cap; differentiable. Not for the Pallas kernels.
        softcap: softcap * tanh(scores / softcap) replaces the scores.
        scale: default 1 / sqrt(D).
        axis_name: inside shard_map, the mesh axis (or axes) over which T and S are sharded: keys, values and their
            segment ids and positions are gathered. Positions are then global; `bias` has S whole.
        implementation: "reference" (the definition, [B, H, T, S] in float32), "xla" (in blocks, anywhere), "pallas"
            (`tpu.py` says which kernel; on a GPU `packed_gpu.py`), "pallas_interpret" (the TPU's on a CPU, slowly),
            "cudnn" (`gpu.py` says for what), or None: a kernel where the call is lowered for a TPU, or the mesh is of
            GPUs, and one can serve it, else "xla". The platform is that of the mesh, if there is one.

    Returns:
        [B, T, H, D] in q's dtype; the softmax and all sums are float32.

    Raises:
        ValueError: shapes that do not fit, segment ids given on one side only, missing positions.
        UsageError: an implementation that is unknown, or cannot serve the call; bfloat16 on a GPU without it.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    bias = None if bias is None else jnp.asarray(bias)
    if lengths is not None:
        if q_segment_ids is not None or kv_segment_ids is not None or q.shape[1] != k.shape[1]:
            raise ValueError("attention: lengths take the place of segment ids, where T = S; give one or the other")
        q_segment_ids = kv_segment_ids = _segment_of(jnp.asarray(lengths, jnp.int32), q)
    mask = Mask(
        *(
            None if x is None else jnp.asarray(x, jnp.int32)
            for x in (q_segment_ids, kv_segment_ids, q_positions, kv_positions)
        )
    )
    _check(q, k, v, mask, bias, causal, sliding_window, axis_name)
    if axis_name is not None and jax.lax.axis_size(axis_name) == 1:
        axis_name = None
    rule = Rule(
        causal=bool(causal),
        sliding_window=None if sliding_window is None else int(sliding_window),
        softcap=None if softcap is None else float(softcap),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        padded=lengths is not None,
    )
    mesh = placement.mesh_of(q, k, v)
    gpu.check_dtype(q.dtype, placement.device_kind(mesh))
    if mesh.explicit_axes:
        return _wrapped(mesh, rule, q, k, v, mask, bias, axis_name, implementation)
    return _local(rule, q, k, v, mask, bias, axis_name, choose(mesh, rule, q, k, mask, bias, axis_name, implementation))


def choose(
    mesh: AbstractMesh,
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    axis_name: str | tuple[str, ...] | None,
    implementation: str | None,
    *,
    log: bool = True,
) -> str:
    """As `placement.choose`. Of a split sequence a kernel is given some queries, all keys, and positions."""
    kind, placed = placement.device_kind(mesh), None
    if (mesh.auto_axes and mesh.size > 1) or placement.varying_axes(q):
        placed = "the compiler does not partition it: use explicit mesh axes, or shard_map with check_vma=False"
    keys = k.shape[1] if axis_name is None else k.shape[1] * jax.lax.axis_size(axis_name)
    queries = q.shape[1] // placement.axes_size(mesh, placement.spec_of(q)[1])
    if axis_name is not None or queries < q.shape[1]:
        mask = mask._replace(q_positions=0) if rule.ordered and mask.q_positions is None else mask
        q, k = (jax.ShapeDtypeStruct((len(x), n, *x.shape[2:]), x.dtype) for x, n in ((q, queries), (k, keys)))
    platform = placement.platform_of(mesh)
    worthwhile = gpu.worthwhile(q.shape) if platform == "gpu" else tpu.worthwhile(q.shape, k.shape)
    if implementation is None and not worthwhile:
        return "xla"
    parts = {"tpu": tpu.refusal, "gpu": gpu.refusal, "cudnn": gpu.cudnn_refusal}
    refusals = {name: refusal(rule, q, k, mask, bias, kind) or placed for name, refusal in parts.items()}
    return placement.choose("attention", mesh, refusals, implementation, log=log)


def _local(rule: Rule, q, k, v, mask: Mask, bias, axis_name, implementation: str) -> jax.Array:
    """One device's part."""
    serve = functools.partial(_serve, rule, implementation)
    if axis_name is None:
        return serve(q, k, v, mask, bias)
    mesh = placement.mesh_of(q)
    skips = implementation in ("xla", "auto") or (implementation == "pallas" and placement.platform_of(mesh) == "gpu")
    if not skips and implementation in ("pallas", "pallas_interpret"):
        skips = tpu.skips(rule, k.shape[1] * jax.lax.axis_size(axis_name), placement.device_kind(mesh) or "tpu")
    return split.attention(serve, rule, q, k, v, mask, bias, axis_name=axis_name, skips=skips)


def _serve(rule: Rule, implementation: str, q, k, v, mask: Mask, bias) -> jax.Array:
    """Some queries with all of their keys, on one device."""
    mesh = placement.mesh_of(q)
    known, device = placement.platform_of(mesh), placement.device_of(mesh)
    if implementation == "auto":
        return _by_platform(rule, device, q, k, v, mask)
    if implementation == "reference":
        return reference.attention(q, k, v, mask, bias, rule=rule)
    if implementation == "xla":
        return xla.attention(q, k, v, mask, bias, rule=rule, device=device)
    if implementation == "cudnn":
        return gpu.cudnn(q, k, v, mask, rule=rule)
    if implementation == "pallas" and known == "gpu":
        return packed_gpu.attention(q, k, v, mask, rule=rule)
    kind, interpret = placement.device_kind(mesh), implementation == "pallas_interpret"
    return tpu.attention(q, k, v, mask, rule=rule, device_kind=kind, interpret=interpret)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_platform(rule: Rule, device: str, q, k, v, mask: Mask) -> jax.Array:
    """Without a mesh the platform is known when the program is lowered, not while it is traced."""
    on_tpu = functools.partial(tpu.attention, rule=rule)
    in_blocks = functools.partial(xla.attention, bias=None, rule=rule, device=device)
    return jax.lax.platform_dependent(q, k, v, mask, tpu=on_tpu, default=in_blocks)


def _wrapped(mesh, rule: Rule, q, k, v, mask: Mask, bias, axis_name, implementation) -> jax.Array:
    """The call under shard_map, over the explicit axes of the arguments' mesh."""
    specs = [placement.spec_of(x) for x in (q, k, v)]
    batch, _, heads, features = (next((spec[i] for spec in specs if spec[i]), ()) for i in range(4))
    length = specs[0][1]
    if features:
        raise ValueError(f"attention: the feature axis of q, k or v is sharded over {features}; reshard it to None")
    parts = placement.axes_size(mesh, heads)
    key_heads = heads if k.shape[2] % parts == 0 else ()
    per_device = q.shape[2] // parts
    group = q.shape[2] // k.shape[2]
    if not key_heads and per_device % group and group % per_device:
        raise ValueError(
            f"attention: {q.shape[2]} query heads on {k.shape[2]} key heads do not split over the {parts} devices of "
            f"{heads}; choose a head axis that divides {k.shape[2]}, or is a multiple of it"
        )
    choice = choose(mesh, rule, q, k, mask, bias, axis_name, implementation)
    divided = placement.axes_size(mesh, length) > 1
    if divided and axis_name is not None:
        raise ValueError(f"attention: T is split twice, over axis_name={axis_name!r} and over {length}; choose one")
    key_length = length if divided and specs[1][1] == length else ()  # else the keys are gathered on the way in

    def body(q, k, v, *rest):
        mask, bias = Mask(*rest[:4]), rest[4] if len(rest) > 4 else None
        if divided and not key_length and rule.ordered and mask.q_positions is None:
            mask = mask._replace(q_positions=jax.lax.axis_index(length) * q.shape[1])
        if heads and not key_heads:
            count = max(1, per_device // group)
            first = jax.lax.axis_index(heads) * per_device // group
            k, v = (jax.lax.dynamic_slice_in_dim(x, first, count, 2) for x in (k, v))
        return _local(rule, q, k, v, mask, bias, axis_name or key_length or None, choice)

    query_spec, query_row = partition(batch, length, heads, ()), partition(batch, length)
    key_spec, key_row = partition(batch, key_length, key_heads, ()), partition(batch, key_length)
    specs = [query_spec, key_spec, key_spec, query_row, key_row, query_row, key_row]
    if bias is not None:
        has = (axes if size > 1 else () for axes, size in zip((batch, heads, length, ()), bias.shape, strict=True))
        specs.append(partition(*has))
    arrays = [q, k, v, *mask] + ([] if bias is None else [bias])
    arrays = [
        None if x is None else jax.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    specs = [None if x is None else spec for x, spec in zip(arrays, specs, strict=True)]
    call = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=query_spec,
        axis_names=set(mesh.explicit_axes),
        check_vma=choice in ("reference", "xla"),  # Pallas calls do not say what varies
    )
    return call(*arrays)


def _segment_of(lengths: jax.Array, q: jax.Array) -> jax.Array:
    """Segment ids [B, T]: 1 up to a row's length, then 0."""
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"attention: expected lengths of shape {q.shape[:1]}, found {lengths.shape}")
    return (jnp.arange(q.shape[1], dtype=jnp.int32) < lengths[:, None]).astype(jnp.int32)


def _check(q, k, v, mask: Mask, bias, causal, sliding_window, axis_name) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: expected q [B, T, H, D] and k, v [B, S, K, D], found {q.shape}, {k.shape}, {v.shape}"
        )
    (batch, queries, heads, _), (_, keys, kv_heads, _) = q.shape, k.shape
    if heads % kv_heads:
        raise ValueError(f"attention: {kv_heads} key heads do not divide {heads} query heads")
    names = ("q_segment_ids", "kv_segment_ids", "q_positions", "kv_positions")
    for name, array, length in zip(names, mask, (queries, keys, queries, keys), strict=True):
        if array is not None and array.shape != (batch, length):
            raise ValueError(f"attention: expected {name} of shape {(batch, length)}, found {array.shape}")
    if (mask.q_segment_ids is None) != (mask.kv_segment_ids is None):
        raise ValueError("attention: give q_segment_ids and kv_segment_ids together (ones where all belong together)")
    if (causal or sliding_window is not None) and queries != keys and mask.q_positions is None:
        raise ValueError(
            f"attention: causal or windowed with T={queries} and S={keys}: give q_positions (and kv_positions), "
            "because the index does not say where the queries stand"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"attention: sliding_window={sliding_window} must be at least 1, the query itself")
    if bias is not None:
        whole = keys if axis_name is None else None  # with axis_name the bias has all keys, k only some
        wanted = (batch, heads, queries, whole or bias.shape[-1])
        if bias.ndim != 4 or not all(n in (1, m) for n, m in zip(bias.shape, wanted, strict=True)):
            raise ValueError(f"attention: bias {bias.shape} does not broadcast to {(batch, heads, queries, keys)}")
