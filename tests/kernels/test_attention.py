"""Attention against its definition in float64 numpy, written here with its gradients by hand."""

from __future__ import annotations

from types import SimpleNamespace

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.products import IN_BF16_SUMMED_IN_FLOAT32, products, types
from tests.kernels.serving import table
from vlm_jax.errors import UsageError
from vlm_jax.kernels import attention, custom_calls, tiles
from vlm_jax.kernels.attention import short, xla
from vlm_jax.kernels.attention.shapes import SHAPES, SMALL, AttentionShape

# Sums of some dozens of float32 products of order 1; the largest gradient here is about 10.
TOLERANCE = 2e-5


def definition(arrays, options, d_out):
    """Output and gradients (q, k, v, bias) in float64, and which queries see something."""
    q, k, v = (arrays[name].astype(np.float64) for name in "qkv")
    batch, queries, heads, features = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scale = options.get("scale") or features**-0.5
    raw = np.einsum("bthd,bshd->bhts", q, k) * scale
    cap, slope = options.get("softcap"), 1.0
    if cap is not None:
        slope = 1 - np.tanh(raw / cap) ** 2
        raw = cap * np.tanh(raw / cap)
    if "bias" in arrays:
        raw = raw + arrays["bias"]

    q_at = options.get("q_positions", np.arange(queries)[None])[:, None, :, None]
    k_at = options.get("kv_positions", np.arange(keys)[None])[:, None, None, :]
    seen = np.ones((batch, 1, queries, keys), bool)
    if options.get("causal"):
        seen &= k_at <= q_at
    if options.get("sliding_window") is not None:
        seen &= q_at - k_at < options["sliding_window"]
    if "q_segment_ids" in options:
        q_ids = options["q_segment_ids"][:, None, :, None]
        seen &= (q_ids == options["kv_segment_ids"][:, None, None, :]) & (q_ids != 0)
    if "lengths" in options:
        real = np.arange(queries) < options["lengths"][:, None]
        seen &= real[:, None, :, None] & real[:, None, None, :]

    weights = np.where(seen, np.exp(raw - raw.max()), 0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhts,bshd->bthd", weights, v)

    d_weights = np.einsum("bthd,bshd->bhts", d_out, v)
    d_raw = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    grads = {}
    if "bias" in arrays:
        axes = tuple(axis for axis, size in enumerate(arrays["bias"].shape) if size == 1)
        grads["bias"] = d_raw.sum(axes, keepdims=True)
    d_raw = d_raw * slope * scale
    grads["q"] = np.einsum("bhts,bshd->bthd", d_raw, k)
    shared = (batch, keys, heads // group, group, features)
    grads["k"] = np.einsum("bhts,bthd->bshd", d_raw, q).reshape(shared).sum(3)
    grads["v"] = np.einsum("bhts,bthd->bshd", weights, d_out).reshape(shared).sum(3)
    return out, grads, np.broadcast_to(seen.any(-1)[:, 0], (batch, queries))


def run(arrays, options, d_out, call=attention):
    """Output and gradients of `call`, compiled together."""

    def loss(arrays, d_out):
        out = call(**arrays, **options)
        return (out.astype(jnp.float32) * d_out).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays, d_out)
    return out, grads


def assert_close(got, want, tolerance=TOLERANCE):
    for name in want[1]:
        np.testing.assert_allclose(got[1][name], want[1][name], rtol=tolerance, atol=tolerance, err_msg=f"d_{name}")
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance, atol=tolerance)


def made(shape: AttentionShape):
    arrays, options = shape.arguments()
    return arrays, options, np.random.default_rng(1).standard_normal(arrays["q"].shape, np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that divide nothing and need every loop."""

    def choose(q_shape, kv_shape, **_):
        return xla.Blocks(1, 1, min(q_shape[1], 16), min(kv_shape[1], 24))

    monkeypatch.setattr(xla, "choose_blocks", choose)


@pytest.mark.parametrize("name", SMALL)
def test_equals_the_definition(name, small_blocks) -> None:
    arrays, options, d_out = made(SMALL[name])
    want = definition(arrays, options, d_out)
    assert_close(run(arrays, {**options, "implementation": "reference"}, d_out), want)
    assert_close(run(arrays, {**options, "implementation": "xla"}, d_out), want)


GROUPED = ["odd_causal_grouped", "packed_window_softcap", "cross_packed"]


@pytest.mark.parametrize("name", GROUPED)
def test_one_block_equals_the_definition(name) -> None:
    arrays, options, d_out = made(SMALL[name])
    assert_close(run(arrays, {**options, "implementation": "xla"}, d_out), definition(arrays, options, d_out))


@pytest.mark.parametrize("name", GROUPED)
def test_splash_equals_the_definition(name, monkeypatch) -> None:
    monkeypatch.setattr(short, "MOST_KEYS", 0)
    arrays, options, d_out = made(SMALL[name])
    want = definition(arrays, options, d_out)
    assert_close(run(arrays, {**options, "implementation": "pallas_interpret"}, d_out), want)


# Blocks beyond the end of T and S, several blocks and programs, heads that fill lanes and heads that do not.
SHORT = {name: shape for name, shape in SMALL.items() if shape.bias is None} | {
    "two_blocks": AttentionShape(2, 200, 150, 4, 2, 64, segments=3),
    "two_programs": AttentionShape(1, 130, 70, 4, 4, 64, causal=True, positions="last"),
    "seventy_two": AttentionShape(1, 140, 140, 3, 3, 72),
}


@pytest.mark.parametrize("name", SHORT)
def test_the_kernel_for_short_sequences_equals_the_definition(name) -> None:
    arrays, options, d_out = made(SHORT[name])
    want = definition(arrays, options, d_out)
    with tiles.trying({"attention.short.scores": 2**14}):
        assert_close(run(arrays, {**options, "implementation": "pallas_interpret"}, d_out), want)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_interpret"])
def test_what_sees_nothing_gives_exactly_zero(implementation) -> None:
    arrays, options, d_out = made(SMALL["cross_packed"])
    *_, seeing = definition(arrays, options, d_out)
    assert (~seeing).sum() > (options["q_segment_ids"] == 0).sum() > 0  # some ids have no partner
    out, grads = run(arrays, {**options, "implementation": implementation}, d_out)
    assert not np.asarray(out)[~seeing].any() and not np.asarray(grads["q"])[~seeing].any()
    unseen = options["kv_segment_ids"] == 0
    assert unseen.any() and not np.asarray(grads["k"])[unseen].any() and not np.asarray(grads["v"])[unseen].any()
    assert all(np.isfinite(x).all() for x in (out, *grads.values()))


def test_a_bias_of_minus_infinity_hides_without_nan(small_blocks) -> None:
    arrays, options, d_out = made(SMALL["bias_per_head"])
    arrays["bias"][:, :, :5] = -np.inf  # these queries see nothing
    arrays["bias"][:, :, :, 3] = -np.inf
    for implementation in ("reference", "xla"):
        out, grads = run(arrays, {**options, "implementation": implementation}, d_out)
        assert not np.asarray(out)[:, :5].any()
        assert all(np.isfinite(x).all() for x in (out, *grads.values()))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bf16_is_summed_in_float32(implementation, small_blocks) -> None:
    ones = np.ones((1, 2000, 1, 8), jnp.bfloat16)  # adding 1 in bf16 stops at 256
    arrays = {"q": 0 * ones[:, :1], "k": ones, "v": ones}
    out, grads = run(arrays, {"implementation": implementation}, np.ones((1, 1, 1, 8), np.float32))
    assert out.dtype == jnp.bfloat16 and (out == 1).all()
    np.testing.assert_allclose(grads["v"].astype(jnp.float32), 1 / 2000, rtol=2**-8)


def test_products_of_bf16_in_blocks_are_summed_in_float32() -> None:
    q = jnp.ones((1, 5, 2, 8), jnp.bfloat16)

    def loss(q, k, v):
        return attention(q, k, v, implementation="xla").astype(jnp.float32).sum()

    found = products(jax.grad(loss, argnums=(0, 1, 2)), q, q, q)
    assert len(found) == 7 and types(found) == IN_BF16_SUMMED_IN_FLOAT32


def test_scale_and_bf16_inputs_stay_within_bf16_of_the_definition() -> None:
    arrays, options, d_out = made(SMALL["packed_causal"])
    arrays = {name: np.asarray(jnp.asarray(x, jnp.bfloat16)) for name, x in arrays.items()}
    options = {**options, "scale": 0.7}
    want = definition(arrays, options, d_out)
    got = run(arrays, options, d_out)
    assert_close((np.float64(got[0]), {n: np.float64(x) for n, x in got[1].items()}), want, 4e-2)


# --------------------------------------------------------------------------------------------------------------- meshes


def placed(mesh, tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


ROWS = ("data", "fsdp")


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads", "implementation"),
    [
        ((2, 2, 2), 4, 2, None),
        ((2, 2, 2), 4, 2, "xla"),  # by lengths
        ((2, 2, 2), 4, 2, "reference"),
        ((2, 2, 2), 4, 2, "pallas_interpret"),
        ((2, 1, 4), 8, 2, None),  # two devices share a key head
        ((1, 2, 4), 12, 1, "pallas_interpret"),
        ((1, 1, 1), 4, 2, None),
    ],
)
def test_eight_devices_equal_one(sizes, heads, kv_heads, implementation, small_blocks, explicit_mesh) -> None:
    rows: dict = {"padded": True} if implementation == "xla" else {"segments": 2}
    arrays, options, d_out = made(AttentionShape(4, 40, 40, heads, kv_heads, 8, causal=True, **rows))
    want = definition(arrays, options, d_out)
    mesh = explicit_mesh(*sizes)
    spec = P(ROWS, None, "tensor", None)
    key_spec = spec if kv_heads % sizes[2] == 0 else P(ROWS, None, None, None)
    with jax.set_mesh(mesh):
        specs = {"q": spec, "k": key_spec, "v": key_spec}
        got = run(placed(mesh, arrays, specs), {**options, "implementation": implementation}, placed(mesh, d_out, spec))
        assert_close(got, want)
        assert jax.typeof(got[0]).sharding.spec == spec
        assert {name: jax.typeof(x).sharding.spec for name, x in got[1].items()} == specs


def test_a_bias_and_a_scan_with_checkpoint_on_eight_devices(small_blocks, explicit_mesh) -> None:
    arrays, options, d_out = made(AttentionShape(4, 20, 30, 4, 2, 8, segments=2, bias=(1, 4, 20, 30)))
    want = definition(arrays, options, d_out)
    mesh = explicit_mesh(2, 2, 2)
    spec = P(ROWS, None, "tensor", None)

    def layers(q, **rest):
        """q passes a second, empty layer, so that the attention stands in a scan under a checkpoint."""

        def layer(carry, first):
            out = jax.checkpoint(lambda q: attention(q, **rest))(carry)
            return jnp.where(first, out, carry), None

        return jax.lax.scan(layer, q, jnp.array([True, False]))[0]

    with jax.set_mesh(mesh):
        specs = {"q": spec, "k": spec, "v": spec, "bias": P(None, "tensor", None, None)}
        assert_close(run(placed(mesh, arrays, specs), options, placed(mesh, d_out, spec), layers), want)


# --------------------------------------------------------------------------------------------- memory, choice, mistakes


def test_no_array_of_all_scores() -> None:
    shape = AttentionShape(1, 2048, 2048, 8, 2, 16, causal=True, segments=3)
    scores = 8 * 2048 * 2048 * 4
    arrays, options, d_out = made(shape)

    def temporary(implementation):
        def loss(arrays):
            return (attention(**arrays, **options, implementation=implementation) * d_out).sum()

        return jax.jit(jax.grad(loss)).lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary("xla") < scores / 8
    assert temporary("reference") > scores  # so that the measure measures


def lowered_for_tpu(call, *args) -> str:
    return jax.jit(call).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


def test_none_is_a_kernel_where_the_call_is_lowered_for_a_tpu(explicit_mesh) -> None:
    def shapes(length):
        return jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, length), jnp.int32)

    def call(q, ids, **options):
        return attention(q, q, q, causal=True, q_segment_ids=ids, kv_segment_ids=ids, **options)

    def gradient(q, ids, **options):
        return jax.grad(lambda q: call(q, ids, **options).astype(jnp.float32).sum())(q)

    assert lowered_for_tpu(gradient, *shapes(300)).count("tpu_custom_call") == 2  # forward, backward
    assert lowered_for_tpu(gradient, *shapes(1500)).count("tpu_custom_call") == 3  # splash: forward, dq, dkv
    order = {"q_positions": jnp.zeros((2, 1500), int)}  # which splash does not know
    assert lowered_for_tpu(lambda *args: gradient(*args, **order), *shapes(1500)).count("tpu_custom_call") == 2
    for length, options in ((300, {"implementation": "xla"}), (3000, {"q_positions": jnp.zeros((2, 3000), int)})):
        assert "tpu_custom_call" not in lowered_for_tpu(lambda *a, o=options: call(*a, **o), *shapes(length))
    q, ids = shapes(300)
    assert "custom_call" not in jax.jit(call).lower(q, ids).as_text()

    # Ahead of time for a mesh of TPUs, the mesh says it while tracing.
    device = jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    mesh = explicit_mesh(2, 1, 1).abstract_mesh.update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        sharded = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("data"))) for x in (q, ids)]
        assert "attention_short" in str(jax.make_jaxpr(call)(*sharded))


def test_custom_calls_are_counted_by_name() -> None:
    matrix = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    twice = jax.jit(lambda x: jnp.linalg.cholesky(x) + jnp.linalg.cholesky(x + 1)).lower(matrix).compile()
    ((name, count),) = custom_calls(twice).items()
    assert "potrf" in name and count == 2
    assert not custom_calls(jax.jit(jnp.sin).lower(matrix).compile())
    text = '%short.3 = f32[2]{0} custom-call(%a), custom_call_target="tpu_custom_call"\n'
    assert custom_calls(SimpleNamespace(as_text=lambda: text * 2)) == {"short": 2}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"implementation": "palas"}, UsageError, "did you mean 'pallas'"),
        ({"implementation": "pallas_interpret", "bias": np.zeros((1, 1, 1, 8))}, UsageError, "take no bias"),
        ({"q_segment_ids": np.ones((2, 8), int)}, ValueError, "together"),
        ({"q_segment_ids": np.ones((2, 8), int), "lengths": [8, 8]}, ValueError, "give one or the other"),
        ({"lengths": [8]}, ValueError, r"lengths of shape \(2,\), found \(1,\)"),
        ({"q_positions": np.ones((1, 8), int)}, ValueError, "expected q_positions"),
        ({"causal": True, "k": np.ones((2, 9, 2, 4)), "v": np.ones((2, 9, 2, 4))}, ValueError, "give q_positions"),
        ({"k": np.ones((2, 8, 3, 4)), "v": np.ones((2, 8, 3, 4))}, ValueError, "3 key heads do not divide 2"),
        ({"sliding_window": 0}, ValueError, "at least 1"),
        ({"bias": np.zeros((2, 3, 8, 8))}, ValueError, "does not broadcast"),
    ],
)
def test_a_mistake_is_one_sentence(change, error, says) -> None:
    x = np.ones((2, 8, 2, 4), np.float32)
    with pytest.raises(error, match=says):
        attention(**{"q": x, "k": x, "v": x, **change})


def test_pallas_on_a_cpu_mesh_says_what_to_use(explicit_mesh) -> None:
    x = jnp.ones((1, 128, 1, 8))
    with jax.set_mesh(explicit_mesh(1, 1, 1)), pytest.raises(UsageError, match=r"no Pallas kernel for cpu.*'xla'"):
        attention(x, x, x, implementation="pallas")


def test_many_keys_in_an_order_of_their_own_are_refused() -> None:
    x = jnp.ones((1, 3000, 1, 8))
    with pytest.raises(UsageError, match=r"beyond 2,048 keys .* leave q_positions"):
        attention(x, x, x, causal=True, q_positions=jnp.zeros((1, 3000), int), implementation="pallas_interpret")


# --------------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.slow
def test_any_shape_equals_the_definition(monkeypatch) -> None:
    """Drawn lengths, heads, masks and (in XLA) blocks; the same draws each time."""
    integers, booleans = hypothesis.strategies.integers, hypothesis.strategies.booleans()

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(hypothesis.strategies.data())
    def equal(data) -> None:
        def draw(low: int, high: int) -> int:
            return data.draw(integers(low, high))

        queries, kv_heads = draw(1, 70), draw(1, 3)
        causal, windowed = data.draw(booleans), data.draw(booleans)
        ordered = causal or windowed
        keys = draw(queries, 90) if ordered else draw(1, 90)  # queries at the end of the keys
        sizes = {"batch": draw(1, 2), "heads": kv_heads * draw(1, 3), "kv_heads": kv_heads, "features": draw(1, 20)}
        shape = AttentionShape(
            queries=queries,
            keys=keys,
            causal=causal,
            sliding_window=draw(1, 60) if windowed else None,
            softcap=2.0 if data.draw(booleans) else None,
            segments=draw(0, min(4, queries - 1, keys - 1)),
            positions="last" if queries != keys and ordered else None,
            **sizes,
        )
        blocks = xla.Blocks(1, 1, min(queries, draw(1, 64)), min(keys, draw(1, 64)))
        monkeypatch.setattr(xla, "choose_blocks", lambda *_, **__: blocks)
        arrays, options, d_out = made(shape)
        want = definition(arrays, options, d_out)
        for implementation in ("reference", "xla", "pallas_interpret"):
            assert_close(run(arrays, {**options, "implementation": implementation}, d_out), want, 5e-5)

    equal()


# ----------------------------------------------------------------------------------- large rows, here and ahead of time

LARGE = [name for name, shape in SHAPES.items() if not shape.small]


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_rows_run_on_a_cpu(name) -> None:
    """One head of each call beside the definition, which has too large an array for all of them."""
    arrays, options, d_out = made(SHAPES[name])
    group = arrays["q"].shape[2] // arrays["k"].shape[2]
    d_out[:, :, 1:group] = 0  # so that the gradients of the first key head are those of the first query head
    got = run(arrays, {**options, "implementation": "xla"}, d_out)

    def first_head(arrays):
        return {key: x[:, :1] if key == "bias" else x[:, :, :1] for key, x in arrays.items()}

    want = run(first_head(arrays), {**options, "implementation": "reference"}, d_out[:, :, :1])
    assert_close((got[0][:, :, :1], first_head(got[1])), want, 1e-4)


KERNELS = {
    "short": ["attention_short", "attention_short_gradients"],
    "splash": ["splash_mha_dkv_", "splash_mha_dq_", "splash_mha_fwd_"],
    "blocks": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_compiles_for_tpus_ahead_of_time(name, tpu_chips) -> None:
    """Forward and backward; needs libtpu, no TPU (`pip install -e ".[plan]"`)."""
    shape = SHAPES[name]
    mesh = Mesh(np.array(tpu_chips[:1]), ("data",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, P())
    arrays, options = shape.arguments()
    arrays = {key: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=whole) for key, x in arrays.items()}
    known = {key: x for key, x in options.items() if not isinstance(x, np.ndarray)}
    ids = {
        key: jax.ShapeDtypeStruct(x.shape, jnp.int32, sharding=whole)
        for key, x in options.items()
        if isinstance(x, np.ndarray)
    }

    def step(arrays, ids, d_out):
        out, pull = jax.vjp(lambda arrays: attention(**arrays, **ids, **known), arrays)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        calls = custom_calls(jax.jit(step).lower(arrays, ids, arrays["q"]).compile())
    kernels = KERNELS[table("Attention")[name][tpu_chips[0].device_kind]]
    found = sorted(call for call in calls if call.startswith(("attention", "splash")))
    assert all(call.startswith(kernel) for call, kernel in zip(found, kernels, strict=True)), calls
