"""The train step of a LLaVA: mesh, accumulation and rematerialisation change where and when it computes, not what."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vlm_jax.models.presets import lora
from vlm_jax.sharding import RULES, make_mesh, place

LORA = lora(4, 8.0, dropout=0.3, targets=r"vision/layers/mlp/up|connector/first|decoder/layers/attention/.*")


def close(ours, wanted, tolerance: float) -> None:
    """`tolerance` of the largest weight of each array."""
    assert set(ours) == set(wanted)
    for path, value in wanted.items():
        error = np.abs(ours[path] - value).max()
        assert error <= tolerance * max(1.0, np.abs(value).max()), f"{path}: {error}"


def one_step(tiny, family, batch, **options) -> tuple[float, float, dict[str, np.ndarray]]:
    """Loss, norm of the gradient and the new weights (old weights minus gradient) on the mesh in use."""
    mesh = jax.sharding.get_mesh()
    state, step = tiny.train_step(family, **options)
    before = tiny.on_host(state.trained)
    arrays = {name: place(a, mesh, P(None, RULES.batch)) for name, a in batch.items()}
    state, metrics = step(state, arrays)
    after = tiny.on_host(state.trained)
    still = {path for path in after if np.abs(after[path] - before[path]).max() < 1e-6}
    assert still <= {"vision/layers/attention/key/bias"}  # adds the same to all scores of a query
    return float(metrics["loss"]), float(metrics["grad_norm"]), after


MESHES = {
    "data": {"data": 8, "fsdp": 1},
    "fsdp": {"fsdp": 8},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


def step_on(tiny, devices: int, **sizes: int) -> tuple[float, float, dict[str, np.ndarray]]:
    with jax.set_mesh(make_mesh(devices=jax.devices()[:devices], **sizes)):
        family = tiny.family(
            "vit",
            "mlp2x_gelu",
            "qwen2",
            vision_changes={"class_token": True},
            decoder_changes={"num_kv_heads": 1},
            newline=True,
            lora=LORA,
        )
        return one_step(tiny, family, tiny.batch(rows=8))


@pytest.fixture(scope="module")
def on_one_device() -> dict:
    return {}


@pytest.mark.parametrize("mesh", MESHES)
def test_the_mesh_changes_neither_loss_nor_weights_nor_dropout(tiny, on_one_device, mesh: str) -> None:
    if not on_one_device:
        on_one_device["result"] = step_on(tiny, 1)
    loss, norm, params = on_one_device["result"]
    sharded_loss, sharded_norm, sharded = step_on(tiny, 8, **MESHES[mesh])
    assert sharded_loss == pytest.approx(loss, rel=1e-5)
    assert sharded_norm == pytest.approx(norm, rel=1e-5)
    close(sharded, params, 1e-5)


def test_dropout_is_on_while_training_and_off_while_evaluating(tiny) -> None:
    with_dropout = tiny.family("vit", lora=LORA)
    without = tiny.family("vit", lora={**LORA, "dropout": 0.0})
    params = tiny.params(with_dropout.bound.abstract)
    batch = {name: a[0] for name, a in tiny.batch(rows=3).items()}
    weights = np.ones_like(batch["labels"], np.float32)

    @jax.jit
    def losses(params, key):
        return [f.loss(params, {}, batch, weights, k)[0] for f in (with_dropout, without) for k in (key, None)]

    dropped, evaluated, *plain = losses(params, jax.random.key(0))
    assert abs(dropped - evaluated) > 1e-3
    assert evaluated == plain[0] == plain[1]
    assert losses(params, jax.random.key(1))[0] != dropped == losses(params, jax.random.key(0))[0]


def test_accumulation_equals_the_big_batch(tiny) -> None:
    batch = tiny.batch(rows=8)
    parts = {name: a.reshape(4, 2, *a.shape[2:]) for name, a in batch.items()}
    family = tiny.family("siglip_vit", "linear", "mistral")
    loss, _, params = one_step(tiny, family, batch)
    accumulated_loss, _, accumulated = one_step(tiny, family, parts)
    assert accumulated_loss == pytest.approx(loss, rel=1e-6)
    close(accumulated, params, 1e-6)


def test_a_step_without_a_trained_token_changes_nothing(tiny) -> None:
    family = tiny.family("siglip_vit", "linear")
    state, step = tiny.train_step(family, optimizer=optax.adam(0.1))
    before = tiny.on_host(state.trained)
    batch = tiny.batch(rows=2)
    batch["labels"] = np.full_like(batch["labels"], -100)
    state, metrics = step(state, batch)
    assert metrics["loss"] == metrics["grad_norm"] == 0
    for path, value in before.items():
        np.testing.assert_array_equal(state.trained[path], value)


def test_remat_changes_memory_but_neither_loss_nor_gradients(tiny) -> None:
    """`offload` moves each layer's input to the host, which XLA cannot do on a CPU: there it must lower for a TPU."""
    deep = {"num_layers": 6}
    batch = {name: a[0] for name, a in tiny.batch(rows=3, length=64).items()}
    weights = np.ones_like(batch["labels"], np.float32)

    def gradient(remat: str):
        family = tiny.family("siglip_vit", decoder_changes=deep, remat=remat)
        params = tiny.params(family.bound.abstract)
        return jax.jit(jax.value_and_grad(lambda params: family.loss(params, {}, batch, weights, None)[0])), params

    def run(remat: str):
        function, params = gradient(remat)
        compiled = function.lower(params).compile()
        loss, grads = compiled(params)
        return float(loss), tiny.on_host(grads), compiled.memory_analysis().temp_size_in_bytes

    loss, grads, memory = run("none")
    for remat, share in (("full", 0.6), ("dots", 0.9)):
        other_loss, other, less = run(remat)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        close(other, grads, 1e-6)
        assert less < share * memory, f"{remat}: {less / memory:.2f} of the memory"
    function, params = gradient("offload")
    text = function.trace(params).lower(lowering_platforms=("tpu",)).as_text()
    assert "pinned_host" in text or "move_to_host" in text.lower()


@pytest.fixture(scope="module")
def curves() -> dict[int, list[float]]:
    return {}


@pytest.mark.parametrize("devices", [1, 8])
def test_one_compilation_per_bucket(tiny, devices: int, curves: dict[int, list[float]]) -> None:
    """Batches with one image, several and none of two buckets; and the losses are the same on 1 and on 8 devices."""
    traces = []
    buckets = [{"length": 16, "tiles": 2}, {"length": 24, "tiles": 1}]
    with jax.set_mesh(make_mesh(devices=jax.devices()[:devices])):
        mesh = jax.sharding.get_mesh()
        family = tiny.family("siglip_vit", "linear")
        state, step = tiny.train_step(family, optimizer=optax.sgd(0.1), on_trace=lambda: traces.append(1))
        losses = []
        for number in range(6):
            batch = tiny.batch(seed=number, rows=8, **buckets[number % 2])
            if number >= 4:  # text alone
                batch["visual_index"], batch["visual_inverse"] = (
                    np.full_like(batch[name], -1) for name in ("visual_index", "visual_inverse")
                )
            arrays = {name: place(a, mesh, P(None, RULES.batch)) for name, a in batch.items()}
            state, metrics = step(state, arrays)
            losses.append(float(metrics["loss"]))
    assert len(traces) == len(buckets)
    curves[devices] = losses
    for other in curves.values():
        np.testing.assert_allclose(losses, other, rtol=1e-5)
