"""Attention over a sequence that is split over devices: equal to a whole one, equal work, served by the kernels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.devices import H200, absent_mesh
from tests.kernels.test_attention import assert_close, definition, made, placed, run
from vlm_jax.errors import UsageError
from vlm_jax.kernels import attention
from vlm_jax.kernels.attention import packed_gpu, split, xla
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


def visits(rule: Rule, q, k, mask: Mask, on_gpu: bool) -> jax.Array:
    """The number of blocks of keys that a call visits."""
    mask = mask.with_positions(rule, q.shape[1], k.shape[1])
    if on_gpu:
        spans = packed_gpu._visits(rule, *packed_gpu._fill_mask(q, k, mask), packed_gpu.TILE, packed_gpu.TILE)
        return (spans[..., 3] - spans[..., 0]).sum()
    blocks = xla.choose_blocks(q.shape, k.shape, ordered=True, device="gpu")
    first, last = xla._Cut(rule, blocks, q, k, mask, None).ranges
    return (last - first).sum()


@pytest.mark.parametrize("on_gpu", [False, True], ids=["in blocks", "packed_gpu"])
@pytest.mark.parametrize(("devices", "length"), [(8, 8192), (3, 6000)])
def test_every_device_has_the_same_work(devices, length, on_gpu, explicit_mesh, monkeypatch) -> None:
    rule = Rule(causal=True, sliding_window=None, softcap=None, scale=1.0)

    def serve(q, k, v, mask, bias):  # who computes an output, and its part of the blocks that were visited for it
        device, count = jax.lax.axis_index("fsdp"), visits(rule, q, k, mask, on_gpu)
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
    [(2048, CAUSAL, "attention_short"), (4096, CAUSAL, None), (4096, {}, "splash_mha")],
)
def test_what_serves_a_split_sequence_on_a_tpu(length, options, kernel) -> None:
    mesh, *arrays = abstract("TPU v5 lite", 4, length)
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(functools.partial(loss, **options))(*arrays))
    assert kernel is None or kernel in text
    assert ("pallas_call" in text) == (kernel is not None)
    assert ("ppermute" in text) == (kernel is None)


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
