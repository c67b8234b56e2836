"""A state comes back bit for bit, on any mesh, and a damaged checkpoint is named in one sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UsageError
from vlm_jax.sharding import make_mesh
from vlm_jax.training.checkpoint import Checkpoints
from vlm_jax.training.optimizer import make_optimizer
from vlm_jax.training.state import TrainState, init_state

SHAPES = {"a/kernel": (8, 4), "a/bias": (4,), "tower/kernel": (4, 8)}
SPECS = {"a/kernel": P("fsdp", "tensor"), "a/bias": P("tensor"), "tower/kernel": P(None, "fsdp")}
RATES = {"a/kernel": 1.0, "a/bias": 0.1, "tower/kernel": None}


def state(steps: int = 0) -> TrainState:
    """A state on the mesh in use after some steps of AdamW; the tower is frozen in bfloat16."""
    rng = np.random.default_rng(0)
    params = {
        path: jax.device_put(rng.standard_normal(shape, np.float32), SPECS[path]) for path, shape in SHAPES.items()
    }
    optimizer = make_optimizer(
        optax.constant_schedule(0.1),
        RATES,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
        first_moment="bfloat16",
    )
    made = init_state(params, RATES, optimizer, frozen_dtype=jnp.dtype("bfloat16"), ema=True)
    for _ in range(steps):
        gradients = jax.tree.map(lambda a: jnp.sin(7 * a), made.trained)
        updates, opt_state = optimizer.update(gradients, made.opt_state, made.trained)
        trained = optax.apply_updates(made.trained, updates)
        made = dataclasses.replace(made, step=made.step + 1, trained=trained, opt_state=opt_state)
    return made


def placed(made: TrainState) -> TrainState:
    """The same values on the mesh in use."""

    def one(path: Any, a: jax.Array) -> jax.Array:
        return jax.device_put(np.asarray(a), SPECS.get(getattr(path[-1], "key", None), P()))

    return jax.tree_util.tree_map_with_path(one, made)


def abstract(made: TrainState) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), made)


def check_equal(ours: TrainState, theirs: TrainState) -> None:
    """Bit for bit, type for type, and sharded alike on the mesh of `theirs`."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)

    def one(path: Any, a: jax.Array, b: jax.Array) -> None:
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), path

    jax.tree_util.tree_map_with_path(one, ours, theirs)


def test_a_state_comes_back_bit_for_bit_on_any_mesh(tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        made = state(steps=3)
    with jax.set_mesh(make_mesh(data=2, fsdp=2, tensor=2)):
        made = placed(made)
        checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
        assert checkpoints.latest() is None
        checkpoints.save_start(made)
        checkpoints.save(made, {"stage": "align", "steps": 10})
        checkpoints.wait()
        checkpoints.close()
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8, "fsdp": 1}):
        with jax.set_mesh(make_mesh(**sizes)):
            like = placed(made)
            checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
            assert checkpoints.latest() == 3
            assert checkpoints.meta(3) == {"stage": "align", "steps": 10}
            check_equal(checkpoints.restore(3, abstract(like)), like)
            checkpoints.close()


@pytest.fixture
def saved(tmp_path: Path):
    """Three steps saved on one device, of which the last two are kept; the folder and the state."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        checkpoints = Checkpoints(str(tmp_path), keep=2)
        checkpoints.save_start(state())
        for steps in (1, 2, 3):
            checkpoints.save(state(steps), {"stage": "only"})
        checkpoints.wait()
        checkpoints.close()
        yield tmp_path, state(3)


def test_saving_copies_what_the_next_step_reuses(tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        made, wanted = state(1), state(1)
        checkpoints = Checkpoints(str(tmp_path))
        checkpoints.save_start(made)
        checkpoints.save(made, {})
        jax.jit(lambda s: jax.tree.map(lambda a: a * 0, s), donate_argnums=0)(made)
        checkpoints.wait()
        check_equal(checkpoints.restore(1, abstract(wanted)), wanted)
        checkpoints.close()


def test_what_is_frozen_is_written_once_and_steps_are_few(saved: tuple[Path, TrainState]) -> None:
    folder, _ = saved
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"frozen", "start", "2", "3"}
    for step in ("2", "3"):
        assert not [path for path in (folder / step).rglob("*") if "tower" in path.name]
    assert "tower" in (folder / "frozen" / "_METADATA").read_text()
    assert "tower" not in (folder / "3" / "state" / "_METADATA").read_text()


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("3/state", "truncated"),
        ("3/state", "missing"),
        ("3/state/_METADATA", "truncated"),
        ("3/meta/metadata", "truncated"),
        ("frozen", "truncated"),
        ("frozen", "missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_sentence(saved: tuple[Path, TrainState], part: str, damage: str) -> None:
    folder, like = saved
    if (folder / part).is_file():
        data = [folder / part]
    else:
        data = [p for p in (folder / part).rglob("*") if p.is_file() and "/d/" in str(p)]
    assert data
    for file in data:
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    checkpoints = Checkpoints(str(folder))
    where = folder / part.split("/")[0]
    with pytest.raises(UsageError, match=f"cannot read the checkpoint {where}.*(delete|--workdir)") as error:
        checkpoints.meta(3)
        checkpoints.restore(3, abstract(like))
    assert "\n" not in str(error.value)
    checkpoints.close()


def test_another_model_is_named_in_one_sentence(saved: tuple[Path, TrainState]) -> None:
    folder, like = saved
    other = dataclasses.replace(like, trained={"b/kernel": like.trained["a/kernel"]})
    checkpoints = Checkpoints(str(folder))
    with pytest.raises(UsageError, match=f"cannot read the checkpoint {folder / '3'}"):
        checkpoints.restore(3, abstract(other))
    checkpoints.close()
