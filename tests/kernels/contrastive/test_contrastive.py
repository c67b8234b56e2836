"""The contrastive losses against their definition in float64 numpy, written here with its gradients by hand."""

from __future__ import annotations

import contextlib
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.devices import absent_mesh
from tests.kernels.products import IN_BF16_SUMMED_IN_FLOAT32, products, types
from vlm_jax.errors import UsageError
from vlm_jax.kernels import custom_calls, sigmoid_contrastive_loss, softmax_contrastive_loss
from vlm_jax.kernels.contrastive import api, tpu, xla
from vlm_jax.kernels.contrastive.shapes import SHAPES, SMALL, ContrastiveShape

LOSSES = {"softmax": softmax_contrastive_loss, "sigmoid": sigmoid_contrastive_loss}
# A float32 logit of size s is off by about 1e-7 s, and so are its probability and the loss.
TOLERANCE = 2e-6


def definition(kind, arrays):
    """Loss and gradients in float64."""
    image, text = (np.asarray(arrays[name], np.float64) for name in ("image", "text"))
    scale, count = float(arrays["scale"]), len(image)
    logits, eye = scale * image @ text.T, np.eye(count)
    if kind == "softmax":
        rows, columns = (np.logaddexp.reduce(logits, axis, keepdims=True) for axis in (1, 0))
        value = ((rows.ravel() + columns.ravel()) / 2 - np.diag(logits)).mean()
        slope = (np.exp(logits - rows) + np.exp(logits - columns) - 2 * eye) / (2 * count)
    else:
        sign = 1 - 2 * eye
        answers = sign * (logits + float(arrays["bias"]))
        value = np.logaddexp(0, answers).sum() / count
        slope = sign * np.exp(-np.logaddexp(0, -answers)) / count
    grads = {"image": scale * slope @ text, "text": scale * slope.T @ image, "scale": (slope * (image @ text.T)).sum()}
    return value, {**grads, "bias": slope.sum()} if kind == "sigmoid" else grads


def made(kind, shape: ContrastiveShape):
    arrays = shape.arguments()
    if kind == "softmax":
        del arrays["bias"]
    return arrays


def run(kind, arrays, call=None, **options):
    """As `definition`, of ours: of twice the loss, so that the factor of the backward pass is not 1."""
    call = call or functools.partial(LOSSES[kind], **options)
    value, grads = jax.jit(jax.value_and_grad(lambda arrays: 2 * call(**arrays)))(arrays)
    return value / 2, {name: np.asarray(x, np.float64) / 2 for name, x in grads.items()}


def assert_close(got, want, arrays, tolerance=TOLERANCE):
    """Within `tolerance` of what a relative error of the logits can do, which grows with the largest logit."""
    largest = 1 + abs(float(arrays["scale"])) + abs(float(arrays.get("bias", 0)))
    assert abs(got[0] - want[0]) <= tolerance * (largest + 5 * abs(want[0]))  # the sum of N² terms, one after another
    assert got[1].keys() == want[1].keys()
    for name, x in want[1].items():
        # The slopes of all N² pairs sum up to at most 2 (softmax) or 1 + N (sigmoid, all answers wrong).
        factor = abs(float(arrays["scale"])) / len(arrays["image"]) if np.ndim(x) else 1
        most = max(np.abs(x).max(), factor)
        np.testing.assert_allclose(got[1][name], x, rtol=0, atol=tolerance * largest * most, err_msg=f"d_{name}")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that divide few lengths, and several of them."""
    monkeypatch.setattr(xla, "choose_tiles", lambda n, m, _: xla.Tiles(min(n, 16), min(m, 24)))


KINDS = pytest.mark.parametrize("kind", LOSSES)


@KINDS
@pytest.mark.parametrize("name", SMALL)
def test_equals_the_definition(kind, name, small_tiles) -> None:
    arrays = made(kind, SMALL[name])
    want = definition(kind, arrays)
    assert_close(run(kind, arrays, implementation="reference"), want, arrays)
    assert_close(run(kind, arrays, implementation="xla"), want, arrays)


@KINDS
@pytest.mark.parametrize("name", ["one_row", "odd", "sharp", "zero"])
def test_the_tpu_kernels_equal_the_definition(kind, name) -> None:
    arrays = made(kind, SMALL[name])
    assert_close(run(kind, arrays, implementation="pallas_interpret"), definition(kind, arrays), arrays)


@KINDS
def test_the_copies_of_the_tpu_kernels_do_not_race(kind, monkeypatch, capfd) -> None:
    """One to three rows and columns of tiles, on a simulated TPU that says where memory is touched while it moves."""
    monkeypatch.setattr(tpu, "tile", lambda length, _: (128, -(-length // 128) * 128))
    watched = pltpu.InterpretParams(detect_races=True)
    for images, texts in ((140, 300), (260, 120)):
        image = ContrastiveShape(images, 8).arguments()["image"]
        text = ContrastiveShape(texts, 8).arguments()["text"]
        numbers = (jnp.float32(3),) if kind == "softmax" else (jnp.float32(3), jnp.float32(-1))
        totals = (jnp.full(images, 5.0), jnp.full(texts, 6.0)) if kind == "softmax" else ()
        name = f"{kind}_gradients"
        got = getattr(tpu, name)(image, text, *numbers, 5, *totals, interpret=watched)
        want = getattr(xla, name)(image, text, *numbers, 5, *totals, tiles=xla.Tiles(images, texts))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
@KINDS
def test_bf16_features_are_summed_in_float32(kind, implementation) -> None:
    arrays = made(kind, ContrastiveShape(1, 8))
    few = {name: np.asarray(jnp.asarray(arrays[name], jnp.bfloat16)) for name in ("image", "text")}
    many = {**arrays, **{name: np.repeat(x, 600, axis=0) for name, x in few.items()}}  # counting in bf16 stops at 256
    got, want = run(kind, many, implementation=implementation), definition(kind, many)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for name, x in want[1].items():
        np.testing.assert_allclose(got[1][name], x, rtol=2e-2, atol=1e-2 * np.abs(x).max() + 2**-9, err_msg=name)


@KINDS
def test_products_are_summed_in_float32_and_float32_factors_are_not_rounded(kind, small_tiles) -> None:
    arrays = made(kind, SMALL["odd"])
    of_value = functools.partial(LOSSES[kind], implementation="xla")

    def found(dtype):
        features = [jnp.asarray(arrays[name], dtype) for name in ("image", "text")]
        numbers = [arrays[name] for name in ("scale", "bias") if name in arrays]
        calls = of_value, jax.grad(of_value, argnums=(0, 1))
        return [equation for call in calls for equation in products(call, *features, *numbers)]

    of_bf16, of_float32 = found(jnp.bfloat16), found(jnp.float32)
    assert len(of_bf16) == len(of_float32) == {"softmax": 5, "sigmoid": 4}[kind]
    assert types(of_bf16) == IN_BF16_SUMMED_IN_FLOAT32
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert all(equation.params["precision"] == highest for equation in of_float32)


def test_a_loss_near_zero_keeps_its_digits() -> None:
    """Where every partner wins by far, log-softmax as a difference of two float32 numbers of size 100 gives 0."""
    image = np.eye(16, dtype=np.float32)
    arrays = {"image": image, "text": image, "scale": np.float32(30)}
    got, want = run("softmax", arrays, implementation="xla"), definition("softmax", arrays)
    assert 0 < want[0] < 2e-12
    np.testing.assert_allclose(got[0], np.log1p(15 * np.exp(-30.0)), rtol=1e-5)
    np.testing.assert_allclose(got[1]["scale"], -15 * np.exp(-30.0), rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------- meshes

ROWS = ("data", "fsdp")
PALLAS = "pallas_interpret"


def on_devices(mesh, arrays):
    specs = {name: P(ROWS, None) if np.ndim(x) else P() for name, x in arrays.items()}
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}, specs


@pytest.mark.parametrize(
    ("devices", "ring", "implementation"),
    [
        (1, True, "xla"),
        (2, False, "xla"),
        (2, True, "xla"),
        (3, True, "xla"),
        (4, False, "xla"),
        (4, True, "xla"),
        (8, False, "xla"),
        (8, True, "xla"),
        (8, True, "reference"),
    ],
)
@KINDS
def test_several_devices_equal_one(kind, devices, ring, implementation, monkeypatch, small_tiles) -> None:
    """By hand in shard_map, the gradient taken inside and outside of it."""
    monkeypatch.setattr(api, "GATHER_BYTES", 0 if ring else 2**28)
    arrays = made(kind, ContrastiveShape(72, 12, scale=20.0))
    want = definition(kind, arrays)
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    specs = {name: P("x") if np.ndim(x) else P() for name, x in arrays.items()}
    loss = functools.partial(LOSSES[kind], axis_name="x", implementation=implementation)

    def outside(**arrays):
        return jax.shard_map(lambda a: loss(**a), mesh=mesh, in_specs=(specs,), out_specs=P())(arrays)

    assert_close(run(kind, arrays, outside), want, arrays)
    inside = jax.shard_map(
        lambda a: jax.value_and_grad(lambda a: loss(**a))(a), mesh=mesh, in_specs=(specs,), out_specs=(P(), specs)
    )
    assert_close(jax.jit(inside)(arrays), want, arrays)


@pytest.mark.parametrize(
    ("sizes", "ring", "implementation"),
    [
        ((2, 2, 2), False, None),
        ((2, 2, 2), True, None),
        ((2, 2, 2), False, "reference"),
        ((2, 1, 1), True, PALLAS),
        ((4, 1, 1), False, PALLAS),
        ((2, 2, 2), True, PALLAS),
    ],
)
@KINDS
def test_sharded_features_need_no_axis_name(kind, sizes, ring, implementation, monkeypatch, explicit_mesh) -> None:
    monkeypatch.setattr(api, "GATHER_BYTES", 0 if ring else 2**28)
    arrays = made(kind, ContrastiveShape(40, 12, scale=20.0))
    want = definition(kind, arrays)
    mesh = explicit_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed, specs = on_devices(mesh, arrays)

        def gradient(arrays):
            return jax.value_and_grad(lambda a: LOSSES[kind](**a, implementation=implementation))(arrays)

        value, grads = jax.jit(gradient)(placed)
        assert_close((value, grads), want, arrays)
        assert {name: jax.typeof(x).sharding.spec for name, x in grads.items()} == specs


def test_a_ring_passes_texts_and_gathers_none(monkeypatch) -> None:
    arrays = made("sigmoid", SMALL["tiles"])
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = {name: P("x") if np.ndim(x) else P() for name, x in arrays.items()}

    def lowered():
        call = jax.shard_map(
            lambda a: sigmoid_contrastive_loss(**a, axis_name="x"), mesh=mesh, in_specs=(specs,), out_specs=P()
        )
        return jax.jit(jax.grad(call)).lower(arrays).as_text()

    gathered = lowered()
    monkeypatch.setattr(api, "GATHER_BYTES", 0)
    ring = lowered()
    assert "all_gather" in gathered and "collective_permute" not in gathered
    assert "all_gather" not in ring and "collective_permute" in ring


# --------------------------------------------------------------------------------------------- memory, choice, mistakes


@KINDS
def test_no_array_of_all_pairs(kind) -> None:
    pairs, width = 8192, 32
    features, number = jax.ShapeDtypeStruct((pairs, width), "f4"), jax.ShapeDtypeStruct((), "f4")
    arguments = (features, features, number, number)[: 3 if kind == "softmax" else 4]

    def temporary(implementation):
        call = jax.grad(functools.partial(LOSSES[kind], implementation=implementation), argnums=(0, 1, 2))
        return jax.jit(call).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary("xla") < pairs * pairs * 4 / 16
    assert temporary("reference") > pairs * pairs * 4  # so that the measure measures


@KINDS
def test_none_is_pallas_where_the_call_is_lowered_for_a_tpu(kind, explicit_mesh) -> None:
    features, number = jax.ShapeDtypeStruct((600, 96), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (features, features, number, number)[: 3 if kind == "softmax" else 4]
    gradient = jax.grad(LOSSES[kind], argnums=(0, 1, 2))

    def for_tpu(call):
        return jax.jit(call).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    assert for_tpu(gradient) == {"softmax": 2, "sigmoid": 1}[kind]
    assert for_tpu(LOSSES[kind]) == 1
    assert not for_tpu(functools.partial(LOSSES[kind], implementation="xla"))
    assert "custom_call" not in jax.jit(gradient).lower(*arguments).as_text()

    # Ahead of time for a mesh of TPUs, the mesh says it while tracing.
    device = jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    mesh = explicit_mesh(2, 1, 1).abstract_mesh.update(abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        spec = NamedSharding(mesh, P("data", None))
        sharded = [jax.ShapeDtypeStruct(features.shape, features.dtype, sharding=spec)] * 2
        assert f"contrastive_{kind}_sums" in str(jax.make_jaxpr(LOSSES[kind])(*sharded, *arguments[2:]))


@pytest.mark.parametrize(
    ("chip", "width", "dtype", "fits"),
    [
        ("TPU v4", 1152, jnp.float32, True),
        ("TPU v4", 1536, jnp.float32, False),
        ("TPU v4", 1024, jnp.float32, True),  # in the smaller tiles
        ("TPU v4", 1536, jnp.bfloat16, True),
        ("TPU v4", 2048, jnp.bfloat16, False),
        ("TPU v5", 3072, jnp.float32, True),
        ("TPU v5", 4096, jnp.float32, False),
        ("TPU v5 lite", 4096, jnp.float32, True),
        ("TPU v6 lite", 8192, jnp.bfloat16, True),
        (None, 1152, jnp.float32, True),
        (None, 1536, jnp.float32, False),  # it may be a v4
    ],
)
@KINDS
def test_tiles_that_do_not_fit_into_a_tpu_run_in_xla(kind, chip, width, dtype, fits) -> None:
    """As libtpu's compiler has it: `test_compiles_for_tpus_ahead_of_time` asks it."""
    features, number = jax.ShapeDtypeStruct((4096, width), dtype), jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (features, features, number, number)[: 3 if kind == "softmax" else 4]
    with jax.sharding.use_abstract_mesh(absent_mesh(chip)) if chip else contextlib.nullcontext():
        for implementation in (None, "pallas") if fits else (None,):
            call = functools.partial(LOSSES[kind], implementation=implementation)
            assert (f"contrastive_{kind}_sums" in str(jax.make_jaxpr(call)(*arguments))) == fits
        if not fits:
            with pytest.raises(UsageError, match=f"'pallas': its tiles of {width} .* MB of VMEM, of which .*has"):
                jax.eval_shape(functools.partial(LOSSES[kind], implementation="pallas"), *arguments)


HALF = np.ones((5, 4), np.float16)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"implementation": "palas"}, UsageError, "did you mean 'pallas'"),
        ({"image": HALF, "text": HALF, "implementation": "pallas"}, UsageError, "bfloat16 and float32"),
        ({"text": np.ones((6, 4), np.float32)}, ValueError, r"expected image and text \[N, D\]"),
        ({"image": np.ones((5, 4), int), "text": np.ones((5, 4), int)}, ValueError, "floating-point"),
        ({"scale": np.ones(1, np.float32)}, ValueError, "scale must be a scalar"),
        ({"bias": np.ones(2, np.float32)}, ValueError, "bias must be a scalar"),
        ({"scale": None}, ValueError, "scale must be a scalar, found None"),
    ],
)
def test_a_mistake_is_one_sentence(change, error, says) -> None:
    x = np.ones((5, 4), np.float32)
    with pytest.raises(error, match=says):
        sigmoid_contrastive_loss(**{"image": x, "text": x, "scale": 1.0, "bias": 0.0, **change})


def test_gradients_that_cannot_be_told_apart_are_refused(explicit_mesh) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = np.ones((4, 4), np.float32)

    def call(features, check, implementation=None):
        loss = functools.partial(softmax_contrastive_loss, scale=1.0, axis_name="x", implementation=implementation)
        return jax.shard_map(loss, mesh=mesh, in_specs=(features,) * 2, out_specs=P(), check_vma=check)(x, x)

    for features, check in ((P(), True), (P("x"), False)):
        with pytest.raises(UsageError, match="do not vary over axis_name='x'"):
            call(features, check)
    with pytest.raises(UsageError, match="explicit mesh axes instead"):
        call(P("x"), True, "pallas_interpret")
    with jax.set_mesh(explicit_mesh(1, 1, 1)), pytest.raises(UsageError, match=r"no Pallas kernel for cpu.*'xla'"):
        softmax_contrastive_loss(x, x, 1.0, implementation="pallas")


@pytest.mark.slow
@KINDS
def test_random_shapes(kind, monkeypatch) -> None:
    integers = hypothesis.strategies.integers

    @hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
    @hypothesis.given(
        integers(1, 200), integers(1, 40), integers(1, 64), integers(1, 64), hypothesis.strategies.floats(-100, 100)
    )
    def equal(pairs, width, rows, columns, scale):
        monkeypatch.setattr(xla, "choose_tiles", lambda n, m, _: xla.Tiles(min(n, rows), min(m, columns)))
        arrays = made(kind, ContrastiveShape(pairs, width, scale=scale))
        want = definition(kind, arrays)
        for implementation in ("xla", "pallas_interpret"):
            assert_close(run(kind, arrays, implementation=implementation), want, arrays)

    equal()


@pytest.mark.slow
@KINDS
def test_compiles_for_tpus_ahead_of_time(kind, tpu_chips, monkeypatch) -> None:
    """One chip, with and without gradients; four with gathered texts; four in a ring; one with features for which a v4
    has no room. Needs libtpu, no TPU (`pip install -e ".[plan]"`)."""
    pairs = 4096
    for count, ring, width, dtype in (
        (1, False, 1024, jnp.bfloat16),
        (4, False, 1152, jnp.bfloat16),
        (4, True, 1152, jnp.bfloat16),
        (1, False, 2048, jnp.float32),
    ):
        monkeypatch.setattr(api, "GATHER_BYTES", 0 if ring else 2**28)
        mesh = Mesh(np.array(tpu_chips[:count]), ("data",), axis_types=(AxisType.Explicit,))
        rows, whole = NamedSharding(mesh, P("data", None)), NamedSharding(mesh, P())
        features = jax.ShapeDtypeStruct((pairs, width), dtype, sharding=rows)
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        arguments = (features, features, number, number)[: 3 if kind == "softmax" else 4]
        gradient = jax.value_and_grad(LOSSES[kind], argnums=(0, 1, 2))
        text = jax.jit(gradient).lower(*arguments).compile().as_text()
        fits = dtype == jnp.bfloat16 or tpu_chips[0].device_kind != "TPU v4"
        assert (f"contrastive_{kind}_gradients" in text and "tpu_custom_call" in text) == fits
        assert not ring or "collective-permute" in text  # some chips gather by permutations too
        if count == 1 and fits:
            text = jax.jit(LOSSES[kind]).lower(*arguments).compile().as_text()
            assert f"contrastive_{kind}_sums" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if not shape.small])
def test_large_rows_compile_for_tpus_ahead_of_time(name, tpu_chips) -> None:
    shape = SHAPES[name]
    mesh = Mesh(np.array(tpu_chips[:1]), ("data",), axis_types=(AxisType.Explicit,))
    whole = NamedSharding(mesh, P())
    features = jax.ShapeDtypeStruct((shape.pairs, shape.width), jnp.bfloat16, sharding=whole)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    for kind, count in {"softmax": 3, "sigmoid": 4}.items():
        gradient = jax.value_and_grad(LOSSES[kind], argnums=tuple(range(count)))
        calls = custom_calls(jax.jit(gradient).lower(*(features, features, number, number)[:count]).compile())
        assert any(call.startswith(f"contrastive_{kind}_gradients") for call in calls), calls
