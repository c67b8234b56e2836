"""The contrastive kernels for Hopper GPUs without one: interpreted against float64, and lowered for an abstract H200.

jax's interpreter of Mosaic GPU runs the three warpgroups as threads, with their barriers and copies. It fails where a
barrier is waited for too seldom, and says where memory is touched while it moves (that of jax 0.12 knows copies and
products as asynchronous). Of layouts and the size of shared memory lowering knows; of registers neither.
"""

from __future__ import annotations

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.contrastive.test_contrastive import KINDS, LOSSES, TOLERANCE, definition, made
from tests.kernels.devices import A100, B200, H200, absent_mesh
from vlm_jax.errors import UsageError
from vlm_jax.kernels import custom_calls, tiles
from vlm_jax.kernels.contrastive import api, gpu, loss, xla
from vlm_jax.kernels.contrastive.shapes import SHAPES, SMALL, ContrastiveShape

NAMES = ("softmax_sums", "softmax_gradients", "sigmoid_gradients", "sigmoid_sums")
# Gradients are of bfloat16, and so are the slopes that they are the products of: each rounds by 2⁻⁹.
ROUNDED = 2**-7


@pytest.fixture
def interpreted(monkeypatch, gpu_interpreter) -> SimpleNamespace:
    """The four operations on the interpreter, with small tiles, on one block."""
    for name, value in (("SMS", 1), ("ROWS", 64), ("COLUMNS", 128)):
        monkeypatch.setattr(gpu, name, value)
    operations = {name: functools.partial(getattr(gpu, name), interpret=gpu_interpreter) for name in NAMES}
    monkeypatch.setattr(loss, "gpu", found := SimpleNamespace(**operations))
    return found


def value_and_gradients(kind, arrays):
    """Of the loss on one device, of bfloat16 features; and the definition of the rounded features."""
    plan = loss.Plan(blocks="pallas_gpu", device="gpu", axis_name=None, ring=False)
    features = {name: jnp.asarray(arrays[name], jnp.bfloat16) for name in ("image", "text")}
    numbers = {name: jnp.float32(x) for name, x in arrays.items() if name not in features}
    call = functools.partial(getattr(loss, f"{kind}_loss"), plan)
    got = jax.jit(jax.value_and_grad(lambda given: call(*(given[name] for name in arrays))))(features | numbers)
    return got, definition(kind, arrays | {name: np.asarray(x, np.float64) for name, x in features.items()})


def assert_close(got, want, arrays):
    largest = 1 + abs(float(arrays["scale"])) + abs(float(arrays.get("bias", 0)))
    assert abs(got[0] - want[0]) <= TOLERANCE * (largest + 5 * abs(want[0]))
    for name, x in want[1].items():
        # A slope is at most 1/N of the value's scale; what is left of a sum that cancels keeps its terms' errors.
        least = abs(float(arrays["scale"])) / len(arrays["image"]) / 8 if np.ndim(x) else largest / 8
        np.testing.assert_allclose(
            np.asarray(got[1][name], np.float64), x, rtol=ROUNDED, atol=ROUNDED * max(np.abs(x).max(), least)
        )


@KINDS
def test_the_gpu_kernels_equal_the_definition(kind, interpreted) -> None:
    """Six tiles with ragged ends, one after another on one block, in two parts of the features."""
    arrays = made(kind, ContrastiveShape(150, 70, scale=20.0, bias=-5.0))
    assert_close(*value_and_gradients(kind, arrays), arrays)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("name", SMALL)
def test_the_gpu_kernels_equal_the_definition_at_every_small_shape(kind, name, interpreted) -> None:
    arrays = made(kind, SMALL[name])
    assert_close(*value_and_gradients(kind, arrays), arrays)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "texts", "blocks", "panel"), [(200, 300, 1, (128, 256)), (300, 550, 3, (512, 768))])
def test_panels_and_blocks_equal_the_whole(images, texts, blocks, panel, interpreted, monkeypatch) -> None:
    """More texts than images, partners off the diagonal, tiles as on a GPU: in four panels; on three blocks."""
    for name, value in (("SMS", blocks), ("ROWS", 128), ("COLUMNS", 256)):
        monkeypatch.setattr(gpu, name, value)
    panels = dict(zip(("contrastive.gpu.panel_rows", "contrastive.gpu.panel_columns"), panel, strict=True))
    image = ContrastiveShape(images, 200).arguments()["image"]
    text = ContrastiveShape(texts, 200).arguments(1)["text"]
    few = [jnp.asarray(x, jnp.bfloat16) for x in (image, text)]
    scale, bias, whole = jnp.float32(9), jnp.float32(-2), xla.Tiles(images, texts)
    rest = {
        "softmax_sums": (scale, 137),
        "softmax_gradients": (scale, 137, jnp.linspace(3, 6, images), jnp.linspace(3, 6, texts)),
        "sigmoid_gradients": (scale, bias, 137),
        "sigmoid_sums": (scale, bias, 137),
    }
    for name in NAMES:
        with tiles.trying(panels):
            got = getattr(interpreted, name)(*few, *rest[name])
        want = getattr(xla, name)(*(x.astype(jnp.float32) for x in few), *rest[name], tiles=whole)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert (g.shape, g.dtype) == (w.shape, w.dtype)
            # Sums are float32; the slopes of the gradients are rounded to bfloat16.
            close = 1e-5 if g.ndim == 1 else ROUNDED
            np.testing.assert_allclose(g, w, rtol=close, atol=close * np.abs(w).max())


def test_log1p_is_exact_where_the_sigmoids_are_small() -> None:
    logits = jnp.asarray([-1e30, -80.0, -16.5, -5.0, -0.3, 0.0, 0.3, 5.0, 80.0])
    value, slope = gpu.softplus_and_sigmoid(logits)
    exact = np.asarray(logits, np.float64)
    np.testing.assert_allclose(value, np.logaddexp(0, exact), rtol=5e-7)
    np.testing.assert_allclose(slope, np.exp(-np.logaddexp(0, -exact)), rtol=5e-7)


# ------------------------------------------------------------------------------------------------- an abstract GPU


def arguments(kind, shape: ContrastiveShape, mesh, dtype=jnp.bfloat16):
    features = jax.ShapeDtypeStruct((shape.pairs, shape.width), dtype, sharding=NamedSharding(mesh, P("data", None)))
    number = jax.ShapeDtypeStruct((), jnp.float32)
    return (features, features, number, number)[: 3 if kind == "softmax" else 4]


def gradient(kind):
    return jax.jit(jax.value_and_grad(LOSSES[kind], argnums=(0, 1, 2) if kind == "softmax" else (0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("softmax", SHAPES["clip_l14"]),
        ("sigmoid", SHAPES["siglip_so400m"]),
        *(
            pytest.param(kind, shape, marks=pytest.mark.slow)
            for kind in LOSSES
            for shape in (*SHAPES.values(), ContrastiveShape(262144, 768))
            if not shape.small
        ),
    ],
)
def test_exports_for_an_h200_without_an_array_of_all_pairs(kind, shape) -> None:
    with jax.sharding.use_abstract_mesh(mesh := absent_mesh(H200)):
        allowed = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
        exported = export.export(gradient(kind), platforms=["cuda"], disabled_checks=allowed)
        program = exported(*arguments(kind, shape, mesh)).mlir_module()
    assert program.count("custom_call @mosaic_gpu_v2") == {"softmax": 2, "sigmoid": 1}[kind]
    sizes = {tuple(map(int, found.split("x")[:-1])) for found in re.findall(r"tensor<((?:\d+x)+)", program)}
    largest = max(math.prod(size) for size in sizes)
    assert largest == max(shape.pairs * shape.width, 4096 * min(8192, shape.pairs))  # the features, or a panel


@pytest.mark.parametrize("ring", [False, pytest.param(True, marks=pytest.mark.slow)])
@KINDS
def test_lowers_for_four_h200(kind, ring, monkeypatch) -> None:
    monkeypatch.setattr(api, "GATHER_BYTES", 0 if ring else 2**28)
    with jax.sharding.use_abstract_mesh(mesh := absent_mesh(H200, 4)):
        lowered = gradient(kind).trace(*arguments(kind, SHAPES["clip_l14"], mesh)).lower(lowering_platforms=("cuda",))
    found = custom_calls(lowered)
    names = {"softmax": ("softmax_sums", "softmax_slopes"), "sigmoid": ("sigmoid_slopes",)}[kind]
    assert {name for name in found if name.startswith("contrastive")} == {f"contrastive_{name}" for name in names}


@KINDS
def test_a_kernel_is_taken_on_a_hopper_gpu_alone(kind) -> None:
    def taken(name, dtype, implementation=None):
        call = functools.partial(LOSSES[kind], implementation=implementation)
        with jax.sharding.use_abstract_mesh(mesh := absent_mesh(name)):
            return "contrastive_" in str(jax.make_jaxpr(call)(*arguments(kind, SHAPES["clip_b32"], mesh, dtype)))

    assert taken(H200, jnp.bfloat16) and taken("NVIDIA H100 80GB HBM3", jnp.bfloat16, "pallas")
    assert not taken(H200, jnp.bfloat16, "xla")
    for name, dtype, reason in (
        (A100, jnp.bfloat16, "Hopper GPUs .* not NVIDIA A100"),
        (B200, jnp.bfloat16, "Hopper GPUs"),
        (H200, jnp.float16, "bfloat16 features, not float16"),
        (H200, jnp.float32, "bfloat16 features, not float32"),
    ):
        assert not taken(name, dtype)
        with pytest.raises(UsageError, match=reason):
            taken(name, dtype, "pallas")
