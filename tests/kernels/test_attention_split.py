"""Attention over a sequence that is split over devices: equal to a whole one, equal work, served by the kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.devices import H200, absent_mesh
from tests.kernels.test_attention import assert_close, definition, made, placed, run
from vlm_jax.errors import UsageError
from vlm_jax.kernels import attention, custom_calls
from vlm_jax.kernels.attention import packed_gpu, short, splash, split, xla
from vlm_jax.kernels.attention.reference import Mask, Rule
from vlm_jax.kernels.attention.shapes import AttentionShape


@pytest.fixture
def small(monkeypatch) -> None:
    """Halves as short as they come, and blocks that divide nothing."""
    monkeypatch.setattr(split, "HALF", 1)
    monkeypatch.setattr(xla, "choose_blocks", lambda q, k, **_: xla.Blocks(1, 1, min(q[1], 7), min(k[1], 10)))


CAUSAL = {"causal": True}
# How queries and keys meet, by the transfers that are made for it.
WHOLE, GATHERED, HALVES, WINDOWS = set(), {"all_gather"}, {"all_gather", "ppermute"}, {"ppermute"}


@pytest.mark.parametrize(
    ("sizes", "axes", "inside", "length", "rule", "options", "how"),
    [
        ((2, 1, 2), "fsdp", False, 48, CAUSAL, {}, WHOLE),
        ((2, 2, 2), "fsdp", True, 48, CAUSAL | {"softcap": 2.0}, {}, HALVES),
        ((1, 3, 1), "fsdp", False, 48, CAUSAL, {}, HALVES),
        ((2, 4, 1), "fsdp", True, 48, CAUSAL | {"sliding_window": 30}, {"check_vma": False}, HALVES),
        ((2, 4, 1), ("data", "fsdp"), False, 48, CAUSAL, {}, HALVES),
        ((1, 8, 1), "fsdp", False, 48, CAUSAL | {"sliding_window": 14, "segments": 0}, {}, WINDOWS),
        ((2, 4, 1), "fsdp", True, 48, CAUSAL | {"sliding_window": 13}, {}, WINDOWS),
        ((1, 2, 2), "fsdp", False, 48, {"sliding_window": 13}, {}, GATHERED),
        ((1, 3, 1), "fsdp", True, 45, CAUSAL, {}, GATHERED),
        ((1, 4, 1), "fsdp", False, 48, CAUSAL, {"implementation": "pallas_interpret"}, GATHERED),
    ],
)
def test_a_split_sequence_equals_a_whole_one(sizes, axes, inside, length, rule, options, how, small, explicit_mesh):
    """By sharded arguments, and inside shard_map by `axis_name`."""
    arrays, masks, d_out = made(AttentionShape(2, length, length, 4, 2, 8, **{"segments": 2, **rule}))
    want = definition(arrays, masks, d_out)
    known = {name: masks.pop(name) for name in list(masks) if not isinstance(masks[name], np.ndarray)}
    options = known | options | {"axis_name": axes if inside else None}
    spec = P("data" if axes == "fsdp" else None, axes, "tensor", None)
    row, check_vma = P(*spec[:2]), options.pop("check_vma", True)

    def call(q, k, v, masks):
        return attention(q, k, v, **masks, **options)

    if inside:
        call = jax.shard_map(call, in_specs=(spec, spec, spec, row), out_specs=spec, check_vma=check_vma)
    mesh = explicit_mesh(*sizes)
    with jax.set_mesh(mesh):
        arrays, masks = placed(mesh, arrays, dict.fromkeys("qkv", spec)), placed(mesh, masks, dict.fromkeys(masks, row))
        jaxpr = str(jax.make_jaxpr(call)(*(arrays[name] for name in "qkv"), masks))
        assert {name for name in ("all_gather", "ppermute") if f" {name}[" in jaxpr} == how
        got = run(arrays, {}, placed(mesh, d_out, spec), lambda q, k, v: call(q, k, v, masks))
        assert_close(got, want, 1e-5)
        assert all(jax.typeof(x).sharding.spec == spec for x in (got[0], *got[1].values()))


def test_keys_that_are_not_split_as_the_queries_are(small, explicit_mesh) -> None:
    arrays, options, d_out = made(AttentionShape(2, 24, 60, 4, 2, 8, causal=True, segments=2, positions="last"))
    want = definition(arrays, options, d_out)
    mesh, spec = explicit_mesh(2, 4, 1), P("data", "fsdp")
    for specs in ({"q": spec, "k": P("data"), "v": P("data")}, dict.fromkeys("qkv", spec)):
        with jax.set_mesh(mesh):
            assert_close(run(placed(mesh, arrays, specs), options, placed(mesh, d_out, spec)), want)


@pytest.mark.parametrize(
    ("devices", "length", "rule", "how"),
    [
        (2, 768, {"sliding_window": 500, "softcap": 2.0}, HALVES),
        (4, 768, {"segments": 3}, HALVES),  # halves of 96 in blocks of 128
        (4, 768, {"sliding_window": 150}, WINDOWS),
        (3, 387, {}, GATHERED),  # 129 on each
    ],
)
def test_splash_serves_the_parts_of_a_sequence(devices, length, rule, how, explicit_mesh, monkeypatch) -> None:
    monkeypatch.setattr(split, "HALF", 1)
    monkeypatch.setattr(short, "MOST_KEYS", 0)
    monkeypatch.setattr(splash, "longest_block", lambda device: 128)
    arrays, masks, d_out = made(AttentionShape(1, length, length, 2, 1, 8, causal=True, **rule))
    if "q_segment_ids" in masks:
        masks["q_segment_ids"][:, :100] = masks["kv_segment_ids"][:, :100] = 0  # rows that see nothing
    want = definition(arrays, masks, d_out)
    known = {name: masks.pop(name) for name in list(masks) if not isinstance(masks[name], np.ndarray)}
    mesh, spec = explicit_mesh(1, devices, 1), P(None, "fsdp")

    def call(q, k, v):
        return attention(q, k, v, **ids, **known, implementation="pallas_interpret")

    with jax.set_mesh(mesh):
        arrays, ids = placed(mesh, arrays, dict.fromkeys("qkv", spec)), placed(mesh, masks, dict.fromkeys(masks, spec))
        jaxpr = str(jax.make_jaxpr(call)(**arrays))
        assert {name for name in ("all_gather", "ppermute") if f" {name}[" in jaxpr} == how
        assert "splash_mha_fwd" in jaxpr
        assert_close(run(arrays, {}, placed(mesh, d_out, spec), call), want)


@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 1), (True, 129), (True, 300), (False, 200), (False, None)]
)
def test_splash_visits_the_blocks_that_its_own_masks_name(causal, window) -> None:
    """With parts of 384 queries that begin at 0, 384 and so on."""
    rule, keys, length, block_q, block_kv = Rule(causal, window, None, 1.0), 1536, 384, 128, 256

    def own_mask(start):
        shape = (length, keys)
        if window is not None:
            return jax_splash.LocalMask(shape, (window - 1, 0 if causal else None), start)
        return jax_splash.CausalMask(shape, start) if causal else jax_splash.FullMask(shape)

    def pairs(info, of_keys):
        block, seen = np.asarray(info.data_next)[0], np.asarray(info.block_mask)[0] > 0
        rows, columns = np.nonzero(seen)
        other = block[rows, columns]
        return list(zip(other, columns, strict=True)) if of_keys else list(zip(rows, other, strict=True))

    traced = jax.jit(lambda at: splash._visits(rule, at, (length // block_q, block_q), (keys // block_kv, block_kv)))
    for start in range(0, keys, length):
        mask = jax_splash.MultiHeadMask([own_mask(start)])
        want = [
            process(mask, (block_q, block_kv))[0]
            for process in (splash_attention_mask_info.process_mask, splash_attention_mask_info.process_mask_dkv)
        ]
        fixed = splash._visits(rule, start, (length // block_q, block_q), (keys // block_kv, block_kv))
        for infos in (fixed, traced(start)):
            for info, its_own, of_keys in zip(infos, want, (False, True), strict=True):
                assert sorted(pairs(info, of_keys)) == sorted(pairs(its_own, of_keys))


def visits(rule: Rule, q, k, mask: Mask, kernel: str) -> jax.Array:
    """The number of blocks of keys that a call visits."""
    if kernel == "splash":
        of_queries, _ = splash._visits(rule, mask.q_positions, (q.shape[1] // 128, 128), (k.shape[1] // 128, 128))
        return of_queries.block_mask.sum()
    mask = mask.with_positions(rule, q.shape[1], k.shape[1])
    if kernel == "packed_gpu":
        spans = packed_gpu._visits(rule, *packed_gpu._fill_mask(q, k, mask), packed_gpu.TILE, packed_gpu.TILE)
        return (spans[..., 3] - spans[..., 0]).sum()
    blocks = xla.choose_blocks(q.shape, k.shape, ordered=True, device="gpu")
    first, last = xla._Cut(rule, blocks, q, k, mask, None).ranges
    return (last - first).sum()


@pytest.mark.parametrize("kernel", ["in blocks", "packed_gpu", "splash"])
@pytest.mark.parametrize(("devices", "length"), [(8, 8192), (3, 6144)])
def test_every_device_has_the_same_work(devices, length, kernel, explicit_mesh, monkeypatch) -> None:
    rule = Rule(causal=True, sliding_window=None, softcap=None, scale=1.0)

    def serve(q, k, v, mask, bias):  # who computes an output, and its part of the blocks that were visited for it
        device, count = jax.lax.axis_index("fsdp"), visits(rule, q, k, mask, kernel)
        return jnp.zeros_like(q).at[..., 0].set(device).at[..., 1].set(count / q.shape[1])

    def call(q):
        return split.attention(serve, rule, q, q, q, Mask(*[None] * 4), None, axis_name="fsdp", skips=True)

    def unevenness() -> float:
        with jax.set_mesh(explicit_mesh(1, devices, 1)):
            q = jax.device_put(np.zeros((1, length, 1, 2), np.float32), P(None, "fsdp"))
            device, part = np.asarray(jax.jit(jax.shard_map(call, out_specs=P(None, "fsdp")))(q))[0, :, 0].T
        counts = np.bincount(device.astype(int), part)
        assert len(counts) == devices
        return counts.max() / counts.mean()

    assert unevenness() <= 1.1
    monkeypatch.setattr(split, "HALF", length)
    assert unevenness() > 0.95 * (2 - 1 / devices)


# ---------------------------------------------------------------------------------------------------- what serves what


def abstract(kind: str, devices: int, length: int):
    """A mesh of `devices` that are not there, and queries, keys and ids over it, split along T."""
    mesh = absent_mesh(kind, devices, axis="fsdp")
    split_up = {"sharding": NamedSharding(mesh, P(None, "fsdp"))}
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16, **split_up) for heads in (8, 2))
    return mesh, q, k, jax.ShapeDtypeStruct((1, length), jnp.int32, **split_up)


def loss(q, k, ids, **options):
    out = attention(q, k, k, q_segment_ids=ids, kv_segment_ids=ids, **options)
    return out.astype(jnp.float32).sum()


def test_the_hopper_kernel_serves_halves() -> None:
    mesh, *arrays = abstract(H200, 4, 4096)
    with jax.sharding.use_abstract_mesh(mesh):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, causal=True), (0, 1)))
        text = step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 3  # forward, dq, dk and dv, each called for both halves
    assert text.count("collective_permute") == 2 * 5  # queries, ids and outputs, the gradients of outputs and queries


@pytest.mark.parametrize(
    ("length", "options", "kernel"),
    [(1024, CAUSAL, "attention_short"), (4096, CAUSAL, "splash_mha"), (4096, {}, "splash_mha")],
)
def test_what_serves_a_split_sequence_on_a_tpu(length, options, kernel) -> None:
    mesh, *arrays = abstract("TPU v5 lite", 4, length)
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(functools.partial(loss, **options))(*arrays))
    assert kernel in text
    assert ("ppermute" in text) == (length == 4096 and options == CAUSAL)  # halves, where blocks are skipped


@pytest.mark.slow
@pytest.mark.parametrize("options", [CAUSAL, CAUSAL | {"sliding_window": 4096}], ids=["halves", "windows"])
def test_a_split_sequence_compiles_for_tpus_ahead_of_time(options, tpu_chips) -> None:
    """Forward and backward, packed, 32,768 tokens over 4 chips; needs libtpu, no TPU (`pip install -e ".[plan]"`)."""
    mesh = Mesh(np.array(tpu_chips[:4]), ("fsdp",), axis_types=(AxisType.Explicit,))
    split_up = {"sharding": NamedSharding(mesh, P(None, "fsdp"))}
    q, k = (jax.ShapeDtypeStruct((1, 32768, heads, 128), jnp.bfloat16, **split_up) for heads in (32, 8))
    ids = jax.ShapeDtypeStruct((1, 32768), jnp.int32, **split_up)

    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, **options), (0, 1)))
        compiled = step.lower(q, k, ids).compile()
    calls = {name: n for name, n in custom_calls(compiled).items() if name.startswith("splash")}
    assert sorted(name.split("_")[2] for name in calls) == ["dkv", "dq", "fwd"]
    assert set(calls.values()) == {2 if options == CAUSAL else 1}
    assert compiled.memory_analysis().temp_size_in_bytes < 2e9


def test_a_kernel_is_refused_where_the_compiler_checks_what_varies() -> None:
    mesh, *arrays = abstract(H200, 4, 4096)
    call = functools.partial(loss, causal=True, axis_name="fsdp", implementation="pallas")

    def outer(*arrays, check_vma):
        specs = {"in_specs": (P(None, "fsdp"),) * 3, "out_specs": P("fsdp")}
        return jax.shard_map(lambda *x: call(*x)[None], **specs, check_vma=check_vma)(*arrays)

    with jax.sharding.use_abstract_mesh(mesh):
        assert "attention_packed" in str(jax.make_jaxpr(functools.partial(outer, check_vma=False))(*arrays))
        with pytest.raises(UsageError, match="shard_map with check_vma=False"):
            jax.make_jaxpr(functools.partial(outer, check_vma=True))(*arrays)


def test_a_sequence_is_split_one_way(explicit_mesh) -> None:
    with jax.set_mesh(explicit_mesh(2, 2, 1)):
        x = jnp.zeros((1, 8, 1, 4), out_sharding=P(None, ("data", "fsdp")))
        call = jax.shard_map(
            lambda x: attention(x, x, x, causal=True, axis_name="data"),
            in_specs=P(None, "data"),
            out_specs=P(None, "data"),
            axis_names={"data"},
        )
        with pytest.raises(ValueError, match=r"split twice, over axis_name='data' and over \('fsdp',\)"):
            jax.make_jaxpr(call)(x)
