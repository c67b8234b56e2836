"""Attention on a GPU, without one: the kernel interpreted, programs lowered for GPUs, and what serves a call where."""

from __future__ import annotations

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.devices import A100, B200, H200, T4, absent_mesh
from tests.kernels.serving import choice, signature
from tests.kernels.test_attention import assert_close, definition, made, run
from vlm_jax.errors import UsageError
from vlm_jax.kernels import attention, placement
from vlm_jax.kernels.attention import gpu, packed_gpu
from vlm_jax.kernels.attention.reference import Mask, Rule, visible
from vlm_jax.kernels.attention.shapes import AttentionShape

# ---------------------------------------------------------------------------------------------------------- interpreted


@pytest.fixture
def interpreted(gpu_interpreter):
    """The kernel, called as `attention` is."""

    def call(q, k, v, *, causal=False, sliding_window=None, softcap=None, **mask):
        mask = Mask(*(mask.get(name) for name in Mask._fields))
        rule = Rule(causal, sliding_window, softcap, q.shape[-1] ** -0.5)
        return packed_gpu.attention(q, k, v, mask, rule=rule, interpret=gpu_interpreter)

    return call


def packed_cross() -> tuple[dict, dict, np.ndarray]:
    """Lengths and heads to be filled up, an order of its own, three tiles of keys, queries that see nothing."""
    arrays, options, d_out = made(AttentionShape(1, 150, 300, 2, 1, 40, causal=True, sliding_window=250, segments=2))
    options["q_positions"] = 2 * np.arange(150, dtype=np.int32)[None]
    return arrays, options, d_out


def test_the_kernel_equals_the_definition(interpreted) -> None:
    arrays, options, d_out = packed_cross()
    want = definition(arrays, options, d_out)
    got = run(arrays, options, d_out, interpreted)
    assert_close(got, want)  # in float32, which the interpreter takes: the sums of the kernel, without its roundings
    seeing, (out, grads) = want[2], got
    assert 0 < (options["q_segment_ids"] == 0).sum() < (~seeing).sum() < 150
    assert not np.asarray(out)[~seeing].any() and not np.asarray(grads["q"])[~seeing].any()
    assert all(np.isfinite(x).all() for x in (out, *grads.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(2, 384, 384, 1, 1, 64, causal=True, segments=2),  # with blocks that need no mask
        AttentionShape(1, 256, 256, 6, 2, 128, causal=True, softcap=2.0),
        AttentionShape(1, 300, 300, 2, 2, 72, sliding_window=40, segments=3),
        AttentionShape(1, 200, 200, 2, 1, 64, causal=True, positions="prefix"),
        AttentionShape(1, 130, 577, 1, 1, 64, segments=4),
    ],
)
def test_more_shapes_equal_the_definition(shape, interpreted) -> None:
    arrays, options, d_out = made(shape)
    assert_close(run(arrays, options, d_out, interpreted), definition(arrays, options, d_out), 5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_within_its_rounding(dtype, interpreted) -> None:
    arrays, options, d_out = packed_cross()
    arrays = {name: np.asarray(x, dtype) for name, x in arrays.items()}
    want = definition(arrays, options, d_out)
    out, grads = run(arrays, options, d_out, interpreted)
    assert out.dtype == dtype
    # weights and their gradients are rounded once, then the results: a few units of the last place of the largest
    assert_close(
        (np.float64(out), {n: np.float64(x) for n, x in grads.items()}), want, 16 * float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize(
    ("causal", "sliding_window", "shuffled"),
    [(False, None, False), (True, None, False), (True, 90, False), (True, 90, True)],
)
def test_no_visible_block_is_skipped_and_no_hidden_one_goes_unmasked(causal, sliding_window, shuffled) -> None:
    rng = np.random.default_rng(0)
    queries, keys = 7 * packed_gpu.TILE, 8 * packed_gpu.TILE

    def rows(length, most):
        row = np.sort(rng.integers(0, most, (1, length)), -1).reshape(-1, 32)
        return jnp.asarray((rng.permutation(row) if shuffled else row).reshape(1, -1), jnp.int32)

    mask = Mask(rows(queries, 2), rows(keys, 2), rows(queries, 200), rows(keys, 200))
    rule = Rule(causal, sliding_window, softcap=None, scale=1.0)
    q, k = jnp.zeros((1, queries, 1, 8)), jnp.zeros((1, keys, 1, 8))
    seen = np.asarray(visible(rule, mask))[0]
    for q_block, kv_block, by_keys in ((128, 128, False), (128, 64, False), (64, 128, True)):
        filled = packed_gpu._fill_mask(q, k, mask.with_positions(rule, queries, keys))
        visits = np.asarray(packed_gpu._visits(rule, *filled, q_block, kv_block, by_keys=by_keys))[0]
        blocks = seen.reshape(queries // q_block, q_block, keys // kv_block, kv_block).swapaxes(1, 2)
        some, every = blocks.any((2, 3)), blocks.all((2, 3))
        if by_keys:
            some, every = some.T, every.T
        assert every.any() != shuffled and (shuffled or not some.all())
        number = np.arange(some.shape[1])
        for (first, whole_first, whole_last, last), any_, all_ in zip(visits, some, every, strict=True):
            assert 0 <= first <= whole_first <= whole_last <= last <= len(number)
            assert not any_[(number < first) | (number >= last)].any()
            assert all_[(number >= whole_first) & (number < whole_last)].all()


# ------------------------------------------------------------------------------------------------- lowered for an H200


def calls(name: str, implementation: str | None, axis_type: AxisType = AxisType.Explicit) -> list[str]:
    """The custom calls in forward and backward of a row of `shapes.py`, lowered for an H200."""
    mesh = absent_mesh(H200, axis_type=axis_type)
    with jax.sharding.use_abstract_mesh(mesh):
        whole = {"sharding": NamedSharding(mesh, P())} if axis_type == AxisType.Explicit else {}
        arrays, masks, known = signature(name, "bfloat16", **whole)

        def step(arrays, masks, d_out):
            def call(arrays):
                return attention(**arrays, **masks, **known, implementation=implementation)

            out, pull = jax.vjp(call, arrays)
            return out, pull(d_out)

        lowered = jax.jit(step).trace(arrays, masks, arrays["q"]).lower(lowering_platforms=("cuda",))
    return [call for call in re.findall(r"custom_call @([\w$]+)", lowered.as_text()) if call != "Sharding"]


@pytest.mark.parametrize("name", ["mistral_7b", "clip_l14_336"])
def test_the_kernel_is_lowered_for_an_h200(name) -> None:
    """Which checks, among the rest, that it fits into shared memory."""
    assert calls(name, None) == ["mosaic_gpu_v2"] * 3  # forward, dq, dk and dv; there is no cuDNN here


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vicuna_7b", "siglip_so400m_384", "flamingo_cross", "mistral_7b_long"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_more_rows_are_lowered_for_an_h200(name, axis_type) -> None:
    assert calls(name, "pallas", axis_type) == ["mosaic_gpu_v2"] * 3


@pytest.mark.slow
def test_sharded_heads_in_a_scan_with_checkpoint_are_lowered() -> None:
    device = AbstractDevice(H200, num_cores=132, platform="cuda")
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, abstract_device=device)

    def loss(q, k, ids):
        def layer(q, _):
            call = functools.partial(attention, causal=True, q_segment_ids=ids, kv_segment_ids=ids)
            return jax.checkpoint(call)(q, k, k), None

        return jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        heads, rows = (NamedSharding(mesh, spec) for spec in (P("data", None, "tensor"), P("data")))
        q, k = (jax.ShapeDtypeStruct((4, 1024, n, 128), jnp.bfloat16, sharding=heads) for n in (32, 8))
        ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=rows)
        text = jax.jit(jax.grad(loss, (0, 1))).trace(q, k, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 4  # forward, and once more, dq, dk and dv


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("clip_l14_336", "PADDING"),
        ("siglip_b16_224", "NO_MASK"),
        ("clip_text", "PADDING_CAUSAL"),
        ("blip2_qformer", "PADDING"),
        ("siglip_so400m_384", "PADDING"),
        ("vicuna_7b", "PADDING_CAUSAL"),
    ],
)
def test_cudnn_is_called_forward_and_backward(name, mask, with_cudnn) -> None:
    """Without a mesh: jax lowers what it partitions by itself only for devices that are there."""
    arrays, masks, known = signature(name, "bfloat16")
    rule = Rule(**known, scale=0.125, padded=bool(masks))

    def step(q, k, v, d_out):
        ids = jnp.ones(q.shape[:2], jnp.int32) if masks else None
        out, pull = jax.vjp(lambda *arrays: gpu.cudnn(*arrays, Mask(ids, ids, None, None), rule=rule), q, k, v)
        return out, pull(d_out)

    text = jax.jit(step).trace(*arrays.values(), arrays["q"]).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"custom_call @(__cudnn[\w$]+)", text) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert set(re.findall(r"mask_type[^A-Z]*([A-Z_]+)", text)) == {mask}


@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(2, 33, 33, 4, 2, 8, causal=True, sliding_window=5),
        AttentionShape(1, 7, 20, 2, 2, 8),
        AttentionShape(3, 43, 43, 4, 2, 8, causal=True, padded=True),
        AttentionShape(3, 20, 20, 2, 2, 8, padded=True),
    ],
)
def test_what_cudnn_is_asked_is_the_definition(shape, monkeypatch) -> None:
    """By jax's own reading of the arguments, in its plain implementation."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, **y: plain(*x, **{**y, "implementation": "xla"}))
    arrays, options, d_out = made(shape)

    def call(q, k, v, causal, sliding_window, softcap, lengths=None):
        ids = None if lengths is None else (jnp.arange(q.shape[1]) < lengths[:, None]).astype(jnp.int32)
        rule = Rule(causal, sliding_window, softcap, 8**-0.5, padded=lengths is not None)
        return gpu.cudnn(q, k, v, Mask(ids, ids, None, None), rule=rule)

    assert_close(run(arrays, options, d_out, call), definition(arrays, options, d_out))


# ----------------------------------------------------------------------------------------------- what serves what where


@pytest.mark.parametrize(
    ("kind", "capability"),
    [
        ("Tesla V100-SXM2-16GB", 7.0),
        (T4, 7.5),
        (A100, 8.0),
        ("NVIDIA A10G", 8.6),
        ("NVIDIA GeForce RTX 4090", 8.9),
        ("NVIDIA RTX 6000 Ada Generation", 8.9),
        ("NVIDIA GH200 480GB", 9.0),
        (B200, 10.0),
        ("NVIDIA of the future", None),
        ("TPU v4", None),
        (None, None),
    ],
)
def test_a_gpu_is_known_by_its_name(kind, capability) -> None:
    assert placement.compute_capability(kind) == capability


@pytest.mark.parametrize(
    ("kind", "dtype", "vision", "packed"),
    [
        (T4, "float16", "xla", "xla"),
        (A100, "float16", "cudnn", "xla"),
        (A100, "float32", "xla", "xla"),
        (H200, "float16", "cudnn", "pallas"),
        (H200, "float32", "xla", "xla"),
        ("NVIDIA of the future", "bfloat16", "xla", "xla"),
    ],
)
def test_other_types_and_unknown_gpus(kind, dtype, vision, packed, monkeypatch, with_cudnn) -> None:
    assert choice(monkeypatch, kind, "clip_l14_336", dtype) == vision
    assert choice(monkeypatch, kind, "mistral_7b", dtype) == packed


def test_without_cudnn_the_kernel_serves_a_hopper(monkeypatch) -> None:
    assert choice(monkeypatch, H200, "clip_l14_336", "bfloat16") == "pallas"
    assert choice(monkeypatch, A100, "clip_l14_336", "bfloat16") == "xla"


@pytest.mark.parametrize(
    ("kind", "implementation", "name", "dtype", "changes", "says"),
    [
        (T4, None, "clip_l14_336", "bfloat16", {}, r"Tesla T4 \(compute capability 7.5\).*--config.dtype=float32"),
        (A100, "pallas", "mistral_7b", "bfloat16", {}, "9.0 .H100, H200., and NVIDIA A100-SXM4-40GB has 8.0"),
        (B200, "pallas", "mistral_7b", "bfloat16", {}, "NVIDIA B200 has 10.0"),
        (H200, "pallas", "paligemma_prefix", "bfloat16", {}, "at most 128, not 256"),
        (H200, "pallas", "mistral_7b", "float32", {}, "not float32 by float32"),
        (H200, "pallas", "t5_xl_encoder", "bfloat16", {}, "no bias"),
        (H200, "cudnn", "mistral_7b", "bfloat16", {}, "cuDNN knows no segment ids"),
        (H200, "cudnn", "paligemma_prefix", "bfloat16", {}, "by index, not by positions"),
        (H200, "cudnn", "clip_l14_336", "bfloat16", {"sliding_window": 9}, "only where the call is causal"),
        (H200, "cudnn", "clip_l14_336", "bfloat16", {"softcap": 9.0}, "no soft cap"),
        (H200, "cudnn", "clip_l14_336", "float32", {}, "not float32 by float32"),
        (T4, "cudnn", "clip_l14_336", "float16", {}, "from 8.0 to 10.0, and Tesla T4 has 7.5"),
        ("TPU v5 lite", "cudnn", "clip_l14_336", "bfloat16", {}, "that of 'TPU v5 lite' is not known"),
    ],
)
def test_a_refusal_says_why(kind, implementation, name, dtype, changes, says, monkeypatch, with_cudnn) -> None:
    with pytest.raises(UsageError, match=says):
        choice(monkeypatch, kind, name, dtype, implementation=implementation, **changes)


def test_cudnn_needs_a_mesh_that_says_which_gpu_it_is(with_cudnn) -> None:
    x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(UsageError, match="without a mesh nothing says which GPU it is"):
        attention(x, x, x, implementation="cudnn")


def test_plain_xla_on_a_gpu_is_logged_once_with_its_reasons(monkeypatch, caplog, with_cudnn) -> None:
    placement._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert choice(monkeypatch, A100, "mistral_7b", "bfloat16") == "xla"
    (record,) = caplog.records
    assert "cuDNN knows no segment ids, only lengths; the kernel needs compute capability 9.0" in record.getMessage()
