"""Layers alone: how they begin, and what their own gradients and precisions are."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.layers.linear import Linear, matmul
from vlm_jax.layers.norms import LayerNorm, RMSNorm
from vlm_jax.layers.rope import RopeScaling, frequencies
from vlm_jax.layers.scope import LoRA, Scope
from vlm_jax.models.binding import Bound
from vlm_jax.sharding import make_mesh


def made(*sizes: int, seed: int = 0, build: Callable[[Scope], nnx.Module], lora: LoRA | None = None) -> dict:
    """The parameters of a module on a mesh of data x fsdp x tensor, by path."""
    devices = jax.devices()[: int(np.prod(sizes))]
    with jax.set_mesh(make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2], devices=devices)):
        params = Bound(build, lora=lora).init(seed)
        return {path: np.asarray(value) for path, value in params.items()}


class Pair(nnx.Module):
    def __init__(self, scope: Scope, names: tuple[str, ...]):
        for name in names:
            setattr(self, name, Linear(scope.stacked(2) / name, 8, 4, axes=("embed", "mlp")))


def test_initial_values_depend_on_seed_and_path_alone() -> None:
    """Up to the last bit, which the compiler rounds in the company of the other parameters."""
    one = made(1, 1, 1, build=lambda scope: Pair(scope, ("b",)))["b/kernel"]
    assert one.shape == (2, 8, 4) and np.abs(one[0] - one[1]).max() > 0.1, "layers begin alike"
    both = made(2, 2, 2, build=lambda scope: Pair(scope, ("a", "b")), lora=LoRA(2, 2.0, targets="a"))
    np.testing.assert_allclose(both["b/kernel"], one, rtol=1e-6)
    assert np.abs(both["a/kernel"] - one).max() > 0.1 and set(both) >= {"a/lora_a", "a/lora_b"}
    other = made(1, 1, 1, seed=1, build=lambda scope: Pair(scope, ("b",)))["b/kernel"]
    assert np.abs(other - one).max() > 0.1


@pytest.mark.parametrize("columns", [True, False])
def test_products_and_their_gradients_on_a_mesh(columns: bool) -> None:
    """Column-parallel and row-parallel, over a batch that is split too."""
    rng = np.random.default_rng(0)
    x, kernel, out = (rng.standard_normal(shape, np.float32) for shape in ((4, 3, 8), (8, 6), (4, 3, 6)))
    wanted = x @ kernel, out @ kernel.T, np.einsum("abi,abj->ij", x, out)
    with jax.set_mesh(make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])):
        batch, split = ("data", "fsdp"), "tensor"
        sharded_x = jax.device_put(x, P(batch, None, None if columns else split))
        sharded_kernel = jax.device_put(kernel, P(None, split) if columns else P(split, None))
        value, back = jax.vjp(matmul, sharded_x, sharded_kernel)
        gradients = back(jax.device_put(out, value.sharding))
        assert jax.typeof(value).sharding.spec == P(batch, None, split if columns else None)
        for ours, theirs in zip((value, *gradients), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_compute_in_float32(norm: type) -> None:
    """In bfloat16 the squares of values around 300 leave nothing of an offset."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        module = norm(Scope(jax.random.key(0)), 64, eps=1e-6)
        x = 300 + jax.random.normal(jax.random.key(1), (2, 64))
        x = x.astype(jnp.bfloat16)
        ours = module(x)
    wide = np.asarray(x, np.float64)
    wide = wide - (wide.mean(-1, keepdims=True) if norm is LayerNorm else 0)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float32), wanted, rtol=2**-7)  # the rounding of the result


def test_rope_scalings_leave_fast_frequencies_and_slow_down_slow_ones() -> None:
    plain, _ = frequencies(64, 5e5, None)
    np.testing.assert_allclose(plain[[0, 16]], [1.0, 5e5**-0.5])
    linear, factor = frequencies(64, 5e5, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(linear, plain / 4)
    assert factor == 1
    for kind in ("llama3", "yarn"):
        scaled, factor = frequencies(64, 5e5, RopeScaling(kind, 8.0, original_length=8192))
        share = plain / scaled
        assert share[0] == 1 and share[-1] == pytest.approx(8) and (np.diff(share) >= -1e-12).all()
        assert ((share > 1) & (share < 8)).sum() >= 3, "some lie between"
        assert factor == pytest.approx(0.1 * np.log(8) + 1 if kind == "yarn" else 1)


def test_no_device_makes_more_than_its_part_of_the_weights() -> None:
    with jax.set_mesh(make_mesh()):
        bound = Bound(lambda scope: Linear(scope.stacked(4), 256, 512, axes=("embed", "mlp")))
        memory = jax.jit(bound.init).lower(0).compile().memory_analysis()
    whole = 4 * 256 * 512 * 4
    assert memory.output_size_in_bytes < 1.1 * whole / 8
    assert memory.temp_size_in_bytes < whole
