"""The linear cross-entropy against its definition in float64 numpy, written here with its gradients by hand."""

from __future__ import annotations

import dataclasses
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.products import IN_BF16_SUMMED_IN_FLOAT32, products, types
from vlm_jax.errors import UsageError
from vlm_jax.kernels import linear_cross_entropy
from vlm_jax.kernels.cross_entropy import xla
from vlm_jax.kernels.cross_entropy.shapes import SHAPES, SMALL, CrossEntropyShape

# Float32 logsumexp of some dozens of terms, summed over some dozens of tokens.
TOLERANCE = 2e-5


def definition(arrays, options):
    """total, per-token losses and gradients (hidden, kernel, bias) in float64."""
    hidden, kernel = arrays["hidden"].astype(np.float64), arrays["kernel"].astype(np.float64)
    (tokens, _), entries = hidden.shape, kernel.shape[1]
    logits, slope = hidden @ kernel + arrays.get("bias", np.zeros(entries)), 1.0
    if (cap := options["softcap"]) is not None:
        slope = 1 - np.tanh(logits / cap) ** 2
        logits = cap * np.tanh(logits / cap)
    logsumexp = np.log(np.exp(logits).sum(-1))
    labelled = arrays["labels"] != -100
    smoothing = options["label_smoothing"]
    target = np.full((tokens, entries), smoothing / entries)
    target[np.arange(tokens), np.where(labelled, arrays["labels"], 0)] += 1 - smoothing
    loss = np.where(labelled, logsumexp - (target * logits).sum(-1) + options["z_loss"] * logsumexp**2, 0)

    probability = np.exp(logits - logsumexp[:, None])
    d_logits = (1 + 2 * options["z_loss"] * logsumexp)[:, None] * probability - target
    d_logits = d_logits * slope * np.where(labelled, arrays["weights"], 0)[:, None]
    grads = {"hidden": d_logits @ kernel.T, "kernel": hidden.T @ d_logits, "bias": d_logits.sum(0)}
    return (loss * arrays["weights"]).sum(), loss, {name: grads[name] for name in grads if name in arrays}


def run(arrays, options):
    """As `definition`, of ours: twice the total, so that the factor of the backward pass is not 1."""
    trained = {name: arrays[name] for name in ("hidden", "kernel", "bias") if name in arrays}
    rest = {name: x for name, x in arrays.items() if name not in trained}

    def loss(trained, rest):
        total, per_token = linear_cross_entropy(**trained, **rest, **options)
        return 2 * total, (total, per_token)

    (_, (total, per_token)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, rest)
    return total, per_token, {name: x / 2 for name, x in grads.items()}


def assert_close(got, want):
    close = {"rtol": TOLERANCE, "atol": TOLERANCE}
    np.testing.assert_allclose(got[0], want[0], **close)
    np.testing.assert_allclose(got[1], want[1], **close)
    assert got[2].keys() == want[2].keys()
    for name in want[2]:
        np.testing.assert_allclose(got[2][name], want[2][name], **close, err_msg=f"d_{name}")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks that divide no length here."""
    monkeypatch.setattr(xla, "chunk_size", lambda tokens, *_: min(tokens, 7))


@pytest.mark.parametrize("name", SMALL)
def test_equals_the_definition(name, small_chunks) -> None:
    arrays, options = SMALL[name].arguments()
    want = definition(arrays, options)
    assert_close(run(arrays, {**options, "implementation": "reference"}), want)
    assert_close(run(arrays, {**options, "implementation": "xla"}), want)


def test_one_chunk_equals_the_definition_and_weights_default_to_one() -> None:
    arrays, options = SMALL["mostly_ignored"].arguments()
    arrays["weights"] = np.ones_like(arrays["weights"])
    want = definition(arrays, options)
    del arrays["weights"]
    assert_close(run(arrays, options), want)


def test_ignored_tokens_are_not_even_read(small_chunks) -> None:
    arrays, options = SMALL["mostly_ignored"].arguments()
    want = definition(arrays, options)
    arrays["hidden"] = np.where(arrays["labels"][:, None] == -100, np.nan, arrays["hidden"])
    assert_close(run(arrays, options), want)
    arrays["labels"] = np.full_like(arrays["labels"], -100)
    total, per_token, grads = run(arrays, options)
    assert total == 0 and not per_token.any() and not any(np.asarray(x).any() for x in grads.values())


def test_weights_and_per_token_losses_carry_no_gradient() -> None:
    arrays, options = SMALL["everything"].arguments()

    def both(arrays):
        total, per_token = linear_cross_entropy(labels=labels, **arrays, **options)
        return total, per_token.sum()

    labels = arrays.pop("labels")
    of_total, of_losses = jax.jit(jax.jacrev(both))(arrays)
    assert not of_total["weights"].any() and of_total["bias"].any()
    assert not any(x.any() for x in of_losses.values())


def test_only_the_gradients_that_are_asked_for_are_made(explicit_mesh) -> None:
    arrays, _ = SMALL["odd"].arguments()
    labels = arrays["labels"]

    def loss(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, labels)[0]

    def products(function):
        return str(jax.make_jaxpr(function)(arrays["hidden"], arrays["kernel"])).count("dot_general")

    gradients = [(), (0,), (1,), (0, 1)]
    assert [products(jax.grad(loss, wanted) if wanted else loss) for wanted in gradients] == [1, 2, 2, 3]
    with jax.set_mesh(explicit_mesh(2, 2, 2)):
        assert [products(jax.grad(loss, wanted) if wanted else loss) for wanted in gradients] == [1, 2, 2, 3]


@pytest.mark.parametrize("kernel_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["everything", "odd"])
def test_bf16_features_have_float32_logits(name, kernel_dtype, small_chunks) -> None:
    """The factors are rounded, nothing else of the value is; the gradients' factors are."""
    arrays, options = SMALL[name].arguments()
    rounded = {key: np.asarray(jnp.asarray(arrays[key], jnp.bfloat16)) for key in ("hidden", "kernel")}
    want = definition({**arrays, **rounded}, options)
    arrays = {**arrays, "hidden": rounded["hidden"], "kernel": jnp.asarray(arrays["kernel"], kernel_dtype)}
    total, per_token, grads = run(arrays, options)
    np.testing.assert_allclose(total, want[0], rtol=TOLERANCE)
    np.testing.assert_allclose(per_token, want[1], rtol=TOLERANCE, atol=TOLERANCE)
    assert grads["hidden"].dtype == jnp.bfloat16 and grads["kernel"].dtype == kernel_dtype
    for key, x in want[2].items():
        np.testing.assert_allclose(np.float32(grads[key]), x, rtol=0, atol=2**-7 * np.abs(x).max(), err_msg=f"d_{key}")


@pytest.mark.parametrize("kernel_dtype", [jnp.bfloat16, jnp.float32])
def test_products_of_bf16_are_summed_in_float32(kernel_dtype) -> None:
    arrays, _ = SMALL["odd"].arguments()

    def loss(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, arrays["labels"])[0]

    trained = jnp.asarray(arrays["hidden"], jnp.bfloat16), jnp.asarray(arrays["kernel"], kernel_dtype)
    found = products(jax.grad(loss, argnums=(0, 1)), *trained)
    assert len(found) == 3 and types(found) == IN_BF16_SUMMED_IN_FLOAT32


def test_bf16_kernel_gradients_are_summed_in_float32(monkeypatch) -> None:
    monkeypatch.setattr(xla, "chunk_size", lambda *_: 4)
    hidden, kernel = np.ones((2048, 1), jnp.bfloat16), np.zeros((1, 2), jnp.bfloat16)
    *_, grads = run({"hidden": hidden, "kernel": kernel, "labels": np.zeros(2048, int)}, {})
    assert grads["kernel"].dtype == jnp.bfloat16 and grads["hidden"].dtype == jnp.bfloat16
    # In steps of 2; in bf16 the sum would stop at 512.
    np.testing.assert_array_equal(np.float32(grads["kernel"]), [[-1024, 1024]])


# --------------------------------------------------------------------------------------------------------------- meshes


def placed(mesh, arrays, tokens, kernel, bias):
    specs = {"hidden": P(tokens, None), "kernel": kernel, "labels": P(tokens), "weights": P(tokens), "bias": bias}
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}, specs


ROWS = ("data", "fsdp")


@pytest.mark.parametrize(
    ("sizes", "tokens", "kernel", "bias", "implementation"),
    [
        ((2, 2, 2), ROWS, P(None, "tensor"), P("tensor"), None),
        ((2, 2, 2), ROWS, P(None, "tensor"), P("tensor"), "reference"),
        ((2, 2, 2), ROWS, P(None, None), P(None), None),
        ((2, 2, 2), ROWS, P("fsdp", "tensor"), P(None), None),  # the kernel at rest
        (
            (2, 2, 2),
            (*ROWS, "tensor"),
            P(None, "tensor"),
            P("tensor"),
            None,
        ),  # T takes the axis, the kernel is gathered
        ((2, 2, 2), None, P(None, ("fsdp", "tensor")), P(None), None),
        ((1, 1, 1), ROWS, P("fsdp", "tensor"), P("tensor"), None),
    ],
)
def test_eight_devices_equal_one(sizes, tokens, kernel, bias, implementation, monkeypatch, explicit_mesh) -> None:
    monkeypatch.setattr(xla, "chunk_size", lambda tokens, *_: min(tokens, 6))
    arrays, options = SMALL["everything"].arguments()
    arrays = {name: x[:48] if name in ("hidden", "labels", "weights") else x for name, x in arrays.items()}
    want = definition(arrays, options)
    mesh = explicit_mesh(*sizes)
    with jax.set_mesh(mesh):
        arrays, specs = placed(mesh, arrays, tokens, kernel, bias)
        got = run(arrays, {**options, "implementation": implementation})
        assert_close(got, want)
        assert jax.typeof(got[0]).sharding.spec == P() and jax.typeof(got[1]).sharding.spec == P(tokens)
        assert all(jax.typeof(x).sharding.spec == specs[name] for name, x in got[2].items())


def test_a_vocabulary_sharded_by_hand(small_chunks, explicit_mesh) -> None:
    arrays, options = SMALL["everything"].arguments()
    want = definition(arrays, options)
    specs = {"hidden": P(), "kernel": P(None, "tensor"), "bias": P("tensor")}

    def local(trained):
        def loss(trained):
            rest = {"labels": arrays["labels"], "weights": arrays["weights"]}
            return linear_cross_entropy(**trained, **rest, **options, axis_name="tensor")

        (total, per_token), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        return total, per_token, grads

    mesh = explicit_mesh(2, 1, 4)
    with jax.set_mesh(mesh):
        trained = {name: jax.device_put(arrays[name], NamedSharding(mesh, spec)) for name, spec in specs.items()}
        call = jax.shard_map(local, in_specs=(specs,), out_specs=(P(), P(), specs))
        assert_close(jax.jit(call)(trained), want)


# ---------------------------------------------------------------------------------------------------------------- sweep


@pytest.mark.slow
def test_any_shape_equals_the_definition(monkeypatch) -> None:
    """Drawn sizes, options and chunks; the same draws each time."""
    integers, booleans = hypothesis.strategies.integers, hypothesis.strategies.booleans()

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(hypothesis.strategies.data())
    def equal(data) -> None:
        sizes = [data.draw(integers(low, high)) for low, high in ((1, 90), (1, 30), (2, 70))]
        shape = CrossEntropyShape(
            *sizes,
            labelled=data.draw(integers(0, 4)) / 4,
            bias=data.draw(booleans),
            softcap=2.0 if data.draw(booleans) else None,
            z_loss=0.1 if data.draw(booleans) else 0.0,
            label_smoothing=0.2 if data.draw(booleans) else 0.0,
        )
        chunk = data.draw(integers(1, 90))
        monkeypatch.setattr(xla, "chunk_size", lambda tokens, *_: min(tokens, chunk))
        arrays, options = shape.arguments()
        want = definition(arrays, options)
        for implementation in ("reference", "xla"):
            assert_close(run(arrays, {**options, "implementation": implementation}), want)

    equal()


# ----------------------------------------------------------------------------------------------------- memory, mistakes


def test_no_array_of_all_logits() -> None:
    tokens, features, entries = 4096, 16, 8192
    hidden, kernel = jax.ShapeDtypeStruct((tokens, features), "f4"), jax.ShapeDtypeStruct((features, entries), "f4")
    labels = jax.ShapeDtypeStruct((tokens,), "i4")

    def temporary(implementation):
        def loss(hidden, kernel, labels):
            return linear_cross_entropy(hidden, kernel, labels, implementation=implementation)[0]

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = tokens * entries * 4
    assert temporary("xla") < logits / 2
    assert temporary("reference") >= logits  # so that the measure measures


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"implementation": "pallas"}, UsageError, "no Pallas kernel.*'xla'"),
        ({"implementation": "liger"}, UsageError, "is unknown"),
        ({"hidden": np.ones((3, 5, 4), np.float32)}, ValueError, r"expected hidden \[T, D\]"),
        ({"labels": np.ones(5, np.float32)}, ValueError, "must be integers"),
        ({"weights": np.ones(4, np.float32)}, ValueError, r"expected weights \[5\]"),
        ({"hidden": np.ones((0, 4), np.float32), "labels": np.ones(0, int)}, ValueError, "at least one token"),
        ({"kernel": np.ones((4, 0), np.float32)}, ValueError, "at least one token and one entry"),
        ({"hidden": np.ones((5, 4), int)}, ValueError, "floating-point hidden"),
        ({"kernel": np.ones((4, 6), int)}, ValueError, "floating-point kernel"),
        ({"softcap": 0}, ValueError, "softcap must be above 0"),
        ({"label_smoothing": 1}, ValueError, r"label_smoothing must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\)"),
        ({"axis_name": "tensor"}, UsageError, "for the inside of a jax.shard_map"),
    ],
)
def test_a_mistake_is_one_sentence(change, error, says) -> None:
    good = {"hidden": np.ones((5, 4), np.float32), "kernel": np.ones((4, 6), np.float32), "labels": np.ones(5, int)}
    with pytest.raises(error, match=says):
        linear_cross_entropy(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"check_vma": False}, "kernel does not vary over axis_name='x'.*check_vma on"),
        ({"kernel": P()}, "kernel does not vary"),
        ({"bias": P()}, "bias does not vary"),
        ({"hidden": P("x")}, "hidden varies over axis_name='x'"),
        ({"labels": P("x")}, "labels varies"),
        ({"weights": P("x")}, "weights varies"),
    ],
)
def test_an_axis_name_over_which_not_just_the_vocabulary_is_sharded_is_refused(change, says) -> None:
    good = {"hidden": P(), "kernel": P(None, "x"), "bias": P("x"), "labels": P(), "weights": P(), "check_vma": True}
    *specs, check = {**good, **change}.values()
    local = (4, 3), (3, 6), (6,), (4,), (4,)
    arrays = [
        np.ones([n * 2 if axis == "x" else n for n, axis in itertools.zip_longest(shape, spec)], np.float32)
        for shape, spec in zip(local, specs, strict=True)
    ]
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def loss(hidden, kernel, bias, labels, weights):
        return linear_cross_entropy(hidden, kernel, labels.astype(int), weights, bias=bias, axis_name="x")[0]

    with pytest.raises(UsageError, match=says):
        jax.shard_map(loss, mesh=mesh, in_specs=tuple(specs), out_specs=P(), check_vma=check)(*arrays)


# ----------------------------------------------------------------------------------- large rows, here and ahead of time

LARGE = {name: shape for name, shape in SHAPES.items() if not shape.small}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_rows_run_on_a_cpu(name) -> None:
    """All of a row, of which 64 tokens have a weight: those beside the definition, which has an array of all logits."""
    arrays, options = LARGE[name].arguments()
    chosen = np.flatnonzero(arrays["labels"] >= 0)[::7][:64]
    weights = np.zeros_like(arrays["weights"])
    weights[chosen] = arrays["weights"][chosen]
    total, per_token, grads = run({**arrays, "weights": weights}, options)
    few = {key: x if key == "kernel" else x[chosen] for key, x in arrays.items()}
    want = run(few, {**options, "implementation": "reference"})
    assert_close((total, per_token[chosen], {**grads, "hidden": grads["hidden"][chosen]}), want)
    assert not np.delete(grads["hidden"], chosen, 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_compiles_for_tpus_ahead_of_time(name, tpu_chips) -> None:
    """Value and gradients, beside the kernel's gradient in a memory of some chunks of logits."""
    shape = LARGE[name]
    mesh = Mesh(np.array(tpu_chips[:1]), ("data",), axis_types=(AxisType.Explicit,))
    sizes = {"hidden": (shape.tokens, shape.features), "kernel": (shape.features, shape.entries)}
    sizes |= {"labels": (shape.tokens,), "weights": (shape.tokens,)}
    types = {"labels": jnp.int32, "weights": jnp.float32}
    whole = NamedSharding(mesh, P())
    arrays = {
        key: jax.ShapeDtypeStruct(size, types.get(key, jnp.bfloat16), sharding=whole) for key, size in sizes.items()
    }
    _, options = dataclasses.replace(shape, tokens=1, entries=2).arguments()

    def step(arrays):
        def loss(trained):
            return linear_cross_entropy(**{**arrays, **trained}, **options)[0]

        return jax.value_and_grad(loss)({key: arrays[key] for key in ("hidden", "kernel")})

    with jax.set_mesh(mesh):
        memory = jax.jit(step).lower(arrays).compile().memory_analysis()
    made = 4 * shape.features * shape.entries  # the kernel's gradient in float32, of which a tpu7x gets two
    gradients = 2 * made if tpu_chips[0].device_kind.startswith("TPU7") else made
    assert memory.temp_size_in_bytes < gradients + 2 * 4 * 1024 * shape.entries
